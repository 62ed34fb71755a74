"""The reconciliation service, asked as OpenRefine asks."""

import base64
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from starlette.testclient import TestClient

from dsmip.data.records import Mention
from dsmip.linking.linker import Linker
from dsmip.linking.links import Link, Links
from dsmip.serving.app import create_app
from dsmip.serving.reconciliation import results
from dsmip.serving.served import Source
from tests.support.small_release import image_bytes

PICTURE = image_bytes((20, 16), "blue")


def asked(client: TestClient, queries: dict[str, Any]) -> Any:
    """A batch as OpenRefine posts it."""
    return client.post("/reconcile", data={"queries": json.dumps(queries)})


def test_the_manifest_says_where_everything_is(client: TestClient) -> None:
    manifest = client.get("/reconcile").json()
    assert "0.2" in manifest["versions"]
    assert {"name", "identifierSpace", "schemaSpace", "view", "preview", "suggest", "extend"} <= manifest.keys()
    service = manifest["suggest"]["entity"]
    path = (service["service_url"] + service["service_path"]).removeprefix("http://testserver")
    assert [each["name"] for each in client.get(path, params={"prefix": "pur"}).json()["result"]] == ["purple"]
    view = manifest["view"]["url"].removeprefix("http://testserver").replace("{{id}}", "Q1")
    assert client.get(view).json()["entity_id"] == "Q1"


def test_a_batch_has_an_answer_by_key_with_the_linkers_order(client: TestClient, linker: Linker) -> None:
    properties = [
        {"pid": "sentence", "v": "a blue thing"},
        {"pid": "image", "v": "data:image/jpeg;base64," + base64.b64encode(PICTURE).decode()},
        {"pid": "P31", "v": {"id": "Q5"}},
    ]
    queries = {"q0": {"query": "blue", "limit": 3, "properties": properties}, "q1": {"query": "red", "type": "entity"}}
    answer = asked(client, queries).json()
    expected = [link.entity_id for link in linker.link("blue", "a blue thing", PICTURE, top=3)]
    assert [each["id"] for each in answer["q0"]["result"]] == expected
    assert len(answer["q1"]["result"]) == 5
    first = answer["q0"]["result"][0]
    assert first["type"] == [{"id": "entity", "name": "Entity"}]
    assert first["match"] is False  # nothing is calibrated
    assert {each["id"] for each in first["features"]} == {"score", "text", "visual", "multimodal"}
    by_get = client.get("/reconcile", params={"queries": json.dumps(queries)}).json()
    assert [each["id"] for each in by_get["q0"]["result"]] == expected


def test_the_draft_of_1_0_answers_a_list(client: TestClient, linker: Linker) -> None:
    conditions = [
        {"matchType": "name", "propertyValue": "blue"},
        {"matchType": "property", "propertyId": "sentence", "propertyValue": "a blue thing"},
    ]
    body = {"queries": [{"conditions": conditions, "limit": 2}, {"conditions": conditions[:1]}]}
    results = client.post("/reconcile/match", json=body).json()["results"]
    expected = [link.entity_id for link in linker.link("blue", "a blue thing", top=2)]
    assert [each["id"] for each in results[0]["candidates"]] == expected
    assert len(results) == 2


def links_of(scores: list[float], confidence: float | None) -> Links:
    links = [Link(f"Q{row}", row, "red", "", score) for row, score in enumerate(scores)]
    return Links(Mention("", "red", "", "", -1), (replace(links[0], confidence=confidence), *links[1:]))


