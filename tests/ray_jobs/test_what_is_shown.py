"""Names with escape sequences, secrets in addresses and full disks, as commands meet them."""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.runs.load_config import load_config
from dsmip.runs.provenance import RECORDS
from dsmip.runs.run import Run
from dsmip.storage.atomic import write_json
from ray_jobs import cli
from ray_jobs.jobs.evaluate import evaluate_run, missing_image_notes
from tests.support.full_disk import small_files
from tests.support.small_release import plain_release

EVIL = "\x1b]0;owned\x07\x9b31m"
SHOWN = "\\x1b]0;owned\\x07\\x9b31m"
SECRET = "s3://key:hunter2@bucket/data"
Dsmip = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dsmip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dsmip:
    """Runs a command; its code and what it said on stdout and stderr: never a traceback or a control character."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dsmip", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        assert not set(said.out + said.err) & {"\x1b", "\x07", "\x9b"}
        assert "hunter2" not in said.out + said.err
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return run


def test_names_of_a_data_set(dsmip: Dsmip, tmp_path: Path) -> None:
    release = MimicRelease(plain_release(tmp_path / "release", 3, 12))
    data = tmp_path / EVIL / "data"
    prepare(release, data, DatasetOptions(name=f"name {EVIL}"))
    code, out, _ = dsmip("inspect", data, "--no-pictures", "--html", tmp_path / "page.html")
    assert code == 0
    assert f"name {SHOWN}" in out
    assert SHOWN in out.splitlines()[0].partition("(")[2]
    assert dsmip("verify", data)[1].startswith(f"{tmp_path}/{SHOWN}/data: ")
    (data / "manifest.json").write_text("{")
    assert dsmip("verify", data)[2].startswith(f"error: {tmp_path}/{SHOWN}/data/manifest.json: line 1")


def test_names_and_commands_of_a_run(dsmip: Dsmip, run: Run, small_data: Dataset, tmp_path: Path) -> None:
    made = Run.create(tmp_path / "a run; rm -r x" / EVIL, run.config, small_data)
    stamp = json.loads((made.folder / "run.json").read_text())
    write_json(made.folder / "run.json", {**stamp, "data": {**stamp["data"], "name": EVIL, "folder": SECRET}})
    code, out, _ = dsmip("status", made.folder, "--json", tmp_path / "status.json")
    assert code == 0
    assert f"dsmip on {SHOWN} (s3://***@bucket/data)" in out
    stored = (tmp_path / "status.json").read_text()
    assert "hunter2" not in stored
    words = shlex.split(json.loads(stored)["next"])
    assert words[:3] == ["dsmip", "train", "--config"]
    assert words[4:] == ["--data", "s3://***@bucket/data", "--run", str(made.folder.resolve())]
    assert dsmip("status", tmp_path / EVIL)[2].startswith(f"error: no run at {tmp_path}/{SHOWN}")


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--config", "demo", "--data", SECRET, "--run", "R"),
        ("train", "--config", "demo", "--data", "DATA", "--run", SECRET),
        ("train", "--config", "demo", "--data", "DATA", "--run", "R", "--set", f"backbone.pretrained={SECRET}"),
        ("prepare", "RELEASE", SECRET),
        ("prepare", "RELEASE", "OUT", "--licence", "see https://host/x?sig=hunter2"),
        ("evaluate", "--run", SECRET),
        ("status", SECRET),
        ("compare", SECRET, SECRET),
        ("verify", SECRET),
        ("inspect", "s3:/key:hunter2@bucket"),
    ],
)
def test_secrets_in_addresses_are_refused(
    arguments: tuple[str, ...], dsmip: Dsmip, small_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DATA").symlink_to(small_data.folder)
    plain_release(tmp_path / "RELEASE", 3, 12)
    code, _, said = dsmip(*arguments)
    assert code == 2
    assert said.count("\n") == 1
    assert "***" in said
    for path in [*tmp_path.glob("R/**/*"), *tmp_path.glob("OUT/**/*")]:
        assert not path.is_file() or b"hunter2" not in path.read_bytes()


def test_a_configuration_with_a_secret_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"model: dsmip\nbackbone: {{architecture: tiny, pretrained: '{SECRET}'}}\n")
    with pytest.raises(UserError, match=r"config.yaml: backbone.pretrained: s3://\*\*\*@bucket/data holds a password"):
        load_config(str(tmp_path / "config.yaml"))


def test_records_hold_no_secret(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dsmip", "train", "--licence", SECRET])
    made = replace(Run.create(tmp_path / "run", run.config, run.dataset))
    with pytest.raises(ValueError, match="hunter2"), made.recorded("train"):
        raise ValueError(f"{SECRET} is away")
    (record,) = (made.folder / RECORDS).iterdir()
    stored = json.loads(record.read_text())
    assert stored["arguments"] == ["dsmip", "train", "--licence", "s3://***@bucket/data"]
    assert stored["outcome"] == "failed: ValueError: s3://***@bucket/data is away"


def test_full_disks(dsmip: Dsmip, run: Run, small_data: Dataset, tmp_path: Path) -> None:
    parts = run.part_names[:2]
    for part in parts:
        evaluate_run(run.at, "test", part, "cpu")
    compared = ("compare", run.folder, run.folder, "--model1", parts[0], "--model2", parts[1])
    out = tmp_path / "out"
    out.mkdir()
    for limit, folder, arguments in (
        (500, out, (*compared, "--json", out / "compared.json")),
        (500, out, ("inspect", small_data.folder, "--no-pictures", "--html", out / "page.html")),
        (500, out, ("inspect", small_data.folder, "--no-pictures", "--json", out / "found.json")),
        (500, out, ("status", run.folder, "--json", out / "status.json")),
        (100, out, ("verify", small_data.folder, "--json", out / "verified.json")),
        (500, run.folder / RECORDS, ("evaluate", "--run", run.folder, "--model", parts[0])),
    ):
        before = sorted(folder.iterdir())
        with small_files(limit):
            code, _, said = dsmip(*arguments)
        last = said.splitlines()[-1]
        assert (code, last) == (
            2,
            f"error: a file has become larger than allowed on the disk of {folder}; raise the limit (ulimit -f)",
        )
        assert sorted(folder.iterdir()) == before


def test_mentions_of_which_an_expert_knows_nothing() -> None:
    best = {"text": {"mentions": 9, "without_image": 4}, "visual": {"mentions": 11, "without_image": 2}}
    (line,) = missing_image_notes(best, ["visual"])
    assert line.startswith("  visual knows nothing of 2 of its mentions: they have no picture.")
    assert list(missing_image_notes({"visual": {"mentions": 11, "without_image": 0}}, ["visual"])) == []
    assert list(missing_image_notes({"text": best["text"]}, ["visual"])) == []
