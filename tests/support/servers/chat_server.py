"""A real chat-completions server on this machine whose answers a test writes."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server sends: a status, a body, headers. `slow`: only when the server is closed."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    slow: bool = False


def says(text: str) -> Reply:
    """A chat completion."""
    return Reply(body=json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())


@dataclass
class ChatServer:
    """A running server.

    Attributes:
        url: Up to /v1.
        requests: What was asked, in the order of arrival: bodies with their headers under "headers".
    """

    url: str
    requests: list[dict[str, Any]]


@contextmanager
def chat_server(reply: Callable[[str, int], Reply]) -> Iterator[ChatServer]:
    """A server for the time of the context; `reply` gets the question and how many were asked before, in a thread."""
    requests: list[dict[str, Any]] = []
    closed, lock = threading.Event(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(requests)
                requests.append({**body, "path": self.path, "headers": dict(self.headers)})
            sent = reply(body["messages"][0]["content"], number)
            if sent.slow:
                closed.wait(60)
            self.send_response(sent.status)
            for name, value in {**sent.headers, "Content-Length": str(len(sent.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent.body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that does not wait any longer is no error."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield ChatServer(f"http://127.0.0.1:{server.server_address[1]}/v1", requests)
    finally:
        closed.set()
        server.shutdown()
        server.server_close()
        thread.join()
