"""Neighbours see each other's flags, outlive each other, and leave nothing behind."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from engine import cores
from engine.cores import CoreBoard, Cores

_RAISE_AND_WAIT = """
import pathlib, sys
from engine.cores import CoreBoard
CoreBoard(pathlib.Path(sys.argv[1])).raise_flag()
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "board"


@pytest.fixture
def two(path: pathlib.Path) -> Iterator[tuple[CoreBoard, CoreBoard]]:
    boards = CoreBoard(path), CoreBoard(path)
    yield boards
    for board in boards:
        board.close()


class TestBoard:
    def test_a_flag_is_seen_by_others_alone(self, two: tuple[CoreBoard, CoreBoard]) -> None:
        first, second = two
        assert first.others_idle()
        assert second.others_idle()
        first.raise_flag()
        assert first.others_idle()
        assert not second.others_idle()
        first.lower_flag()
        assert second.others_idle()

    def test_the_last_to_leave_takes_the_board_away(self, path: pathlib.Path) -> None:
        first, second = CoreBoard(path), CoreBoard(path)
        first.raise_flag()
        first.close()
        assert path.exists()
        assert second.others_idle()
        second.close()
        assert not path.exists()

    def test_places_are_given_again(self, path: pathlib.Path) -> None:
        stays = CoreBoard(path)
        for _ in range(300):
            CoreBoard(path).close()
        stays.close()

    def test_a_full_board_is_an_error(self, path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cores, "_NUM_PLACES", 1)
        board = CoreBoard(path)
        with pytest.raises(OSError, match="all 1 places are taken"):
            CoreBoard(path)
        board.close()

    def test_a_killed_neighbours_flag_is_taken_down(self, path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cores, "_TRUST_S", 0.0)
        board = CoreBoard(path)
        with subprocess.Popen(
            [sys.executable, "-c", _RAISE_AND_WAIT, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as neighbour:
            assert neighbour.stdout is not None
            assert neighbour.stdout.readline() == b"up\n"
            assert not board.others_idle()
            assert not board.others_idle()
            neighbour.kill()
            neighbour.wait()
        # Once to mind the flag and take it down.
        board.others_idle()
        assert board.others_idle()
        board.close()
        assert not path.exists()

    def test_another_users_link_is_not_followed(self, path: pathlib.Path, tmp_path: pathlib.Path) -> None:
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="symbolic links"):
            CoreBoard(path)
        assert not (tmp_path / "elsewhere").exists()


class TestCores:
    @pytest.fixture(autouse=True)
    def board_and_threads(self, path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(cores, "_FOLDER", path.parent)
        num_threads = torch.get_num_threads()
        yield
        torch.set_num_threads(num_threads)

    def test_a_worker_borrows_while_its_neighbour_is_idle(self) -> None:
        prefill, decode = Cores(1, 2), Cores(1, 2)
        prefill.take()
        assert torch.get_num_threads() == 2
        decode.take()
        assert torch.get_num_threads() == 1
        prefill.rest()
        decode.take()
        assert torch.get_num_threads() == 2
        decode.close()
        prefill.close()

    def test_a_worker_that_borrows_nothing_is_minded_all_the_same(self) -> None:
        lender, borrower = Cores(1, 1), Cores(1, 2)
        lender.take()
        borrower.take()
        assert torch.get_num_threads() == 1
        lender.rest()
        borrower.take()
        assert torch.get_num_threads() == 2
        lender.close()
        borrower.close()

    def test_nothing_is_borrowed_unasked(self, path: pathlib.Path) -> None:
        alone = Cores(1, 0)
        alone.take()
        assert torch.get_num_threads() == 1
        assert list(path.parent.iterdir()) == []

    def test_without_shared_memory_a_worker_keeps_to_its_own(
        self, path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cores, "_FOLDER", path / "missing")
        alone = Cores(1, 2)
        alone.take()
        assert torch.get_num_threads() == 1
