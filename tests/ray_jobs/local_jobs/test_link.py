"""The command `dsmip link`: one mention as a table or JSON, files of mentions as files of links."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import dsmip
from dsmip.linking import bulk
from dsmip.linking.bulk import LinksFile
from dsmip.runs.run import Run
from dsmip.storage.nearby_files import NearbyFiles
from dsmip.storage.object_store import ObjectStore
from ray_jobs.cli import app
from ray_jobs.local_jobs.linking.sources import BlockReader, find_files, plan_blocks
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
    assert of_rows.drop_columns("file").equals(of_lines.drop_columns("file"))


class Halted(Exception):
    """Stands for a kill."""


def test_an_interrupted_command_goes_on_to_the_same_bytes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "BLOCK_ROWS", 3)
    lines = [json.dumps({"word": f"word {number}", "sentence": f"the {number}th thing"}) for number in range(8)]
    (tmp_path / "mentions.jsonl").write_text("\n".join(lines))
    command(run.folder, tmp_path / "mentions.jsonl", "--out", tmp_path / "whole.parquet")
    written = list[int]()
    write = LinksFile.write_block

    def halting(file: LinksFile, number: int, table: pa.Table) -> None:
        if len(written) == 2:
            raise Halted
        written.append(number)
        write(file, number, table)

    monkeypatch.setattr(LinksFile, "write_block", halting)
    asked = (run.folder, tmp_path / "mentions.jsonl", "--out", tmp_path / "halted.parquet")
    with pytest.raises(Halted):
        command(*asked)
    assert not (tmp_path / "halted.parquet").exists()
    monkeypatch.setattr(LinksFile, "write_block", write)
    said = command(*asked).stdout
    assert "2 of 3 blocks of mentions are there already" in said
    assert (tmp_path / "halted.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert [*tmp_path.glob(".*")] == []


def test_the_bytes_do_not_depend_on_the_number_of_threads(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "BATCH_SIZE", 3)
    lines = [json.dumps({"word": f"word {number}"}) for number in range(8)]
    (tmp_path / "mentions.jsonl").write_text("\n".join(lines))
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            command(run.folder, tmp_path / "mentions.jsonl", "--out", tmp_path / f"{count}.parquet")
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "3.parquet").read_bytes()


def test_blocks_of_another_job_are_not_gone_on_with(tmp_path: Path) -> None:
    made = LinksFile(tmp_path / "links.parquet", {"top": 1})
    assert made.begin() == set()
    made.write_block(0, bulk.SCHEMA.empty_table())
    same, other = (LinksFile(made.out, {"top": top}) for top in (1, 2))
    assert same.begin() == {0}
    assert other.begin() == set()
    with pytest.raises(dsmip.UserError, match=r"a finished block is gone"):
        made.finish(1)
    with pytest.raises(dsmip.UserError, match=r"ends in \.parquet"):
        LinksFile(tmp_path / "links.csv", {})


def test_a_folder_and_a_pattern_of_files(run: Run, mentions: Path, tmp_path: Path) -> None:
    """Pictures start from each file's own folder."""
    further = mentions.parent / "further"
    further.mkdir()
    (further / "blue.jpg").write_bytes(image_bytes((30, 20), "blue"))
    (further / "more.jsonl").write_text(json.dumps({"word": "blue", "image": "blue.jpg"}))
    pq.write_table(pa.Table.from_pylist([{"word": "red", "image": "red.jpg"}]), mentions.parent / "a.parquet")
    out = tmp_path / "links.parquet"
    assert "9 mentions, 3 linked" in command(run.folder, mentions.parent, "--out", out).stdout
    table = pq.read_table(out)
    assert table.column("file").to_pylist() == ["a.parquet", *["mentions.jsonl"] * 8]
    assert table.column("row").to_pylist() == list(range(9))
    said = command(run.folder, f"{mentions.parent}/**/*.jsonl", "--out", out).stdout
    assert "9 mentions, 3 linked" in said
    assert pq.read_table(out).column("file").to_pylist() == ["further/more.jsonl", *["mentions.jsonl"] * 8]


