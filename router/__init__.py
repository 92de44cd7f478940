"""The router: the one process that clients speak to; `python -m router CONFIG.json` runs it.

server            composes all below; readiness, draining
app, http         the gRPC service; health, readiness and metrics over HTTP
api_keys, tls     who may call, and how both ports are encrypted
pipeline          a request's life, in numbered steps; job is one request
targets           lists what Prometheus scrapes; http_metrics, grpc_metrics count the calls of both APIs
observation       the moments of that life, for accounting (metrics and log lines) and other observers
timeline, page    what the live page at / shows: the last requests, rates, workers
intake            checks (validation), tokenises (tokenization, model_card) and hashes what comes in
admission         the queue of requests that wait for workers
placement         which workers serve a request: pure functions over snapshot and ledger
membership        follows the supervisor; worker_link, watch, attach, leases, backoff: the streams to one worker
request_state     one attempt at a request, as its workers report it
emission          from its tokens to what the client is sent; detokenization: text and stop strings
recovery          what to do on which failure
"""
