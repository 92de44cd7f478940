"""Moves KV blocks between pools: a `Ticket` in, verified blocks out.

A decode worker's `Receiver` reserves blocks and answers a ticket; a prefill worker's `Sender` opens a `Push` for it,
sends pages while they are computed, and commits. Control (Open, Commit, Abort) goes from sender to receiver by gRPC, or
in line with the pages where a transport has a faster way. The receiver alone writes into its pool.
"""
