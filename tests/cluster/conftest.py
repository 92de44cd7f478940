"""Checkpoints and pairs of workers that are driven step by step."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.composed import MakePair, Pair
from tests.engine.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint("gemma3", tmp_path_factory.mktemp("models") / "gemma3")


@pytest.fixture
def make_pair(llama: pathlib.Path) -> Iterator[MakePair]:
    """Makes pairs; at the end each must be empty."""
    pairs: list[Pair] = []
    with contextlib.ExitStack() as stack:

        def make(model: pathlib.Path = llama, **kwargs: Any) -> Pair:
            pairs.append(stack.enter_context(contextlib.closing(Pair(model, **kwargs))))
            return pairs[-1]

        yield make
        for pair in pairs:
            pair.run()
            pair.assert_empty()
