"""`dsmip verify` names the file and the sample of whatever was changed."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_prep.inspection.verification import verify_dataset
from dsmip.data.dataset import Dataset
from dsmip.data.tar import read_shard, write_shard
from dsmip.storage.atomic import sha256_file
from ray_jobs import cli


@pytest.fixture
def folder(small_data: Dataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_data.folder, tmp_path / "data"))


def _flip(path: Path, after: bytes, by: int = 0) -> None:
    """Changes one bit, `by` bytes after the first place of `after`."""
    content = bytearray(path.read_bytes())
    content[content.index(after) + len(after) + by] ^= 1
    path.write_bytes(content)


def _rewrite(path: Path, change: Callable[[list[tuple[str, dict[str, bytes]]]], object]) -> None:
    """Changes a shard's samples, and the manifest so that digest and size fit: only the content is wrong."""
    samples = [(sample.key, dict(sample.fields)) for sample in read_shard(path)]
    change(samples)
    write_shard(path, samples)
    manifest = path.parents[1] / "manifest.json"
    value = json.loads(manifest.read_text())
    for shard in value["shards"]:
        if shard["path"] == f"{path.parent.name}/{path.name}":
            shard |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    manifest.write_text(json.dumps(value))


def _change_table(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    path, manifest = folder / "kb/entities.parquet", folder / "manifest.json"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(table.from_pylist(rows, table.schema), path)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"entities_sha256": sha256_file(path)}))


def _swap_rows(rows: list[dict[str, Any]]) -> None:
    rows[1], rows[2] = rows[2], rows[1]


def _set_field(key: int, field: str, content: bytes) -> Callable[[list[tuple[str, dict[str, bytes]]]], None]:
    return lambda samples: samples[key][1].__setitem__(field, content)


def _replace(key: int, field: str, old: bytes, new: bytes) -> Callable[[list[tuple[str, dict[str, bytes]]]], None]:
    def change(samples: list[tuple[str, dict[str, bytes]]]) -> None:
        assert old in samples[key][1][field]
        samples[key][1][field] = samples[key][1][field].replace(old, new)

    return change


def _with_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _drop_last(samples: list[tuple[str, dict[str, bytes]]]) -> None:
    samples.pop()


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"test-00000002.jpg") + 600])


