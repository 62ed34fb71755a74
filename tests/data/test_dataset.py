"""The dataset directory: reading, damage, and readers that trust nothing."""

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.data.dataset import Dataset
from dsmip.data.tar import read_shard, tar_header, write_shard
from dsmip.errors import UserError
from tests.support.small_release import faulty_release


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(MimicRelease(faulty_release(tmp_path / "release")), tmp_path / "data", DatasetOptions(name="small"))
    return tmp_path / "data"


def _change_manifest(folder: Path, change: Mapping[str, Any]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def _add(archive: tarfile.TarFile, name: str, content: bytes = b"{}", kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    archive.addfile(info, io.BytesIO(content))


def test_rows_ranges_and_random_access_agree(folder: Path) -> None:
    dataset = Dataset.open(folder)
    whole = list(dataset.entities())
    assert [entity.entity_row for entity in whole] == list(range(dataset.num_entities)) == [0, 1, 2, 3]
    assert list(dataset.entities(range(1, 3))) == whole[1:3]
    assert list(dataset.entities(range(0))) == []
    assert [dataset.entity(row) for row in range(4)] == whole
    assert [dataset.entity_images(row) for row in range(4)] == [entity.images for entity in whole]
    for row in (-1, 4):
        with pytest.raises(IndexError):
            dataset.entity(row)


def test_entity_texts_are_a_table(folder: Path) -> None:
    table = Dataset.open(folder).entity_texts()
    assert table.to_pydict() == {
        "entity_row": [0, 1, 2, 3],
        "entity_id": ["Q1", "Q2", "Q3", "Q6"],
        "name": ["Ash", "Birch", "Cédar", "Elm"],
        "attributes": ["tree", "", "", "tree"],
        "num_images": [2, 0, 1, 0],
    }


def test_mentions_by_position(folder: Path) -> None:
    dataset = Dataset.open(folder)
    whole = list(dataset.mentions("train"))
    assert len(whole) == dataset.num_mentions("train")
    assert list(dataset.mentions("train", range(2, 5))) == whole[2:5]
    with pytest.raises(ValueError, match="no split 'dev'"):
        list(dataset.mentions("dev"))


def test_the_hash_names_the_data(folder: Path) -> None:
    first = Dataset.open(folder).manifest_hash
    assert first == Dataset.open(folder).manifest_hash
    _change_manifest(folder, {"licence": "other"})
    assert Dataset.open(folder).manifest_hash != first


def test_webdataset_reads_the_shards(folder: Path) -> None:
    dataset = Dataset.open(folder)
    urls = [str(folder / shard.path) for shard in dataset.manifest.shards_of("train")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [json.loads(sample["json"])["mention_id"] for sample in samples] == [
        mention.mention_id for mention in dataset.mentions("train")
    ]
    ash = next(sample for sample in samples if json.loads(sample["json"])["mention_id"] == "a")
    assert ash["jpg"]
    assert (ash["entity.0.jpg"], ash["entity.1.jpg"]) == dataset.entity_images(0)
    assert json.loads(ash["entity.json"])["num_images"] == 2


def test_tars_carry_no_trace_of_machine_or_time(folder: Path) -> None:
    keys = []
    for shard in Dataset.open(folder).manifest.shards:
        with tarfile.open(folder / shard.path) as archive:
            for member in archive:
                keys.append(member.name.split(".")[0])
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                assert member.mode == 0o644
    assert "00000003" in keys
    assert "test-00000000" in keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entities": 5}, "kb has 5 samples, but its shards hold 4"),
        ({"entities": "4"}, "entities: "),
        ({"surprise": 1}, "surprise: "),
        ({"format": 2}, "dataset format 2"),
        ({"splits": {}}, "splits must be train, validation, test"),
    ],
)
def test_a_wrong_manifest_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    _change_manifest(folder, change)
    with pytest.raises(UserError, match=message):
        Dataset.open(folder)


@pytest.mark.parametrize(
    "path", ["pipe:touch /tmp/owned", "../kb/kb-000000.tar", "/etc/passwd", "kb/train-000000.tar", "kb/kb-000000.tar\n"]
)
def test_shards_outside_the_layout_are_refused(folder: Path, path: str) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0]["path"] = path
    _change_manifest(folder, {"shards": shards})
    with pytest.raises(UserError, match="path"):
        Dataset.open(folder)


def test_what_is_no_dataset_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such dataset directory"):
        Dataset.open(tmp_path / "nowhere")
    (folder / "manifest.json").write_text('{"name": }')
    with pytest.raises(UserError, match=r"manifest.json: line 1 column 10: wrong JSON"):
        Dataset.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no manifest.json"):
        Dataset.open(folder)


