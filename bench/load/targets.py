"""Who is asked: the seam between the runner and a server's protocol, and the choice between protocols by address."""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

from baton.errors import BatonError, from_status
from bench.load.outcome import Outcome

Api = Literal["completions", "chat"]


@dataclasses.dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server says of its model; None for what it does not tell."""

    name: str
    vocab_size: int | None = None
    max_model_len: int | None = None


class Target(Protocol):
    """A server. Made, used and closed on one event loop; requests run at the same time."""

    async def served_model(self) -> ServedModel:
        """Asks what is served.

        Raises:
            BatonError: the server cannot be reached or refuses.
        """

    async def send(self, outcome: Outcome) -> None:
        """Sends `outcome.request` and fills `outcome` with tokens as they arrive, and with usage, to the end.

        Greedy, and past the end of sequence until `max_tokens`. Token ids are asked for where turns follow.

        Raises:
            BatonError: the request was refused or broke off; `outcome` has what arrived before.
        """

    async def close(self) -> None:
        """Ends all connections."""


def open_target(
    address: str,
    *,
    api: Api = "completions",
    model: str | None = None,
    api_key: str | None = None,
    tls_ca: str | None = None,
    continuous_usage: bool = False,
) -> Target:
    """The target for an address: http://… and https://… speak OpenAI's API, grpc://HOST:PORT and HOST:PORT Baton's.

    Args:
        model: the model's name; None asks the server for its only one.
        tls_ca: PEM file of authorities to trust; for gRPC it also turns TLS on.
        continuous_usage: asks for a token count in every event (HTTP; gRPC always tells).

    Raises:
        ValueError: the address is none, the protocol has no such API, or its package is not installed.
    """
    scheme, separator, rest = address.partition("://")
    if separator and scheme in ("http", "https"):
        try:
            from bench.load.http_target import HttpTarget
        except ModuleNotFoundError as error:
            raise ValueError(f"{scheme} needs {error.name}: install Baton as pip install 'baton[bench]'") from error
        return HttpTarget(
            address, api=api, model=model, api_key=api_key, tls_ca=tls_ca, continuous_usage=continuous_usage
        )
    if separator and scheme != "grpc":
        raise ValueError(f"{address}: the scheme must be http, https or grpc")
    host, _, port = (rest if separator else address).rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{address}: must be http://…, https://…, grpc://HOST:PORT or HOST:PORT")
    if api == "chat":
        raise ValueError(f"{address}: gRPC has no chat API; use http://…")
    from bench.load.grpc_target import GrpcTarget

    return GrpcTarget(f"{host}:{port}", model=model, api_key=api_key, tls_ca=tls_ca)


_STATUS_OF_HTTP = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    422: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def http_error(status: int, message: str) -> BatonError:
    """The error that an HTTP status means, so that both protocols' refusals are counted under the same names."""
    return from_status(_STATUS_OF_HTTP.get(status, "INTERNAL"), message)
