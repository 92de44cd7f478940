"""A server of a few lines with a child process, run by itself: `python tiny_server.py PORT [stubborn]`."""

from __future__ import annotations

import http.server
import signal
import subprocess
import sys


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers /health, and /version as JSON."""

    def do_GET(self) -> None:
        body = {"/health": b"ok", "/version": b'{"version": "0.1"}'}.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *arguments: object) -> None:
        """Nothing to tell."""


def main() -> None:
    port, *modes = sys.argv[1:]
    # The child leaves the session, as daemons do, and never looks at its parent.
    child = [sys.executable, "-c", "import signal; signal.pause()"]
    subprocess.Popen(child, start_new_session="stubborn" in modes)
    if "stubborn" in modes:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("listening", flush=True)
    http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
