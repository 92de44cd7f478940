"""A tensor-parallel worker's ranks as processes of one host.

Rank 0 is the worker that everybody knows. It leads: it schedules, samples and speaks to the others of the cluster. The
ranks after it are its children, which hold a shard of the model and a pool of their KV heads, and do what they are told
in order. They live and die together: when one is gone so is the worker, which the supervisor replaces.
"""
