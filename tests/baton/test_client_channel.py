from __future__ import annotations

import pathlib

import pytest

from baton.client import AsyncClient, Client, Tls
from baton.client.channel import call_metadata, channel_options
from baton.errors import InvalidRequestError, UnauthenticatedError, from_status
from tests.baton.fake_inference import serving


def test_a_key_is_sent_as_a_bearer_token() -> None:
    assert call_metadata("key-1") == (("authorization", "Bearer key-1"),)
    assert call_metadata(None) == ()


@pytest.mark.parametrize("key", ["", "two words", "ümlaut", "line\n"])
@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_a_key_that_no_header_can_carry_is_refused_and_not_repeated(client: type, key: str) -> None:
    with pytest.raises(InvalidRequestError, match="api_key: must have at least one character") as caught:
        client("127.0.0.1:1", api_key=key)
    assert not key or key not in str(caught.value)


def test_a_certificate_needs_its_key() -> None:
    with pytest.raises(ValueError, match="cert_file and key_file"):
        Tls(cert_file="client.pem")


def test_a_file_that_is_missing_is_an_error_at_once(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ca\.pem"):
        Client("127.0.0.1:1", tls=Tls(ca_file=tmp_path / "ca.pem"))


def test_the_name_in_the_certificate_may_be_another_than_the_target() -> None:
    assert ("grpc.ssl_target_name_override", "router") in channel_options(1024, Tls(server_name="router"))
    assert all(name != "grpc.ssl_target_name_override" for name, _ in channel_options(1024, Tls()))


def test_unauthenticated_has_an_error_of_its_own() -> None:
    assert isinstance(from_status("UNAUTHENTICATED", "no key"), UnauthenticatedError)


def test_a_message_that_is_too_large_is_not_worth_another_try() -> None:
    with serving() as server, Client(server.target, max_message_bytes=1000) as client:
        with pytest.raises(InvalidRequestError, match="message larger than max") as caught:
            client.tokenize("x" * 2000)
        assert not caught.value.retryable
