"""A stand-in of the Hugging Face hub's HTTP interface, as far as its client asks it to store and fetch a model."""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_somebody"
ATTRIBUTES = ".gitattributes"
"""What the hub itself puts into a new repository, and needs there."""


@dataclass
class Hub:
    """A running hub.

    Attributes:
        endpoint: Its address.
        models: Contents of files by path, by owner/name.
        commits: How many each of them has had.
        private: The models that were made private.
        asked: Method and path of all requests.
    """

    endpoint: str = ""
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: Counter[str] = field(default_factory=Counter)
    private: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Starts one on a free port of this machine; it knows the one token `TOKEN`, without which it shows nothing."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        else:
            self._of_model(path.removeprefix("/api/models/").strip("/").split("/"), body)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        there = name in self.state.models
        self.state.models.setdefault(name, {ATTRIBUTES: b""})
        if asked.get("private") or asked.get("visibility") == "private":
            self.state.private.add(name)
        self._send(409 if there else 200, {"url": f"{self.state.endpoint}/{name}", "name": name})

    def _of_model(self, words: list[str], body: bytes) -> None:
        name, what = "/".join(words[:2]), words[2] if len(words) > 2 else "revision"
        files = self.state.models.get(name)
        if files is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif what == "preupload":
            asked = [each["path"] for each in json.loads(body)["files"]]
            self._send(
                200, {"files": [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in asked]}
            )
        elif what == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            self.state.commits[name] += 1
            commit = self._commit(name)
            self._send(200, {"commitUrl": f"{self.state.endpoint}/{name}/commit/{commit}", "commitOid": commit})
        elif what == "tree":
            self._send(200, [_entry(path, content) for path, content in files.items()])
        elif what == "resolve":
            self._file(files.get("/".join(words[4:])), self._commit(name))
        else:
            siblings = [{"rfilename": each} for each in files]
            self._send(200, {"_id": "1", "id": name, "modelId": name, "sha": self._commit(name), "siblings": siblings})

    def _commit(self, name: str) -> str:
        """The last one of a model."""
        return f"{self.state.commits[name]:040x}"

    def _file(self, content: bytes | None, commit: str) -> None:
        if content is None:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        self._send(200, content, {"ETag": f'"{_hash(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})

    def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "oid": _hash(content), "size": len(content), "path": path}


def _hash(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
