"""The generated release, its faults, and the benchmarks of preparing and streaming at a size of seconds."""

import json
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from benchmarks.data import big_release, shards, stores
from benchmarks.data import prepare as prepare_benchmark
from benchmarks.data.big_release import BigRelease, write_big_release
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError

LOST = {
    "cut short": "picture unreadable",
    "zero bytes": "picture unreadable",
    "HTML": "picture unreadable",
    "bomb": "picture too large",
    "missing": "picture missing",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_faultless_release_has_distinct_jpegs_and_the_same_bytes_again(tmp_path: Path) -> None:
    release = BigRelease(entities=9, mentions=10, size=48)
    for name in ("one", "other"):
        assert write_big_release(release, tmp_path / name) == {"kb": Counter(), "mentions": Counter()}
    written = contents(tmp_path / "one")
    assert written == contents(tmp_path / "other")
    images = [content for name, content in written.items() if name.endswith(".jpg")]
    assert len(set(images)) == len(images) == 19
    for content in images:
        with Image.open(BytesIO(content)) as image:
            assert (image.format, image.size) == ("JPEG", (48, 48))
    with pytest.raises(UserError, match="already holds something"):
        write_big_release(release, tmp_path / "one")


def test_every_fault_of_a_release_is_found_and_counted_by_prepare(tmp_path: Path) -> None:
    faults = write_big_release(BigRelease(entities=120, mentions=120, size=40, faults=45), tmp_path / "release")
    for part, kinds in big_release.FAULTS.items():
        assert set(faults[part]) == set(kinds), "a draw without one of the faults shows nothing"
    manifest = prepare(MimicRelease(tmp_path / "release"), tmp_path / "data", DatasetOptions(name="big"))
    everything = faults["kb"] + faults["mentions"]
    rejected = {*big_release.ENTITY_FAULTS, *big_release.MENTION_FAULTS} - {"empty attributes", "no mention id"}
    assert manifest.rejects == {kind: everything[kind] for kind in sorted(rejected)}
    assert manifest.repaired == {"no mention id": everything["no mention id"]}
    lost = Counter[str]()
    for kind, reason in LOST.items():
        lost[reason] += everything[kind]
    assert manifest.degraded == {"empty attributes": everything["empty attributes"], **lost}


def test_what_is_measured_counts_every_sample_once(small_data: Dataset) -> None:
    asked, num_samples = (small_data.folder, 8, 23), small_data.num_mentions("train")
    for decoder in get_args(shards.Decoder):
        assert sum(shards.decoding(*asked, rank, 2, decoder)() for rank in range(2)) == num_samples
    assert shards.streaming(*asked, 0, 1, "pictures", 0)() == num_samples
    assert sum(shards.streaming(*asked, rank, 2, "all", 4)() for rank in range(2)) == num_samples


@pytest.mark.soak
def test_the_stream_is_measured_against_bare_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    release = ["--entities", "20", "--mentions", "30", "--work", str(tmp_path)]
    shards.main([*release, "--batch-size", "8", "--samples", "16", "--rounds", "1", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["workers"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert 0 < row["samples"] <= 16
        assert min(row[name] for name in ("torchvision_per_s", "Pillow_per_s", "all_per_s", "ratio")) > 0
    assert {"records_per_s", "pictures_per_s"} <= set(rows[0])
    assert "all : bare" in capsys.readouterr().out


@pytest.mark.soak
def test_an_object_store_is_measured_against_a_folder(
    small_data: Dataset, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    monkeypatch.setenv("DSMIP_CACHE", "")  # the benchmark sets it
    options = ["--data", str(small_data.folder), "--uri", bucket, "--work", str(tmp_path)]
    stores.main([*options, "--batch-size", "8", "--rounds", "1", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["work"] for row in rows] == ["records", "all"]
    for row in rows:
        assert min(row[name] for name in ("folder", "cold", "warm", "cold_ratio", "warm_ratio")) > 0


@pytest.mark.soak
def test_prepare_is_measured_against_the_bare_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    sizes = ["--entities", "60", "--mentions", "30", "--rounds", "1", "--work", str(tmp_path)]
    prepare_benchmark.main([*sizes, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["workers"], row["pictures"]) for row in rows] == [(1, 90), (2, 90)]
    for row in rows:
        assert min(row[name] for name in ("bare_per_s", "whole_per_s", "whole_ratio", "driver_peak_mib")) > 0
    assert "from 1 to 2 workers: bare" in capsys.readouterr().out
