"""What a run says of its making: revision, versions, machine; one record per command, however it ended."""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from data_prep.formats.mimic import MimicRelease
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.runs import provenance
from dsmip.runs.run import Run
from dsmip.version import VERSION
from ray_jobs.jobs.prepare import BuildOptions, prepare_release
from tests.support.paths import ROOT
from tests.support.small_release import plain_release


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def package_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the package seem to live in `folder`."""
    source = folder / "dsmip" / "__init__.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    monkeypatch.setattr(provenance, "ROOT", folder)
    return source


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((run / "records").iterdir())]


def test_the_revision_and_whether_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = package_in(tmp_path / "project", monkeypatch)
    assert provenance.environment()["git"] is None  # outside a checkout
    git(tmp_path / "project", "init", "-q")
    git(tmp_path / "project", "add", "-A")
    git(tmp_path / "project", "commit", "-qm", "first")
    revision = git(tmp_path / "project", "rev-parse", "HEAD")
    assert provenance.environment()["git"] == {"revision": revision, "dirty": False}
    source.write_text("changed = True\n")
    assert provenance.environment()["git"] == {"revision": revision, "dirty": True}


def test_the_revision_of_a_checkout_around_the_package_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is installed into the folder of somebody's paper."""
    git(tmp_path, "init", "-q")
    package_in(tmp_path / "venv" / "site-packages", monkeypatch)
    assert provenance.environment()["git"] is None


def test_versions_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    made = provenance.environment()
    assert made["packages"]["torch"] == metadata.version("torch")
    assert made["packages"]["ray"] == metadata.version("ray")
    assert made["python"] == sys.version.split()[0]
    assert made["cpu"]["model"]
    assert made["cpu"]["count"] >= 1
    assert made["memory_bytes"] > 1 << 28
    assert json.loads(json.dumps(made)) == made
    monkeypatch.setenv("PATH", "")  # neither git nor nvidia-smi
    assert (provenance.environment()["git"], provenance.environment()["gpus"]) == (None, [])


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_the_digest_of_the_sources_is_that_of_the_command_in_the_docs(tmp_path: Path) -> None:
    for name in ("dsmip/a.py", "dsmip/ops/kernel.cpp", "ray_jobs/a_b.py", "data_prep/B.py", "data_prep/b/c.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "dsmip" / "__pycache__").mkdir()
    for name in ("dsmip/__pycache__/a.pyc", "dsmip/.a.py.swp", "tests.py"):
        (tmp_path / name).write_text("not ours")
    docs = (ROOT / "docs" / "watching.md").read_text()
    (line,) = [line.strip() for line in docs.splitlines() if line.endswith("| sha256sum")]
    said = subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert said.split()[0] == provenance.source_sha256(tmp_path)
    assert provenance.environment()["source_sha256"] == provenance.source_sha256(ROOT)


def test_a_prepared_data_set_says_what_made_it(tmp_path: Path) -> None:
    release, data = MimicRelease(plain_release(tmp_path / "release", 3, 6)), tmp_path / "data"
    for _ in range(2):  # the second time it is kept
        prepare_release(release, data, BuildOptions(), lambda part, done, total: None)
    (record,) = records(data)
    assert (record["command"], record["outcome"]) == ("prepare", "finished")
    assert record["data_sha256"] == Dataset.open(data).manifest_hash
    assert record["environment"]["source_sha256"]


def test_a_run_says_what_made_it(tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset) -> None:
    run = Run.create(tmp_path / "run", small_config, small_data)
    stamp = json.loads((run.folder / "run.json").read_text())
    assert stamp["made"]["dsmip"] == VERSION
    assert stamp["seed"] == small_config.seed


def test_a_record_tells_how_a_command_ended(
    tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "run", small_config, small_data)
    monkeypatch.setattr(sys, "argv", ["/somewhere/dsmip", "tune", "--seed", "7"])
    with run.recorded("tune", seed=7):
        (record,) = records(run.folder)
        assert (record["outcome"], record["ended"], record["seed"]) == ("running", None, 7)
    with pytest.raises(ValueError, match="too small"), run.recorded("train"):
        raise ValueError("too small")
    with pytest.raises(KeyboardInterrupt), run.recorded("train"):
        raise KeyboardInterrupt
    found = records(run.folder)
    assert [record["outcome"] for record in found] == ["finished", "failed: ValueError: too small", "interrupted"]
    for record in found:
        assert record["arguments"] == ["dsmip", "tune", "--seed", "7"]
        assert record["data_sha256"] == small_data.manifest_hash
        assert record["config"] == small_config.model_dump(mode="json")
        assert record["environment"]["packages"]["torch"]
        assert record["started"] <= record["ended"]
