"""A client of the OpenAI chat API with nothing but the standard library, for `baton chat`."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import ssl
import urllib.parse
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from baton.errors import BatonError, InvalidRequestError, UnavailableError

# A model that is busy may take long to its first token, but not to say that it lives.
TIMEOUT_S = 600.0

Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer; `is_reasoning` marks what the model thinks before it answers."""

    text: str
    is_reasoning: bool = False


class ChatClient:
    """Streams answers from one server; a connection for each.

    Args:
        url: of the router's HTTP side, such as http://127.0.0.1:8000.
        api_key: sent as a bearer token; None sends none.
        tls_ca: PEM file with the authorities that an https url trusts; None trusts the system's.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, tls_ca: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequestError("url", f"{url!r} is not http://HOST:PORT")
        self.url = urllib.parse.urlunsplit(parts).rstrip("/")
        self._parts = parts
        self._tls = ssl.create_default_context(cafile=tls_ca) if parts.scheme == "https" else None
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s

    def model(self) -> str:
        """The name of the first served model.

        Raises:
            BatonError: the server does not answer, or not as it should.
        """
        with self._answer("GET", "/v1/models") as response:
            try:
                return str(json.loads(response.read())["data"][0]["id"])
            except (ValueError, LookupError, TypeError) as error:
                raise UnavailableError("this is no OpenAI-compatible server") from error

    def stream(self, messages: Sequence[Message], *, model: str, **sampling: Any) -> Generator[Piece, None, None]:
        """The answer to a conversation, in pieces; closing the iterator stops it on the server too.

        Raises:
            BatonError: the server does not answer, refuses, or fails on the way.
        """
        body = {"model": model, "messages": list(messages), "stream": True, **sampling}
        with self._answer("POST", "/v1/chat/completions", body) as response:
            for data in _events(response):
                if data == "[DONE]":
                    return
                yield from _pieces(data)
        raise UnavailableError("the answer broke off")

    @contextlib.contextmanager
    def _answer(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        host, port = self._parts.hostname or "", self._parts.port
        if self._tls is not None:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=self._timeout_s, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        try:
            text = None if body is None else json.dumps(body).encode()
            connection.request(method, self._parts.path.rstrip("/") + path, text, self._headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise _refusal(response)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(str(error) or type(error).__name__) from error
        finally:
            connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    """The data of each server-sent event."""
    for line in response:
        field, _, value = line.decode().rstrip("\r\n").partition(":")
        if field == "data":
            yield value.removeprefix(" ")


def _pieces(data: str) -> Iterator[Piece]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise UnavailableError("the server sent an event that is not JSON") from error
    if "error" in event:
        raise BatonError(_message(event))
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        if text := delta.get("reasoning_content"):
            yield Piece(text, is_reasoning=True)
        if text := delta.get("content"):
            yield Piece(text)


def _refusal(response: http.client.HTTPResponse) -> BatonError:
    """The error that a status and OpenAI's error body stand for."""
    text = response.read().decode(errors="replace")
    try:
        message = _message(json.loads(text))
    except ValueError:
        message = text.strip() or str(response.reason)
    if response.status == http.client.NOT_FOUND and not text.strip().startswith("{"):
        message = "has no OpenAI chat API"
    return BatonError(f"HTTP {response.status}: {message}")


def _message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message", error)) if isinstance(error, dict) else str(error or body)
