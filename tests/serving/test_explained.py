"""`POST /link` with `explain`, as the page asks it of every system."""

import math
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import dsmip
from dsmip.data.dataset import Dataset
from dsmip.models import systems
from dsmip.serving.app import create_app
from dsmip.serving.served import Source
from tests.support.scoring.linked_runs import finished_run, small_system

QUICK = ("blink", "clip", "mimic")  # the others are slow tests; "dsmip" is asked in test_link_routes.py

UNITS = ["text", "image", "cross"]
PARTS = {"dsmip": ["text", "visual", "multimodal"]} | dict.fromkeys(("mimic", "m3el", "mmoe"), UNITS)  # others: one


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in systems()]
)
def test_what_parts_say_are_numbers(name: str, small_data: Dataset, narrow_backbone: Path, tmp_path: Path) -> None:
    """Also of what a re-ranker has put in another order, and behind its four candidates."""
    linker = dsmip.load(finished_run(tmp_path / "run", small_system(name, narrow_backbone), small_data).folder)
    with TestClient(create_app(Source(lambda: linker, lambda: ""), name=name)) as client:
        for word, top in (("red", 11), ("blue", 1)):
            answer = client.post("/link", json={"word": word, "top": top, "explain": True})
            assert answer.status_code == 200, answer.text
            (found,) = answer.json()["mentions"]
            links, expected = found["links"], linker.link(word, top=top, explain=True)
            assert [link["entity_id"] for link in links] == [link.entity_id for link in expected]
            assert list(expected.parts) == PARTS.get(name, [])
            for number, link in enumerate(links):
                assert {each["name"]: each["score"] for each in link["parts"]} == {
                    part: pytest.approx(scores[number], abs=1e-4) for part, scores in expected.parts.items()
                }
                assert all(math.isfinite(each["score"]) and 0 <= each["share"] <= 1 for each in link["parts"])
        features = client.post("/reconcile", data={"queries": '{"q0": {"query": "red", "limit": 11}}'}).json()
        scores = [each["score"] for each in features["q0"]["result"]]
        assert len(scores) == 11
        assert scores == sorted(scores, reverse=True)
