"""Two ranks, each a process of its own, compute what transformers does on one, and live and die together."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engine.batch import BatchItem, build_batch
from tests.engine.checkpoints import FAMILIES, make_checkpoint
from tests.engine.paged_model import PagedModel, transformers_greedy, transformers_logits, transformers_model
from tests.engine.test_model_runner import TOLERANCE, difference, prompts
from tests.worker.ranks.conftest import ForkedFollower, MakeTeam, Team, running_team, team_config
from worker.ranks.pages import StepPages

pytestmark = pytest.mark.clusters


class TeamModel(PagedModel):
    """The ranks' pools are NaN wherever nothing was written."""

    def __init__(self, team: Team) -> None:
        engine = team.engine
        self.model, self.layout, self.kv, self.runner = engine.model, engine.layout, engine.cache.kv, engine.runner
        self._cache = engine.cache
        num_blocks = engine.cache.pool.num_blocks
        self._free = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(1)) + 1).tolist()
        self.spoil(range(num_blocks))

    def spoil(self, block_ids: Sequence[int]) -> None:
        self._cache.spoil(block_ids)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *((family, {}) for family in FAMILIES),
        # The last rank's part of the vocabulary is filled up.
        pytest.param("llama", {"vocab_size": 383, "tie_word_embeddings": True}, id="odd vocabulary"),
    ],
)
def test_two_ranks_compute_what_transformers_does(
    family: str, overrides: dict[str, Any], make_team: MakeTeam, tmp_path: pathlib.Path
) -> None:
    path = make_checkpoint(family, tmp_path, sharded=True, **overrides)
    team = make_team(path)
    model = TeamModel(team)
    assert model.layout.num_kv_heads == 1
    oracle = transformers_model(path)
    ids, starts = prompts([45, 7, 1, 30]), prompts([20, 3], seed=2)
    assert difference(model.logits(ids, [23, 7, 1, 15]), transformers_logits(oracle, ids)) <= TOLERANCE
    assert model.greedy(starts, 6) == transformers_greedy(oracle, starts, 6)
    assert not team.lost.is_set()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def team(forker: socket.socket, llama: pathlib.Path) -> Iterator[Team]:
    """One for all tests that do not end it."""
    with running_team(forker, llama) as team:
        yield team
        assert not team.lost.is_set()


def test_a_fork_has_copies_of_the_partial_block_in_all_ranks(team: Team) -> None:
    engine = team.engine
    (prompt,) = prompts([21])
    first = engine.cache.begin()
    assert engine.cache.allocate(first, len(prompt) + 1)
    engine.runner.execute([BatchItem(prompt, 0, first.rows(), 0)])
    second = engine.cache.fork(first, len(prompt))
    assert second is not None
    wanted, got = (
        engine.runner.execute([BatchItem([5], len(prompt), sequence.rows(), 1)]) for sequence in (first, second)
    )
    assert torch.equal(wanted, got)


def test_tokens_that_only_the_device_knows_reach_all_ranks(team: Team) -> None:
    engine = team.engine
    sequence = engine.cache.begin()
    assert engine.cache.allocate(sequence, 2)
    known = build_batch([BatchItem([7, 9], 0, sequence.rows(), 1)], engine.layout)
    wanted = engine.runner.execute_batch(known).clone()
    unknown = dataclasses.replace(known, token_ids=np.array([7, 0]), sources=np.array([-1, 1]))
    assert torch.equal(engine.runner.execute_batch(unknown, chosen=torch.tensor([3, 9])), wanted)


def test_a_batch_that_cannot_be_built_harms_nobody(team: Team) -> None:
    with pytest.raises(AssertionError):
        team.engine.runner.execute([BatchItem([5], 0, [[0]], 1)])
    assert team.engine.runner.execute([BatchItem([5], 0, [[1]], 1)]).isfinite().all()


def test_a_leader_whose_follower_is_killed_gives_up(make_team: MakeTeam, llama: pathlib.Path) -> None:
    team = make_team(llama)
    team.follower.kill()
    assert team.lost.wait(30)
    with pytest.raises((OSError, RuntimeError)):
        team.engine.runner.execute([BatchItem([5], 0, [[1]], 1)])


def test_a_step_that_fails_in_one_rank_ends_the_worker(make_team: MakeTeam, llama: pathlib.Path) -> None:
    """The other has begun it, or gone beyond it: from then on their pools differ."""
    team = make_team(llama)

    class Broken(StepPages):
        def __call__(self, layer: int) -> None:
            raise ValueError("out of step")

    with pytest.raises(ValueError, match="out of step"):
        team.engine.runner.execute([BatchItem([5], 0, [[1]], 1)], Broken([], []))
    assert team.lost.is_set()


def test_what_no_rank_can_load_is_an_error_of_the_start(make_team: MakeTeam, tmp_path: pathlib.Path) -> None:
    path = make_checkpoint("llama", tmp_path, intermediate_size=97)
    with pytest.raises(ValueError, match="tensor_parallel_size: 2 does not divide the model's intermediate_size, 97"):
        make_team(path)


def test_a_follower_that_dies_before_it_loads_is_an_error_of_the_start(
    forker: socket.socket, llama: pathlib.Path
) -> None:
    with contextlib.closing(ForkedFollower(forker)) as launched:
        launched.kill()
        launched.wait()
        with pytest.raises(ValueError, match="rank 1 is gone"):
            Team(launched, team_config(llama))
