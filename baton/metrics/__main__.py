"""`python -m baton.metrics`: prints docs/metrics.md."""

from baton.metrics.reference import render

print(render(), end="")
