"""The way to a cluster: a real head with ports of its own, and every stage submitted to it from the checkout."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dsmip.config import ExperimentConfig, TuneConfig, merged
from dsmip.data.dataset import Dataset
from dsmip.runs.load_config import to_yaml
from dsmip.runs.run import Run
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import train_part
from tests.support.cluster.ray_heads import Head, running_head, wait_until
from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head(["--num-cpus", "4"]) as started:
        yield started


def two_experts(config: ExperimentConfig, epochs: int) -> ExperimentConfig:
    experts = {name: config.system.experts[name] for name in ("text", "multimodal")}  # type: ignore[attr-defined]
    system = config.system.model_copy(update={"experts": experts, "use": ("text", "multimodal")})
    return merged(config, {"train": {"epochs": epochs}, "system": config.system}).model_copy(update={"system": system})


def train_options(config: ExperimentConfig, data: Dataset, folder: Path) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(to_yaml(config))
    return ["--config", str(path), "--data", str(data.folder), "--run", str(folder / "run")]


def finished(folder: Path) -> list[str]:
    run = Run.open(folder)
    return [part for part in run.part_names if run.is_finished(part)]


def test_a_stopped_training_goes_on_where_it_was(
    head: Head, tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset
) -> None:
    options = train_options(two_experts(small_config, epochs=30), small_data, tmp_path)
    head.start("stopped", "ray_jobs/train_experts.py", *options)
    seen = re.compile(r"^  text +epoch +[1-9]", flags=re.M)
    wait_until(lambda: bool(seen.search(head.client.get_job_logs("stopped"))), 300, "no epoch ended")
    assert head.client.stop_job("stopped")  # at once: the command takes as long as some epochs
    wait_until(lambda: head.client.get_job_status("stopped").is_terminal(), 60, "the job did not stop")
    assert head.client.get_job_status("stopped") == "STOPPED"
    assert "text" not in finished(tmp_path / "run")

    ended = head.submit("resumed", "ray_jobs/train_experts.py", *options)
    assert (ended.cli_code, ended.exit_code) == (0, 0), ended.output
    assert "succeeded" in ended.output
    assert re.search(r"^  text +epoch +30 ", ended.output, flags=re.M), "the log was not streamed"
    assert not re.search(r"^  text +epoch +1 ", ended.output, flags=re.M), "it began anew"
    assert finished(tmp_path / "run") == ["text", "multimodal"]
    assert [row["epoch"] for row in Run.open(tmp_path / "run").part_report("text")["history"]] == list(range(30))


def test_a_mistake_has_its_own_exit_code(
    head: Head, tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset
) -> None:
    options = train_options(small_config, small_data, tmp_path)
    ended = head.submit("mistake", "ray_jobs/train_experts.py", *options, "--set", "train.epocs=1")
    assert (ended.cli_code, ended.exit_code) == (1, 2), ended.output  # the command line knows only 0 and 1
    assert "did you mean 'epochs'" in ended.output
    assert "exit code 2" in ended.output


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, ""),
        ({"RAY_AUTH_MODE": "disabled"}, "commands without a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "the token of RAY_AUTH_TOKEN"),
    ],
)
def test_a_command_joins_with_the_token_and_is_refused_in_one_line_without(
    head: Head, variables: dict[str, str], said: str
) -> None:
    code = (
        "from ray_jobs.cli import app, run_script\n"
        "@app.command()\n"
        "def join() -> None:\n"
        "    from ray_jobs.cluster.connection import connected\n"
        "    with connected():\n"
        "        pass\n"
        "run_script('join')"
    )
    environment = {**os.environ, "RAY_ADDRESS": head.gcs, **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    if not said:
        assert done.returncode == 0, done.stderr
    else:
        line = f"error: RAY_ADDRESS={head.gcs}: the cluster does not take {said} (docs/cluster.md, Tokens)"
        assert done.returncode == 2
        assert done.stderr == f"{line}; name a running cluster, or unset it for a local Ray\n"


def test_who_has_no_token_submits_nothing(head: Head) -> None:
    ended = head.ray("job", "list", variables={"RAY_AUTH_MODE": "disabled"})
    assert ended.returncode != 0
    assert "401" in ended.stderr + ended.stdout or "uthentication" in ended.stderr + ended.stdout


@pytest.mark.soak
def test_preparation_is_submitted(head: Head, tmp_path: Path, small_data: Dataset) -> None:
    release = small_data.folder.parent / "release"
    ended = head.submit("prepare", "ray_jobs/prepare.py", str(release), str(tmp_path / "data"), "--ray")
    assert ended.exit_code == 0, ended.output
    assert Dataset.open(tmp_path / "data").manifest.entities == small_data.manifest.entities


@pytest.mark.soak
def test_stage_two_and_evaluation_are_submitted(
    head: Head, tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset
) -> None:
    tune = TuneConfig(
        trials=2,
        rungs=(1,),
        reduction=2,
        resources={"cpu": 1},
        space={"system.gate.temperature": {"values": [0.1, 0.5, 1.0]}},
        train={"epochs": 1},
    )
    config = two_experts(small_config, epochs=1).model_copy(update={"tune": tune})
    run = Run.create(tmp_path / "run", config, small_data)
    for part in run.part_names:
        train_part(run, part, LocalContext(tmp_path / f"checkpoints-{part}"))
    ended = head.submit("tune", "ray_jobs/tune_gate.py", "--run", str(run.folder))
    assert ended.exit_code == 0, ended.output
    assert run.is_finished("dsmip")
    ended = head.submit("evaluate", "ray_jobs/evaluate.py", "--run", str(run.folder), "--workers", "2")
    assert ended.exit_code == 0, ended.output
    assert (run.folder / "evaluate" / "test" / "dsmip" / "metrics.json").is_file()


@pytest.mark.soak
def test_bulk_linking_is_submitted(head: Head, tmp_path: Path, run: Run) -> None:
    mentions, out = tmp_path / "mentions.jsonl", tmp_path / "links.parquet"
    records = [{"mention_id": str(number), "word": "red" if number else ""} for number in range(6)]
    mentions.write_text("\n".join(map(json.dumps, records)))
    options = ("--out", str(out), "--workers", "2", "--top", "2")
    ended = head.submit("link", "ray_jobs/link.py", str(run.folder), str(mentions), *options)
    assert (ended.cli_code, ended.exit_code) == (0, 0), ended.output
    rows = pq.read_table(out).to_pylist()
    assert [row["mention_id"] for row in rows] == [each["mention_id"] for each in records]  # every one, in order
    assert rows[0]["reason"]
    assert all(len(row["entity_ids"]) == 2 and row["reason"] is None for row in rows[1:])