def test_damage_is_found(folder: Path) -> None:
    dataset = Dataset.open(folder)
    shard = folder / dataset.manifest.shards_of("train")[0].path
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    Dataset.open(folder)
    shard.write_bytes(content[:1000])
    with pytest.raises(UserError, match=r"train-000000.tar: has 1000 bytes instead of"):
        Dataset.open(folder)
    with pytest.raises(UserError, match=r"train-000000.tar: (the shard is damaged|fewer samples)"):
        list(dataset.mentions("train"))
    shard.unlink()
    with pytest.raises(UserError, match=r"train-000000.tar: the file is missing"):
        Dataset.open(folder)


def test_files_that_are_closed_to_this_user_are_named_when_it_is_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by each worker of a training, after Ray has started."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "entities.parquet")
    with pytest.raises(UserError, match=r"kb/entities\.parquet: this user may not read it"):
        Dataset.open(folder)


def test_picture_places_are_checked(folder: Path) -> None:
    path = folder / "kb/entities.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    for offset, size in ((-1, 10), (10**9, 10), (0, 1 << 40)):
        rows[0]["image_offsets"], rows[0]["image_sizes"] = [offset], [size]
        pq.write_table(table.from_pylist(rows, table.schema), path)
        with pytest.raises(UserError, match="prepare the dataset again"):
            Dataset.open(folder).entity(0)
    rows[0]["shard"] = "../secret"
    pq.write_table(table.from_pylist(rows, table.schema), path)
    with pytest.raises(UserError, match="unknown shard"):
        Dataset.open(folder).entity(0)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="damaged"):
        Dataset.open(folder).entity_texts()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../evil.json", tarfile.REGTYPE),
        ("/evil.json", tarfile.REGTYPE),
        ("folder/a.json", tarfile.REGTYPE),
        ("nodot", tarfile.REGTYPE),
        ("a.json", tarfile.SYMTYPE),
        ("a.json", tarfile.FIFOTYPE),
    ],
)
def test_unexpected_members_are_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path, "w") as archive:
        _add(archive, name, b"" if kind != tarfile.REGTYPE else b"{}", kind)
    with pytest.raises(UserError, match="unexpected member"):
        list(read_shard(path))


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path, "w:gz") as archive:
        _add(archive, "a.json")
    with pytest.raises(UserError, match="damaged"):
        list(read_shard(path))


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"mention_id": "a"}', b'{"__class__": "x"}'])
def test_samples_that_nobody_wrote_are_refused(folder: Path, content: bytes) -> None:
    dataset = Dataset.open(folder)
    for shard in dataset.manifest.shards_of("test"):
        write_shard(folder / shard.path, [("test-00000000", {"json": content})])
    with pytest.raises(UserError, match=r"test-000000.tar: test-00000000: a sample is not as it was written"):
        list(dataset.mentions("test"))


FIELDS = st.dictionaries(
    st.sampled_from(["json", "jpg", "entity.json", "entity.0.jpg"]), st.binary(max_size=1500), min_size=1
)


@given(st.lists(FIELDS, max_size=6), st.sets(st.integers(0, 5)))
def test_shards_return_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, samples: list[dict[str, bytes]], wanted: set[int]
) -> None:
    path = tmp_path_factory.mktemp("tar") / "s.tar"
    written = write_shard(path, [(f"k{number}", fields) for number, fields in enumerate(samples)])
    content = path.read_bytes()
    assert (written.samples, written.bytes) == (len(samples), len(content))
    for fields, spans in zip(samples, written.spans, strict=True):
        assert {field: content[offset : offset + size] for field, (offset, size) in spans.items()} == fields
    read = list(read_shard(path, wanted.__contains__))
    assert [sample.index for sample in read] == [number for number in range(len(samples)) if number in wanted]
    assert [dict(sample.fields) for sample in read] == [samples[sample.index] for sample in read]


@pytest.mark.parametrize("key", ["a.b", "a/b", "", ".."])
def test_keys_have_no_dots_or_folders(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="not a sample's field"):
        write_shard(tmp_path / "s.tar", [(key, {"json": b""})])
    assert list(tmp_path.iterdir()) == []


@given(name=st.text("abcXYZ019_-.", min_size=1, max_size=100), size=st.integers(0, 8**11 - 1))
def test_headers_are_those_of_the_standard_library(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    assert tar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT, "ascii")


def test_names_and_sizes_that_no_header_holds_are_refused() -> None:
    for name, size in (("x" * 101, 1), ("x", 8**11)):
        with pytest.raises(ValueError, match="no header"):
            tar_header(name, size)
