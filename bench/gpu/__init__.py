"""Measures the Triton kernels on a GPU, against what it can do and against other libraries, all in one process.

`python -m bench.gpu` measures attention; with `--tune` it measures tiles and prints rows for `engine.kernels.tiles`.
"""
