"""A run whose data has moved: told by --data where it is, and made to remember it."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_jobs import cli
from tests.support.old_run import unpack

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A folder with a run, and its data in a place that the run does not know."""
    unpack(tmp_path)
    (tmp_path / "data").rename(tmp_path / "my data")
    return tmp_path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> tuple[int, str]:
        """The exit code, and all that is printed."""
        monkeypatch.setattr(sys, "argv", ["dsmip", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return run


def test_without_a_word_the_remedy_is_named(moved: Path, command: Command) -> None:
    for arguments in (["evaluate", "--model", "text"], ["tune"]):
        code, said = command(*arguments, "--run", moved / "run")
        assert code == 2
        assert said.startswith(f"error: {moved}/data")
        assert said.endswith(f"if the data of run {moved}/run has moved, say where it is by --data\n")


def test_it_is_read_from_where_it_is_said_to_be_and_remembered_on_demand(moved: Path, command: Command) -> None:
    figures = json.loads((moved / "run/evaluate/test/text/metrics.json").read_text())["overall"]
    evaluate = ["evaluate", "--run", moved / "run", "--model", "text"]
    code, said = command(*evaluate, "--data", moved / "my data")
    remember = f"dsmip status {moved}/run --data '{moved}/my data' --remember"
    assert (code, said.splitlines()[0]) == (
        0,
        f"data: {moved}/my data (the run remembers {moved}/data; to remember this one: {remember})",
    )
    again = json.loads((moved / "run/evaluate/test/text/metrics.json").read_text())["overall"]
    assert again == pytest.approx(figures)
    assert command(*evaluate)[0] == 2, "it was remembered without being asked"
    code, said = command("status", moved / "run", "--data", moved / "my data", "--remember")
    assert (code, said.splitlines()[0]) == (0, f"data: {moved}/my data (remembered)")
    assert command(*evaluate)[0] == 0


def test_a_training_that_is_told_remembers_it(moved: Path, command: Command) -> None:
    run = moved / "run"
    assert command("train", "--config", run / "config.yaml", "--data", moved / "my data", "--run", run)[0] == 0
    assert command("evaluate", "--run", run, "--model", "text")[0] == 0


def test_other_data_is_refused(moved: Path, command: Command) -> None:
    other = moved / "other"
    shutil.copytree(moved / "my data", other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "name": "another"}))
    for arguments in (["calibrate", "--run", moved / "run"], ["status", moved / "run", "--remember"]):
        code, said = command(*arguments, "--data", other)
        assert code == 2
        assert "but " in said
        assert "use the run's own data or another run" in said
    code, said = command("status", moved / "run", "--remember")
    assert (code, said) == (2, "error: --remember: say by --data where the run's data lies now\n")
