"""JSON and YAML that hold what no value can be made of: one line with the file's name, whoever reads it."""

import re
from pathlib import Path

import pytest

from dsmip.errors import UserError
from dsmip.runs.load_config import load_config
from dsmip.runs.loaded_model import PART
from dsmip.runs.provenance import RECORDS
from dsmip.runs.run import Run
from dsmip.runs.status import read_status
from dsmip.storage.parsing import parse_json, parse_yaml, read_json
from ray_jobs.jobs.prepare import demo_config

DEEP = "[" * 1000 + "]" * 1000  # PyYAML takes a time that grows with the square
DIGITS = "9" * 6000
DEEP_JSON = '{"data":' * 100_000


@pytest.mark.parametrize("value", [DEEP, "{a: " * 3000, "2024-13-45", DIGITS, "[", "!!python/object:os.system x"])
def test_yaml_that_is_none(value: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"model: dsmip\nseed: {value}\n")
    for read in (lambda: load_config(str(path)), lambda: demo_config(str(path))):
        with pytest.raises(UserError, match=f"{re.escape(str(path))} is not valid YAML") as refused:
            read()
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 1000
    with pytest.raises(UserError, match="--set seed: the value is not valid YAML"):
        load_config("demo", [f"seed={value}"])


def test_a_key_of_thousands_of_names() -> None:
    with pytest.raises(UserError, match="3001 names in one another"):
        load_config("demo", ["a." * 3000 + "b=1"])


def test_yaml_that_is_some() -> None:
    assert parse_yaml("a: [1, x]", "config") == {"a": [1, "x"]}


@pytest.mark.parametrize("content", [DEEP_JSON, DIGITS, "{", "[]", "\ufffe"])
def test_json_that_is_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"part\.json is damaged .*; remove it$") as refused:
        read_json(path, lambda value: value["best"], "; remove it")
    assert len(str(refused.value)) < 500
    if content != "[]":
        with pytest.raises(UserError, match=r"^a\.json: "):
            parse_json(content.encode(), "a.json")


@pytest.mark.parametrize("content", [DEEP_JSON, f'{{"data": {DIGITS}}}', '{"best": {"mrr": 1e999}, "history": 3}'])
def test_every_file_of_a_run(content: str, run: Run) -> None:
    """`status` names what is damaged and goes on; what needs the file ends with one line."""
    part = run.folder / run.part_names[0] / PART
    sound = part.read_text()
    try:
        part.write_text(content)
        (problem,) = [each for each in read_status(run.at).problems if each.startswith(f"{part} is damaged: ")]
        assert len(problem) < 500
        if "best" not in content:
            with pytest.raises(UserError, match=rf"{part} is damaged .*; remove {part.parent} and run the command"):
                run.part_report(run.part_names[0])
    finally:
        part.write_text(sound)
    stamp = run.folder / "run.json"
    sound = stamp.read_text()
    try:
        stamp.write_text(content)
        with pytest.raises(UserError, match=rf"{stamp} is damaged .*; train into another"):
            Run.open(run.at)
        assert str(stamp) in [each.partition(" is damaged")[0] for each in read_status(run.at).problems]
    finally:
        stamp.write_text(sound)
    (run.folder / RECORDS).mkdir(exist_ok=True)
    record = run.folder / RECORDS / "20990101T000000.000000Z-train.json"
    record.write_text(content)
    assert str(record) in [each.partition(" is damaged")[0] for each in read_status(run.at).problems]
    record.unlink()
