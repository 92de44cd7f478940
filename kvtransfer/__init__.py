"""Moves KV blocks between pools: a `Ticket` in, verified blocks out.

A decode worker's `Receiver` reserves blocks and answers a ticket; a prefill worker's `Sender` opens a `Push` for it,
sends pages while they are computed, and commits. Open and Commit go in line with the pages, Abort beside them. The
receiver alone writes into its pool.
"""
