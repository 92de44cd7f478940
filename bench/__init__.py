"""Benchmarks: each prints ratios against a limit that it measured in the same run."""
