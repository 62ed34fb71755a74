"""The demo release: its layout and bytes, and that every mention has exactly the evidence its kind promises."""

import io
import json
from dataclasses import astuple
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat
from pydantic import ValidationError

from data_prep.demo.arms import CHARGES, PATTERNS, Arms, Damage
from data_prep.demo.drawing import photograph, plate
from data_prep.demo.mentions import KINDS, MentionPlan
from data_prep.demo.release import DemoConfig, KindRates, draw_demo, write_demo_release
from data_prep.demo.text import FACTS
from data_prep.demo.world import House
from dsmip.errors import UserError

CONFIG = DemoConfig(seed=3, num_entities=150, num_train=120, num_validation=40, num_test=80, picture_size=32)
# Elements of Arms (by position) that are gone from a damaged picture.
HIDDEN = {"none": set(), "charges": {3, 4}, "border": {6}}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "release"
    write_demo_release(CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def drawn() -> tuple[list[House], list[MentionPlan]]:
    houses, plans = draw_demo(CONFIG)
    return houses, [plan for split in plans.values() for plan in split]


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _named(houses: list[House], word: str) -> set[int]:
    if word.startswith(("the ", "this ", "these ")):
        return set(range(len(houses)))
    return {row for row, house in enumerate(houses) if word == house.name or word in house.name.split()}


def _named_with_facts(houses: list[House], plan: MentionPlan) -> set[int]:
    """Houses that agree with the word and with every fact value found in the sentence itself."""
    words = set(plan.sentence.replace(plan.word, "").replace(",", " ").replace(".", " ").split())
    facts = {(fact, value) for fact, values in FACTS.items() for value in values if value in words}
    return {row for row in _named(houses, plan.word) if facts <= set(houses[row].facts.items())}


def _visible_differences(first: Arms, second: Arms, damage: str) -> int:
    return sum(
        a != b
        for position, (a, b) in enumerate(zip(astuple(first), astuple(second), strict=True))
        if position not in HIDDEN[damage]
    )


def _seen(houses: list[House], plan: MentionPlan, fewer_than: int) -> set[int]:
    """Houses that agree with the word and differ from the picture in fewer than so many visible elements."""
    assert plan.shown is not None
    shown = houses[plan.shown].arms
    return {
        row
        for row in _named(houses, plan.word)
        if _visible_differences(houses[row].arms, shown, plan.damage) < fewer_than
    }


def test_every_kind_has_the_evidence_it_promises(drawn: tuple[list[House], list[MentionPlan]]) -> None:
    houses, plans = drawn
    assert {plan.kind for plan in plans} == set(KINDS)
    for plan in plans:
        by_text = _named_with_facts(houses, plan)
        if plan.kind in ("easy", "text", "missing_picture"):
            assert by_text == {plan.gold}
        if plan.kind == "missing_picture":
            assert plan.shown is None
        elif plan.kind == "text":
            assert plan.shown != plan.gold
            assert plan.gold not in _seen(houses, plan, fewer_than=2)
        else:
            assert plan.shown == plan.gold
            assert houses[plan.gold].has_image
        if plan.kind == "easy":
            assert _seen(houses, plan, fewer_than=1) == {plan.gold}
        elif plan.kind == "picture":
            assert by_text == _named(houses, plan.word)
            assert len(by_text) > 1
        elif plan.kind == "pointing":
            assert plan.gold not in by_text
        elif plan.kind == "both":
            seen = _seen(houses, plan, fewer_than=1)
            assert min(len(by_text), len(seen)) > 1
            assert by_text & seen == {plan.gold}
        if plan.kind in ("picture", "pointing"):
            assert _seen(houses, plan, fewer_than=2) == {plan.gold}


def test_shields_differ_in_two_elements_unless_they_are_twins(drawn: tuple[list[House], list[MentionPlan]]) -> None:
    houses, _ = drawn
    for row, house in enumerate(houses):
        close = [
            other
            for other in range(len(houses))
            if other != row and _visible_differences(house.arms, houses[other].arms, "none") < 2
        ]
        assert close == ([] if house.twin is None else [house.twin])


def test_names_are_shared_by_several_houses(drawn: tuple[list[House], list[MentionPlan]]) -> None:
    houses, _ = drawn
    names = [house.name for house in houses]
    assert min(names.count(name) for name in set(names)) >= 3


def test_files_agree_with_each_other(release: Path) -> None:
    entities = _load(release / "kb_entity.json")
    assert _load(release / "qid2id.json") == {entity["qid"]: entity["id"] for entity in entities}
    assert [entity["id"] for entity in entities] == list(range(CONFIG.num_entities))
    images = {name for entity in entities for name in entity["image_list"]}
    assert images == {path.name for path in (release / "kb_image").iterdir()}
    assert len(images) == CONFIG.num_entities - round(CONFIG.entities_without_picture * CONFIG.num_entities)
    names = {entity["qid"]: entity["entity_name"] for entity in entities}
    sizes = {"train": CONFIG.num_train, "dev": CONFIG.num_validation, "test": CONFIG.num_test}
    mention_images, ids = set(), []
    for split, size in sizes.items():
        records = _load(release / f"DEMO_{split}.json")
        assert len(records) == size
        for record in records:
            assert set(record) == {"id", "sentence", "mentions", "entities", "imgPath", "answer", "kind"}
            assert record["entities"] == names[record["answer"]]
            assert record["mentions"] in record["sentence"]
            assert (record["imgPath"] == "") == (record["kind"] == "missing_picture")
        ids += [record["id"] for record in records]
        mention_images |= {record["imgPath"] for record in records if record["imgPath"]}
    assert len(set(ids)) == len(ids)
    assert mention_images == {path.name for path in (release / "mention_image").iterdir()}


def _answers(config: DemoConfig) -> dict[str, list[int]]:
    _, plans = draw_demo(config)
    return {split: [plan.gold for plan in split_plans] for split, split_plans in plans.items()}


def test_unseen_answers_are_never_answers_in_training_nor_shared_by_validation_and_test() -> None:
    answers = _answers(CONFIG.model_copy(update={"unseen_answers": 1.0}))
    train, validation, test = (set(answers[split]) for split in ("train", "dev", "test"))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_half_of_the_test_answers_are_new_by_default() -> None:
    answers = _answers(CONFIG)
    new = [answer for answer in answers["test"] if answer not in set(answers["train"])]
    assert len(answers["test"]) > len(new) >= CONFIG.num_test / 2


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_seed_decides_every_byte(release: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_demo_release(CONFIG, tmp_path / "again", lambda what, done, total: seen.append((done, total)))
    first, again = _files(release), _files(tmp_path / "again")
    assert first == again
    num_images = sum(name.endswith(".jpg") for name in first)
    assert seen == [(done, num_images) for done in range(1, num_images + 1)]
    write_demo_release(CONFIG.model_copy(update={"seed": 4}), tmp_path / "other")
    other = _files(tmp_path / "other")
    assert other["kb_entity.json"] != first["kb_entity.json"]
    assert other["DEMO_test.json"] != first["DEMO_test.json"]


def test_pictures_are_rgb_jpegs_of_the_size_asked(release: Path) -> None:
    for path in (*(release / "kb_image").iterdir(), *(release / "mention_image").iterdir()):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))


