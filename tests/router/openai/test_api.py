"""What all routes share: keys, ids, deadlines, and what there is no route for."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

import baton
from baton.config import RouterConfig
from tests.router.openai.conftest import Http


async def test_the_served_model_is_listed(http: Http) -> None:
    listed = (await http.client.get("/v1/models")).json()
    (model,) = listed["data"]
    assert listed["object"] == "list"
    assert (model["id"], model["object"], model["max_model_len"]) == ("mock", "model", 512)
    assert (await http.client.get("/v1/models/mock")).json() == model


async def test_other_models_do_not_exist(http: Http) -> None:
    response = await http.client.get("/v1/models/org/other")
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "the model 'org/other' does not exist here; this is 'mock'",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "x"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [5]},
    }
    for path, body in bodies.items():
        assert (await http.error(path, {"model": "other", **body}, 404))["code"] == "model_not_found"


async def test_embeddings_are_not_implemented(http: Http) -> None:
    error = await http.error("/v1/embeddings", {"input": "x"}, 501)
    assert (error["type"], error["code"]) == ("not_implemented_error", "not_implemented")


async def test_there_is_no_route_for_anything_else(http: Http) -> None:
    for path in ("/v1/nothing", "/v1/models/", "/v1/completions/"):
        response = await http.client.get(path)
        assert response.status_code == 404
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_methods_that_a_route_does_not_have_are_refused(http: Http) -> None:
    response = await http.client.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["message"] == "GET is not allowed for /v1/completions"
    options = await http.client.options("/v1/models")
    assert (options.status_code, options.content) == (204, b"")
    assert set(options.headers["allow"].split(", ")) == {"GET", "HEAD"}
    assert (await http.client.head("/v1/models")).status_code == 200
    assert not [name for name in options.headers if name.startswith("access-control-")]


async def test_the_release_is_told(http: Http) -> None:
    assert (await http.client.get("/version")).json() == {"version": baton.__version__}


async def test_a_request_id_is_made_or_taken(http: Http) -> None:
    made = await http.post("/v1/completions", {"prompt": "x"})
    assert made.json()["id"] == f"cmpl-{made.headers['x-request-id']}"
    for _ in range(2):
        taken = await http.post("/v1/completions", {"prompt": "x"}, x_request_id="mine")
        assert taken.json()["id"] == "cmpl-mine"
        assert taken.headers["x-request-id"] == "mine"
    _, first, second = (request.request_id for request in http.pipeline.requests)
    assert first.startswith("cmpl-mine-")
    assert first != second


async def test_each_prompt_has_an_id_of_its_own(http: Http) -> None:
    answer = await http.complete(prompt=["a", "b"])
    assert sorted(r.request_id for r in http.pipeline.requests) == [f"{answer['id']}-0", f"{answer['id']}-1"]


async def test_streams_and_errors_have_the_id_too(http: Http) -> None:
    stream = await http.post("/v1/completions", {"prompt": "x", "stream": True}, x_request_id="mine")
    error = await http.post("/v1/completions", {}, x_request_id="mine")
    assert stream.headers["x-request-id"] == error.headers["x-request-id"] == "mine"


@pytest.mark.parametrize("value", ["", "a b", "x" * 97])
async def test_an_id_that_cannot_be_written_in_a_log_is_refused(http: Http, value: str) -> None:
    response = await http.post("/v1/completions", {"prompt": "x"}, x_request_id=value)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Request-Id"


async def test_a_deadline_goes_to_the_pipeline(http: Http) -> None:
    await http.post("/v1/completions", {"prompt": "x"}, x_request_timeout_s="2.5")
    await http.post("/v1/completions", {"prompt": "x"})
    assert http.pipeline.timeouts == [2.5, None]


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
async def test_a_deadline_must_be_a_time(http: Http, value: str) -> None:
    response = await http.post("/v1/completions", {"prompt": "x"}, x_request_timeout_s=value)
    assert response.json()["error"]["param"] == "X-Request-Timeout-S"


class TestKeys:
    @pytest.fixture
    def router_config(self) -> RouterConfig:
        return RouterConfig(api_keys=("secret", "other"))

    @pytest.mark.parametrize("key", ["secret", "other"])
    async def test_a_valid_key_is_let_in(self, http: Http, key: str) -> None:
        response = await http.post("/v1/completions", {"prompt": "x"}, authorization=f"Bearer {key}")
        assert response.status_code == 200

    @pytest.mark.parametrize("value", ["Bearer wrong", "Bearer", "secret", "Basic secret"])
    async def test_a_wrong_key_is_not(self, http: Http, value: str) -> None:
        response = await http.post("/v1/completions", {"prompt": "x"}, authorization=value)
        self.check(response)

    async def test_every_route_of_the_api_wants_one(self, http: Http) -> None:
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"):
            self.check(await http.post(path, {}))
        for path in ("/v1/models", "/v1/models/mock"):
            self.check(await http.client.get(path))

    async def test_probes_want_none(self, http: Http) -> None:
        for path in ("/health", "/ready", "/version"):
            assert (await http.client.get(path)).status_code == 200

    @staticmethod
    def check(response: httpx.Response) -> None:
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