KB, TEST = "kb/kb-000000.tar", "test/test-000000.tar"
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of an entity": (lambda f: _flip(f / KB, b'"name": "green', -1), rf"{KB}: sample 0*1: name is 'greeo'"),
    "a bit of an entity's picture": (
        lambda f: _flip(f / KB, b"\xff\xdb", 40),
        r"test-\d+: its entity pictures are not the kb's of row 1",
    ),
    "a bit of a sentence": (lambda f: _flip(f / TEST, b'"sentence": "', 1), f"{TEST}: its SHA-256 is not"),
    "a bit of a gold": (
        lambda f: _flip(f / TEST, b'"entity_row": ', 0),
        rf"{TEST}: sample test-0*0: its gold is Q\d+ \(row",
    ),
    "a bit of a header": (
        lambda f: _flip(f / TEST, b"test-00000002.json", -1),
        rf"{TEST}: 3 samples \(up to sample test-0*2\), the manifest says 8",
    ),
    "a bit of the table": (lambda f: _flip(f / "kb/entities.parquet", b"PAR1", 60), "entities.parquet: its SHA-256"),
    "a tar cut short": (
        lambda f: _truncate(f / TEST),
        rf"{TEST}: cannot be read beyond sample test-0*1 \(member 'test-0*2.jpg' is cut",
    ),
    "a lost tar": (lambda f: (f / TEST).unlink(), f"{TEST}: the shard is missing"),
    "a lost table": (lambda f: (f / "kb/entities.parquet").unlink(), "entities.parquet: the file is missing"),
    "a lost list": (lambda f: (f / "rejects.jsonl").unlink(), "rejects.jsonl: the file is missing"),
    "a strange line": (lambda f: (f / "rejects.jsonl").write_text("{}\n"), "rejects.jsonl: line 1 is no finding"),
    "a wrong reason": (
        lambda f: _with_manifest(f, rejects={"empty word": 2}),
        "0 records rejected for 'empty word', the manifest says 2",
    ),
    "a wrong count of pictures": (
        lambda f: _with_manifest(f, entities_with_image=7),
        "manifest.json: says that 7 of kb have a picture; the shards hold 8",
    ),
    "swapped rows": (lambda f: _change_table(f, _swap_rows), r"kb-000000.tar: sample 0*1: entity_id is 'Q1', .+ 'Q2'"),
    "a wrong place": (
        lambda f: _change_table(f, lambda rows: rows[2].update(image_offsets=[512])),
        r"kb-000000.tar: sample 0*2: 0.jpg does not lie where kb/entities.parquet says \(512 \+",
    ),
    "a lost row": (lambda f: _change_table(f, lambda rows: rows.pop()), "10 rows, the manifest says 11 entities"),
    "another text": (
        lambda f: _rewrite(f / KB, _replace(3, "json", b"yellow", b"orange")),
        r"kb-000000.tar: sample 0*3: name is 'orange', in kb/entities.parquet 'yellow'",
    ),
    "another copy": (
        lambda f: _rewrite(f / TEST, _replace(0, "entity.json", b"colour", b"flavour")),
        f"{TEST}: sample test-0*0: entity.json is not the kb's record",
    ),
    "no JPEG": (
        lambda f: _rewrite(f / TEST, _set_field(1, "jpg", b"\x89PNG")),
        f"{TEST}: sample test-0*1: jpg cannot be decoded \\(no JPEG\\)",
    ),
    "another field": (
        lambda f: _rewrite(f / TEST, _set_field(1, "entity.7.jpg", b"")),
        f"{TEST}: sample test-0*1: entity.7.jpg is unexpected",
    ),
    "no mention": (
        lambda f: _rewrite(f / TEST, _set_field(1, "json", b"[]")),
        f"{TEST}: sample test-0*1: a record is not an object",
    ),
    "fewer samples": (lambda f: _rewrite(f / TEST, _drop_last), rf"{TEST}: 7 samples .+, the manifest says 8"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_named(folder: Path, name: str) -> None:
    change, message = CHANGES[name]
    change(folder)
    found = verify_dataset(folder)
    assert not found.ok
    assert any(re.search(message, str(problem)) for problem in found.problems), [str(p) for p in found.problems]


def test_all_problems_are_counted_and_few_are_kept(folder: Path) -> None:
    for path in folder.glob("t*/*.tar"):
        _rewrite(path, lambda samples: [sample[1].update({"entity.9.jpg": b""}) for sample in samples])
    _change_table(folder, lambda rows: [row.update(name="x", attributes="y", key="z", entity_row=-1) for row in rows])
    found = verify_dataset(folder, workers=2)
    assert found.num_problems == 31 + 11 * 5
    assert verify_dataset(folder).problems == found.problems


def test_the_command_tells_by_its_exit_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> tuple[Any, dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", ["dsmip", "verify", str(folder), "--json", str(tmp_path / "v.json")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, json.loads((tmp_path / "v.json").read_text()), capsys.readouterr().out

    code, figures, said = run()
    assert (code, figures["ok"], figures["problems"], figures["samples"]) == (0, True, [], 49)
    assert "all as the manifest says" in said
    _flip(folder / KB, b'"name": "green')
    code, figures, said = run()
    assert (code, figures["ok"]) == (1, False)
    assert f"{KB}: its SHA-256 is not the manifest's" in said
    assert figures["num_problems"] == len(figures["problems"])
    assert hashlib.sha256((folder / KB).read_bytes()).hexdigest() == sha256_file(folder / KB)