def test_rates_decide_the_kinds(tmp_path: Path) -> None:
    kinds = KindRates(easy=0, text=3, missing_picture=1, picture=0, pointing=0, both=0)
    _, plans = draw_demo(CONFIG.model_copy(update={"kinds": kinds, "unseen_answers": 0.0}))
    counts = {kind: sum(plan.kind == kind for plan in plans["test"]) for kind in KINDS}
    assert counts == {"easy": 0, "text": 60, "missing_picture": 20, "picture": 0, "pointing": 0, "both": 0}


def _pixel_distance(first: bytes, second: bytes) -> float:
    difference = ImageChops.difference(Image.open(io.BytesIO(first)), Image.open(io.BytesIO(second)))
    return max(ImageStat.Stat(difference).mean)


@pytest.mark.parametrize("charge", CHARGES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_worn_charges_cannot_be_told_apart(charge: str, count: int) -> None:
    def photo(shown: str, damage: Damage) -> bytes:
        arms = Arms("pale", "red", "blue", shown, "gold", count, "white")
        return photograph(arms, 64, damage=damage, roughness=0.0, rng=Random(1))

    other = "ball" if charge != "ball" else "star"
    assert photo(charge, "charges") == photo(other, "charges")
    assert _pixel_distance(photo(charge, "none"), photo(other, "none")) > 0.5


def test_a_worn_border_cannot_be_told_apart() -> None:
    def photo(border: str, damage: Damage) -> bytes:
        arms = Arms("fess", "green", "gold", "tree", "white", 1, border)
        return photograph(arms, 64, damage=damage, roughness=0.0, rng=Random(1))

    assert _pixel_distance(photo("red", "border"), photo("", "border")) < 1.0
    assert _pixel_distance(photo("red", "none"), photo("", "none")) > 10.0


def test_every_pattern_and_charge_looks_different() -> None:
    plates = [
        plate(Arms(pattern, "red", "blue", charge, "gold", 1, ""), 64) for pattern in PATTERNS for charge in CHARGES
    ]
    assert len(set(plates)) == len(PATTERNS) * len(CHARGES)


def test_a_used_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds something"):
        write_demo_release(CONFIG, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("wrong", [{"num_entities": 3}, {"colour": "red"}, {"roughness": 9}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DemoConfig.model_validate(wrong)


def test_all_rates_zero_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least one kind"):
        KindRates.model_validate(dict.fromkeys(KINDS, 0))
