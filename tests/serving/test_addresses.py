"""Pictures by address: from below what the owner allows, and nothing else is asked for anything."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from starlette.testclient import TestClient

from dsmip.errors import UserError
from dsmip.linking.linker import Linker
from dsmip.serving.addresses import checked_prefix, is_allowed
from dsmip.serving.app import create_app
from dsmip.serving.limits import Limits
from dsmip.serving.served import Source
from tests.support.small_release import image_bytes

PICTURE = image_bytes((20, 16), "blue")


class _Pictures(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/images/blue.jpg":
            self._send(200, PICTURE)
        elif self.path == "/images/large.jpg":
            self._send(200, bytes(60_000))
        elif self.path == "/images/elsewhere.jpg":
            self._send(302, b"", ("Location", "/secret/blue.jpg"))
        else:
            self._send(404, b"")

    def _send(self, status: int, content: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def asked() -> list[str]:
    """The paths that the host of pictures was asked for."""
    return []


@pytest.fixture
def host(asked: list[str]) -> Iterator[str]:
    paths = asked

    class Handler(_Pictures):
        asked = paths

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def open_client(linker: Linker, host: str) -> Iterator[TestClient]:
    limits = Limits(image_bytes=50_000, image_urls=(f"{host}/images/",))
    app = create_app(Source(lambda: linker, lambda: ""), name="colours", limits=limits)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_an_allowed_picture_is_that_picture(open_client: TestClient, linker: Linker, host: str) -> None:
    url = f"{host}/images/blue.jpg"
    expected = [(link.entity_id, pytest.approx(link.score)) for link in linker.link("red", image=PICTURE, top=3)]
    answer = open_client.post("/link", json={"word": "red", "image": url, "top": 3}).json()["mentions"][0]
    assert [(link["entity_id"], link["score"]) for link in answer["links"]] == expected
    query = {"q0": {"query": "red", "limit": 3, "properties": [{"pid": "image", "v": url}]}}
    found = open_client.post("/reconcile", data={"queries": json.dumps(query)}).json()["q0"]["result"]
    assert [(each["id"], each["score"]) for each in found] == expected


@pytest.mark.parametrize(
    ("path", "said", "reached"),
    [
        ("/secret/blue.jpg", "not allowed", False),
        ("/images/../secret/blue.jpg", "not allowed", False),
        ("/images/%2e%2e/secret/blue.jpg", "not allowed", False),
        ("/images/lost.jpg", "status 404", True),
        ("/images/elsewhere.jpg", "status 302", True),  # and where it leads to is not asked
        ("/images/large.jpg", "50000 bytes", True),
    ],
)
def test_other_addresses_are_refused(
    open_client: TestClient, host: str, asked: list[str], path: str, said: str, reached: bool
) -> None:
    answer = open_client.post("/link", json={"word": "red", "image": host + path})
    assert (answer.status_code, answer.json()["field"]) == (413 if "large" in path else 422, "image")
    assert said in answer.json()["message"]
    assert asked == ([path] if reached else [])


def test_a_host_that_is_away(linker: Linker) -> None:
    limits = Limits(image_urls=("http://127.0.0.1:9/",))  # the discard port: nobody listens
    app = create_app(Source(lambda: linker, lambda: ""), name="colours", limits=limits)
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.post("/link", json={"word": "red", "image": "http://127.0.0.1:9/a.jpg"})
    assert (answer.status_code, answer.json()["message"]) == (422, "the address cannot be reached")


@pytest.mark.parametrize(
    "address",
    [
        "http://example.org/images/a.jpg",  # another scheme
        "https://example.org:8443/images/a.jpg",
        "https://example.org.evil.org/images/a.jpg",
        "https://somebody@example.org/images/a.jpg",
        "https://example.org/imagesa.jpg",
        "https://example.org/images/..\\a.jpg",
        "https://example.org:x/images/a.jpg",
        "file:///images/a.jpg",
    ],
)
def test_what_only_looks_allowed(address: str) -> None:
    assert not is_allowed(address, ["https://example.org/images/"])
    assert is_allowed("https://EXAMPLE.org:443/images/b/a.jpg?size=2", ["https://example.org/images/"])


@pytest.mark.parametrize("prefix", ["example.org/", "https://example.org", "https://example.org/a", "ftp://x/"])
def test_a_prefix_ends_where_a_folder_does(prefix: str) -> None:
    with pytest.raises(UserError, match=f"--image-urls {prefix}: give the start of addresses"):
        checked_prefix(prefix)
