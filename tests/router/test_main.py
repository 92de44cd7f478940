"""The router as a process of its own."""

from __future__ import annotations

import asyncio
import json
import pathlib
import signal
import subprocess
import sys

import grpc.aio
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.v1 import inference_pb2_grpc
from bench.mock_workers.cluster import MockCluster
from tests.router.conftest import next_of, request_of, rest_of, tokens_of
from tests.router.test_server import config_for


async def test_a_router_process_serves_drains_on_sigterm_and_exits_0(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    async with MockCluster() as cluster:
        config = config_for(checkpoint).model_copy(update={"membership_address": cluster.membership.address})
        path = tmp_path / "router.json"
        path.write_text(config.model_dump_json())
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "router", str(path), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            where = json.loads(await process.stdout.readline())
            assert where["pid"] == process.pid
            async with grpc.aio.insecure_channel(where["grpc"]) as channel, httpx.AsyncClient() as http:
                health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                while (await health.read()).status != health_pb2.HealthCheckResponse.SERVING:
                    pass
                health.cancel()
                assert json.loads(await process.stdout.readline()) == {"ready": True}
                assert (await http.get(where["http"] + "/ready")).status_code == 200
                cluster.decode[0].step_gate.clear()
                stub: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(channel)
                call = stub.Generate(request_of([7] * 100, max_tokens=30))
                received = tokens_of([await next_of(call)])
                process.send_signal(signal.SIGTERM)
                cluster.decode[0].step_gate.set()
                received += tokens_of(await rest_of(call))
                assert len(received) == 30
            rest, errors = await process.communicate()
            assert (process.returncode, rest) == (0, b""), errors.decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "router", *args], capture_output=True, text=True, timeout=60)


def test_a_bad_configuration_exits_2_and_says_why(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "router.json"
    path.write_text('{"router": {"grpc_prot": 1}}')
    result = run(str(path))
    assert result.returncode == 2
    assert "grpc_prot" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_that_is_missing_exits_2_and_says_why(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "router.json"
    path.write_text(config_for(tmp_path / "nowhere").model_dump_json())
    result = run(str(path))
    assert result.returncode == 2
    assert result.stderr.strip().endswith("nowhere has no config.json: not a checkpoint folder")


def test_no_argument_is_a_usage_error() -> None:
    result = run()
    assert result.returncode == 2
    assert result.stderr.startswith("usage: python -m router")


def test_the_router_loads_neither_torch_nor_ray_nor_transformers() -> None:
    code = (
        "import sys, router.__main__;"
        "print([name for name in ('torch', 'ray', 'transformers', 'numba') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
