"""`POST /link`: what it answers, and how it refuses."""

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

import dsmip
from dsmip.linking.linker import Linker
from dsmip.runs.run import Run
from dsmip.serving.app import create_app
from dsmip.serving.served import Source
from tests.support.scoring.linked_runs import break_long_texts
from tests.support.small_release import image_bytes

PICTURE = image_bytes((20, 16), "red")
BASE64 = base64.b64encode(PICTURE).decode()


def bomb() -> bytes:
    """A small PNG of 400 million pixels."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


def as_linked(linker: Linker, top: int, **mention: Any) -> list[tuple[str, Any]]:
    return [(link.entity_id, pytest.approx(link.score, abs=1e-5)) for link in linker.link(top=top, **mention)]


def pairs(answer: Any, number: int = 0) -> list[tuple[str, float]]:
    return [(each["entity_id"], each["score"]) for each in answer.json()["mentions"][number]["links"]]


@pytest.mark.parametrize("image", [BASE64, f"data:image/jpeg;base64,{BASE64}"])
def test_one_mention_gets_the_linkers_own_links(client: TestClient, linker: Linker, image: str) -> None:
    asked = {"word": "red", "sentence": "a red thing", "image": image, "top": 3}
    answer = client.post("/link", json=asked)
    assert answer.status_code == 200, answer.text
    assert pairs(answer) == as_linked(linker, 3, word="red", sentence="a red thing", image=PICTURE)
    (found,) = answer.json()["mentions"]
    assert (found["word"], found["is_nil"], found["reason"]) == ("red", False, None)
    assert found["links"][0]["name"] == linker.link("red", "a red thing", PICTURE)[0].name
    assert found["links"][0]["parts"] == []


def test_a_form_with_a_file_is_the_same(client: TestClient, linker: Linker) -> None:
    form = {"word": "red", "sentence": "a red thing", "top": "2"}
    answer = client.post("/link", data=form, files={"image": ("x.jpg", PICTURE)})
    assert pairs(answer) == as_linked(linker, 2, word="red", sentence="a red thing", image=PICTURE)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"image": base64.b64encode(b"no picture").decode()}, "image: "),
        ({"image": "/etc/passwd!"}, "image: is no base64"),
        ({"image": "http://x.example/a.jpg"}, "image: no address is fetched"),
        ({"image": base64.b64encode(b"x" * 60_000).decode()}, "image: a picture may have 50000 bytes"),
        ({"sentence": "r" * 501}, "sentence: a text may have 500 characters"),
        ({"word": " "}, "word: empty"),
    ],
)
def test_many_keep_their_order_and_a_bad_one_stops_no_other(
    client: TestClient, linker: Linker, bad: dict[str, Any], reason: str
) -> None:
    mentions = [
        {"id": "a", "word": "red"},
        {"id": "b", "word": "blue", **bad},
        {"id": "c", "word": "green", "sentence": "a green thing"},
    ]
    answer = client.post("/link", json={"mentions": mentions, "top": 1})
    assert answer.status_code == 200
    found = answer.json()["mentions"]
    assert [each["id"] for each in found] == ["a", "b", "c"]
    assert [len(each["links"]) for each in found] == [1, 0, 1]
    assert found[1]["reason"].startswith(reason)
    assert pairs(answer, 2) == as_linked(linker, 1, word="green", sentence="a green thing")


def test_a_mention_that_scores_nan_is_refused_and_stops_no_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = dsmip.load(run.folder, model="text")
    break_long_texts(monkeypatch, 20)
    broken = {"word": "blue", "sentence": "a blue thing " * 10}
    with TestClient(create_app(Source(lambda: text, lambda: ""), name="text")) as client:
        answer = client.post("/link", json={"mentions": [{"word": "red"}, broken], "top": 1})
        refused = client.post("/link", json=broken)
    found = answer.json()["mentions"]
    assert [len(each["links"]) for each in found] == [1, 0]
    assert pairs(answer) == as_linked(text, 1, word="red")
    assert (refused.status_code, refused.json()["field"]) == (422, "mention")
    assert refused.json()["message"].startswith("the model scores it as NaN")
    assert found[1]["reason"] == f"mention: {refused.json()['message']}"
    assert str(run.folder) not in answer.text + refused.text


def test_explained_links_have_every_experts_score(client: TestClient, linker: Linker) -> None:
    answer = client.post("/link", json={"word": "red", "top": 3, "explain": True})
    links = answer.json()["mentions"][0]["links"]
    for link in links:
        parts = {each["name"]: each for each in link["parts"]}
        assert list(parts) == ["text", "visual", "multimodal"]
        assert parts[link["expert"]]["score"] == pytest.approx(link["score"], abs=1e-4)
        assert all(0 <= each["share"] <= 1 for each in link["parts"])


@pytest.mark.parametrize(
    ("asked", "field", "message"),
    [
        ({"word": " "}, "word", "empty"),
        ({}, "word", "Field required"),
        ({"word": "red", "sentense": "x"}, "sentense", "Extra inputs"),
        ({"word": "red", "top": 0}, "top", "greater than or equal to 1"),
        ({"word": "red", "top": 9}, "top", "may get 8 entities"),
        ({"word": 3}, "word", "valid string"),
        ({"word": "r" * 501}, "word", "500 characters"),
        ({"word": "red", "sentence": "r" * 501}, "sentence", "500 characters"),
        ({"word": "red", "image": "http://x.example/a.jpg"}, "image", "no address is fetched"),
        ({"word": "red", "image": "/etc/passwd!"}, "image", "no base64"),
        ({"word": "red", "image": "data:image/png,x"}, "image", "data:image/...;base64"),
        ({"word": "red", "image": base64.b64encode(bomb()).decode()}, "image", "too large"),
        ({"word": "red", "image": base64.b64encode(b"GIF89a").decode()}, "image", "unreadable"),
        ({"word": "red", "min_confidence": 0.5}, "min_confidence", "not calibrated"),
        ({"mentions": []}, "mentions", "at least 1"),
        ({"mentions": [{"word": "red"}, {"words": "x"}]}, "mentions.1.word", "Field required"),
    ],
)
def test_what_cannot_be_used_is_named(client: TestClient, asked: dict[str, Any], field: str, message: str) -> None:
    answer = client.post("/link", json=asked)
    assert answer.status_code == 422, answer.text
    assert answer.json()["field"] == field
    assert message in answer.json()["message"]


@pytest.mark.parametrize(
    ("asked", "field", "message"),
    [
        ({"mentions": [{"word": "red"}] * 5}, "mentions", "4 mentions"),
        ({"word": "red", "image": base64.b64encode(b"x" * 60_000).decode()}, "image", "50000 bytes"),
    ],
)
def test_what_is_too_much_is_named(client: TestClient, asked: dict[str, Any], field: str, message: str) -> None:
    answer = client.post("/link", json=asked)
    assert (answer.status_code, answer.json()["field"]) == (413, field)
    assert message in answer.json()["message"]


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"{", "application/json", "is no JSON"),
        (b"[1]", "application/json", "is no JSON object"),
        (b"[" * 100_000, "application/json", "is no JSON"),
        (b"word=red", "application/x-www-form-urlencoded", "send application/json or multipart/form-data"),
        (b"\xff\xfe", "application/json", "is no JSON"),
    ],
)
def test_bodies_of_other_kinds_are_refused(client: TestClient, body: bytes, kind: str, message: str) -> None:
    answer = client.post("/link", content=body, headers={"content-type": kind})
    assert answer.status_code == 422
    assert message in answer.json()["message"]


def test_bodies_are_bounded_announced_or_not(client: TestClient) -> None:
    announced = client.post("/link", json={"word": "red", "sentence": "x" * 300_000})
    unannounced = client.post(
        "/link", content=(b"x" * 50_000 for _ in range(10)), headers={"content-type": "application/json"}
    )
    for answer in (announced, unannounced):
        assert answer.status_code == 413
        assert "200000 bytes" in answer.json()["message"]


@pytest.mark.parametrize("path", ["/link", "/reconcile"])
def test_forms_are_bounded_as_well(client: TestClient, path: str) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + b"x" * 500_000
    kind = {"content-type": "multipart/form-data; boundary=x"}
    chunks = (form[start : start + 50_000] for start in range(0, len(form), 50_000))
    assert client.post(path, content=chunks, headers=kind).status_code == 413
    assert client.post(path, data={"queries": "x" * 300_000}).status_code == 413


@pytest.mark.parametrize("path", ["/link", "/reconcile"])
def test_a_form_that_is_none_is_refused(client: TestClient, path: str) -> None:
    answer = client.post(path, content=b"nothing", headers={"content-type": "multipart/form-data; boundary=x"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["message"]
    answer = client.post(path, content=b"nothing", headers={"content-type": "multipart/form-data"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["message"]


def test_halves_of_characters_are_refused(client: TestClient) -> None:
    """JSON may hold what no text may: half of a surrogate pair, as a value or as a name."""
    half = "\\ud800"
    for body in (f'{{"word": "{half}"}}', f'{{"word": "red", "{half}": 1}}', f'{{"mentions": [{{"word": "{half}"}}]}}'):
        answer = client.post("/link", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 422, answer.text
    for queries in (f'{{"{half}": {{"query": "red"}}}}', f'{{"q0": {{"query": "{half}"}}}}'):
        assert client.post("/reconcile", data={"queries": queries}).status_code == 422


def test_answers_repeat_nothing_that_was_sent(client: TestClient) -> None:
    secret = "s3cret-of-a-client"
    for asked in ({"word": 1, "sentence": secret}, {"word": "red", "image": secret}, {"word": "red", "top": secret}):
        assert secret not in client.post("/link", json=asked).text


def test_a_calibrated_linker_says_how_sure_it_is_and_what_is_not_there(calibrated: Linker) -> None:
    with TestClient(create_app(Source(lambda: calibrated, lambda: ""), name="calibrated")) as client:
        expected = calibrated.link("red", "a red thing")
        (found,) = client.post("/link", json={"word": "red", "sentence": "a red thing"}).json()["mentions"]
        assert found["known"] == pytest.approx(expected.known, abs=1e-4)
        assert found["links"][0]["confidence"] == pytest.approx(expected[0].confidence, abs=1e-4)
        assert [each["confidence"] for each in found["links"][1:]] == [None] * 4
        for threshold, is_nil in ((0.0, False), (1.0, True)):
            asked = {"word": "red", "sentence": "a red thing", "min_confidence": threshold}
            assert client.post("/link", json=asked).json()["mentions"][0]["is_nil"] is is_nil
        queries = {"q0": {"query": "red"}}
        (first, *_) = client.post("/reconcile", data={"queries": json.dumps(queries)}).json()["q0"]["result"]
        linked = calibrated.link("red")
        assert first["score"] == pytest.approx(100 * (linked[0].confidence or 0), abs=0.02)
        assert first["match"] is (not linked.is_nil and (linked[0].confidence or 0) >= 0.5)
        assert client.get("/health/ready").json()["calibrated"] is True
