"""A hand-made release with one of each flaw that an inspection finds."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.small_release import image_bytes, write_release

KB: list[Any] = [
    {"qid": "Q1", "entity_name": "Ash", "attr": "tree", "image_list": ["a.jpg"]},
    {"qid": "Q2", "entity_name": "ash ", "attr": "TREE", "image_list": ["b.jpg"]},
    {"qid": "Q3", "entity_name": "Birch", "attr": "very " * 100, "image_list": ["plain.jpg"]},
    {"qid": "Q4", "entity_name": "Ash", "attr": "powder", "image_list": ["a_copy.jpg"]},
    {"qid": "Q5", "entity_name": "<script>alert(1)</script>", "attr": "", "image_list": []},
    {"qid": "Q6", "entity_name": "Elm", "attr": "tree", "image_list": ["plain2.jpg"]},
]


def _mention(name: str, word: str, sentence: str, gold: str, image: str = "") -> dict[str, str]:
    return {"id": name, "mentions": word, "sentence": sentence, "answer": gold, "imgPath": image}


TRAIN = [
    _mention("t0", "ash", "The ash is grey.", "Q1", "a.jpg"),
    _mention("t1", "ash", "The ash is  GREY.", "Q1"),
    _mention("t2", "ash", "The ash is grey.", "Q4", "c.jpg"),
    _mention("t3", "oak", "No such tree.", "Q2", "plain.jpg"),
]
VALIDATION = [_mention("v0", "birch", "A birch " + "and a birch " * 40, "Q3", "c.jpg")]
TEST = [
    _mention("e0", "elm", "the ash is grey.", "Q6", "c_small.jpg"),
    _mention("e1", "birch", "", "Q5", "plain3.jpg"),
    _mention("e2", "Ash", "Ash!", "Q1", "b.jpg"),
]


def noise(seed: int, size: int = 64, quality: int = 90) -> bytes:
    """A picture of 4 x 4 random colours; other sizes and qualities of one seed look the same."""
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def planted_release(folder: Path) -> Path:
    """Writes it in the MIMIC layout."""
    images = {
        "kb_image/a.jpg": noise(1),
        "kb_image/a_copy.jpg": noise(1),
        "kb_image/b.jpg": noise(2),
        "kb_image/plain.jpg": image_bytes((32, 32), "white"),
        "kb_image/plain2.jpg": image_bytes((48, 32), "white"),
        "mention_image/a.jpg": noise(1),
        "mention_image/b.jpg": noise(2),
        "mention_image/c.jpg": noise(3),
        "mention_image/c_small.jpg": noise(3, 48, 70),
        "mention_image/plain.jpg": image_bytes((32, 33), "white"),
        "mention_image/plain3.jpg": image_bytes((40, 32), "white"),
    }
    return write_release(folder, {"kb": KB, "train": TRAIN, "dev": VALIDATION, "test": TEST}, images)
