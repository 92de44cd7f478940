"""A scripted OpenAI-compatible server on a real port, for tests of `baton chat`."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# How long a server takes to notice that it is to stop.
POLL_S = 0.01


class FakeOpenAI:
    """Answers each chat request with the next of `answers`: pieces of text, an error, or a text that never ends.

    Attributes:
        requests: the bodies of the chat requests, with the bearer token as "key".
        hung_up: set when a client has closed an answer that does not end.
    """

    def __init__(self) -> None:
        self.answers: list[list[str] | tuple[int, str]] = []
        self.endless = False
        self.requests: list[dict[str, Any]] = []
        self.hung_up = threading.Event()
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        self.requests.append({**body, "key": handler.headers.get("authorization")})
        answer = self.answers.pop(0)
        if isinstance(answer, tuple):
            send(handler, answer[0], {"error": {"message": answer[1]}})
            return
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.end_headers()
        try:
            for text in answer:
                self._event(handler, json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}))
            while self.endless:
                self._event(handler, json.dumps({"choices": [{"index": 0, "delta": {"content": ""}}]}))
        except ConnectionError:
            self.hung_up.set()
            return
        self._event(handler, "[DONE]")

    def _event(self, handler: BaseHTTPRequestHandler, data: str) -> None:
        handler.wfile.write(f"data: {data}\n\n".encode())


@contextlib.contextmanager
def openai_server() -> Iterator[FakeOpenAI]:
    fake = FakeOpenAI()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            send(self, 200, {"data": [{"id": "demo"}]})

        def do_POST(self) -> None:
            fake.answer(self)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=[POLL_S])
        thread.start()
        try:
            yield fake
        finally:
            fake.endless = False
            server.shutdown()
            thread.join()


def send(handler: BaseHTTPRequestHandler, status: int, body: Any) -> None:
    handler.send_response(status)
    handler.send_header("content-type", "application/json")
    handler.end_headers()
    handler.wfile.write(json.dumps(body).encode())
