"""A dataset in an object store: the same records as in its folder, by way of a cache that is filled once."""

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.build.view import make_view
from data_prep.formats.mimic import MimicRelease
from dsmip.data.dataset import Dataset, TrainingBatch
from dsmip.errors import StoreAway, UserError
from dsmip.parallel import map_tasks
from dsmip.storage.cache import spare_bytes
from dsmip.storage.object_store import connected_system, filesystem
from tests.support.object_store import ObjectStore, free_port, running_store, variables
from tests.support.paths import ROOT
from tests.support.small_release import plain_release

SHARD = "train/train-000001.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """16 shards of training mentions: windows enough to fetch ahead."""
    folder = tmp_path_factory.mktemp("plain")
    prepare(MimicRelease(plain_release(folder / "release", 7, 160)), folder / "data", DatasetOptions(name="plain"))
    return Dataset.open(folder / "data")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which may grow however full the disk is."""
    monkeypatch.setenv("DSMIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DSMIP_CACHE_GB", "1")
    return tmp_path / "cache"


@pytest.fixture
def uri(folder: Dataset, bucket: str, cache: Path) -> str:
    """The dataset, uploaded."""
    return uploaded(folder, f"{bucket}/data")


def uploaded(dataset: Dataset, uri: str) -> str:
    system, path = filesystem(uri)
    system.put(f"{dataset.folder}/", path, recursive=True)
    return uri


def put(uri: str, content: bytes) -> None:
    system, path = filesystem(uri)
    system.pipe_file(path, content)


def batches(dataset: Dataset, epoch: int = 0, start_step: int = 0) -> list[TrainingBatch]:
    return list(dataset.training_batches("train", 8, seed=3, epoch=epoch, start_step=start_step))


def shards_in(cache: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in cache.rglob("*.tar")}


def test_all_records_are_those_of_the_folder(folder: Dataset, uri: str, cache: Path) -> None:
    remote = Dataset.open(f"{uri}/")
    assert (remote.location, remote.manifest_hash) == (uri, folder.manifest_hash)
    for epoch in range(2):
        assert batches(remote, epoch) == batches(folder, epoch)
    for split in ("validation", "test"):
        assert list(remote.mentions(split)) == list(folder.mentions(split))
    assert list(remote.entities()) == list(folder.entities())
    assert remote.entity_images(0) == folder.entity_images(0)
    assert shards_in(cache) == {shard.path for shard in folder.manifest.shards}


def test_a_resumed_epoch_fetches_only_what_is_left(folder: Dataset, uri: str, cache: Path) -> None:
    steps = folder.num_steps("train", 8)
    assert batches(Dataset.open(uri), start_step=steps - 2) == batches(folder, start_step=steps - 2)
    assert len(shards_in(cache)) <= 8


def test_a_file_uri_is_read_in_place(folder: Dataset, cache: Path) -> None:
    local = Dataset.open(folder.folder.as_uri())
    assert local.location == folder.location
    assert batches(local) == batches(folder)
    assert not cache.exists()


def test_a_view_of_a_dataset_in_a_store(folder: Dataset, uri: str, bucket: str, tmp_path: Path) -> None:
    """In a folder it names the URI; in the store, the way to its dataset."""
    expected = make_view(folder.folder, tmp_path / "local", 0.5, 1)
    of_folder = make_view(uri, tmp_path / "half", 0.5, 1)
    assert batches(of_folder) == batches(expected)
    put(f"{bucket}/views/half/manifest.json", of_folder.own.read("manifest.json").replace(uri.encode(), b"../../data"))
    assert batches(Dataset.open(f"{bucket}/views/half")) == batches(expected)


@pytest.mark.parametrize("way", ["../../../other/data", "../../..", "/other/data"])
def test_a_view_does_not_lead_to_another_bucket(
    folder: Dataset, uri: str, bucket: str, tmp_path: Path, way: str
) -> None:
    view = make_view(uri, tmp_path / "half", 0.5, 1)
    put(f"{bucket}/half/manifest.json", view.own.read("manifest.json").replace(uri.encode(), way.encode()))
    with pytest.raises(UserError, match=f"view of '{way}', which leads out of its bucket"):
        Dataset.open(f"{bucket}/half")


def read_all(uri: str) -> list[str]:
    return [mention.mention_id for batch in batches(Dataset.open(uri)) for mention in batch.mentions]


@pytest.mark.slow
def test_two_processes_fill_the_cache_once(folder: Dataset, uri: str, object_store: ObjectStore, cache: Path) -> None:
    before = object_store.num_reads()
    first, second = map_tasks(read_all, [uri, uri], workers=2)
    assert first == second == read_all(folder.location)
    reads = {name: count - before.get(name, 0) for name, count in object_store.num_reads().items()}
    of_shards = [count for name, count in reads.items() if name.startswith(f"{uri}/train/") and count]
    assert of_shards == [1] * len(folder.manifest.shards_of("train"))


def test_a_damaged_copy_is_fetched_again(folder: Dataset, uri: str, cache: Path) -> None:
    remote = Dataset.open(uri)
    batches(remote)
    (copy,) = cache.rglob(Path(SHARD).name)
    whole = copy.read_bytes()
    for damaged in (whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:], whole[:-1], b""):
        copy.write_bytes(damaged)
        assert batches(remote) == batches(folder)
        assert copy.read_bytes() == whole


