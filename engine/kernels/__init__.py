"""Triton kernels: attention over KV blocks in place, what moves blocks, and what else a decoder layer and a sampler do.

Each module holds kernels and the functions that launch them on torch tensors; `tiles` has the sizes they run with on
each GPU. Called on the engine's thread. Without a GPU the same functions run in Triton's interpreter on tensors in host
memory, if TRITON_INTERPRET=1 is set before Triton is imported.

Legend: T tokens of the step, S sequences, Hq query heads, Hkv key/value heads, D head dimension, B block size, V
vocabulary. In kernels, names in capitals are compile-time constants, and pointers are named for what they point to.
"""
