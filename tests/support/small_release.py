"""A hand-made release in the MIMIC layout with one of every fault, for the tests of preparation and of shards."""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

HOSTILE = "<img src=x onerror=window.hurt=1></script><script>window.hurt=1</script><!--<script>"
"""A text that would run as a script, or end one, on a page that takes it for more than a text."""
KB: list[Any] = [
    {"id": 0, "qid": "Q1", "entity_name": "Ash", "attr": "tree", "image_list": ["Q1.jpg", "Q1_b.png"]},
    {"id": 1, "qid": "Q2", "entity_name": "Birch", "attr": "", "image_list": []},
    {"id": 2, "qid": "Q1", "entity_name": "Ash again", "attr": "x", "image_list": []},
    {"id": 3, "qid": "Q3", "entity_name": "Cédar", "attr": None, "image_list": ["broken.jpg", "Q3%20x.jpg"]},
    {"id": 4, "qid": 5, "entity_name": "Dill", "attr": "herb", "image_list": None},
    {"id": 5, "qid": "Q6", "entity_name": "Elm", "attr": "tree", "image_list": ["lost.jpg"]},
    "no record",
]
TRAIN: list[Any] = [
    {
        "id": "a",
        "sentence": "The ash.",
        "mentions": "ash",
        "answer": "Q1",
        "imgPath": "x/Photo.of.ash.PNG",
        "kind": "t",
    },
    {"id": 7, "sentence": "A birch", "mentions": "birch", "answer": "Q2", "imgPath": "", "year": 1999, "tags": ["z"]},
    {"id": "c", "sentence": "nothing", "mentions": "none", "answer": "nil", "imgPath": ""},
    {"id": "d", "sentence": "nothing", "mentions": "none", "answer": None, "imgPath": ""},
    {"id": "e", "sentence": "unknown", "mentions": "word", "answer": "Q99", "imgPath": ""},
    {"id": "f", "sentence": "no word", "mentions": " ", "answer": "Q1", "imgPath": ""},
    {"id": "g", "sentence": "list", "mentions": ["word"], "answer": "Q1", "imgPath": ""},
    {"sentence": "", "mentions": "cedar", "answer": "Q3", "imgPath": "gone.jpg"},
    {"id": "i", "sentence": "literal name", "mentions": "elm", "answer": "Q6", "imgPath": "literal.name.png"},
    {"id": "j", "sentence": "broken \ud800", "mentions": "elm", "answer": "Q6", "imgPath": ""},
    {"id": "k", "sentence": "bad picture", "mentions": "elm", "answer": "Q6", "imgPath": "broken.jpg"},
    {"id": "l", "sentence": "spaced", "mentions": "elm", "answer": "Q6", "imgPath": "a%20b.jpg"},
]
VALIDATION: list[Any] = [{"id": "v", "sentence": "s", "mentions": "ash", "answer": "Q1", "imgPath": ""}]
TEST: list[Any] = [{"id": "t", "sentence": "s", "mentions": "birch", "answer": "Q2", "imgPath": "Photo.jpg"}]
NUM_INPUTS = len(KB) + len(TRAIN) + len(VALIDATION) + len(TEST)


def image_bytes(size: tuple[int, int], colour: str = "red", form: str = "JPEG", mode: str = "RGB") -> bytes:
    """A plain picture as encoded bytes."""
    buffer = BytesIO()
    Image.new(mode, size, colour).save(buffer, form)
    return buffer.getvalue()


def write_release(folder: Path, records: Mapping[str, list[Any]], images: Mapping[str, bytes]) -> Path:
    """Writes kb / train / dev / test records and pictures (path below the folder: content)."""
    names = {"kb": "kb_entity.json", "train": "T_train.json", "dev": "T_dev.json", "test": "T_test.json"}
    for name in ("kb_image", "mention_image"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for kind, name in names.items():
        (folder / name).write_text(json.dumps(records[kind]))
    for name, content in images.items():
        (folder / name).write_bytes(content)
    return folder


def faulty_release(folder: Path) -> Path:
    """The release of this file's records."""
    images = {
        "kb_image/Q1.jpg": image_bytes((300, 400)),
        "kb_image/Q1_b.png": image_bytes((20, 10), "blue", "PNG"),
        "kb_image/broken.jpg": b"\xff\xd8 no picture",
        "kb_image/Q3 x.jpg": image_bytes((50, 50), "green"),
        "mention_image/Photo.jpg": image_bytes((30, 30)),
        "mention_image/literal.name.png": image_bytes((30, 30), "white", "PNG"),
        "mention_image/broken.jpg": image_bytes((64, 64))[:-200],
        "mention_image/a b.jpg": image_bytes((30, 40)),
    }
    return write_release(folder, {"kb": KB, "train": TRAIN, "dev": VALIDATION, "test": TEST}, images)


def plain_release(folder: Path, num_entities: int, num_train: int) -> Path:
    """Faultless: entity 0 has two pictures, every third one has one; mention n names entity n % num_entities."""
    kb = [
        {"qid": f"Q{row}", "entity_name": f"name {row}", "attr": f"fact {row}", "image_list": _images(row)}
        for row in range(num_entities)
    ]
    files = {f"kb_image/{name}": image_bytes((8, 8), "black") for row in range(num_entities) for name in _images(row)}
    mentions = [
        {"id": f"m{n}", "sentence": f"s {n}", "mentions": f"w{n}", "answer": f"Q{n % num_entities}", "imgPath": ""}
        for n in range(num_train + 4)
    ]
    splits = {"train": mentions[:num_train], "dev": mentions[num_train:-2], "test": mentions[-2:]}
    return write_release(folder, {"kb": kb, **splits}, files)


def _images(row: int) -> list[str]:
    return [f"{row}-{number}.jpg" for number in range(2 if row == 0 else row % 3 == 0)]


def write_colours(folder: Path, answers: Sequence[str]) -> Path:
    """A release without pictures of six entities, with as many mentions in each split as there are answers.

    Args:
        answers: Q0 to Q5, or nil, of a split's mentions.
    """
    words, size = ("red", "green", "blue", "yellow", "purple", "orange"), len(answers)
    kb = [{"qid": f"Q{row}", "entity_name": word, "attr": f"colour {row}"} for row, word in enumerate(words)]
    mentions = [
        {"id": f"m{number}", "sentence": f"a {words[number % 6]} thing", "mentions": words[number % 6]}
        | {"answer": answers[number % size], "imgPath": "", "kind": "odd" if number % 2 else "even"}
        for number in range(3 * size)
    ]
    parts = {name: mentions[k * size : (k + 1) * size] for k, name in enumerate(("train", "dev", "test"))}
    return write_release(folder, {"kb": kb, **parts}, {})
