"""How the commands that are clients connect: keys and TLS, against a real router."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from baton.config import ModelConfig, RouterConfig, ServeConfig
from deploy.cli import commands
from deploy.tour import MODEL
from router.server import RouterServer
from tests.certificates import Authority
from tests.router.alone import running_router


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def router(authority: Authority) -> Iterator[RouterServer]:
    cert, key = authority.issue("router")
    config = RouterConfig(api_keys=("sesame",), tls_cert_file=str(cert), tls_key_file=str(key))
    with running_router(ServeConfig(model=ModelConfig(path=str(MODEL), served_name="demo"), router=config)) as router:
        yield router


def invoke(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(commands.main, arguments, env={"BATON_API_KEY": "", **environment})


def test_the_key_and_the_authority_let_a_command_in(router: RouterServer, authority: Authority) -> None:
    target = ("--target", router.grpc_address)
    flag = invoke("status", "--json", *target, "--tls-ca", str(authority.ca_file), BATON_API_KEY="sesame")
    assert (flag.exit_code, '"ready": true' in flag.output) == (0, True)
    variable = invoke("status", "--json", *target, BATON_API_KEY="sesame", BATON_TLS_CA=str(authority.ca_file))
    assert variable.exit_code == 0


@pytest.mark.parametrize("key", ["", "open"])
def test_without_a_valid_key_it_says_what_to_set(router: RouterServer, authority: Authority, key: str) -> None:
    result = invoke(
        "generate", "Hi", "--target", router.grpc_address, "--tls-ca", str(authority.ca_file), BATON_API_KEY=key
    )
    assert result.exit_code == 1
    assert "a valid API key is required" in result.output
    assert "(set BATON_API_KEY)" in result.output


def test_a_key_that_cannot_be_sent_is_the_users_to_mend(router: RouterServer) -> None:
    result = invoke("status", "--target", router.grpc_address, BATON_API_KEY="se same")
    assert (result.exit_code, result.output.startswith("error: api_key: must")) == (2, True)


def test_an_authority_that_is_no_file_is_refused(tmp_path: pathlib.Path) -> None:
    result = invoke("status", "--tls-ca", str(tmp_path / "nothing.pem"))
    assert result.exit_code == 2
    assert "nothing.pem" in result.output


def test_without_tls_it_does_not_get_through(router: RouterServer) -> None:
    result = invoke("status", "--target", router.grpc_address, BATON_API_KEY="sesame")
    assert (result.exit_code, "is `baton serve` running there?" in result.output) == (1, True)
