"""Before any module of these tests imports kernels, so that they are interpreted where there is no GPU."""

from tests.engine.kernels import interpreter  # noqa: F401
