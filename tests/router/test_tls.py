from __future__ import annotations

import asyncio
import json
import pathlib
import ssl
import sys

import httpx
import pytest
from cryptography.hazmat.primitives import serialization

from baton.client import AsyncClient, Tls
from baton.config import DecodeConfig, ModelConfig, RouterConfig, RouterProcessConfig, TransferConfig
from baton.errors import UnavailableError
from bench.mock_workers.cluster import MockCluster
from router.server import RouterServer
from router.tls import ServerTls
from tests.certificates import Authority
from tests.router.test_server import config_for


@pytest.fixture
def authority(tmp_path: pathlib.Path) -> Authority:
    return Authority(tmp_path)


def server_of(checkpoint: pathlib.Path, cluster: MockCluster, **router: str) -> RouterServer:
    return RouterServer(
        RouterProcessConfig(
            model=ModelConfig(path=str(checkpoint)),
            router=RouterConfig(grpc_port=0, http_port=0, **router),  # type: ignore[arg-type]
            decode=DecodeConfig(),
            transfer=TransferConfig(),
            membership_address=cluster.membership.address,
        )
    )


async def test_both_ports_speak_tls_and_nothing_else(checkpoint: pathlib.Path, authority: Authority) -> None:
    cert, key = authority.issue("router")
    async with MockCluster() as cluster:
        server = server_of(checkpoint, cluster, tls_cert_file=str(cert), tls_key_file=str(key))
        await server.start()
        try:
            await server.wait_ready()
            assert server.url == f"https://{server.http_address}"
            async with AsyncClient(server.grpc_address, tls=Tls(ca_file=authority.ca_file)) as client:
                assert (await client.generate("hello world", max_tokens=2, timeout_s=30)).usage.completion_tokens == 2
            async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=authority.ca_file)) as http:
                assert (await http.get(f"{server.url}/ready")).status_code == 200
            async with AsyncClient(server.grpc_address) as plain:
                with pytest.raises(UnavailableError):
                    await plain.status()
            async with httpx.AsyncClient() as http:
                with pytest.raises(httpx.HTTPError):
                    await http.get(f"http://{server.http_address}/ready")
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await http.get(f"{server.url}/ready")
        finally:
            await server.stop()


async def test_clients_need_a_certificate_of_the_authority_that_is_named(
    checkpoint: pathlib.Path, authority: Authority, tmp_path: pathlib.Path
) -> None:
    cert, key = authority.issue("router")
    good = authority.issue("client")
    bad = Authority(tmp_path, "other").issue("stranger")
    async with MockCluster() as cluster:
        server = server_of(
            checkpoint,
            cluster,
            tls_cert_file=str(cert),
            tls_key_file=str(key),
            tls_client_ca_file=str(authority.ca_file),
        )
        await server.start()
        try:
            await server.wait_ready()
            for pair, is_welcome in ((good, True), (bad, False), (None, False)):
                assert await can_call_grpc(server, authority, pair) is is_welcome
                assert await can_call_http(server, authority, pair) is is_welcome
        finally:
            await server.stop()


Pair = tuple[pathlib.Path, pathlib.Path] | None


async def can_call_grpc(server: RouterServer, authority: Authority, pair: Pair) -> bool:
    cert, key = pair or (None, None)
    tls = Tls(ca_file=authority.ca_file, cert_file=cert, key_file=key)
    async with AsyncClient(server.grpc_address, tls=tls) as client:
        try:
            await client.status()
        except UnavailableError:
            return False
        return True


async def can_call_http(server: RouterServer, authority: Authority, pair: Pair) -> bool:
    context = ssl.create_default_context(cafile=authority.ca_file)
    if pair is not None:
        context.load_cert_chain(*pair)
    async with httpx.AsyncClient(verify=context) as http:
        try:
            return (await http.get(f"{server.url}/ready")).status_code == 200
        except httpx.HTTPError:
            return False


def test_files_that_cannot_be_used_are_named_with_their_setting(authority: Authority, tmp_path: pathlib.Path) -> None:
    cert, key = authority.issue("router")
    _, other_key = authority.issue("other")
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("nonsense")
    encrypted = tmp_path / "encrypted.key"
    encrypted.write_bytes(
        serialization.load_pem_private_key(key.read_bytes(), None).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    cases = [
        (tmp_path / "missing.pem", key, None, r"router\.tls_cert_file .*missing\.pem: No such file"),
        (cert, tmp_path / "missing.key", None, r"router\.tls_key_file .*missing\.key: No such file"),
        (cert, key, tmp_path / "missing", r"router\.tls_client_ca_file .*missing: No such file"),
        (no_pem, key, None, r"router\.tls_cert_file, router\.tls_key_file .*no\.pem"),
        (cert, other_key, None, r"router\.tls_cert_file, router\.tls_key_file .*key values mismatch"),
        (cert, encrypted, None, r"encrypted"),
        (cert, key, no_pem, r"router\.tls_client_ca_file .*no\.pem"),
    ]
    for cert_file, key_file, client_ca, message in cases:
        with pytest.raises(ValueError, match=message):
            ServerTls(
                cert_file=str(cert_file),
                key_file=str(key_file),
                client_ca_file=None if client_ca is None else str(client_ca),
            )


async def test_the_process_says_that_it_is_ready_whoever_may_connect(
    checkpoint: pathlib.Path, authority: Authority, tmp_path: pathlib.Path
) -> None:
    """`baton serve` has no certificate, so it is told."""
    cert, key = authority.issue("router")
    async with MockCluster() as cluster:
        router = RouterConfig(
            grpc_port=0,
            http_port=0,
            tls_cert_file=str(cert),
            tls_key_file=str(key),
            tls_client_ca_file=str(authority.ca_file),
        )
        config = config_for(checkpoint).model_copy(
            update={"router": router, "membership_address": cluster.membership.address}
        )
        path = tmp_path / "router.json"
        path.write_text(config.model_dump_json())
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "router", str(path), stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            assert json.loads(await process.stdout.readline())["http"].startswith("https://127.0.0.1:")
            assert json.loads(await process.stdout.readline()) == {"ready": True}
        finally:
            process.terminate()
            await process.wait()
        assert process.returncode == 0


def test_half_a_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="tls_cert_file and tls_key_file: one is set without the other"):
        RouterConfig(tls_cert_file="cert.pem")
    with pytest.raises(ValueError, match="tls_client_ca_file: needs tls_cert_file"):
        RouterConfig(tls_client_ca_file="ca.pem")


@pytest.mark.parametrize("key", ["", "has blank", "ümlaut", "x" * 513])
def test_keys_that_no_header_can_carry_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="api_keys"):
        RouterConfig(api_keys=(key,))
