"""Compiles every kernel for every kind of GPU, without one, and keeps what each needs of a GPU in `resources.tsv`."""
