"""Has Triton's interpreter, where there is no GPU, round as GPUs do."""

from tests.engine.kernels import interpreter  # noqa: F401