def test_a_shard_of_other_bytes_is_refused_by_its_uri(folder: Dataset, uri: str, cache: Path) -> None:
    remote = Dataset.open(uri)
    content = (folder.folder / SHARD).read_bytes()
    put(f"{uri}/{SHARD}", content[:-1] + b"x")
    with pytest.raises(UserError, match=rf"{uri}/{SHARD}: not the bytes that the manifest names"):
        batches(remote)
    assert SHARD not in shards_in(cache)
    put(f"{uri}/{SHARD}", content)
    assert batches(remote) == batches(folder)


def test_a_missing_shard_is_refused_by_its_uri(uri: str) -> None:
    system, path = filesystem(f"{uri}/{SHARD}")
    system.rm(path)
    with pytest.raises(UserError, match=rf"{uri}/{SHARD}: the file is missing"):
        batches(Dataset.open(uri))


def test_a_changed_dataset_is_another_one(folder: Dataset, uri: str, tmp_path: Path, cache: Path) -> None:
    batches(Dataset.open(uri))
    prepare(MimicRelease(plain_release(tmp_path / "release", 7, 150)), tmp_path / "other", DatasetOptions(name="other"))
    other = Dataset.open(tmp_path / "other")
    uploaded(other, uri)
    assert batches(Dataset.open(uri)) == batches(other)


@pytest.mark.parametrize("shards", [0.5, 2.5])
def test_a_cache_that_holds_little_still_gives_all(
    folder: Dataset, uri: str, cache: Path, shards: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies go while others are read, and what is open stays readable."""
    size = max(shard.bytes for shard in folder.manifest.shards)
    table = (folder.folder / "kb/entities.parquet").stat().st_size
    limit = shards * size + table
    monkeypatch.setenv("DSMIP_CACHE_GB", str(limit / 1e9))
    remote = Dataset.open(uri)
    reading = remote.mentions("train")
    first = next(reading)
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(batches, remote, epoch) for epoch in (0, 1)]
        for epoch, stream in enumerate(streams):
            assert stream.result() == batches(folder, epoch)
    assert [first, *reading] == list(folder.mentions("train"))
    assert sum(path.stat().st_size for path in cache.rglob("*.tar")) <= limit + 8 * size  # being fetched side by side


def test_folders_of_killed_processes_go_after_a_day(uri: str, cache: Path) -> None:
    left, used = cache / "data" / ".fresh-left", cache / "data" / ".fresh-used"
    for folder in (left, used):
        folder.mkdir(parents=True)
        (folder / "entities.parquet").write_bytes(b"half")
    yesterday = time.time() - 90_000
    os.utime(left, (yesterday, yesterday))
    batches(Dataset.open(uri))
    assert not left.exists()
    assert used.is_dir()


@pytest.mark.parametrize(("size", "spare"), [(20e9, 3e9), (4e12, -5e9)])
def test_without_a_limit_a_tenth_of_the_disk_stays_free_or_ten_gigabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float, spare: float
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=size, free=5e9))
    assert spare_bytes(tmp_path) == spare


def test_a_limit_that_is_no_number_is_a_mistake(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMIP_CACHE_GB", "much")
    with pytest.raises(UserError, match="DSMIP_CACHE_GB=much: must be a number"):
        batches(Dataset.open(uri))


def test_what_is_no_dataset_is_named(bucket: str, object_store: ObjectStore) -> None:
    for uri in (f"{bucket}/none", "s3://no-such-bucket/data"):
        with pytest.raises(UserError, match=rf"{uri}: no such bucket, or no manifest\.json"):
            Dataset.open(uri)
    put(f"{bucket}/manifest.json", b"{")
    with pytest.raises(UserError, match=rf"{bucket}/manifest\.json: line 1"):
        Dataset.open(bucket)


def test_a_server_that_goes_away_is_said(
    folder: Dataset, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch: the first window is read, the next ones cannot be."""
    port = free_port()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("dsmip.storage.object_store.RETRY_WAITS", (0.0,))
    for name, value in variables(port, tmp_path).items():
        monkeypatch.setenv(name, value)
    connected_system.cache_clear()
    try:
        with running_store(port) as store:
            remote = Dataset.open(uploaded(folder, f"{store.uri}/data"))
            stream = remote.training_batches("train", 8, seed=3, epoch=0)
            next(stream)
            store.process.kill()
            store.process.wait()
            with pytest.raises(StoreAway, match=r"s3://\S+\.tar: the store failed or cannot be reached"):
                list(remote.training_batches("train", 8, seed=3, epoch=1))
    finally:
        connected_system.cache_clear()


@pytest.mark.slow
def test_a_full_disk_is_said_in_one_line(uri: str, cache: Path) -> None:
    """With a limit on the size of files, which fails as a full disk does."""
    inspect = [sys.executable, "-m", "ray_jobs", "inspect", uri, "--no-pictures"]
    ended = subprocess.run(inspect, cwd=ROOT, text=True, capture_output=True, preexec_fn=limit_files, check=False)
    assert ended.returncode == 2, ended.stderr
    full = rf"error: {re.escape(str(cache))}\S*: File too large, while {uri}/\S+ was copied here; make room, .*\n"
    assert re.fullmatch(full, ended.stderr), ended.stderr
    assert not list(cache.rglob("*.tmp"))


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
