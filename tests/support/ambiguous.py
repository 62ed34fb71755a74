"""A data set of words that name several entities, for the tests of enhancement."""

from pathlib import Path
from typing import Any

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.data.dataset import Dataset
from tests.support.small_release import image_bytes, write_release

KB = (("Elm", "a tree with leaves"), ("Elm", "a street in a town"), ("Oak", "a tree with acorns"), ("Elm Oak", ""))
SENTENCES = (
    ("Elm", "The elm lost its leaves.", 0),
    ("elm", "They walked down the street.", 1),
    ("Oak", "Acorns below.", 2),
    ("Ash", "Nobody knows.", 2),
)


def ambiguous(folder: Path, shift: int = 0) -> Dataset:
    """Four entities, and twelve mentions of each split; `shift` moves all golds."""
    kb = [
        {"qid": f"Q{row}", "entity_name": name, "attr": text, "image_list": [f"Q{row}.jpg"]}
        for row, (name, text) in enumerate(KB)
    ]
    files = {f"kb_image/Q{row}.jpg": image_bytes((16, 16), "green") for row in range(len(KB))}
    files["mention_image/m.jpg"] = image_bytes((16, 16))
    records: dict[str, list[Any]] = {"kb": kb, "train": [], "dev": [], "test": []}
    for split in ("train", "dev", "test"):
        for number in range(12):
            word, sentence, gold = SENTENCES[number % 4]
            answer = f"Q{(gold + shift) % len(KB)}"
            name = f"{split}{number}"
            image = "m.jpg" if number % 2 else ""
            # of each kind the sentences differ, so that no question is asked for two mentions
            text = f"{sentence} No. {name}"
            records[split].append({"id": name, "sentence": text, "mentions": word, "answer": answer, "imgPath": image})
    release = write_release(folder / "release", records, files)
    prepare(MimicRelease(release), folder / "data", DatasetOptions(name="ambiguous"))
    return Dataset.open(folder / "data")
