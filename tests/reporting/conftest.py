"""A run of random weights whose names, sentences, ids and groups are hostile, evaluated and calibrated."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.evaluation.index_builder import OpenedEvaluation
from dsmip.evaluation.report import evaluate_model
from dsmip.runs.run import Run
from tests.support.small_release import HOSTILE, image_bytes, write_release

NAMES = ("red", "green", "blue", "yellow", "purple", "orange", "grey", "pink", "brown", "cyan", "red", HOSTILE)
NUM_MENTIONS = 24  # of each split


@pytest.fixture(scope="session")
def made_run(small_config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve entities, two of one name; every third mention and every fourth entity without a picture."""
    folder = tmp_path_factory.mktemp("reported")
    colours = [name if name.isalpha() else "white" for name in NAMES]
    kb = [
        {"qid": f"Q{row}", "entity_name": name, "attr": f"{name}, number {row}"}
        | {"image_list": [f"Q{row}.jpg"] * (row % 4 > 0)}
        for row, name in enumerate(NAMES)
    ]
    images = {f"kb_image/Q{row}.jpg": image_bytes((16, 16), colour) for row, colour in enumerate(colours)}
    mentions = []
    for number in range(3 * NUM_MENTIONS):
        row = number * 7 % len(NAMES)
        name = NAMES[row]
        mention_id = f"m{number}" if name.isalpha() else f"m{number} {HOSTILE}"
        mention = {"id": mention_id, "sentence": f"a {name} thing, number {number}", "mentions": name}
        mention |= {"answer": f"Q{row}", "imgPath": f"m{number}.jpg" if number % 3 else ""}
        mentions.append(mention | {"kind": HOSTILE if number % 5 == 0 else "odd" if number % 2 else "even"})
        images[f"mention_image/m{number}.jpg"] = image_bytes((20, 16), colours[row])
    parts = [mentions[start : start + NUM_MENTIONS] for start in range(0, 3 * NUM_MENTIONS, NUM_MENTIONS)]
    records: dict[str, list[Any]] = dict(zip(("kb", "train", "dev", "test"), (kb, *parts), strict=True))
    prepare(
        MimicRelease(write_release(folder / "release", records, images)), folder / "data", DatasetOptions(name="small")
    )
    run = Run.create(folder / "run", small_config, Dataset.open(folder / "data"))
    history = [{"epoch": epoch, "loss": 2.0 / (1 + epoch), "mrr": 0.1 * epoch} for epoch in range(4)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for name in run.part_names:
            part = run.system.build_part(name, small_config, with_encoder=True)
            run.save_part(name, part, {"best": history[3], "history": history})
        run.save_part("dsmip", run.system.build_whole(small_config), {"history": history, "warnings": [HOSTILE]})
    cpu = torch.device("cpu")
    evaluate_model(OpenedEvaluation(run, "validation", "dsmip"), cpu)
    for model in ("dsmip", *run.part_names):
        evaluate_model(OpenedEvaluation(run, "test", model), cpu)
    return run.folder


@pytest.fixture
def reported(made_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, without what a model needs: weights, features and indexes."""
    return shutil.copytree(
        made_run, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors", "features", "index")
    )
