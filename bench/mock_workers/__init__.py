"""Workers without models: they speak the real protocol over real sockets and say what a script says.

They run on the caller's event loop, for tests of the router; `python -m bench.mock_workers` runs a cluster of them in
a process of its own, for benchmarks of it. Gates (`asyncio.Event`s, open at first) hold a worker at a point; lists
record what it was asked; `until` waits for a condition on them.

worker            what both roles share: a server, the Watch stream, leases; what tokens they say
prefill, decode   the two roles
cluster           several of both, and the membership that names them
"""
