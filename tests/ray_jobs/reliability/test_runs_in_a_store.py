"""Runs at s3:// on a real Ray: the whole way, going on from another machine, and what is not done twice."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dsmip.config import ExperimentConfig, TuneConfig, merged
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.encoders import feature_cache
from dsmip.errors import UserError
from dsmip.runs.part_features import PartFeatures
from dsmip.runs.run import Run
from dsmip.runs.status import read_status
from dsmip.storage.atomic import sha256_file
from dsmip.storage.locations import open_run_storage
from dsmip.storage.object_store import filesystem
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import train_part
from ray_jobs.cli import app
from ray_jobs.cluster.local import own_token  # before Ray is imported
from tests.support.cluster.ray_heads import processes_of, wait_until

# isort: split
from ray.cluster_utils import Cluster

from dsmip.runs.load_config import changed, to_yaml
from tests.support.paths import ROOT

COMMAND = [sys.executable, "-c", "from ray_jobs.cli import main; main()"]


@pytest.fixture
def data(bucket: str, small_data: Dataset) -> Dataset:
    """The small data set in the store."""
    system, path = filesystem(f"{bucket}/data")
    system.put(str(small_data.folder), path, recursive=True)
    return Dataset.open(f"{bucket}/data")


def two_experts(config: ExperimentConfig, epochs: int) -> ExperimentConfig:
    experts = {name: config.system.experts[name] for name in ("text", "multimodal")}  # type: ignore[attr-defined]
    system = config.system.model_copy(update={"experts": experts, "use": ("text", "multimodal")})
    return merged(config, {"train": {"epochs": epochs}, "system": config.system}).model_copy(update={"system": system})


def command(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_a_run_is_made_opened_and_refused_as_in_a_folder(
    bucket: str, small_config: ExperimentConfig, data: Dataset, small_data: Dataset
) -> None:
    with pytest.raises(UserError, match=rf"no run at {bucket}/run \(no run.json\)"):
        Run.open(f"{bucket}/run")
    run = Run.create(f"{bucket}/run", small_config, data)
    assert Run.open(f"{bucket}/run").dataset.location == data.location
    assert Run.open(f"{bucket}/run", small_data).config == small_config
    assert not run.has_begun
    other = changed(small_config, {"seed": 3})
    run.trainings.write_text("text/checkpoint_0/checkpoint.json", "{}")
    assert run.has_begun
    with pytest.raises(UserError, match=rf"run {bucket}/run was made with another configuration \(seed was 0"):
        Run.create(f"{bucket}/run", other, data)
    with pytest.raises(UserError, match=rf"{bucket} is not empty and not a run"):
        Run.create(bucket, small_config, data)


def untimed(said: str) -> list[str]:
    """Lines of a command without those of progress, which a slow machine shows more of."""
    return [line for line in said.splitlines() if not re.search(r"\[\d+ s\]$", line)]


def test_another_machine_takes_what_is_computed(
    bucket: str, tmp_path: Path, small_config: ExperimentConfig, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished parts, feature tables, and the index with prepared mentions: nothing is encoded again."""
    run = Run.create(f"{bucket}/run", two_experts(small_config, epochs=1), data)
    train_part(run, "text", LocalContext(tmp_path / "checkpoints"))
    table = PartFeatures(run, "text", run.config).cached(KB)
    assert table
    first = command("evaluate", "--run", f"{bucket}/run", "--model", "text", "--split", "validation")

    def encode(*arguments: object) -> None:
        pytest.fail("encoded again")

    monkeypatch.setenv("DSMIP_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(feature_cache, "encode_split", encode)
    there = Run.open(f"{bucket}/run")
    assert there.is_finished("text")
    found = PartFeatures(there, "text", there.config).cached(KB)
    assert found
    assert (found.name, found.is_relative_to(tmp_path / "other")) == (table.name, True)
    again = command("evaluate", "--run", f"{bucket}/run", "--model", "text", "--split", "validation")
    assert untimed(again) == untimed(first)
    assert f"{bucket}/run/evaluate/validation/text/metrics.json" in first
    assert read_status(f"{bucket}/run").disk == there.storage.sizes()
    same = CliRunner().invoke(
        app,
        ["compare", f"{bucket}/run", f"{bucket}/run/", "--model1", "text", "--split", "validation", "--model2", "text"],
    )
    assert "both are" in str(same.exception)


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A cluster of a head and two nodes of one CPU, each with a cache of its own; yields variables for drivers."""
    with (
        pytest.MonkeyPatch.context() as variables,
        tempfile.TemporaryDirectory(prefix="dc", ignore_cleanup_errors=True) as folder,
    ):
        variables.setenv("RAY_TMPDIR", folder)
        variables.setenv("RAY_worker_niceness", "0")
        variables.delenv("RAY_ADDRESS", raising=False)
        caches = {name: {"DSMIP_CACHE": str(tmp_path / name)} for name in ("head", "one", "two", "driver")}
        own_token()
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "env_vars": caches["head"]})
        try:
            for name in ("one", "two"):
                started.add_node(num_cpus=1, env_vars=caches[name])
            yield {**caches["driver"], "RAY_ADDRESS": started.address}
        finally:
            started.shutdown()


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_whole_way_on_nodes_that_share_nothing(
    bucket: str,
    tmp_path: Path,
    small_config: ExperimentConfig,
    data: Dataset,
    two_nodes: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = f"{bucket}/runs/x"
    space = {"system.gate.temperature": {"values": [0.1, 1.0]}}
    plan = TuneConfig(trials=2, rungs=(1, 2), reduction=2, resources={"cpu": 1}, space=space, train={"epochs": 2})
    config = tmp_path / "config.yaml"
    settings = two_experts(small_config, epochs=2).model_copy(update={"tune": plan, "watch": ("tensorboard",)})
    config.write_text(to_yaml(settings))
    train = ["train", "--config", str(config), "--data", data.location, "--run", run]
    for arguments in (train, ["tune", "--run", run], ["evaluate", "--run", run, "--workers", "2"]):
        with driver(arguments, two_nodes) as process:
            assert process.wait(300) == 0, arguments
    for name in ("one", "two"):
        here = {path.parts[-2] for path in (tmp_path / name).glob("runs/*/files/**/*.safetensors")}
        assert any(folder.startswith("dsmip-") for folder in here), here  # the index: both have ranked

    monkeypatch.setenv("DSMIP_CACHE", str(tmp_path / "another machine"))
    status = read_status(run)
    assert {each.state for each in status.parts} == {"finished"}
    assert sorted(each.state for each in status.trials) == ["dropped", "finished"]
    assert (status.problems, status.next) == ([], "nothing: trained, tuned and evaluated")
    assert {"features", "index", "ray", "tensorboard", "tune"} < status.disk.keys()
    assert open_run_storage(run).glob("ray/*.json") == ["ray/multimodal.progress.json", "ray/text.progress.json"]
    assert "dsmip on test" in command("evaluate", "--run", run)
    command("evaluate", "--run", run, "--model", "text")
    assert "2 - 1" in command("compare", run, run, "--model2", "text")
    assert "finished already" in command(*train)
    assert "sweep finished already" in command("tune", "--run", run)


@contextmanager
def driver(arguments: list[str], variables: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A command, with a Ray of its own unless `variables` have an address; all of it is killed when the block ends."""
    folder = tempfile.mkdtemp(prefix="ds")
    own = {"RAY_ADDRESS": "", "RAY_TMPDIR": folder, "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **own, **variables}
    process = subprocess.Popen([*COMMAND, *arguments], env=environment, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for number in processes_of(Path(folder)):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.soak
def test_a_killed_training_goes_on_from_another_machine_to_the_same_weights(
    bucket: str, tmp_path: Path, small_config: ExperimentConfig, data: Dataset
) -> None:
    settings, run = two_experts(small_config, epochs=30), f"{bucket}/run"
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(settings))
    arguments = ["train", "--config", str(config), "--data", data.location, "--run", run]
    storage = open_run_storage(run)

    def both_have_begun() -> bool:
        return all(storage.glob(f"ray/{part}/checkpoint_*") for part in ("text", "multimodal"))

    with driver(arguments, {"DSMIP_CACHE": str(tmp_path / "one")}):
        wait_until(both_have_begun, 300, "no checkpoint came")
    status = read_status(run)  # in a cache that neither of them has
    assert {each.state for each in status.parts if each.name in ("text", "multimodal")} <= {"training", "finished"}
    assert all(each.epochs_done for each in status.parts if each.name in ("text", "multimodal"))
    killed = Run.open(run)
    assert not all(map(killed.is_finished, killed.part_names))
    with driver(arguments, {"DSMIP_CACHE": str(tmp_path / "two")}) as process:
        assert process.wait(400) == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for part in killed.part_names:
            undisturbed = Run.create(tmp_path / "undisturbed", settings, data)
            result = train_part(undisturbed, part, LocalContext(tmp_path / f"checkpoints-{part}"))
            name = f"{part}/weights.safetensors"
            storage.pull(name)
            assert sha256_file(storage.folder / name) == sha256_file(undisturbed.folder / name)
            assert Run.open(run).part_report(part)["history"] == result.history
    finally:
        torch.set_num_threads(threads)
