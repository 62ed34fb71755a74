"""The page of one's own data: what it shows runs as it stands, and its configuration fits so few records."""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dsmip.data.dataset import Dataset
from dsmip.evaluation.index_builder import OpenedEvaluation
from dsmip.evaluation.report import evaluate_model
from dsmip.runs.checks import check_pretraining, check_training
from dsmip.runs.load_config import job_config, shadowed
from dsmip.runs.run import Run
from dsmip.training.stages import check_held_out
from ray_jobs.cli import main
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
BLOCKS = [textwrap.dedent(block).strip("\n") for block in re.findall(r"(?:^(?: {4}.*)?\n)+", PAGE, flags=re.M)]
COMMANDS = [
    shlex.split(line)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("dsmip ")
]


def _run_block(start: str, folder: Path, *arguments: str) -> str:
    """Runs the page's only block that begins so, in a folder; what it printed."""
    (code,) = [block for block in BLOCKS if block.startswith(start)]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _dsmip(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = [words for words in COMMANDS if words[1] == command]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def test_a_smaller_museum_is_made_prepared_and_trained_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run_block('"""Writes a made-up museum', tmp_path, "museum", "100", "400")
    monkeypatch.chdir(tmp_path)
    _dsmip("prepare", monkeypatch)
    said = capsys.readouterr().out
    assert "100 entities; mentions: train 280, validation 40, test 80;" in said
    assert "records rejected 0, repaired 0, degraded 0" in said
    assert "warning" not in said
    dataset = Dataset.open(tmp_path / "data" / "museum")
    config = job_config("own")
    assert check_training(config, dataset) == []
    assert check_pretraining(config, dataset) == []
    check_held_out(dataset, config.held_out)


def test_settings_that_the_page_shows_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [words for words in COMMANDS if words[1] == "train"]
    assert len(shown) == 3
    for words in shown:
        settings = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
        config = job_config(words[words.index("--config") + 1], settings)
        assert shadowed(config, settings) == []
    assert {words[1] for words in COMMANDS} == {"prepare", "inspect", "train", "tune", "evaluate"}


def test_figures_and_one_mention_are_read_as_shown(run: Run, tmp_path: Path) -> None:
    found = evaluate_model(OpenedEvaluation(run, "test", "dsmip"), torch.device("cpu"))
    folder = tmp_path / "runs" / "museum" / "evaluate" / "test"
    folder.mkdir(parents=True)
    (folder / "dsmip").symlink_to(found.folder)
    said = _run_block("import json\nimport pyarrow", tmp_path)
    assert f"hits@1 {found.metrics['overall']['hits@1']:.3f}" in said
    assert "which is at rank" in said
