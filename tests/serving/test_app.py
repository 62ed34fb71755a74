"""Health, figures, entities, pages and their headers; busy and changed services."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

from dsmip.errors import UserError
from dsmip.linking.linker import Linker
from dsmip.linking.links import Links
from dsmip.serving.app import create_app
from dsmip.serving.limits import Limits
from dsmip.serving.served import Served, Source, stamp_of
from tests.support.cluster.ray_heads import wait_until


def test_health_has_facts(client: TestClient) -> None:
    assert client.get("/health/live").json() == {"status": "alive"}
    ready = client.get("/health/ready").json()
    assert (ready["status"], ready["system"], ready["entities"]) == ("ready", "dsmip", 11)
    assert ready["experts"] == ["text", "visual", "multimodal"]


def test_figures_are_prometheus_text_with_a_bounded_number_of_labels(client: TestClient) -> None:
    client.post("/link", json={"word": "red"})
    client.post("/link", json={"word": ""})
    for number in range(3):
        client.get(f"/nowhere/{number}")
    text = client.get("/metrics").text
    assert re.search(r'dsmip_requests_total\{path="/link",status="200"\} [1-9]', text)
    assert re.search(r'dsmip_requests_total\{path="/link",status="422"\} [1-9]', text)
    assert re.search(r'dsmip_requests_total\{path="other",status="404"\} 3.0', text)
    assert "dsmip_entities 11.0" in text
    assert "nowhere" not in text


def test_entities_by_id_by_name_and_their_pictures(client: TestClient) -> None:
    entity = client.get("/entities/Q1").json()
    assert (entity["entity_id"], entity["name"], entity["attributes"]) == ("Q1", "green", "colour 1")
    picture = client.get(entity["image"])
    assert picture.headers["content-type"] == "image/jpeg"
    assert picture.content.startswith(b"\xff\xd8")
    found = client.get("/entities", params={"query": "RE"}).json()
    assert [each["name"] for each in found] == ["red", "green", "grey"]  # those that begin with it first
    assert client.get("/entities/Q0/image").status_code == 404  # it has none
    missing = client.get("/entities/Q99")
    assert (missing.status_code, missing.json()) == (404, {"message": "no such entity", "field": None})
    assert client.get("/nowhere").json() == {"message": "Not Found", "field": None}
    assert client.put("/link").json() == {"message": "Method Not Allowed", "field": None}
    assert client.get("/entities", params={"query": "e", "limit": 1000}).json()["field"] == "query.limit"


def test_pages_need_nothing_from_elsewhere_and_escape_what_they_show(client: TestClient) -> None:
    for path in ("/", "/docs", "/page/page.js", "/page/page.css"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", answer.text)
    page = client.get("/").text
    assert "colours &lt;b&gt;" in page
    assert "a &lt;i&gt;red&lt;/i&gt; thing" in page
    assert "<script>" not in page
    assert "onclick" not in page
    assert client.get("/page/../app.py").status_code == 404
    assert "POST /link" in client.get("/docs").text
    assert client.get("/openapi.json").json()["paths"]["/link"]["post"]["requestBody"]["content"].keys() == {
        "application/json",
        "multipart/form-data",
    }


class SlowLinker:
    """A linker whose mentions wait until they are let."""

    def __init__(self, linker: Linker) -> None:
        self._linker, self.begun, self.let = linker, threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._linker, name)

    def __len__(self) -> int:
        return len(self._linker)

    def link_many(self, *arguments: Any, **options: Any) -> Iterator[Links]:
        self.begun.set()
        assert self.let.wait(60)
        return self._linker.link_many(*arguments, **options)


def test_who_comes_while_too_many_wait_is_told_when_to_come_again(linker: Linker) -> None:
    slow = SlowLinker(linker)
    limits = Limits(waiting=1, retry_after=7)
    source = Source(lambda: slow, lambda: "")  # type: ignore[arg-type, return-value]
    with TestClient(create_app(source, name="slow", limits=limits)) as client:
        answers: list[Any] = []

        def ask() -> None:
            answers.append(client.post("/link", json={"word": "red"}))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        assert slow.begun.wait(60)
        threads[1].start()
        while client.get("/health/ready").json()["waiting"] < 1:
            pass
        refused = client.post("/link", json={"word": "blue"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
        slow.let.set()
        for thread in threads:
            thread.join(60)
        assert [each.status_code for each in answers] == [200, 200]


@contextmanager
def listening(app: Any) -> Iterator[tuple[str, int]]:
    """The address of a real server of the application, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, 60, "the server does not start")
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.mark.parametrize("path", ["/link", "/reconcile"])
def test_clients_that_hang_up_leave_nothing_behind(linker: Linker, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """One in the middle of its upload, one while it waits: no traceback, and its place in the queue is free again."""
    slow = SlowLinker(linker)
    app = create_app(Source(lambda: slow, lambda: ""), name="slow")  # type: ignore[arg-type, return-value]
    queries: dict[str, Any] = {"data": {"queries": '{"q0": {"query": "red"}}'}}
    body = httpx.Request("POST", "http://x/", **({"json": {"word": "red"}} if path == "/link" else queries))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {body.headers['content-type']}\r\nContent-Length: "
    with listening(app) as address, httpx.Client(base_url=f"http://{address[0]}:{address[1]}") as client:

        def waiting() -> int:
            return int(client.get("/health/ready").json()["waiting"])

        with socket.create_connection(address) as first, socket.create_connection(address) as second:
            first.sendall(f"{head}{len(body.content)}\r\n\r\n".encode() + body.content)
            assert slow.begun.wait(60)
            second.sendall(f"{head}{len(body.content)}\r\n\r\n".encode() + body.content)
            wait_until(lambda: waiting() == 1, 60, "it does not wait")
            second.close()
            wait_until(lambda: waiting() == 0, 60, "it still waits")
        with socket.create_connection(address) as third:
            third.sendall(f"{head}999\r\n\r\n".encode() + body.content)
        gone = re.compile(rf'requests_total{{path="{path}",status="4\d\d"}} (\d+)')

        def counted() -> int:
            return sum(int(each) for each in gone.findall(client.get("/metrics").text))

        wait_until(lambda: counted() == 3, 60, "they are not counted")
        slow.let.set()
        assert client.post("/link", json={"word": "red"}).status_code == 200
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


def test_a_changed_source_is_opened_again_and_a_damaged_one_changes_nothing(linker: Linker) -> None:
    stamp, said = ["1"], list[str]()
    opened: list[Linker] = []

    def open_source() -> Linker:
        if stamp[0] == "damaged":
            raise UserError("bundle.json is damaged")
        if stamp[0] == "odd":
            raise RuntimeError("no such thing")
        opened.append(linker)
        return linker

    served = Served(Source(open_source, lambda: stamp[0]), said.append)
    assert not served.check()
    stamp[0] = "damaged"
    assert not served.check()
    assert said == ["what is served has changed and cannot be opened; the old one goes on: bundle.json is damaged"]
    stamp[0] = "odd"
    assert not served.check()
    assert "the old one goes on: no such thing" in said[1]
    stamp[0] = "2"
    assert served.check()
    assert not served.check()
    assert len(opened) == 2
    assert said[2].startswith("opened again: Linker(dsmip of ")


def test_a_stamp_changes_with_what_is_written_last(tmp_path: Path) -> None:
    assert stamp_of(tmp_path / "nowhere") == stamp_of("s3://bucket/run") == stamp_of("hf-hub:owner/name") == ""
    (tmp_path / "dsmip").mkdir()
    (tmp_path / "dsmip" / "part.json").write_text("{}")
    first = stamp_of(tmp_path)
    (tmp_path / "dsmip" / "part.json").write_text("{ }")
    assert first != stamp_of(tmp_path) != ""
    assert stamp_of(tmp_path.as_uri()) == stamp_of(tmp_path)


@pytest.mark.parametrize("path", ["/link", "/reconcile/match"])
def test_errors_of_the_server_say_nothing_of_it(linker: Linker, path: str) -> None:
    class Broken(SlowLinker):
        def link_many(self, *arguments: Any, **options: Any) -> Iterator[Links]:
            raise UserError("/home/somebody/run scores NaN")

    broken = Broken(linker)
    source = Source(lambda: broken, lambda: "")  # type: ignore[arg-type, return-value]
    bodies = {"/link": {"word": "red"}}
    conditions = [{"matchType": "name", "propertyValue": "red"}]
    bodies["/reconcile/match"] = {"queries": [{"conditions": conditions}]}  # type: ignore[dict-item]
    with TestClient(create_app(source, name="broken"), raise_server_exceptions=False) as client:
        answer = client.post(path, json=bodies[path])
    assert answer.status_code == 500
    assert "somebody" not in answer.text
