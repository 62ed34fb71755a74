"""URIs, the file systems behind them, and what is said when these fail; against a real S3 server."""

import errno
import re
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from dsmip.errors import StoreAway, UserError
from dsmip.storage.locations import local_path
from dsmip.storage.object_store import attempt, cache_folder, filesystem, is_uri, private_cache, stored_object
from tests.support.object_store import ObjectStore
from tests.support.paths import ROOT


def test_object_stores_have_one_client() -> None:
    sources = [
        path
        for package in ("benchmarks", "data_prep", "dsmip", "ray_jobs")
        for path in Path(ROOT, package).rglob("*.py")
    ]
    calls = re.compile(r"^\s*(import|from) (fsspec|s3fs|gcsfs)\b", re.M)
    assert {path.name for path in sources if calls.search(path.read_text(encoding="utf-8"))} == {"object_store.py"}


@pytest.mark.parametrize("location", ["s3://bucket", "gs://bucket/a b", "file:///tmp/x"])
def test_uris(location: str) -> None:
    assert is_uri(location)
    assert not is_uri(Path(location))


@pytest.mark.parametrize("location", ["data", "/tmp/data", "/tmp/s3:/bucket", "C:\\data", "a/b://c", ""])
def test_paths(location: str) -> None:
    assert not is_uri(location)
    assert local_path(location) == Path(location)


def test_a_file_uri_is_a_path() -> None:
    assert local_path("file:///tmp/a%20b") == Path("/tmp/a b")
    assert local_path("FILE://localhost/runs/x#1?y") == Path("/runs/x#1?y")
    assert local_path("s3://bucket/a") is None
    with pytest.raises(UserError, match="three slashes, as file:///tmp/x"):
        local_path("file://tmp/x")


def test_an_unknown_scheme_is_a_mistake() -> None:
    for uri in ("nosuch://bucket/a", "memory://a"):
        with pytest.raises(UserError, match="no storage is known"):
            filesystem(uri)


@pytest.mark.parametrize("location", ["s3:/b/x", "file:/tmp/x", "s3://", "simplecache::s3://b/x", Path("s3://b/x")])
def test_a_mistyped_uri_is_no_folder(location: str | Path) -> None:
    with pytest.raises(UserError, match="neither a path here nor a URI"):
        local_path(location)


@pytest.mark.parametrize("uri", ["s3://bucket//run", "s3://bucket/a//run", "s3:///run", "s3://bucket/run?versionId=1"])
def test_an_address_that_would_not_be_found_again_is_refused(uri: str) -> None:
    for use in (filesystem, local_path):
        with pytest.raises(UserError, match=r"write one slash|leave it out"):
            use(uri)


@pytest.mark.parametrize("uri", ["s3://[b]/d", "zip://x/y", "reference://x/y", "ftp://127.0.0.1:1/x", "hdfs://x/y"])
def test_what_cannot_be_opened_is_said_in_one_line(uri: str) -> None:
    with pytest.raises(UserError) as caught:
        filesystem(uri)
    assert str(caught.value).startswith(f"{uri}: ")
    assert "\n" not in str(caught.value)


def test_a_scheme_is_known_in_capitals_too() -> None:
    assert filesystem("S3://Bucket/Run/")[1] == "Bucket/Run"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install 'dsmip\[gcs\]'"):
        filesystem("gs://bucket/a")


def test_files_come_and_go(bucket: str) -> None:
    system, path = filesystem(f"{bucket}/")
    attempt(bucket, lambda: system.pipe_file(f"{path}/a/b", b"content"))
    assert attempt(bucket, lambda: system.cat_file(f"{path}/a/b")) == b"content"
    assert [Path(name).name for name in system.find(path)] == ["b"]


def test_a_missing_object_or_bucket_is_not_tried_again(object_store: ObjectStore, bucket: str) -> None:
    for uri in (f"{bucket}/none", "s3://no-such-bucket/none"):
        system, path = filesystem(uri)
        with pytest.raises(FileNotFoundError):
            attempt(uri, partial(system.info, path))


def test_a_version_changes_with_the_content() -> None:
    def version(info: dict[str, object]) -> str:
        return stored_object(info).version

    date = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    tagged = {"size": 1, "ETag": '"a"', "LastModified": date}
    assert version(tagged) == version({**tagged, "LastModified": date.replace(minute=5)})
    assert version(tagged) != version({**tagged, "ETag": '"b"'})
    dated = {"size": 1, "mtime": date}
    for same in (date.replace(microsecond=9), "2026-01-02 03:04:05.9Z"):
        assert version(dated) == version({**dated, "mtime": same})
    for other in ({"size": 2}, {"mtime": date.replace(second=6)}):
        assert version(dated) != version({**dated, **other})
    assert version({"size": 1, "created": 5.2}) == version({"size": 1, "created": 5.9})


def test_missing_credentials_are_named(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    system, path = filesystem(f"{object_store.uri}/a")
    fresh = type(system)(skip_instance_cache=True)
    with pytest.raises(UserError, match=r"s3://x/a: access denied .*credentials") as caught:
        attempt("s3://x/a", lambda: fresh.info(path))
    assert not isinstance(caught.value, StoreAway)


def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    failures = [ConnectionResetError("reset"), TimeoutError("slow")]

    def call() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert attempt("s3://x/a", call) == "done"
    assert waits == sorted(waits)
    assert len(waits) == 2
    failures += [ConnectionResetError("reset")] * 9
    with pytest.raises(StoreAway, match=r"s3://x/a: .*cannot be reached \(ConnectionResetError: reset\)"):
        attempt("s3://x/a", call)


def test_nothing_is_tried_again_after_a_long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("tried again"))

    def call() -> None:
        raise TimeoutError("slow")

    with pytest.raises(StoreAway, match=r"s3://x/a: .*cannot be reached \(TimeoutError: slow\)"):
        attempt("s3://x/a", call)


def test_a_full_disk_here_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("tried again"))
    with pytest.raises(UserError, match=f"{cache_folder()}: No space left on device, while s3://x/a") as caught:
        attempt("s3://x/a", call)
    assert not isinstance(caught.value, StoreAway)


def test_the_cache_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSMIP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("DSMIP_CACHE")
    assert cache_folder().name == "dsmip"


def test_copies_lie_in_folders_that_nobody_else_can_look_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("DSMIP_CACHE", str(cache))
    assert private_cache("data") == cache / "data"
    assert [path.stat().st_mode & 0o777 for path in (cache, cache / "data")] == [0o700, 0o700]
    cache.chmod(0o755)  # a folder that the user has for other things too stays as it is
    private_cache("data")
    assert cache.stat().st_mode & 0o777 == 0o755


def test_a_cache_that_may_be_anothers_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    theirs, link = tmp_path / "theirs", tmp_path / "link"
    theirs.mkdir()
    link.symlink_to(theirs)
    monkeypatch.setenv("DSMIP_CACHE", str(link))
    with pytest.raises(UserError, match=f"^{link}: is a link.*set DSMIP_CACHE to a folder of your own"):
        private_cache("data")
    monkeypatch.setenv("DSMIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "data").symlink_to(theirs)
    with pytest.raises(UserError, match=f"^{tmp_path}/cache/data: is a link.*set DSMIP_CACHE"):
        private_cache("data")
    assert list(theirs.iterdir()) == []
