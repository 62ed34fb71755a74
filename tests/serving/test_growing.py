"""A served bundle whose entities change: each change is seen by itself, and no request is lost."""

import threading
from collections.abc import Callable
from pathlib import Path

from starlette.testclient import TestClient

import dsmip
from dsmip.serving.app import create_app
from dsmip.serving.served import Source, reloading, stamp_of
from tests.support.scoring.grown import colour_files, exported, record, two_experts


def test_changes_are_seen_and_no_request_is_lost(narrow_backbone: Path, tmp_path: Path) -> None:
    bundle = exported(tmp_path, two_experts(narrow_backbone), [record(number) for number in range(4)])
    entities, images = dsmip.load(bundle).entities, colour_files(tmp_path / "images")
    # Each with what is there then, and what is no more.
    changes: list[tuple[Callable[[], object], str, str]] = [
        (lambda: entities.add([record(7), record(8)], images=images), "Q8", "Q9"),
        (lambda: entities.remove(["Q0", "Q7"]), "Q8", "Q7"),
        (lambda: entities.update([record(1, 1)], images=images), "Q1", "Q0"),
        (entities.compact, "Q1", "Q7"),
        (lambda: entities.add([record(9)], images=images), "Q9", "Q7"),  # deletes what was before
    ]
    source = Source(reloading(lambda: dsmip.load(bundle)), lambda: stamp_of(bundle))
    ends, statuses = threading.Event(), list[int]()
    with TestClient(create_app(source, name="growing", check_seconds=0.05)) as client:

        def ask() -> None:
            while not ends.is_set():
                statuses.append(client.post("/link", json={"word": "blue", "top": 8}).status_code)
                statuses.append(client.get("/entities/Q1/image").status_code)

        clients = [threading.Thread(target=ask) for _ in range(2)]
        for thread in clients:
            thread.start()
        try:
            for change, there, gone in changes:
                opened = client.get("/health/ready").json()["opened"]
                change()
                while client.get("/health/ready").json()["opened"] == opened:
                    pass
                found = client.post("/link", json={"word": "red", "top": 8}).json()["mentions"][0]["links"]
                ids = {link["entity_id"] for link in found}
                assert there in ids
                assert gone not in ids
                assert client.get(f"/entities/{there}").status_code == 200
                assert client.get(f"/entities/{gone}").status_code == 404
        finally:
            ends.set()
            for thread in clients:
                thread.join(60)
    assert len(statuses) > 2
    assert set(statuses) == {200}
