"""The router: the one process that clients speak to; `python -m router CONFIG.json` runs it.

server            composes all below; readiness, draining
app, http         the gRPC service; health, readiness and metrics over HTTP
pipeline          a request's life, in numbered steps; job is one request
observation       the moments of that life, for accounting (metrics and log lines) and other observers
intake            checks (validation), tokenises (tokenization, model_card) and hashes what comes in
admission         the queue of requests that wait for workers
placement         which workers serve a request: pure functions over snapshot and ledger
membership        follows the supervisor; worker_link, watch, attach, leases, backoff: the streams to one worker
request_state     one attempt at a request, as its workers report it
emission          from its tokens to what the client is sent; detokenization: text and stop strings
recovery          what to do on which failure
"""
