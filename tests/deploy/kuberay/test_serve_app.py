"""Baton under Ray Serve, as in a RayService: real Serve, real `baton serve`."""

from __future__ import annotations

import os
import pathlib
import socket
import warnings
from collections.abc import Iterator

import httpx
import psutil
import pytest

from deploy.kuberay.arguments import Arguments

pytestmark = pytest.mark.clusters

MODEL = pathlib.Path(__file__).parents[3] / "deploy" / "demo" / "model"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where Serve answers for one replica with a cluster of the process runtime."""
    with warnings.catch_warnings():
        # Serve's own, about names of pydantic and of starlette.
        warnings.simplefilter("ignore")
        import ray
        from ray import serve

        from deploy.kuberay.serve_app import app

    arguments = ["--model", str(MODEL), "--served-model-name", "demo", "--runtime", "process"]
    ports = ["--grpc-port", "0", "--http-port", "0"]
    before = set(psutil.Process().children(recursive=True))
    # As Ray has it every other test would go before what is started here.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", include_dashboard=False, object_store_memory=80 << 20, num_cpus=2, log_to_driver=False)
    try:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(Arguments(arguments=[*arguments, *ports], drain_s=20)), route_prefix="/")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()
    left = set(psutil.Process().children(recursive=True)) - before
    psutil.wait_procs(left, timeout=10)


def test_an_answer_comes_through_serve(url: str) -> None:
    request = {"model": "demo", "prompt": "The", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=request)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8


def test_a_stream_comes_through_serve_as_it_is_made(url: str) -> None:
    request = {"model": "demo", "prompt": "The", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=request) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert len(events) > 2


def test_what_the_router_refuses_is_refused_in_its_words(url: str) -> None:
    answer = httpx.get(f"{url}/v1/models/absent?a=1&b=%20")
    assert answer.status_code == 404
    refused = httpx.post(f"{url}/v1/completions", json={"model": "demo", "prompt": "The", "max_tokens": -1})
    assert refused.status_code == 400
    assert "max_tokens" in refused.text
