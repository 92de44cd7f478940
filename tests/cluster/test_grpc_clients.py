"""The gRPC API as programs of others meet it: Node's client, reflection and health from outside, and the examples."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.client import Client
from baton.config import ModelConfig, RouterConfig, ServeConfig
from deploy.tour import MODEL
from tests.certificates import Authority
from tests.cluster.harness import ClusterUnderTest
from tests.cluster.inprocess import assert_idle
from tests.node_programs import REPOSITORY, lay_out, run_node
from tests.reflection import ReflectedServer
from tests.router.alone import running_router
from tests.tools import NODE_FOLDER, node

EXAMPLES = sorted((REPOSITORY / "examples" / "python").glob("*.py"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    node()
    folder = lay_out(tmp_path_factory.mktemp("node"))
    shutil.copy(NODE_FOLDER / "grpc_client.mjs", folder)
    return folder


@pytest.fixture(scope="module")
def seen(demo_cluster: ClusterUnderTest, programs: pathlib.Path) -> Any:
    """What one run of tests/node/grpc_client.mjs saw."""
    output = run_node(programs / "grpc_client.mjs", environment={"BATON_TARGET": demo_cluster.target})
    return json.loads(output)


@pytest.fixture
def client(demo_cluster: ClusterUnderTest) -> Iterator[Client]:
    with Client(demo_cluster.target) as client:
        yield client


class TestNode:
    def test_a_stream_has_its_prompt_first_and_usage_and_timings_last(self, seen: Any, client: Client) -> None:
        streaming = seen["streaming"]
        expected = client.generate("Once upon a time", max_tokens=12, temperature=0, ignore_eos=True)
        assert streaming["token_ids"] == [list(expected.choices[0].token_ids)] * 2
        assert streaming["texts"] == [expected.text] * 2
        assert streaming["prompt"]["text"] == "Once upon a time"
        assert len(streaming["request_ids"]) == 1
        assert streaming["num_messages"] > 1
        assert streaming["num_top"] == 2
        assert streaming["finish_reasons"] == ["FINISH_REASON_LENGTH"] * 2
        assert set(streaming["early_usage"]) == {None}
        assert streaming["usage"]["completion_tokens"] == 24
        assert streaming["timings"]["decode_worker"] == "decode-0"

    def test_prompts_may_be_token_ids(self, seen: Any) -> None:
        assert seen["by_token_ids"] == {"prompt_tokens": 3, "cached_tokens": 0, "completion_tokens": 1}

    def test_cancelling_ends_the_stream_and_frees_what_it_held(self, seen: Any, client: Client) -> None:
        assert seen["cancelling"]["error"]["code"] == "CANCELLED"
        assert seen["cancelling"]["received"] < 2000
        assert_idle(client)

    def test_a_deadline_ends_the_stream(self, seen: Any, client: Client) -> None:
        assert seen["deadline"]["code"] == "DEADLINE_EXCEEDED"
        assert_idle(client)

    def test_errors_have_a_status_and_name_the_field_and_the_limit(self, seen: Any) -> None:
        assert seen["no_prompt"] == invalid("prompt: either text or token_ids is required")
        assert seen["bad_temperature"] == invalid("sampling.temperature: must be finite and at least 0, got -1")
        assert seen["too_many_choices"] == invalid("sampling.n: must be from 1 to 16, got 99")
        assert seen["unknown_token"]["code"] == "INVALID_ARGUMENT"
        assert seen["unknown_token"]["details"].startswith("token_ids: 4000000000 is not below the vocabulary's")
        assert seen["trailers"] == invalid("sampling.top_p: must be above 0 and at most 1, got 7")
        assert seen["other_model"] == {
            "code": "NOT_FOUND",
            "details": "model: 'gpt-5' is not served; this is 'demo'",
        }

    def test_the_smaller_calls_answer(self, seen: Any, client: Client) -> None:
        info = client.model_info()
        assert (seen["model"]["name"], seen["model"]["max_model_len"]) == ("demo", info.max_model_len)
        assert tuple(seen["tokens"]["token_ids"]) == client.tokenize("Once upon a time", add_special_tokens=False)
        assert seen["text"]["text"] == "Once upon a time"
        assert seen["cluster"]["ready"]
        assert {worker["name"] for worker in seen["cluster"]["workers"]} == {"prefill-0", "decode-0"}

    def test_the_example_streams_an_answer(self, demo_cluster: ClusterUnderTest, programs: pathlib.Path) -> None:
        output = run_node(programs / "generate.mjs", environment={"BATON_TARGET": demo_cluster.target})
        assert output.startswith("demo: at most 4096 tokens")
        assert "generated" in output
        assert "on decode-0" in output

    def test_it_sends_its_key_over_tls(self, programs: pathlib.Path, tmp_path: pathlib.Path) -> None:
        authority = Authority(tmp_path)
        cert, key = authority.issue("router")
        router = RouterConfig(api_keys=("sesame",), tls_cert_file=str(cert), tls_key_file=str(key))
        with running_router(ServeConfig(model=ModelConfig(path=str(MODEL)), router=router)) as server:
            environment = {
                "BATON_TARGET": server.grpc_address,
                "BATON_TLS_CA": str(authority.ca_file),
                "BATON_API_KEY": "sesame",
            }
            assert "48 generated" in run_node(programs / "generate.mjs", environment=environment)


def invalid(details: str) -> dict[str, str]:
    return {"code": "INVALID_ARGUMENT", "details": details}


class TestReflection:
    """A client that has nothing but the address, as grpcurl and graphical clients do."""

    @pytest.fixture
    def channel(self, demo_cluster: ClusterUnderTest) -> Iterator[grpc.Channel]:
        with grpc.insecure_channel(demo_cluster.target) as channel:
            yield channel

    def test_every_service_is_listed(self, channel: grpc.Channel) -> None:
        assert ReflectedServer(channel).services() == {
            "baton.v1.Inference",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }

    def test_every_method_can_be_called_from_its_description(self, channel: grpc.Channel) -> None:
        server = ReflectedServer(channel)
        requests = {
            "Generate": {"text": "Once upon a time", "sampling": {"maxTokens": 3, "temperature": 0}},
            "GetModelInfo": {},
            "GetClusterStatus": {},
            "Tokenize": {"text": "Once"},
            "Detokenize": {"tokenIds": [5, 6]},
        }
        assert server.methods("baton.v1.Inference") == set(requests)
        for method, request in requests.items():
            assert server.call(f"baton.v1.Inference/{method}", json.dumps(request))

    def test_health_is_known_for_the_service_and_for_the_whole(self, channel: grpc.Channel) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "baton.v1.Inference"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="baton.v1.Nothing"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_in_python_runs(demo_cluster: ClusterUnderTest, example: pathlib.Path) -> None:
    result = subprocess.run(
        [sys.executable, str(example)],
        env={**os.environ, "BATON_TARGET": demo_cluster.target},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip()
