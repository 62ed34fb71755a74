"""The groups that every report has, on a hand-made release where each value occurs."""

from pathlib import Path
from typing import Any

import pytest

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.data.dataset import Dataset
from dsmip.evaluation.groups import report_groups, rows_by_value
from tests.support.small_release import image_bytes, write_release


def entity(qid: str, name: str, image: str = "") -> dict[str, Any]:
    return {"qid": qid, "entity_name": name, "attr": "a", "image_list": [image] if image else []}


def mention(mention_id: str, word: str, answer: str, image: str = "", /, **groups: str) -> dict[str, Any]:
    return {"id": mention_id, "sentence": "s", "mentions": word, "answer": answer, "imgPath": image, **groups}


KB = [
    entity("Q1", "Jordan", "one.jpg"),
    entity("Q2", "jordan "),
    entity("Q3", "Paris", "one.jpg"),
    entity("Q4", "Steve Jobs"),
    entity("Q5", "Jobs"),
    entity("Q6", "Oslo"),
]
TRAIN = [mention("a", "Paris", "Q3"), mention("b", "the city", "Q3")]
VALIDATION = [mention("c", "The City", "Q6")]
TEST = [
    mention("name of two", "JORDAN", "Q2", "m.jpg"),
    mention("name of one", "Paris", "Q3", "m.jpg"),
    mention("name of another", "Jobs", "Q4"),
    mention("gold of two", "the city", "Q3"),
    mention("gold of one", "capital", "Q6"),
]


def prepared(folder: Path, test: list[dict[str, Any]]) -> Dataset:
    files = {"kb_image/one.jpg": image_bytes((8, 8)), "mention_image/m.jpg": image_bytes((8, 8))}
    records: dict[str, list[Any]] = {"kb": list(KB), "train": list(TRAIN), "dev": list(VALIDATION), "test": list(test)}
    prepare(
        MimicRelease(write_release(folder / "release", records, files)), folder / "data", DatasetOptions(name="groups")
    )
    return Dataset.open(folder / "data")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepared(tmp_path_factory.mktemp("groups"), TEST)


def groups_of(dataset: Dataset, split: str) -> dict[str, dict[str, str]]:
    mentions = list(dataset.mentions(split))
    groups = report_groups(dataset, mentions, dataset)
    return {mention.mention_id: each for mention, each in zip(mentions, groups, strict=True)}


def test_a_word_is_ambiguous_when_names_or_golds_give_it_several_entities(dataset: Dataset) -> None:
    assert {mention_id: each["ambiguity"] for mention_id, each in groups_of(dataset, "test").items()} == {
        "name of two": "ambiguous",
        "name of one": "unique",
        "name of another": "ambiguous",
        "gold of two": "ambiguous",  # the other gold is a validation mention's
        "gold of one": "unique",
    }


def test_seen_golds_are_golds_of_the_train_split(dataset: Dataset) -> None:
    found = {mention_id: each["gold_seen"] for mention_id, each in groups_of(dataset, "test").items()}
    assert {mention_id for mention_id, value in found.items() if value == "seen"} == {"name of one", "gold of two"}
    assert set(found.values()) == {"seen", "unseen"}
    assert groups_of(dataset, "validation")["c"]["gold_seen"] == "unseen"
    assert {each["gold_seen"] for each in groups_of(dataset, "train").values()} == {"seen"}


def test_who_has_a_picture(dataset: Dataset) -> None:
    assert {mention_id: each["picture"] for mention_id, each in groups_of(dataset, "test").items()} == {
        "name of two": "mention only",
        "name of one": "mention+entity",
        "name of another": "none",
        "gold of two": "entity only",
        "gold of one": "none",
    }


def test_groups_of_the_data_set_stand_as_they_are(tmp_path: Path) -> None:
    test = [mention("x", "Paris", "Q3", ambiguity="rare", topic="city"), mention("y", "Oslo", "Q6")]
    found = groups_of(prepared(tmp_path, test), "test")
    assert found["x"] == {"ambiguity": "rare", "topic": "city", "gold_seen": "seen", "picture": "entity only"}
    assert found["y"] == {"gold_seen": "unseen", "picture": "none"}


def test_rows_by_value() -> None:
    found = rows_by_value([{"kind": "b"}, {}, {"kind": "a"}, {"kind": "b"}], "kind")
    assert list(found.items()) == [
        ("", [False, True, False, False]),
        ("a", [False, False, True, False]),
        ("b", [True, False, False, True]),
    ]
