"""A served system of fused experts: explained links and reconciliation, as the page and OpenRefine ask for them."""

import json
import math
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import dsmip
from dsmip.data.dataset import Dataset
from dsmip.runs.load_config import changed
from dsmip.serving.app import create_app
from dsmip.serving.served import Source
from tests.support.scoring.linked_runs import finished_run, small_system

EXPERTS = ["text", "visual", "multimodal"]


@pytest.mark.parametrize(
    "scoring", ["mixture", *(pytest.param(each, marks=pytest.mark.slow) for each in ("choice", "product"))]
)
def test_what_each_expert_says_of_a_link_is_there(
    scoring: str, small_data: Dataset, narrow_backbone: Path, tmp_path: Path
) -> None:
    config = changed(small_system("dsmip", narrow_backbone), {"system": {"gate": {"preset": "confidence"}}})
    run = finished_run(tmp_path / "run", changed(config, {"system": {"gate": {"scoring": scoring}}}), small_data)
    linker = dsmip.load(run.folder)
    with TestClient(create_app(Source(lambda: linker, lambda: ""), name="fused")) as client:
        answer = client.post("/link", json={"word": "red", "sentence": "a red thing", "top": 11, "explain": True})
        assert answer.status_code == 200, answer.text
        links = answer.json()["mentions"][0]["links"]
        queries = {"q0": {"query": "red", "properties": [{"pid": "sentence", "v": "a red thing"}]}}
        (result, *_) = client.post("/reconcile", data={"queries": json.dumps(queries)}).json()["q0"]["result"]
    parts = [{each["name"]: each["score"] for each in link["parts"]} for link in links]
    for name in EXPERTS:  # each is a distribution over the whole knowledge base of eleven
        assert sum(math.exp(each[name]) for each in parts) == pytest.approx(1, abs=1e-4)
    for link, each in zip(links, parts, strict=True):
        assert min(each.values()) - 1e-4 <= link["score"] <= max(each.values()) + 1e-4
        if scoring == "choice":
            assert each[link["expert"]] == pytest.approx(link["score"], abs=1e-4)
    assert [each["id"] for each in result["features"] if each["id"] in EXPERTS] == EXPERTS
