"""One process compiles what is in no cache yet; when it is done nobody waits any more."""

from __future__ import annotations

import pathlib
import threading

import numba
import pytest

from engine.cpu_kernels.compiling import compiling_once


def test_others_wait_for_the_first(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kernels"))
    order: list[str] = []

    def second() -> None:
        with compiling_once():
            order.append("second")

    thread = threading.Thread(target=second)
    with compiling_once():
        thread.start()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    with compiling_once(), compiling_once():
        pass


def test_a_load_that_fails_leaves_the_next_one_to_compile(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kernels"))
    with pytest.raises(ValueError, match="unfit"), compiling_once():
        raise ValueError("unfit")
    assert not (tmp_path / "kernels" / "compiled").exists()
    with compiling_once():
        pass
    assert (tmp_path / "kernels" / "compiled").exists()
