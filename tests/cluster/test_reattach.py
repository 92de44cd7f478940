"""A router that loses its token stream resumes it: no token is lost, none comes twice."""

from __future__ import annotations

import logging
import pathlib

import pytest

from baton.client import Client
from tests.cluster.inprocess import InProcessCluster, assert_idle
from tests.cluster.oracle import Oracle, prompt_of
from tests.engine.checkpoints import make_checkpoint

pytestmark = pytest.mark.clusters


def test_a_stream_goes_on_where_it_was(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="router.attach")
    model = make_checkpoint("llama", tmp_path / "tiny-llama")
    cluster = InProcessCluster(model)
    cluster.start()
    try:
        with Client(cluster.target) as client:
            token_ids: list[int] = []
            for delta in client.stream(prompt_of(80), max_tokens=300, temperature=0.0):
                before = len(token_ids)
                token_ids += [token_id for choice in delta.choices for token_id in choice.token_ids]
                if before // 60 != len(token_ids) // 60:
                    cluster.break_attach()
            assert token_ids == Oracle(model).generate(prompt_of(80), 300)
            assert len(token_ids) > 60, "the stream ended before it was broken"
            assert caplog.text.count("was reset") >= 2
            assert_idle(client)
    finally:
        cluster.stop()
