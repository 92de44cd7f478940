"""Before any module of these tests imports kernels: a process either interprets all of them or none."""

from tests.engine.kernels import interpreter  # noqa: F401
