"""`dsmip cache list` and `dsmip cache prune`, by what they print and leave."""

import json
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.build.view import make_view
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.encoders.shared_tables.places import FOLDER
from ray_jobs.cli import app
from tests.support.encoders.shared_tables import make, reading


def command(*arguments: object) -> str:
    """What a command prints, which must end well."""
    done = CliRunner().invoke(app, ["cache", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def data(small_data: Dataset, tmp_path: Path) -> Path:
    """A data set with three tables beside it, a the first of them."""
    shutil.copytree(small_data.folder, tmp_path / "data", ignore=shutil.ignore_patterns(FOLDER))
    for key in ("a" * 64, "b" * 64, "c" * 64):
        make(tmp_path / "data" / FOLDER, key)
    return tmp_path / "data"


def test_tables_are_listed(data: Path, tmp_path: Path) -> None:
    with reading(data / FOLDER, "b" * 64):
        said = command("list", data, "--json", tmp_path / "found.json")
    (line,) = [line for line in said.splitlines() if "b" * 16 in line]
    for text in ("small", KB, "text", "1000", time.strftime("%Y-"), "in use"):
        assert text in line
    assert "in use" not in next(line for line in said.splitlines() if "a" * 16 in line)
    assert f"{data / FOLDER}: 3 tables, 0.0 GB of " in said
    found = json.loads((tmp_path / "found.json").read_text())
    assert [each["key"][0] for each in found["tables"]] == ["a", "c", "b"]
    assert [each["in_use"] for each in found["tables"]] == [False, False, True]


def test_tables_of_a_view_are_those_of_its_data(data: Path, tmp_path: Path) -> None:
    make_view(data, tmp_path / "view", 0.5, seed=0)
    assert "3 tables" in command("list", tmp_path / "view")


def test_a_place_is_listed_by_itself_or_by_its_variable(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "3 tables" in command("list", data / FOLDER)
    monkeypatch.setenv("DSMIP_FEATURES", str(data / FOLDER))
    assert "3 tables" in command("list")


def test_what_was_not_used_for_the_longest_is_pruned(data: Path) -> None:
    size = (data / FOLDER / f"{'a' * 64}.safetensors").stat().st_size
    with reading(data / FOLDER, "a" * 64):
        said = command("prune", data, "--keep", 0)
    assert said.count("  removed small kb") == 2
    assert "removed 2 tables; 1 table left, 0.0 GB, 1 of them in use, which are kept" in said
    assert "removed 0 tables; 1 table left" in command("prune", data, "--unused", 1)
    assert "removed 0 tables; 1 table left" in command("prune", data, "--keep", (size + 1) / 1e9)
    assert "removed 1 table; 0 tables left" in command("prune", data, "--unused", 0)


def test_a_place_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["cache", "list", str(tmp_path / "gone")])
    assert "no such folder; give a data set, or a folder of feature tables" in str(ended.exception)
