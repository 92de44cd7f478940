"""Every family over every transport between two workers, through a router, equals `transformers`."""

from __future__ import annotations

import pathlib

import pytest

from baton.requests import FinishReason
from tests.cluster.inprocess import in_process_cluster
from tests.cluster.oracle import Oracle, prompt_of
from tests.engine.checkpoints import EOS_ID, FAMILIES, make_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_checkpoint(family, root / family) for family in FAMILIES}


@pytest.mark.parametrize("transport", ["shm", "collective", "grpc"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(
    family: str, transport: str, models: dict[str, pathlib.Path]
) -> None:
    oracle = Oracle(models[family])
    with in_process_cluster(models[family], transport=transport) as client:
        for length in (1, 16, 77):
            completion = client.generate(prompt_of(length), max_tokens=12, temperature=0.0)
            (choice,) = completion.choices
            expected = oracle.generate(prompt_of(length), 12)
            assert list(choice.token_ids) == expected
            ended = FinishReason.STOP if expected[-1] == EOS_ID else FinishReason.LENGTH
            assert choice.finish_reason is ended
            assert not completion.timings.local_prefill
