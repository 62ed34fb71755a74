"""Fixtures that several test files share: a tiny prepared data set and a narrow backbone."""

import json
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a hub; read when the library is imported

import pytest
import torch
from hypothesis import settings

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.runs.load_config import parse_config
from dsmip.runs.run import Run
from ray_jobs.cluster import environment  # noqa: F401  (before any test imports Ray)
from tests.support.encoders.backbones import NARROW_BACKBONE
from tests.support.object_store import ObjectStore, free_port, running_store, variables
from tests.support.paths import ROOT
from tests.support.small_release import image_bytes, write_release

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "grey", "pink", "brown", "cyan", "white")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several processes (`-n 2`): one has all modules of the shared Ray; modules stay whole."""
    from tests.support.scheduling import WholeModules

    return WholeModules(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the shared Ray come first: they are the longest of what one process has."""
    items.sort(key=lambda item: "ray_cluster" not in getattr(item, "fixturenames", ()))


settings.register_profile("untimed", deadline=None)  # seconds of an example say how busy the machine is
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """11 entities (three of four with a picture), 23 / 7 / 8 mentions of two kinds, some with a picture."""
    folder = tmp_path_factory.mktemp("small")
    kb = [
        {
            "qid": f"Q{row}",
            "entity_name": colour,
            "attr": f"colour {row}",
            "image_list": [f"Q{row}.jpg"] * (row % 4 > 0),
        }
        for row, colour in enumerate(COLOURS)
    ]
    files = {f"kb_image/Q{row}.jpg": image_bytes((16, 16), colour) for row, colour in enumerate(COLOURS)}
    mentions = []
    for number in range(38):
        row = number * 7 % len(COLOURS)
        mentions.append(
            {
                "id": f"m{number}",
                "sentence": f"a {COLOURS[row]} thing, number {number}",
                "mentions": COLOURS[row],
                "answer": f"Q{row}",
                "imgPath": f"m{number}.jpg" if number % 3 else "",
                "kind": "odd" if number % 2 else "even",
            }
        )
        files[f"mention_image/m{number}.jpg"] = image_bytes((20, 16), COLOURS[row])
    records: dict[str, list[Any]] = {"kb": kb, "train": mentions[:23], "dev": mentions[23:30], "test": mentions[30:]}
    prepare(
        MimicRelease(write_release(folder / "release", records, files)), folder / "data", DatasetOptions(name="small")
    )
    return Dataset.open(folder / "data")


@pytest.fixture(scope="session")
def narrow_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of two thin layers per tower."""
    path = tmp_path_factory.mktemp("backbone") / "narrow.json"
    path.write_text(json.dumps(NARROW_BACKBONE))
    return path


@pytest.fixture(scope="session")
def small_config(narrow_backbone: Path) -> ExperimentConfig:
    """DSMIP with three small experts: text and visual frozen, multimodal with prompts."""
    return parse_config(
        {
            "model": "dsmip",
            "backbone": {"architecture": str(narrow_backbone)},
            "system": {
                "experts": {"text": {}, "visual": {}, "multimodal": {"prompt_length": 2, "prompt_depth": 2}},
                "width": 8,
                "gate": {"picture": "clip", "width": 8},
            },
            "train": {"epochs": 2, "batch_size": 8},
        }
    )


@pytest.fixture(scope="module")
def run(small_data: Dataset, small_config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose parts are finished and know nothing."""
    made = Run.create(tmp_path_factory.mktemp("finished") / "run", small_config, small_data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for name in made.part_names:
            made.save_part(name, made.system.build_part(name, small_config, with_encoder=True), {})
        made.save_part("dsmip", made.system.build_whole(small_config), {})
    return made


@pytest.fixture(scope="session", autouse=True)
def store_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of the tests' object store, its clients' variables, and a cache folder of the tests' own.

    Set before anything starts, as Ray's workers inherit them; the server itself starts when a test asks for it.
    """
    folder = tmp_path_factory.mktemp("store")
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in {**variables(port, folder), "DSMIP_CACHE": str(folder / "cache")}.items():
            patch.setenv(name, value)
        yield port


@pytest.fixture(scope="session")
def object_store(store_port: int) -> Iterator[ObjectStore]:
    """A real S3 server, in a process of its own, that this process and Ray's workers reach."""
    with running_store(store_port) as store:
        yield store


@pytest.fixture
def bucket(object_store: ObjectStore) -> str:
    """A fresh prefix in the object store, as a URI."""
    return f"{object_store.uri}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A quiet Ray of this process with 4 CPUs, whatever the machine has; jobs use it instead of starting one."""
    from ray_jobs.cluster.local import start_local

    # isort: split
    import ray

    variables = pytest.MonkeyPatch()
    variables.delenv("RAY_ADDRESS", raising=False)
    variables.setenv("PYTHONPATH", str(ROOT))  # workers find what tests give them
    variables.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    variables.setenv("RAY_worker_maximum_startup_concurrency", "16")
    if "RAY_worker_niceness" not in os.environ:
        variables.setenv("RAY_worker_niceness", "0")  # Ray's 15 starves the workers beside any other load
    start_local(num_cpus=4, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
        variables.undo()
