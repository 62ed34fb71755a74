"""What cross-modal experts are for: entities whose picture alone is told by a mention's text, and the reverse."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.data.dataset import Dataset
from dsmip.runs.load_config import parse_config
from dsmip.runs.run import Run
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import train_part
from tests.support.small_release import write_release

COLOURS = ("red", "green", "blue", "yellow", "black")
FLAGS = [(left, right) for left in COLOURS for right in COLOURS]
FORMS = ("{} then {}", "first {}, then {}", "{} on the left, {} on the right")


def flag(left: str, right: str) -> bytes:
    picture = Image.new("RGB", (16, 16), left)
    picture.paste(right, (8, 0, 16, 16))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def flags(folder: Path) -> Dataset:
    """25 flags, each of two entities whose names and attributes say nothing of its colours.

    One of the two is a gold of training, the other one of validation.
    """
    kb = [
        {"qid": f"Q{row}", "entity_name": f"flag {row}", "attr": f"number {row}", "image_list": [f"{row % 25}.png"]}
        for row in range(50)
    ]
    files = {f"kb_image/{row}.png": flag(*colours) for row, colours in enumerate(FLAGS)}
    records: dict[str, list[Any]] = {"kb": kb, "train": [], "dev": [], "test": []}
    for split, first in (("train", 0), ("dev", 25), ("test", 25)):
        for row, colours in enumerate(FLAGS, first):
            for number, form in enumerate(FORMS):
                name, sentence = f"{split}{row}.{number}", form.format(*colours)
                mention = {"id": name, "sentence": sentence, "mentions": "flag", "answer": f"Q{row}", "imgPath": ""}
                records[split].append(mention)
    release = MimicRelease(write_release(folder / "release", records, files))
    prepare(release, folder / "data", DatasetOptions(name="flags"))
    return Dataset.open(folder / "data")


@pytest.mark.slow
def test_flags_that_a_text_describes_are_found_by_text_image_and_not_by_text(
    narrow_backbone: Path, tmp_path: Path
) -> None:
    """Mean rank of the golds of validation, where 1.5 is the best (two have the same picture).

    A text expert can learn which entities are golds of training, and is left with chance among the 25 others.
    """
    data, found = flags(tmp_path), {}
    for part in ("text", "text_image"):
        tree = {
            "model": "dsmip",
            "backbone": {"architecture": str(narrow_backbone)},
            "system": {
                "experts": {"text": {"tune": "full"}, "text_image": {"tune": "full"}},
                "use": ["text", "text_image"],
                "width": 16,
            },
            "train": {
                "epochs": 30,
                "batch_size": 20,
                "learning_rate": 3e-3,
                "extra_negatives": 15,
                "validate_every": 15,
            },
        }
        run = Run.create(tmp_path / part, parse_config(tree), data)
        found[part] = train_part(run, part, LocalContext(tmp_path / f"{part}-work")).best
    assert found["text_image"]["mean_rank"] < 4
    assert found["text"]["mean_rank"] > 10
