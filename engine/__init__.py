"""The engine: model, paged KV cache, attention and sampling on torch.

It imports neither grpc nor ray, so the same engine runs in a test, a Ray actor or a bare process.
"""
