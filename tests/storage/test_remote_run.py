"""A run's files in a real object store, seen from several machines: each has a cache folder of its own."""

import hashlib
import os
import pickle
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dsmip.errors import StoreAway, UserError
from dsmip.parallel import map_tasks
from dsmip.storage.atomic import write_text
from dsmip.storage.locations import open_run_storage
from dsmip.storage.object_store import ObjectStore, connected_system, filesystem
from dsmip.storage.run_storage import LocalRun, RunStorage
from tests.support.object_store import free_port, running_store, variables

OnMachine = Callable[[str], RunStorage]
PROCESSES, ROUNDS = 4, 4


@pytest.fixture
def on(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnMachine:
    """The run of this test, on a machine; only that machine's cache is known until another one is asked for."""

    def machine(name: str) -> RunStorage:
        monkeypatch.setenv("DSMIP_CACHE", str(tmp_path / name))
        return open_run_storage(f"{bucket}/run")

    return machine


def files(storage: RunStorage) -> dict[str, str]:
    """What is in the copy here."""
    found = {path for path in storage.folder.rglob("*") if path.is_file()}
    return {path.relative_to(storage.folder).as_posix(): path.read_text() for path in sorted(found)}


def test_a_location_is_a_folder_or_an_address(tmp_path: Path) -> None:
    assert (
        open_run_storage(tmp_path / "run") == open_run_storage(f"file://{tmp_path}/run") == LocalRun(tmp_path / "run")
    )
    assert (
        str(open_run_storage("s3://bucket/run/")) == open_run_storage("s3://bucket/run").location == "s3://bucket/run"
    )
    assert (open_run_storage("s3://bucket/run") / "ray").location == "s3://bucket/run/ray"
    with pytest.raises(UserError, match="no storage is known by 'ftps://'"):
        open_run_storage("ftps://host/run").refresh()


def test_small_files_come_by_themselves_and_large_ones_when_they_are_asked_for(on: OnMachine) -> None:
    here = on("one")
    here.write_json("run.json", {"id": 1})
    here.write_text("config.yaml", "seed: 0")
    with here.atomic("text/weights.safetensors") as path:
        path.write_text("weights")
    there = on("two")
    there.refresh()
    assert files(there) == {"config.yaml": "seed: 0", "run.json": '{\n  "id": 1\n}\n'}
    there.pull("text/weights.safetensors")
    assert files(there)["text/weights.safetensors"] == "weights"
    assert there.sizes() == {"config.yaml": 7, "run.json": 14, "text": 7}
    assert there.glob("te*/*") == ["text/weights.safetensors"]


def test_what_others_changed_or_deleted_is_seen(on: OnMachine) -> None:
    here = on("one")
    here.write_json("run.json", {"id": 1})
    for name in ("index/a.bin", "index/b.bin", "gone.json", "changed.json"):
        here.write_text(name, "old")
    there = on("two")
    there.refresh()
    there.pull("index")
    here = on("one")
    here.delete("gone.json")
    here.delete("index/a.bin")
    here.write_text("changed.json", "new")
    assert not (here.folder / "gone.json").exists()
    there = on("two")
    there.refresh()
    there.pull("index")
    assert files(there).keys() == {"run.json", "changed.json", "index/b.bin"}
    assert files(there)["changed.json"] == "new"


def test_a_run_that_was_made_anew_has_nothing_of_the_old_one(on: OnMachine) -> None:
    here = on("one")
    here.write_json("run.json", {"id": 1})
    here.write_text("features/table.safetensors", "old")
    there = on("two")
    for name in there.glob("*"):
        there.delete(name)
    there.write_json("run.json", {"id": 2})
    here = on("one")
    here.refresh()
    assert files(here) == {"run.json": '{\n  "id": 2\n}\n'}


def test_nothing_is_here_that_could_not_be_sent(on: OnMachine) -> None:
    here = on("one")
    with suppress(RuntimeError), here.atomic("part.json") as path:
        path.write_text("half")
        raise RuntimeError
    assert files(here) == here.sizes() == {}
    lost = open_run_storage("s3://no-such-bucket/run")
    with pytest.raises(UserError, match=r"s3://no-such-bucket/run/part\.json.*bucket"):
        lost.write_text("part.json", "whole")
    assert files(lost) == {}


def test_a_folder_that_other_code_writes_is_sent_and_replaced(on: OnMachine) -> None:
    here = on("one") / "trials/0"
    for number in (1, 2):
        (here.folder / f"checkpoints/{number}").mkdir(parents=True)
        (here.folder / f"checkpoints/{number}/checkpoint.json").write_text(str(number))
        (here.folder / f"checkpoints/{number}/weights.bin").write_text(str(number))
    here.push("checkpoints")
    shutil.rmtree(here.folder / "checkpoints/1")
    (here.folder / "checkpoints/2/weights.bin").write_text("changed")
    here.replace("checkpoints")
    (here.folder / "checkpoints/3").mkdir()
    (here.folder / "checkpoints/3/weights.bin").write_text("never sent")
    here.pull("checkpoints")
    expected = {"checkpoints/2/checkpoint.json": "2", "checkpoints/2/weights.bin": "changed"}
    assert files(here) == expected  # as on a machine that has seen nothing of it:
    there = on("two") / "trials/0"
    there.pull("checkpoints")
    assert files(there) == expected
    assert there.glob("checkpoints/*") == ["checkpoints/2"]


def forbid_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    def transfer(*arguments: object, **options: object) -> None:
        pytest.fail("a transfer")

    for way in ("get", "put"):
        monkeypatch.setattr(ObjectStore, way, transfer)


def test_what_is_up_to_date_is_neither_fetched_nor_sent(on: OnMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    here = on("one")
    here.write_json("run.json", {})
    here.write_text("index/a.bin", "a")
    there = on("two")
    there.refresh()
    there.pull("index")

    forbid_transfers(monkeypatch)
    for machine in ("two", "one"):
        storage = on(machine)
        storage.refresh()
        storage.pull("index")
        storage.push("index", "run.json")


def test_a_listing_with_finer_dates_is_of_the_same_files(on: OnMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As MinIO's is: milliseconds in a listing, seconds for one file."""
    here = on("one")
    system, _ = filesystem(here.location)
    original = system.find

    def find(*arguments: object, **options: object) -> dict[str, dict[str, object]]:
        finer = {"LastModified": datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)}
        return {path: {**info, **finer} for path, info in original(*arguments, **options).items()}

    here.write_json("run.json", {"id": 1})
    (here.folder / "progress.bin").write_text("not sent yet")
    monkeypatch.setattr(system, "find", find)
    forbid_transfers(monkeypatch)
    here.refresh()
    assert files(here).keys() == {"run.json", "progress.bin"}


def test_a_copy_that_an_earlier_version_made_is_not_fetched_again(
    on: OnMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one whose notes are of no use taken for the store's file."""
    here = on("one")
    here.write_json("run.json", {"id": 1})
    here.write_text("a.txt", "a")
    there = on("two")
    notes = there.folder.parent / "versions"
    for name, content in (("run.json", '{\n  "id": 1\n}\n'), ("a.txt", "a")):
        write_text(there.folder / name, content)
        found = (there.folder / name).stat()
        tag = hashlib.md5(content.encode()).hexdigest()
        write_text(notes / name, f'{found.st_size} ETag "{tag}"\n{found.st_size} {found.st_mtime_ns} {found.st_ino}')
    with monkeypatch.context() as patched:
        forbid_transfers(patched)
        there.refresh()
        there.push("a.txt")
    write_text(notes / "a.txt", "notes of another kind")
    write_text(there.folder / "a.txt", "not the store's")
    there.refresh()
    assert files(there)["a.txt"] == "a"


def refreshed(task: tuple[str, str, int]) -> list[str]:
    """Caches, each refreshed by all processes at the same moment: the run's files in each, or what went wrong."""
    uri, root, process = task
    found = []
    for number in range(ROUNDS):
        cache = Path(root, str(number))
        os.environ["DSMIP_CACHE"] = str(cache / "cache")
        storage = open_run_storage(uri)
        storage.glob("*")  # connected
        (cache / f"ready-{process}").touch()
        deadline = time.monotonic() + 60
        while len(list(cache.glob("ready-*"))) < PROCESSES:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        try:
            storage.refresh()
            found.append(" ".join(sorted(name for name in files(storage) if "/." not in f"/{name}")))
        except Exception as error:
            found.append(repr(error))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("used", [False, True])
def test_processes_that_start_at_once_share_a_copy(on: OnMachine, bucket: str, tmp_path: Path, used: bool) -> None:
    """On a new node, or on one that knows another run of that address."""
    root = tmp_path / "nodes"
    for number in range(ROUNDS):
        (root / str(number)).mkdir(parents=True)
        if used:
            old = on(f"nodes/{number}/cache")
            for name in ("run.json", "gone.json", "records/0.json"):
                old.write_text(name, "old")
    here = on("one")
    for name in here.glob("*"):
        here.delete(name)
    here.write_json("run.json", {"id": 1})
    for number in range(8):
        here.write_text(f"records/{number}.json", "{}")
    expected = " ".join(sorted(files(here)))
    tasks = [(f"{bucket}/run", str(root), process) for process in range(PROCESSES)]
    assert list(map_tasks(refreshed, tasks, workers=PROCESSES)) == [[expected] * ROUNDS] * PROCESSES


def test_signs_in_an_address_stand_for_themselves(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither listed nor deleted is what they would match as a pattern."""
    monkeypatch.setenv("DSMIP_CACHE", str(tmp_path))
    addresses = [f"{bucket}/{name}" for name in ("run[1]", "run1", "run*", "run")]
    for address in addresses:
        open_run_storage(address).write_text("ray/text/a.txt", address)
    for address in (addresses[0], addresses[2]):
        storage = open_run_storage(address)
        assert storage.glob("*/*") == ["ray/text"]
        assert storage.glob("ray/*/*.txt") == ["ray/text/a.txt"]
        path, system = (storage / "ray").arrow_filesystem()
        system.delete_dir(f"{path}/text")
        assert storage.glob("*") == []
    assert [open_run_storage(address).sizes() != {} for address in addresses] == [False, True, False, True]


def test_half_written_files_are_not_sent(on: OnMachine) -> None:
    here = on("one")
    (here.folder / "index/.b.bin.tmp").mkdir(parents=True)
    (here.folder / "index/.b.bin.tmp/0").write_text("half")
    (here.folder / "index/a.bin").write_text("whole")
    here.push("index")
    assert here.sizes() == {"index": 5}


def test_no_name_in_the_store_leads_out_of_the_copy(on: OnMachine, bucket: str) -> None:
    here = on("one")
    here.write_json("run.json", {})
    system, path = filesystem(f"{bucket}/run")
    for name in ("../escaped.json", "/escaped.json", "records/../../escaped.json"):
        system.pipe_file(f"{path}/{name}", b"{}")
    there = on("two")
    there.refresh()
    there.pull("records")
    assert files(there).keys() == {"run.json"}
    assert not list(there.folder.parents[3].rglob("escaped.json"))


def test_another_process_opens_a_connection_of_its_own(on: OnMachine) -> None:
    here = on("one") / "ray"
    here.write_text("a.txt", "a")
    again = pickle.loads(pickle.dumps(here))
    assert again == here
    again.pull("a.txt")
    path, system = again.arrow_filesystem()
    assert system.open_input_stream(f"{path}/a.txt").read() == b"a"


def test_a_store_that_is_gone_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmip.storage.object_store.RETRY_WAITS", ())
    monkeypatch.setenv("DSMIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    port = free_port()
    for name, value in variables(port, tmp_path).items():
        monkeypatch.setenv(name, value)
    connected_system.cache_clear()  # it knows the other server
    try:
        with running_store(port) as store:
            storage = open_run_storage(f"{store.uri}/run")
            storage.write_text("a.txt", "a")
            store.process.kill()
            store.process.wait()
            with pytest.raises(
                StoreAway, match=r"^s3://dsmip-tests/run/b\.txt: .*cannot be reached.*run the command again$"
            ):
                storage.write_text("b.txt", "b")
            assert files(storage) == {"a.txt": "a"}
    finally:
        connected_system.cache_clear()
