"""Benchmarks: `baton bench`, a module for each command."""