def test_scores_of_a_calibrated_model_are_on_one_scale_and_fall(calibrated: Linker) -> None:
    """OpenRefine sorts candidates by their scores, and takes the first one alone for a match."""
    expected = calibrated.link("blue", "a blue thing", top=5)
    properties = [{"pid": "sentence", "v": "a blue thing"}]
    conditions = [
        {"matchType": "name", "propertyValue": "blue"},
        {"matchType": "property", "propertyId": "sentence", "propertyValue": "a blue thing"},
    ]
    with TestClient(create_app(Source(lambda: calibrated, lambda: ""), name="calibrated")) as client:
        batch = asked(client, {"q0": {"query": "blue", "properties": properties}, "q1": {"query": "red", "limit": 8}})
        draft = client.post("/reconcile/match", json={"queries": [{"conditions": conditions}]})
    for found in (batch.json()["q0"]["result"], draft.json()["results"][0]["candidates"]):
        assert [each["id"] for each in found] == [link.entity_id for link in expected]
        per_cent = 100 * (expected[0].confidence or 0)
        assert [each["score"] for each in found] == pytest.approx([per_cent / n for n in (1, 2, 3, 4, 5)], abs=0.02)
        raw = [each["features"][0]["value"] for each in found]
        assert raw == pytest.approx([link.score for link in expected], abs=1e-5)


@pytest.mark.parametrize("scores", [[250.0, 240.0, 240.0, 3.0], [-1.0, -2.0, -2.0, -9.0], [0.2, 0.1, 7.0, 6.0]])
@pytest.mark.parametrize("confidence", [0.9, 0.004, 1e-7])
def test_whatever_the_model_scores_the_links_keep_their_order(scores: list[float], confidence: float) -> None:
    found = [each["score"] for each in results(links_of(scores, confidence))]
    assert found[0] == pytest.approx(100 * confidence)
    assert all(0 < after < before for before, after in pairwise(found))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3.5, 3.5, -1.0], [3.5, 3.5, -1.0]),
        ([0.2, 0.1, 7.0, -3.0], [0.2, 0.1, 0.1, -3.0]),  # a re-ranker's candidates, and what its first stage says
    ],
)
def test_scores_that_are_not_calibrated_are_the_models_but_never_rise(
    scores: list[float], expected: list[float]
) -> None:
    found = results(links_of(scores, None))
    assert [each["score"] for each in found] == expected
    assert [each["features"][0]["value"] for each in found] == scores


BLUE = "data:image/jpeg;base64," + base64.b64encode(PICTURE).decode()


@pytest.mark.parametrize(
    ("properties", "mention"),
    [
        ({"sentence": {"id": "Q2", "name": "a blue thing"}}, {"sentence": "a blue thing"}),
        ({"sentence": 1995}, {"sentence": "1995"}),
        ({"sentence": 2.5}, {"sentence": "2.5"}),
        ({"sentence": True}, {"sentence": "true"}),
        ({"sentence": ["", None, {"id": "Q2", "name": "a blue thing"}, "another"]}, {"sentence": "a blue thing"}),
        ({"sentence": []}, {}),
        ({"sentence": {"id": "Q2", "name": ""}}, {}),
        ({"sentence": 0, "image": {"id": "Q2", "name": BLUE}}, {"sentence": "0", "image": PICTURE}),
        ({"image": ["", BLUE]}, {"image": PICTURE}),
    ],
)
def test_cells_that_are_no_texts_are_read(
    client: TestClient, linker: Linker, properties: dict[str, Any], mention: dict[str, Any]
) -> None:
    """Cells of a column that is reconciled come as entities, numbers as numbers, and several values as a list."""
    expected = [(link.entity_id, pytest.approx(link.score, abs=1e-5)) for link in linker.link("blue", **mention, top=3)]
    query = {"query": "blue", "limit": 3, "properties": [{"pid": pid, "v": v} for pid, v in properties.items()]}
    conditions = [{"matchType": "name", "propertyValue": "blue"}]
    for pid, value in properties.items():
        conditions.append({"matchType": "property", "propertyId": pid, "propertyValue": value})
    batch = asked(client, {"q0": query, "q1": query}).json()
    draft = client.post("/reconcile/match", json={"queries": [{"conditions": conditions, "limit": 3}]}).json()
    for found in (batch["q0"]["result"], batch["q1"]["result"], draft["results"][0]["candidates"]):
        assert [(each["id"], each["score"]) for each in found] == expected


