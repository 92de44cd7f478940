"""Measures Baton on a GPU in one call: attention, steps, transfers and a server, each beside its limit or its peers.

`python -m bench.gpu` measures everything; with `--tune` it measures tiles and prints rows for `engine.kernels.tiles`.
What is measured and how much of it is a `Scale`: one for a GPU, and a tiny one for CPUs, which shows that all of it
runs.
"""
