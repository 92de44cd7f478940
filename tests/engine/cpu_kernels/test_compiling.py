"""One process compiles what is in no cache yet; when it is done nobody waits any more."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import threading

import numba
import pytest

from engine.cpu_kernels.compiling import compiling_once, exact_kernel


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


def test_another_checkout_finds_what_one_has_compiled(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kernels"))
    sources = {
        "one": "def add(a, b): return a + b\n",
        "two": "def add(a, b): return a + b\n",
        "three": "def add(a, b): return b + a\n",
    }
    hits = {}
    for name, source in sources.items():
        file = tmp_path / name / "sums.py"
        file.parent.mkdir()
        file.write_text(source)
        spec = importlib.util.spec_from_file_location("sums", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "sums", module)
        spec.loader.exec_module(module)
        add = exact_kernel(module.add)
        assert add(1, 2) == 3
        hits[name] = sum(add.stats.cache_hits.values())
    assert hits == {"one": 0, "two": 1, "three": 0}
