"""Padded decode steps over memory that stays, as CUDA graphs replay them, answer what plain steps answer."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine import decode_graphs
from engine.batch import Batch, BatchItem, build_batch
from engine.decode_graphs import DecodeGraphs
from tests.engine.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.engine.paged_model import PagedModel

CPU = torch.device("cpu")


class Replays:
    """In the place of CUDA: launches again what was captured, over the same memory."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replayed = 0

    def __call__(self, launch: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed += 1
            with torch.inference_mode():
                launch()

        return replay


class Stream:
    """One sequence: its tokens, and its blocks."""

    def __init__(self, model: PagedModel, token_ids: list[int], max_tokens: int) -> None:
        self.token_ids = token_ids
        self.tables = model.new_tables(max_tokens)

    @property
    def item(self) -> BatchItem:
        return BatchItem(self.token_ids[-1:], len(self.token_ids) - 1, self.tables, 1)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PagedModel:
    path: pathlib.Path = make_checkpoint(request.param, tmp_path_factory.mktemp("models") / request.param)
    return PagedModel(path, "reference", 8)


def make_graphs(model: PagedModel, capture: Replays, max_rows: int = 16) -> DecodeGraphs:
    return DecodeGraphs(
        model.runner.forward, model.layout, CPU, max_rows=max_rows, vocab_size=VOCAB_SIZE, capture=capture
    )


def prefill(model: PagedModel, lengths: list[int], seed: int = 0) -> list[Stream]:
    generator = np.random.default_rng(seed)
    streams = [Stream(model, generator.integers(3, VOCAB_SIZE, length).tolist(), length + 6) for length in lengths]
    model.runner.execute([BatchItem(stream.token_ids, 0, stream.tables, 0) for stream in streams])
    for stream in streams:
        stream.token_ids.append(int(generator.integers(3, VOCAB_SIZE)))
    return streams


def test_padded_steps_equal_plain_ones(model: PagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of several sizes in turn, contexts that pass a power of two; nothing but their slots is written."""
    monkeypatch.setattr(decode_graphs, "_MIN_CONTEXT", 16)
    capture = Replays()
    graphs = make_graphs(model, capture)
    streams = prefill(model, [15, 3, 30, 9, 1])
    for chosen in ([0, 1, 2], [4], [2, 3, 1, 0, 4], [1, 0, 3], [3]):
        batch = build_batch([streams[index].item for index in chosen], model.layout)
        assert graphs.takes(batch)
        with torch.inference_mode():
            padded = graphs.run(batch, None).clone()
        unwritten = model.kv[:, 0].isnan().all()
        assert unwritten, "padding was written to the null block"
        assert (padded - model.runner.execute_batch(batch)).abs().max() <= 1e-5
        for index, row in zip(chosen, padded, strict=True):
            streams[index].token_ids.append(int(row.argmax()))
    assert (capture.num_captured, capture.num_replayed) == (3, 2)


def test_tokens_that_only_the_device_knows_are_taken_from_there(model: PagedModel) -> None:
    graphs = make_graphs(model, Replays())
    streams = prefill(model, [5, 6, 7], seed=1)
    batch = build_batch([stream.item for stream in streams], model.layout)
    wanted = model.runner.execute_batch(batch)
    chosen = torch.tensor([streams[2].token_ids[-1], streams[0].token_ids[-1]])
    blind = Batch(
        token_ids=np.array([-1, streams[1].token_ids[-1], -1]),
        sources=np.array([1, -1, 0]),
        **{name: getattr(batch, name) for name in Batch.__dataclass_fields__ if name not in ("token_ids", "sources")},
    )
    for _ in range(2):
        with torch.inference_mode():
            assert (graphs.run(blind, chosen) - wanted).abs().max() <= 1e-5
    assert (model.runner.execute_batch(blind, chosen=chosen) - wanted).abs().max() <= 1e-5


def test_what_is_no_decode_step_or_too_large_is_not_taken(model: PagedModel) -> None:
    graphs = make_graphs(model, Replays(), max_rows=2)
    item = BatchItem([5], 0, model.new_tables(1), 1)
    assert graphs.takes(build_batch([item, item], model.layout))
    assert not graphs.takes(build_batch([item, item, item], model.layout))
    assert not graphs.takes(build_batch([BatchItem([5], 0, item.tables, 0)], model.layout))
    assert not graphs.takes(build_batch([BatchItem([5, 6], 0, item.tables, 1)], model.layout))


def test_a_model_that_cannot_be_captured_goes_on_without(model: PagedModel, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(launch: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = DecodeGraphs(model.runner.forward, model.layout, CPU, max_rows=4, vocab_size=VOCAB_SIZE, capture=refuse)
    (stream,) = prefill(model, [5], seed=2)
    batch = build_batch([stream.item], model.layout)
    wanted = model.runner.execute_batch(batch)
    with torch.inference_mode():
        assert (graphs.run(batch, None) - wanted).abs().max() <= 1e-5
    assert not graphs.takes(batch)
    assert "no CUDA graph" in caplog.text


def test_the_least_recently_used_graph_goes(model: PagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "_MAX_GRAPHS", 2)
    capture = Replays()
    graphs = make_graphs(model, capture)
    streams = prefill(model, [3, 3, 3, 3, 3], seed=3)
    for num_rows in (1, 2, 1, 4, 1, 2):
        batch = build_batch([stream.item for stream in streams[:num_rows]], model.layout)
        with torch.inference_mode():
            graphs.run(batch, None)
    assert (capture.num_captured, capture.num_replayed) == (4, 2)
