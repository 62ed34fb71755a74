"""`dsmip prepare`, `verify`, `inspect` and `features` on an object store, through the command line."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.build.publish import upload_dataset
from data_prep.formats.mimic import MimicRelease
from dsmip.data.dataset import Dataset
from dsmip.data.images import CLIP_PIXELS
from dsmip.data.manifest import KB
from dsmip.data.table import Table
from dsmip.encoders.image_features import KB_AND_SPLITS, find_features
from dsmip.errors import UserError
from dsmip.runs.provenance import RECORDS
from dsmip.storage.object_store import filesystem
from ray_jobs import cli
from tests.support.object_store import ObjectStore
from tests.support.small_release import plain_release

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dsmip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs a command; returns its exit code and what it said on stdout and stderr. The cache is empty at first."""
    monkeypatch.setenv("DSMIP_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dsmip", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_release(tmp_path_factory.mktemp("plain") / "release", 7, 160)


def stored(uri: str) -> dict[str, bytes]:
    system, path = filesystem(uri)
    return {name.removeprefix(f"{path}/"): system.cat_file(name) for name in system.find(path)}


def contents(folder: Path) -> Mapping[str, bytes]:
    """All files but the record of the command, which is not uploaded."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != RECORDS]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_prepare_then_verify_and_inspect(release: Path, bucket: str, dsmip: Command, tmp_path: Path) -> None:
    """Bytes and figures are those of a folder; run again, nothing is made; other settings are refused."""
    uri, folder = f"{bucket}/data", tmp_path / "data"
    assert dsmip("prepare", release, folder)[0] == 0
    code, said, _ = dsmip("prepare", release, uri)
    assert (code, said.splitlines()[-1]) == (0, said.splitlines()[-1].replace(str(folder), uri))
    assert f"{uri}: 7 entities" in said
    assert stored(uri) == contents(folder)
    assert not list((tmp_path / "cache").rglob("*.tar"))

    assert dsmip("prepare", release, uri)[0] == 0
    code, _, said = dsmip("prepare", release, uri, "--seed", 1)
    assert (code, said) == (2, f"error: {uri}: holds another dataset (seed differ); remove it or choose another\n")

    code, said, _ = dsmip("verify", uri, "--json", tmp_path / "found.json")
    assert (code, said.splitlines()[-1].endswith("all as the manifest says")) == (0, True)
    figures = []
    for location in (folder, uri):
        assert dsmip("inspect", location, "--json", tmp_path / "figures.json")[0] == 0
        figures.append(json.loads((tmp_path / "figures.json").read_text()))
    assert figures[0] == figures[1]


def test_verify_reads_the_store_and_not_the_copies(release: Path, bucket: str, dsmip: Command, tmp_path: Path) -> None:
    dsmip("prepare", release, bucket)
    dataset = Dataset.open(bucket)
    list(dataset.mentions("train"))
    system, path = filesystem(bucket)
    shard = f"{path}/train/train-000003.tar"
    content = system.cat_file(shard)
    system.pipe_file(shard, content[:600] + bytes([content[600] ^ 1]) + content[601:])
    system.rm(f"{path}/test/test-000000.tar")
    code, said, _ = dsmip("verify", bucket, "--workers", 1)
    assert code == 1
    assert "train/train-000003.tar: its SHA-256 is not the manifest's" in said
    assert "test/test-000000.tar: the shard is missing" in said
    assert not list((tmp_path / "cache/data").glob(".fresh-*"))


def test_an_upload_goes_on_where_it_was(release: Path, bucket: str, tmp_path: Path) -> None:
    """What has other bytes in the store by now is sent again; the manifest comes last."""
    folder, journal = tmp_path / "data", tmp_path / "uploaded.json"
    manifest = prepare(MimicRelease(release), folder, DatasetOptions(name="plain"))
    lost, kept = folder / manifest.shards[-1].path, tmp_path / "kept"
    lost.rename(kept)
    with pytest.raises(UserError, match=rf"{bucket}/{manifest.shards[-1].path}: cannot be written"):
        upload_dataset(folder, bucket, journal)
    assert "manifest.json" not in stored(bucket)
    kept.rename(lost)
    noted = list(json.loads(journal.read_text()))
    assert len(noted) >= 2
    system, path = filesystem(bucket)
    system.pipe_file(f"{path}/{noted[0]}", b"other")
    system.rm(f"{path}/{noted[1]}")
    num_files = len(manifest.shards) + 2
    assert upload_dataset(folder, bucket, journal) == num_files - len(noted) + 2 + 1
    assert stored(bucket) == contents(folder)
    assert upload_dataset(folder, bucket, journal) == 1


def test_what_cannot_be_prepared_in_a_store(release: Path, bucket: str, dsmip: Command) -> None:
    system, path = filesystem(bucket)
    system.pipe_file(f"{path}/notes.txt", b"mine")
    for uri, what in (
        (bucket, r"is not empty and no dataset \(it holds notes\.txt\)"),
        ("s3://no-such-bucket/data", "no such bucket"),
        ("nosuch://data", "no storage is known by 'nosuch://'"),
    ):
        code, _, said = dsmip("prepare", release, uri)
        assert code == 2
        assert re.fullmatch(rf"error: {uri}: .*{what}.*\n", said), said
    assert stored(bucket) == {"notes.txt": b"mine"}


def test_a_view_in_a_store(release: Path, bucket: str, dsmip: Command, tmp_path: Path) -> None:
    assert dsmip("prepare", release, f"{bucket}/data")[0] == 0
    view = ("prepare", f"{bucket}/data", f"{bucket}/half", "--train-fraction", 0.5)
    for _ in range(2):
        assert dsmip(*view)[0] == 0
    assert Dataset.open(f"{bucket}/half").num_mentions("train") == 80
    code, _, said = dsmip(*view, "--seed", 1)
    assert (code, "is not empty and no such view" in said) == (2, True)
    prepare(MimicRelease(release), tmp_path / "data", DatasetOptions(name="plain"))
    code, _, said = dsmip("prepare", tmp_path / "data", f"{bucket}/third", "--train-fraction", 0.3)
    assert (code, "is a folder of this machine" in said) == (2, True)


@pytest.mark.parametrize(
    "command",
    ["train --config demo --data {} --run R", "inspect {}", "verify {}", "features {} --kind vgg16 --random-weights 0"],
)
def test_no_dataset_at_a_uri_is_a_mistake(object_store: ObjectStore, dsmip: Command, command: str) -> None:
    code, _, said = dsmip(*command.format("s3://no-such-bucket/data").split())
    assert code == 2
    assert said == (
        "error: s3://no-such-bucket/data: no such bucket, or no manifest.json, so this is no complete dataset; "
        "prepare it (again)\n"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_picture_features_lie_beside_the_shards(
    small_data: Dataset, bucket: str, narrow_backbone: Path, tmp_path: Path, dsmip: Command
) -> None:
    """The job's tables are the folder's, to the last bit; every node fetches them from there."""
    system, path = filesystem(bucket)
    system.put(f"{small_data.folder}/", path, recursive=True)
    options = ("--kind", "clip", "--random-weights", 0, "--config", "demo")
    setting = ("--set", f"backbone.architecture={narrow_backbone}")
    code, said, wrong = dsmip("features", bucket, *options, *setting)
    assert code == 0, wrong
    assert f"{bucket}/features/clip-" in said
    (found,) = find_features(Dataset.open(bucket), "clip", 16, CLIP_PIXELS, "float32")
    names = {Path(name).name for name in stored(f"{bucket}/features")}
    assert names == {"manifest.json", *(f"{part}.safetensors" for part in KB_AND_SPLITS)}
    kb = Table.load(found.file(KB)).dense("picture").clone()
    assert kb.shape == (11, 24)
    found.file(KB).write_bytes(b"damaged")
    assert torch.equal(Table.load(found.file(KB)).dense("picture"), kb)
    assert "is finished already" in dsmip("features", bucket, *options, *setting)[1]
