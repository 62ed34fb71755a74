"""The command `dsmip link`: one mention as a table or JSON, files of mentions as files of links."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import dsmip
from dsmip.linking import bulk
from dsmip.linking.bulk import BulkOptions, LinksFile, link_file
from dsmip.linking.linker import Linker
from dsmip.runs.run import Run
from ray_jobs.cli import app
from tests.support.small_release import image_bytes


def command(*arguments: object) -> Any:
    done = CliRunner().invoke(app, ["link", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_one_mention(run: Run, tmp_path: Path) -> None:
    (tmp_path / "red.jpg").write_bytes(image_bytes((30, 20)))
    asked = (run.folder, "--word", "red", "--sentence", "a red thing", "--image", tmp_path / "red.jpg", "--top", "3")
    links = dsmip.load(run.folder).link("red", "a red thing", tmp_path / "red.jpg", top=3)
    said = command(*asked, "--json", tmp_path / "links.json").stdout
    for link in links:
        assert link.expert
        row = next(line for line in said.splitlines() if f" {link.entity_id} " in line)
        assert {link.name, link.expert, f"{link.score:.4f}"} <= {*row.split()}
    assert "confidence" not in said  # nothing is calibrated
    found = json.loads(command(*asked, "--json", "-").stdout)
    assert found == json.loads((tmp_path / "links.json").read_text()) == links.as_dict()


MENTIONS: list[Any] = [
    {"mention_id": "a", "word": "red", "sentence": "a red thing", "image": "red.jpg", "further": 1},
    {"word": " ", "sentence": "no word"},
    {"mention_id": "b", "word": "blue", "sentence": "a blue thing", "image": "lost.jpg"},
    {"word": "green", "image": "text.jpg"},
    {"word": "broken \ud800"},
    ["no", "record"],
    {"mention_id": 7, "word": "green"},
]
REASONS = [None, "word: empty", "image lost.jpg: no such file", "image text.jpg: picture unreadable", "broken text"]
REASONS += ["a mention is a dict", None, "wrong JSON: line 8"]


@pytest.fixture
def mentions(tmp_path: Path) -> Path:
    folder = tmp_path / "mentions"
    folder.mkdir()
    (folder / "red.jpg").write_bytes(image_bytes((30, 20)))
    (folder / "text.jpg").write_text("no picture")
    lines = [json.dumps(each) for each in MENTIONS]
    (folder / "mentions.jsonl").write_text("\n".join([*lines, '{"word": ']) + "\n")
    return folder / "mentions.jsonl"


def test_every_mention_of_a_file_has_a_row(run: Run, mentions: Path, tmp_path: Path) -> None:
    out = tmp_path / "links.parquet"
    said = command(run.folder, mentions, "--out", out, "--top", "4").stdout
    assert "8 mentions, 2 linked, 6 that could not be (see the column reason)" in said
    table = pq.read_table(out)
    assert table.column("row").to_pylist() == list(range(8))
    for found, reason in zip(table.column("reason").to_pylist(), REASONS, strict=True):
        assert (found is None) == (reason is None)
        assert reason is None or reason in found
    assert table.column("mention_id").to_pylist() == ["a", "", "b", "", "", "", "7", ""]
    assert [len(each) for each in table.column("scores").to_pylist()] == [4, 0, 0, 0, 0, 0, 4, 0]
    links = dsmip.load(run.folder).link("red", "a red thing", mentions.parent / "red.jpg", top=4)
    first = table.slice(0, 1).to_pylist()[0]
    assert first["entity_ids"] == [link.entity_id for link in links]
    assert first["names"] == [link.name for link in links]
    assert first["experts"] == [link.expert for link in links]
    assert first["scores"] == pytest.approx([link.score for link in links], rel=1e-5, abs=1e-5)
    assert "is complete already" in command(run.folder, mentions, "--out", out, "--top", "4").stdout
    assert "is complete already" not in command(run.folder, mentions, "--out", out, "--top", "2").stdout
    assert [*tmp_path.glob(".*")] == []


def test_a_parquet_file_gives_what_its_lines_give(run: Run, mentions: Path, tmp_path: Path) -> None:
    records = [{"word": "red", "image": "red.jpg"}, {"word": "blue", "image": None}]
    pq.write_table(pa.Table.from_pylist(records), mentions.parent / "two.parquet")
    mentions.with_name("two.jsonl").write_text("\n".join(map(json.dumps, records)))
    for name in ("two.parquet", "two.jsonl"):
        command(run.folder, mentions.with_name(name), "--out", tmp_path / f"of_{name}.parquet")
    of_rows, of_lines = (pq.read_table(tmp_path / f"of_two.{kind}.parquet") for kind in ("parquet", "jsonl"))
    assert of_rows.equals(of_lines)


def test_an_interrupted_file_goes_on_to_the_same_bytes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "BLOCK_ROWS", 3)
    linker = dsmip.load(run.folder)
    records = [{"word": f"word {number}", "sentence": f"the {number}th thing"} for number in range(8)]
    opened = list[int]()

    def open_linker() -> Linker:
        opened.append(1)
        return linker

    def until(stop: int) -> Iterator[dict[str, str]]:
        yield from records[:stop]
        if stop < len(records):
            raise KeyboardInterrupt

    whole, halted = (LinksFile(tmp_path / f"{name}.parquet", {"job": 1}) for name in ("whole", "halted"))
    link_file(open_linker, until(8), whole, BulkOptions(), 8)
    with pytest.raises(KeyboardInterrupt):
        link_file(open_linker, until(7), halted, BulkOptions(), 8)
    assert not halted.out.exists()
    seen = list[tuple[str, int, int]]()
    link_file(open_linker, until(8), halted, BulkOptions(), 8, lambda *about: seen.append(about))
    assert seen == [("mentions linked", done, 8) for done in (3, 6, 8)]
    assert halted.out.read_bytes() == whole.out.read_bytes()
    assert not halted.parts.exists()
    assert len(opened) == 3
    other = LinksFile(tmp_path / "halted.parquet", {"job": 2})
    assert (halted.is_finished, other.is_finished) == (True, False)


def test_blocks_of_another_job_are_not_gone_on_with(run: Run, tmp_path: Path) -> None:
    made = LinksFile(tmp_path / "links.parquet", {"top": 1})
    made.begin()
    made.write_block(0, bulk.SCHEMA.empty_table())
    same, other = (LinksFile(made.out, {"top": top}) for top in (1, 2))
    same.begin()
    assert made.block(0).is_file()
    other.begin()
    assert not made.block(0).is_file()
    with pytest.raises(dsmip.UserError, match=r"ends in \.parquet"):
        LinksFile(tmp_path / "links.csv", {})


def test_no_mention_at_all(run: Run, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    command(run.folder, tmp_path / "none.jsonl", "--out", tmp_path / "links.parquet")
    table = pq.read_table(tmp_path / "links.parquet")
    assert (len(table), table.column_names) == (0, bulk.SCHEMA.names)
