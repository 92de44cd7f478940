"""What the router adds, measured alone: the real process, in front of mock workers that answer at once.

command        `baton bench router`
measurements   what is measured, and how
results        what was found, as JSON, tables and a plot
processes      the router, the mock workers and the bare server, each a process whose CPU time is its own
bare_server    what streaming over grpc.aio costs with nothing behind it
clients        light ones, which count what arrives and read none of it
"""
