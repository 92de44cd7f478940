"""The paged KV cache: layout, block pool, prefix index, and the cache that joins them to a tensor."""
