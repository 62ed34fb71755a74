"""A run that was moved together with the weights that its configuration names: by the way from one to the other."""

import json
import shutil
from pathlib import Path

import pytest

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.encoders.clip import Backbone
from dsmip.errors import UserError
from dsmip.runs.load_config import changed, job_config, key_text
from dsmip.runs.moved_files import found_beside
from dsmip.runs.run import Run
from ray_jobs.jobs.tune_gate import sweep_key, tune_gate
from ray_jobs.training.trials import draw_trials
from tests.support.displays import Lines


@pytest.fixture
def made(tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset) -> Run:
    """A run beside its backbone, of which both files have absolute names."""
    home = tmp_path / "here"
    home.mkdir()
    architecture = shutil.copy(small_config.backbone.architecture, home / "narrow.json")
    Backbone.build(str(architecture), None).save_weights(home / "weights.safetensors")
    backbone = {"architecture": str(architecture), "pretrained": str(home / "weights.safetensors")}
    return Run.create(home / "run", changed(small_config, {"backbone": backbone}), small_data)


def test_a_run_that_was_moved_with_its_backbone_opens_and_goes_on(made: Run, tmp_path: Path) -> None:
    before = sweep_key(draw_trials(made.config, 0), 0, made.note_files())
    there = (tmp_path / "here").rename(tmp_path / "there")
    run = Run.open(there / "run")
    assert run.config.backbone.pretrained == str(there / "weights.safetensors")
    assert run.config.backbone.architecture == str(there / "narrow.json")
    assert sweep_key(draw_trials(run.config, 0), 0, run.note_files()) == before
    Run.open((there / "run").rename(there / "again")).load_encoder("gate", run.config)  # the notes now hold both places
    path = str(there / "again" / "config.yaml")
    given = found_beside(job_config(path), path)
    assert given == run.config
    assert Run.create(there / "again", given, run.dataset).config == given
    assert job_config(path) == given  # from now on it is what the run's own file says


def test_a_run_of_two_towers_finds_their_folder_and_file(
    tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset
) -> None:
    tower = tmp_path / "here" / "text"
    tower.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors", "notes.md"):
        (tower / name).write_text(name)
    (tmp_path / "here" / "vision.pth").write_text("weights")
    pair = "hf:{0}/text + timm:test_vit@{0}/vision.pth + 16"
    config = changed(small_config, {"backbone": {"architecture": pair.format(tmp_path / "here"), "pretrained": None}})
    before = key_text(config, Run.create(tmp_path / "here" / "run", config, small_data).note_files())
    assert str(tmp_path) not in before.partition("system:")[0]
    there = (tmp_path / "here").rename(tmp_path / "there")
    (there / "text" / "notes.md").write_text("nothing that a tower reads")
    run = Run.open(there / "run")
    assert run.config.backbone.architecture == pair.format(there)
    assert key_text(run.config, run.note_files()) == before
    (there / "text" / "tokenizer.json").write_text("another")
    there.rename(tmp_path / "elsewhere")
    architecture = Run.open(tmp_path / "elsewhere" / "run").config.backbone.architecture
    assert not architecture.startswith(f"hf:{tmp_path}/elsewhere/text")
    assert f"@{tmp_path}/elsewhere/vision.pth" in architecture


def test_another_file_in_its_place_is_not_taken(made: Run, tmp_path: Path) -> None:
    there = (tmp_path / "here").rename(tmp_path / "there")
    (there / "weights.safetensors").write_bytes(b"other")
    run = Run.open(there / "run")
    assert run.config.backbone.pretrained == str(tmp_path / "here" / "weights.safetensors")
    with pytest.raises(UserError, match=r"weights file .*here/weights.safetensors does not exist"):
        run.load_encoder("gate", run.config)


def test_a_run_of_an_older_version_opens_and_has_notes_when_it_is_trained(made: Run) -> None:
    stamp = json.loads((made.folder / "run.json").read_text())
    (made.folder / "run.json").write_text(json.dumps({key: stamp[key] for key in stamp if key != "files"}))
    assert Run.open(made.folder).config == made.config
    Run.create(made.folder, made.config, made.dataset)
    assert json.loads((made.folder / "run.json").read_text())["files"] == stamp["files"]


def test_a_finished_sweep_is_found_by_the_names_that_older_versions_kept_and_by_hashes(made: Run) -> None:
    trials = draw_trials(made.config, 0)
    keys = [sweep_key(trials, 0), sweep_key(trials, 0, made.note_files())]
    assert keys[0] != keys[1]
    for key in keys:
        made.storage.write_json("tune/sweep.json", {"sha256": key, "seed": 0, "trials": {}})
        best = {"hits@1": 0.25, "mrr": 0.5}
        report = {"trial": 0, "changes": {}, "best": best, "mrr": {"0": 0.5}, "sweep": key}
        made.storage.write_json("dsmip/part.json", report)
        lines = Lines()
        assert tune_gate(made, made.config, lines)["sweep"] == key
        assert lines.lines[-1].startswith("  sweep finished already: best is trial 0")
    made.storage.write_json("tune/sweep.json", {"sha256": "other", "seed": 3, "trials": {}})
    with pytest.raises(UserError, match="holds another sweep"):
        tune_gate(made, made.config, Lines())