def test_files_in_a_store_give_what_those_here_give(run: Run, mentions: Path, bucket: str, tmp_path: Path) -> None:
    store = ObjectStore(bucket)
    records = [{"word": "red", "image": "red.jpg"}, {"word": "blue", "image": "../gone/blue.jpg"}]
    pq.write_table(pa.Table.from_pylist(records), mentions.parent / "two.parquet")
    for path in mentions.parent.iterdir():
        store.put(path, f"in/{path.name}")
    here, there = tmp_path / "here.parquet", f"{bucket}/out/there.parquet"
    command(run.folder, mentions.parent, "--out", here)
    command(run.folder, f"{bucket}/in", "--out", there)
    assert set(store.objects("out")) == {"out/there.parquet"}
    found = pq.read_table(io.BytesIO(store.read("out/there.parquet") or b""))
    assert found.equals(pq.read_table(here))
    assert found.column("reason").to_pylist()[-1] == "image ../gone/blue.jpg: no such file"
    assert "is complete already" in command(run.folder, f"{bucket}/in", "--out", there).stdout
    for name in ("two.parquet", "*.parquet", "[a-z]*.parquet"):
        (file,) = find_files(f"{bucket}/in/{name}")
        assert (file.name, file.location) == ("two.parquet", f"{bucket}/in/two.parquet")


def test_a_file_that_changes_while_it_is_linked_is_refused(mentions: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"word": "red"}] * 3), mentions.with_name("rows.parquet"))
    blocks = plan_blocks(find_files(mentions.parent))
    reader = BlockReader()
    assert [len(reader.read(block).mentions) for block in blocks] == [8, 3]
    for block in blocks:
        content = Path(block.file.location).read_bytes()
        Path(block.file.location).write_bytes(content[: len(content) // 2])
        with pytest.raises(dsmip.UserError, match=r"was changed|cannot be read as parquet"):
            BlockReader().read(block)


def test_blocks_of_rows_are_read_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of groups that begin elsewhere than the blocks."""
    monkeypatch.setattr(bulk, "BLOCK_ROWS", 3)
    records = [{"word": f"word {number}", "more": number} for number in range(11)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet", row_group_size=4)
    blocks = plan_blocks(find_files(tmp_path / "rows.parquet"))
    for order in ([0, 1, 2, 3], [0, 2, 3], [3, 1, 1, 0]):
        reader = BlockReader()
        for number in order:
            found = reader.read(blocks[number])
            expected = [{"word": each["word"]} for each in records[3 * number : 3 * number + 3]]
            assert (found.first_row, found.mentions) == (3 * number, expected)


@pytest.mark.parametrize(
    "image", ["/etc/hostname", "../../../outside.jpg", "s3://other/a.jpg", "https://example.org/a.jpg"]
)
def test_pictures_in_a_store_are_those_of_its_bucket(image: str, bucket: str) -> None:
    name = bucket.split("/")[2]
    found = NearbyFiles(f"{bucket}/folder", 100).fetched([image])
    with pytest.raises(dsmip.UserError, match=f"is not in s3://{name}, where the mentions are"):
        found(image)


def test_a_picture_in_a_store_is_fetched_whole_unless_it_is_too_large(bucket: str) -> None:
    ObjectStore(bucket).write("folder/a.jpg", b"0123456789")
    names = ["a.jpg", f"{bucket}/folder/a.jpg"]
    found = NearbyFiles(f"{bucket}/folder", 10).fetched(names)
    assert [found(name) for name in names] == [b"0123456789"] * 2
    with pytest.raises(dsmip.UserError, match="larger than 9 bytes"):
        NearbyFiles(f"{bucket}/folder", 9).fetched(names)("a.jpg")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("gone.jsonl", r"gone\.jsonl: no such file of mentions"),
        ("*.csv", "no such file of mentions"),
        ("notes.txt", r"notes\.txt: mentions are read from \.jsonl or \.parquet"),
        ("broken.parquet", r"broken\.parquet: cannot be read as parquet"),
        ("folder", "no such file of mentions"),
    ],
)
def test_a_source_that_is_none_is_one_line(run: Run, source: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "broken.parquet").write_text("no table")
    (tmp_path / "folder").mkdir()
    asked = ["link", str(run.folder), str(tmp_path / source), "--out", str(tmp_path / "out.parquet")]
    ended = CliRunner().invoke(app, asked)
    assert isinstance(ended.exception, dsmip.UserError)
    assert re.search(said, str(ended.exception))


def test_no_mention_at_all(run: Run, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    command(run.folder, tmp_path / "none.jsonl", "--out", tmp_path / "links.parquet")
    table = pq.read_table(tmp_path / "links.parquet")
    assert (len(table), table.column_names) == (0, bulk.SCHEMA.names)


def test_a_folder_in_the_results_place_is_said_before_anything_is_linked(tmp_path: Path) -> None:
    (tmp_path / "links.parquet").mkdir()
    with pytest.raises(dsmip.UserError, match=r"links\.parquet: is a folder; give the name of a parquet file"):
        LinksFile(tmp_path / "links.parquet", {})
