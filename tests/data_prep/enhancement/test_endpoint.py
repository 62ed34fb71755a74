"""`dsmip enhance --chooser endpoint` against a real server: slow, failing, talking nonsense, gone; and interrupted."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from data_prep.enhancement.answers import AnswerFile, check_prompt, number_in
from data_prep.enhancement.choosers import Question
from data_prep.enhancement.endpoint import KEY_VARIABLE, Endpoint, EndpointAway, EndpointOptions
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import SPLITS
from dsmip.errors import UserError, no_room
from ray_jobs.local_jobs.enhance import EnhanceOptions, enhance_data
from ray_jobs.terminal.display import Display
from tests.support.full_disk import small_files
from tests.support.servers.chat_server import ChatServer, Reply, chat_server, says

NUM_QUESTIONS = 18  # mentions of three splits with two candidates


def enhanced(data: Dataset, out: Path, server: ChatServer, prompt: Path | None = None, **options: Any) -> Dataset:
    chosen = EndpointOptions(server.url, options.pop("model", "m-1"), **{"timeout": 20.0, "wait": 0.01, **options})
    enhance_data(data.location, str(out), EnhanceOptions(endpoint=chosen, prompt=prompt), Display())
    return Dataset.open(out)


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "enhancement/answers.jsonl").read_text().splitlines()]


def knows(question: str, number: int) -> Reply:
    """The number of the street, always; the first question of all has no descriptions."""
    found = re.search(r"(\d)\. Elm: a street", question)
    return says(f"{found[1]}. \ud83d" if found else "1")  # half a surrogate pair, as JSON may hold one


def test_a_model_chooses_and_its_answers_are_kept(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sesame")
    with chat_server(knows) as server:
        made = enhanced(data, tmp_path / "out", server, at_once=3)
    found = {mention.mention_id: mention.desc for split in SPLITS for mention in made.mentions(split)}
    assert [found[f"test{number}"] for number in range(4)] == [*["a street in a town"] * 2, "a tree with acorns", ""]
    asked = [request for request in server.requests if "Sentence:" in request["messages"][0]["content"]]
    assert len(asked) == NUM_QUESTIONS
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    assert {(request["model"], request["headers"]["Authorization"]) for request in asked} == {("m-1", "Bearer sesame")}
    assert "The elm lost its leaves. No. test0" in "".join(each["messages"][0]["content"] for each in asked)
    kept = answers(tmp_path / "out")
    assert len(kept) == NUM_QUESTIONS
    assert {each["answer"] for each in kept} <= {"1. \ud83d", "2. \ud83d"}
    settings = json.loads((tmp_path / "out/enhancement/settings.json").read_text())
    assert settings["model"] == "m-1"
    assert "{candidates}" in settings["prompt"]
    assert made.manifest.choices["mention_desc"].startswith("endpoint m-1, settings ")
    assert "sesame" not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json*"))


def test_what_passes_is_asked_again(data: Dataset, tmp_path: Path) -> None:
    fails = (Reply(500), Reply(429, headers={"Retry-After": "0.01"}), Reply(503), Reply(slow=True))

    def reply(question: str, number: int) -> Reply:
        return fails[number - 1] if 1 <= number <= len(fails) else knows(question, number)

    with chat_server(reply) as server:
        enhanced(data, tmp_path / "out", server, at_once=1, timeout=2.0)
    asked = [request["messages"][0]["content"] for request in server.requests]
    assert asked[1 : 2 + len(fails)] == [asked[1]] * (1 + len(fails))
    assert len(answers(tmp_path / "out")) == NUM_QUESTIONS


def test_an_endpoint_that_fails_midway_loses_nothing(data: Dataset, tmp_path: Path) -> None:
    with (
        chat_server(lambda question, number: knows(question, number) if number < 6 else Reply(502)) as server,
        pytest.raises(EndpointAway, match=r"has failed 3 times: HTTP 502") as error,
    ):
        enhanced(data, tmp_path / "out", server, at_once=1, retries=2)
    assert error.value.exit_code == 1
    assert not (tmp_path / "out/manifest.json").exists()
    kept = answers(tmp_path / "out")
    assert len(kept) == 5
    with (tmp_path / "out/enhancement/answers.jsonl").open("a") as stream:
        stream.write('{"question": "cut o')  # as a killed process may leave it
    with pytest.raises(UserError, match="was begun with other settings"), chat_server(knows) as server:
        enhanced(data, tmp_path / "out", server, model="m-2")
    with chat_server(knows) as server:
        enhanced(data, tmp_path / "out", server)
    assert len(server.requests) == 1 + NUM_QUESTIONS - len(kept)
    assert answers(tmp_path / "out")[: len(kept)] == kept


def test_as_many_questions_as_wanted_are_under_way_at_a_time(data: Dataset, tmp_path: Path) -> None:
    three, lock, busy, most = threading.Barrier(3), threading.Lock(), 0, 0

    def reply(question: str, number: int) -> Reply:
        nonlocal busy, most
        if number:
            with lock:
                busy, most = busy + 1, max(most, busy + 1)
            three.wait(timeout=30)  # fewer never meet: the server then drops them
            with lock:
                busy -= 1
        return knows(question, number)

    with chat_server(reply) as server:
        enhanced(data, tmp_path / "out", server, at_once=3, retries=0)
    assert most == 3
    assert len(answers(tmp_path / "out")) == NUM_QUESTIONS


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(body=b"<html>hello</html>"), r"no chat completion: '<html>hello</html>'"),
        (Reply(body=b'{"choices": []}'), "no chat completion"),
        (Reply(body=b'{"choices": [{"message": {"content": null}}]}'), "no chat completion"),
        (Reply(401, b"wrong key sesame"), rf"refuses: HTTP 401: wrong key \*\*\*; see .*{KEY_VARIABLE}"),
        (Reply(404, b"no such model"), "refuses: HTTP 404: no such model; see --url, --model"),
        (Reply(307, headers={"Location": "http://127.0.0.1:9/"}), "refuses: HTTP 307"),
    ],
)
def test_nonsense_ends_at_once_and_makes_nothing(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: Reply, message: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sesame")
    with chat_server(lambda *_: reply) as server, pytest.raises(UserError, match=message):
        enhanced(data, tmp_path / "out", server)
    assert len(server.requests) == 1
    assert not (tmp_path / "out").exists()


def test_an_endpoint_that_is_away_ends_before_anything_is_made(data: Dataset, tmp_path: Path) -> None:
    with chat_server(knows) as server:
        pass
    with pytest.raises(EndpointAway, match=r"has failed 2 times: .*refused"):
        enhanced(data, tmp_path / "out", server, retries=1)
    assert not (tmp_path / "out").exists()


def test_a_model_that_names_no_number_is_found_out_early(data: Dataset, tmp_path: Path) -> None:
    with (
        chat_server(lambda *_: says("I would say the one of the tree.")) as server,
        pytest.raises(UserError, match=r"10 of 10 answers name no candidate by number, such as 'I would say"),
    ):
        enhanced(data, tmp_path / "out", server, at_once=1)
    assert len(answers(tmp_path / "out")) == 10
    with chat_server(lambda question, number: knows(question, number) if number % 4 else says("Hm.")) as server:
        made = enhanced(data, tmp_path / "out", server, at_once=1)
    assert len(server.requests) == 1 + NUM_QUESTIONS  # what was of no use is asked again
    chosen = [mention.desc for split in SPLITS for mention in made.mentions(split) if mention.word.lower() == "elm"]
    assert (chosen.count("a street in a town"), chosen.count("")) == (14, 4)


def test_a_question_of_ones_own(data: Dataset, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{candidates}\nWhich is the {word} of {sentence}? JSON {{}}")
    with chat_server(knows) as server:
        enhanced(data, tmp_path / "out", server, prompt)
    text = server.requests[-1]["messages"][0]["content"]
    assert text.startswith("1. Elm: ")
    assert text.endswith("? JSON {}")
    for wrong in ("{word}{sentence}", "{word}{sentence}{candidates}{gold}", "{word}{sentence}{candidates}{", "{0}"):
        with pytest.raises(UserError, match=r"a prompt has each of \{word\}, \{sentence\}, \{candidates\}"):
            check_prompt(wrong, "--prompt")


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        *[("2", 2), (" **3**.", 3), ("0", 0), ("Number 2 fits best", 2), ("2. Elm: 1850", 2), ("1 or", 1)],
        *[("4", None), ("none", None), ("either 1 or 2", None), ("", None), ("2nd", None), ("9" * 20, None)],
    ],
)
def test_the_number_in_an_answer(answer: str, number: int | None) -> None:
    assert number_in(answer, 3) == number


@pytest.mark.parametrize("wait", ["nan", "-1", "soon"])
def test_a_wait_that_is_no_time_is_none(wait: str) -> None:
    def reply(question: str, number: int) -> Reply:
        return says("1") if number else Reply(429, headers={"Retry-After": wait})

    with chat_server(reply) as server:
        assert Endpoint(EndpointOptions(server.url, "m", wait=0.01)).ask("?") == "1"


def test_a_full_disk_names_the_folder_of_the_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with small_files(1 << 10), pytest.raises(OSError, match=str(tmp_path)) as caught:
        AnswerFile(path).add("digest", Question("m", "word", "sentence", ()), "1" * (1 << 12), 1)
    assert no_room(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/v1",
        "localhost:8000",
        "file:///etc",
        "http://user:secret@h/v1",
        "http://h:x/v1",
        "http://a b/v1",
        "http://[::1",
    ],
)
def test_addresses_that_cannot_be(url: str) -> None:
    with pytest.raises(UserError, match="--url"):
        Endpoint(EndpointOptions(url, "m"))


def test_a_key_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "two\nlines")
    with pytest.raises(UserError, match=f"{KEY_VARIABLE}: holds characters that no key has"):
        Endpoint(EndpointOptions("http://localhost/v1", "m"))
