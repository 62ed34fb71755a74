"""The commands `dsmip entities`: a file of entities changes a bundle, or is refused in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dsmip
from ray_jobs.cli import app, main
from tests.support.scoring.grown import colour_files, exported, record, two_experts
from tests.support.small_release import image_bytes


@pytest.fixture(scope="module")
def made(narrow_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [record(number) for number in range(6)]
    return exported(tmp_path_factory.mktemp("exported"), two_experts(narrow_backbone), records)


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that is not there yet, beside pictures."""
    folder = colour_files(tmp_path / "more")
    (folder / "broken.jpg").write_bytes(image_bytes((30, 30))[:-200])
    return folder / "more.jsonl"


def line(number: int = 8, **fields: object) -> str:
    return json.dumps({**record(number), **fields})


def test_a_bundle_grows(bundle: Path, file: Path) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["entities", *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output.replace("\n", "")

    file.write_text(f"{line(7)}\n\n{line(8)}\n")
    assert "2 added; 8 entities in 2 segments" in run("add", str(bundle), str(file))
    file.write_text(line(8, name="eight"))
    assert "1 updated; 8 entities in 3 segments" in run("update", str(bundle), str(file))
    assert "1 removed; 7 entities in 2 segments, 1 row of removed ones" in run("remove", str(bundle), str(file))
    assert "7 entities in 1 segment" in run("compact", str(bundle))
    linker = dsmip.load(bundle)
    ids = [text["entity_id"] for text in linker.knowledge_base.texts(range(len(linker)))]
    assert ids == ["Q0", "Q1", "Q2", "Q3", "Q4", "Q5", "Q7"]


@pytest.mark.parametrize(
    ("how", "lines", "message"),
    [
        ("add", [line(), "", line()], r"more\.jsonl: line 3: Q8: comes twice \(first: .*more\.jsonl: line 1\)"),
        ("add", [line(), "{"], r"more\.jsonl: wrong JSON: line 2 column 2"),
        ("add", [line(images=["broken.jpg"])], r"more\.jsonl: line 1: Q8: images broken\.jpg: picture unreadable"),
        ("update", [line()], r"more\.jsonl: line 1: Q8: is not in the knowledge base: 'add' adds it"),
        ("remove", ["3"], r"more\.jsonl: line 1: 3: is not in the knowledge base"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    how: str,
    lines: list[str],
    message: str,
    bundle: Path,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (bundle / "bundle.json").read_bytes()
    file.write_text("\n".join(lines))
    monkeypatch.setattr("sys.argv", ["dsmip", "entities", how, str(bundle), str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(message, said)
    assert (bundle / "bundle.json").read_bytes() == before


def test_what_is_no_bundle_or_no_such_file(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made.parent / "run"
    for arguments, message in (
        (["add", str(run), "more.jsonl"], "is no bundle, .*export the run first"),
        (["add", str(made), "more.csv"], r"more\.csv: entities are read from \.jsonl"),
        (["remove", str(made), str(tmp_path / "gone.jsonl")], r"gone\.jsonl: cannot be read: No such file"),
    ):
        monkeypatch.setattr("sys.argv", ["dsmip", "entities", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert re.search(message, capsys.readouterr().err)
