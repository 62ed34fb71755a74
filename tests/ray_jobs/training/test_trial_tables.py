"""The feature tables of trials: shared by runs, of a view the rows of whole splits, made again when they are gone."""

import json
import shutil
from pathlib import Path

import pytest
import ray
import torch

from data_prep.build.view import make_view
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.encoders.shared_tables.places import FOLDER
from dsmip.models.dsmip import GATE
from dsmip.runs.load_config import to_yaml
from dsmip.runs.run import Run
from ray_jobs.training.trial import SPLITS, PartTables, cache_features, files_here, load_tables

CPU = torch.device("cpu")
PARTS = ("text", GATE)


def finished(folder: Path, config: ExperimentConfig, data: Dataset) -> Run:
    run = Run.create(folder, config, data)
    for name in run.part_names:
        run.save_part(name, run.system.build_part(name, config, with_encoder=True), {})
    return run


def tables_of(run: Run) -> dict[str, PartTables]:
    where = (run.storage.location, run.dataset.location, to_yaml(run.config))
    in_a_worker = ray.remote(cache_features)
    return dict(zip(PARTS, ray.get([in_a_worker.remote(*where, part, part, None) for part in PARTS]), strict=True))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_trials_of_a_view_read_the_tables_of_another_run(
    small_data: Dataset, small_config: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_data.folder, tmp_path / "data", ignore=shutil.ignore_patterns(FOLDER))
    whole = Dataset.open(tmp_path / "data")
    tables_of(finished(tmp_path / "one", small_config, whole))
    view = make_view(whole.folder, tmp_path / "view", 0.5, seed=0)
    run = finished(tmp_path / "other", small_config, view)
    tables, place = tables_of(run), whole.folder / FOLDER
    assert len(list(place.glob("*.safetensors"))) == len(PARTS) * len(SPLITS)
    assert not (run.folder / "features").exists()

    shared = place / f"{Path(tables['text'].cached[KB]).name}.safetensors"
    shared.unlink()  # somebody has made room meanwhile
    for _ in range(2):
        paths = {part: files_here(run, run.config, part, tables[part], CPU) for part in PARTS}
        found = load_tables(json.dumps(paths), PARTS, "cpu", view.location)
        assert {split: len(table) for split, table in found.items()} == {"train": 12, "validation": 7, KB: 11}
    assert shared.is_file()
    assert "are damaged (the file is missing)" in capsys.readouterr().err
