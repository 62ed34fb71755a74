"""An object that others replaced by one of the same size is noticed by all that keep copies or notes of objects."""

from pathlib import Path

import pytest

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.build.publish import upload_dataset
from data_prep.formats.mimic import MimicRelease
from dsmip.storage.locations import open_dataset_storage, open_run_storage
from dsmip.storage.object_store import ObjectStore
from tests.support.small_release import plain_release


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache."""
    monkeypatch.setenv("DSMIP_CACHE", str(tmp_path / "cache"))


def test_a_version_is_the_same_in_a_listing_and_changes_with_the_object(bucket: str, tmp_path: Path) -> None:
    store, file = ObjectStore(bucket), tmp_path / "file"
    versions = set()
    for content in ("one", "two"):
        file.write_text(content)
        version = store.put(file, "a/b.txt")
        assert {name: stored.version for name, stored in store.objects().items()} == {"a/b.txt": version}
        assert store.objects("a/b.txt") == store.objects("a") == store.objects()
        versions.add(version)
    assert len(versions) == 2


def test_a_run_fetches_the_other_object(bucket: str) -> None:
    run = open_run_storage(f"{bucket}/run")
    for name in ("run.json", "config.yaml", "weights.bin"):
        run.write_text(name, "first")
    for name in ("config.yaml", "weights.bin"):
        ObjectStore(run.location).write(name, b"other")
    run.refresh()
    run.pull("weights.bin")
    assert [(run.folder / name).read_text() for name in ("config.yaml", "weights.bin")] == ["other", "other"]


def test_a_dataset_is_read_afresh_and_an_upload_sends_its_own(bucket: str, tmp_path: Path) -> None:
    folder, journal = tmp_path / "data", tmp_path / "uploaded.json"
    manifest = prepare(MimicRelease(plain_release(tmp_path / "release", 7, 10)), folder, DatasetOptions(name="plain"))
    upload_dataset(folder, bucket, journal)
    shard = manifest.shards[0]
    own, other = (folder / shard.path).read_bytes(), bytes(shard.bytes)
    dataset, _ = open_dataset_storage(bucket)
    assert dataset.use(shard, Path.read_bytes) == own  # copied
    for content in (own, other):
        ObjectStore(bucket).write(shard.path, content)
        with dataset.fresh(shard.path) as path:
            assert path.read_bytes() == content
    assert upload_dataset(folder, bucket, journal) == 2  # that shard and the manifest
    with dataset.fresh(shard.path) as path:
        assert path.read_bytes() == own