@pytest.mark.parametrize(
    ("pid", "value"),
    [("image", 3), ("image", True), ("image", {"id": "Q2"}), ("sentence", {"id": "Q2"}), ("sentence", [["a"]])],
)
def test_cells_without_a_text_are_refused(client: TestClient, pid: str, value: Any) -> None:
    properties = [{"pid": pid, "v": value}]
    answer = asked(client, {"q0": {"query": "red", "properties": properties}})
    assert (answer.status_code, answer.json()["field"]) == (422, f"q0.{pid}")
    answer = asked(client, {"q0": {"query": "red", "properties": properties}, "q1": {"query": "red"}})
    assert [len(each["result"]) for each in answer.json().values()] == [0, 5]


def test_entities_are_extended_and_previewed(client: TestClient) -> None:
    proposed = client.get("/reconcile/extend/propose", params={"type": "entity"}).json()["properties"]
    assert [each["id"] for each in proposed] == ["name", "attributes"]
    extend = {"ids": ["Q1", "Q99"], "properties": [{"id": "attributes"}, {"id": "unknown"}]}
    answer = client.post("/reconcile", data={"extend": json.dumps(extend)}).json()
    assert answer["meta"] == [{"id": "attributes", "name": "Attributes"}]
    assert answer["rows"] == {"Q1": {"attributes": [{"str": "colour 1"}]}, "Q99": {"attributes": []}}
    assert client.get("/reconcile", params={"extend": json.dumps(extend)}).json() == answer
    card = client.get("/reconcile/preview", params={"id": "Q1"})
    assert "green" in card.text
    assert "frame-ancestors" not in card.headers["content-security-policy"]
    assert client.get("/reconcile/preview", params={"id": "Q99"}).status_code == 404


def test_every_origin_may_ask_and_only_here(client: TestClient) -> None:
    origin = {"Origin": "http://127.0.0.1:3333"}
    assert client.get("/reconcile", headers=origin).headers["access-control-allow-origin"] == "*"
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    assert client.options("/reconcile", headers=preflight).status_code == 200
    assert "access-control-allow-origin" not in client.get("/entities/Q1", headers=origin).headers


@pytest.mark.parametrize(
    ("queries", "field"),
    [
        ("{", "queries"),
        ("[]", "queries"),
        ("{}", "queries"),
        ('{"q0": 1}', "queries"),
        ('{"q0": {}}', "q0.query"),
        ('{"q0": {"query": "red", "limit": "x"}}', "q0.limit"),
        ('{"q0": {"query": "red", "properties": 1}}', "q0.properties"),
        ('{"q0": {"query": "red", "properties": [{"pid": "image", "v": "http://x.example/a"}]}}', "q0.image"),
    ],
)
def test_queries_that_are_none_are_named(client: TestClient, queries: str, field: str) -> None:
    answer = client.post("/reconcile", data={"queries": queries})
    assert (answer.status_code, answer.json()["field"]) == (422, field)


def test_a_bad_cell_stops_no_other(client: TestClient) -> None:
    """An empty one, and pictures at addresses that cannot be had."""
    properties = [{"pid": "image", "v": "http://x.example/a"}]
    queries = {"q0": {"query": ""}, "q1": {"query": "red"}, "q2": {"query": "red", "properties": properties}}
    answer = asked(client, queries)
    assert answer.status_code == 200, answer.text
    assert [len(answer.json()[key]["result"]) for key in queries] == [0, 5, 0]
    many = asked(client, {f"q{number}": {"query": "red"} for number in range(5)})
    assert (many.status_code, many.json()["field"]) == (413, "queries")


def test_a_post_without_anything_is_refused(client: TestClient) -> None:
    assert client.post("/reconcile", data={}).json()["field"] == "queries"
    assert client.post("/reconcile/match", json={"queries": 3}).json()["field"] == "queries"
    answer = client.post("/reconcile/match", json={"queries": [{"conditions": 3}]})
    assert answer.json()["field"] == "queries.0.conditions"
    assert client.post("/reconcile", data={"extend": "{}"}).json()["field"] == "extend"
