"""The job `dsmip features` on a real Ray: what the gate would compute, again after a kill, the user's mistakes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner, Result

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.table import Table
from dsmip.encoders.feature_cache import load_features
from dsmip.encoders.image_features import KB_AND_SPLITS
from dsmip.errors import UserError
from dsmip.models.dsmip import GATE
from dsmip.runs.load_config import to_yaml
from dsmip.runs.part_features import PartFeatures
from dsmip.runs.run import Run
from dsmip.training.stages import CPU
from ray_jobs.cli import app
from tests.support.cluster.ray_heads import processes_of
from tests.support.encoders.backbones import NARROW_BACKBONE

OF_CLIP = ("--kind", "clip", "--random-weights", "0", "--config")


@pytest.fixture
def dataset(small_data: Dataset, tmp_path: Path) -> Dataset:
    """A copy: features go into its folder."""
    shutil.copytree(small_data.folder, tmp_path / "data")
    return Dataset.open(tmp_path / "data")


@pytest.fixture
def config(small_config: ExperimentConfig, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(small_config))
    return path


def features(data: Path, *options: object) -> Result:
    return CliRunner().invoke(app, ["features", str(data), *map(str, options)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_the_job_writes_what_the_gate_computes(
    dataset: Dataset, config: Path, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", small_config, dataset)
    gate = PartFeatures(run, GATE, run.config)
    files = {split: gate.files(split, CPU) for split in (KB, "train")}
    made = features(dataset.folder, *OF_CLIP, config, "--workers", 2)
    assert made.exit_code == 0, made.output
    assert "warning: random weights of seed 0" in made.output
    assert "49 items" in made.output
    (folder,) = (dataset.folder / "features").iterdir()
    for split, paths in files.items():
        found = Table.load(folder / f"{split}.safetensors")
        assert torch.equal(found.dense("picture"), load_features(paths).dense("picture"))
    assert set(contents(folder)) == {"manifest.json", *(f"{split}.safetensors" for split in KB_AND_SPLITS)}
    assert "is finished already" in features(dataset.folder, *OF_CLIP, config).output


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_finished_chunks_are_kept_and_a_damaged_shard_is_named(dataset: Dataset, config: Path) -> None:
    (shard,) = (dataset.folder / "test").iterdir()
    content = shard.read_bytes()
    shard.write_bytes(b"x" * len(content))
    ended = features(dataset.folder, *OF_CLIP, config)
    assert isinstance(ended.exception, UserError), ended.output
    assert re.search(r"test-000000\.tar", str(ended.exception))

    shard.write_bytes(content)
    (folder,) = (dataset.folder / "features").iterdir()
    outdated = folder / "pieces-0123456789abcdef"  # of data that was prepared anew
    outdated.mkdir()
    resumed = features(dataset.folder, *OF_CLIP, config)
    assert re.search(r"[123] of 4 chunks are there already", resumed.output), resumed.output
    assert set(contents(folder)) == {"manifest.json", *(f"{split}.safetensors" for split in KB_AND_SPLITS)}


@pytest.mark.soak
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_job_goes_on_and_ends_the_same(dataset: Dataset, config: Path, tmp_path: Path) -> None:
    """With a network of real size, so that a chunk takes a second and the kill comes in the middle."""
    large = tmp_path / "large.json"
    vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
    large.write_text(json.dumps({**NARROW_BACKBONE, "vision_cfg": vision}))
    shutil.copytree(dataset.folder, tmp_path / "killed")
    options = (*OF_CLIP, str(config), "--set", f"backbone.architecture={large}")
    assert features(dataset.folder, *options).exit_code == 0
    temporary = Path(tempfile.mkdtemp(prefix="df"))
    variables = {**os.environ, "RAY_TMPDIR": str(temporary)}
    variables.pop("RAY_ADDRESS", None)
    command = [
        sys.executable,
        "-m",
        "ray_jobs.features",
        str(tmp_path / "killed"),
        *options,
    ]  # a cluster of its own
    job = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not list((tmp_path / "killed").glob("features/*/pieces-*/kb-*")):
            assert job.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        for process in processes_of(temporary):  # Ray's workers, which have a session of their own
            os.kill(process, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)
    assert not list((tmp_path / "killed").glob("features/*/manifest.json"))
    resumed = features(tmp_path / "killed", *options)
    assert re.search(r"[123] of 4 chunks are there already", resumed.output), resumed.output
    assert contents(tmp_path / "killed") == contents(dataset.folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--kind vgg16 --weights gone.pth", r"gone\.pth do not exist"),
        ("--kind vgg16 --config {config} --set system.gate.vgg_weights=gone.pth", r"gone\.pth do not exist"),
        (f"--kind vgg16 --config {{config}} --set system.gate.vgg_weights=sha256:{'0' * 16}", "say where by --weights"),
        ("--kind vgg16 --weights a.pth --random-weights 1", "exclude each other"),
        ("--kind vgg16 --set seed=1", "name one by --config"),
        ("--kind clip", "name one by --config"),
        ("--kind clip --config {config}", "has no weights.*--random-weights 0"),
        ("--kind clip --config {config} --weights a.pth", "backbone.pretrained"),
        ("--kind clip --config {config} --set backbone.pretrained=gone.pt", "gone.pt does not exist"),
        ("--kind clip --config {config} --set backbone.pretrained=gone.pt --random-weights 0", "leave out"),
    ],
)
def test_mistakes_are_told_before_ray_starts(dataset: Dataset, config: Path, options: str, said: str) -> None:
    ended = features(dataset.folder, *options.format(config=config).split())
    assert isinstance(ended.exception, UserError), ended.output
    assert re.search(said, str(ended.exception))
    assert not (dataset.folder / "features").exists()


def test_a_backbone_of_texts_alone_has_no_features_of_pictures(dataset: Dataset, config: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
    BertModel(BertConfig(intermediate_size=32, **sizes)).save_pretrained(tmp_path / "text")
    ended = features(dataset.folder, *OF_CLIP, config, "--set", f"backbone.architecture=hf:{tmp_path / 'text'}")
    assert isinstance(ended.exception, UserError), ended.output
    assert "has no vision tower" in str(ended.exception)
