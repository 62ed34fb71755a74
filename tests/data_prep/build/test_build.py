"""Preparation: accounting, byte-identical results, and what an interrupted or repeated build does."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from data_prep.build import mention_shards, plan
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.build.runners import Result, Task, Tick, run_in_processes, run_serially
from data_prep.build.tasks import KbTask, SplitTask
from data_prep.formats.mimic import MimicRelease
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import ImageSettings
from dsmip.errors import UserError
from tests.support.small_release import NUM_INPUTS, faulty_release, image_bytes, plain_release


@pytest.fixture
def release(tmp_path: Path) -> MimicRelease:
    return MimicRelease(faulty_release(tmp_path / "release"))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _size(content: bytes) -> tuple[int, int]:
    with Image.open(BytesIO(content)) as image:
        return image.size


def test_every_input_is_in_a_shard_or_rejected(release: MimicRelease, tmp_path: Path) -> None:
    manifest = prepare(release, tmp_path / "data", DatasetOptions(name="small", licence="CC0"))
    in_shards = sum(shard.samples for shard in manifest.shards)
    lines = [json.loads(line) for line in (tmp_path / "data/rejects.jsonl").read_text().splitlines()]
    rejected = [line for line in lines if line["action"] == "rejected"]
    assert in_shards + len(rejected) == NUM_INPUTS
    assert len(rejected) == sum(manifest.rejects.values()) == 9
    assert len({(line["source"], line["record"]) for line in rejected}) == len(rejected)
    found = {(line["source"], line["record"], line["id"], line["reason"]) for line in lines}
    assert {
        ("T_train.json", 3, "c", "nil gold"),  # the third record
        ("T_train.json", 8, "", "no mention id"),
        ("T_train.json", 11, "k", "picture unreadable"),
        ("kb_entity.json", 1 + 3, "Q3", "picture unreadable"),
        ("kb_entity.json", 7, "", "wrong type"),
    } <= found
    assert manifest.degraded == {
        "empty attributes": 2,
        "empty sentence": 1,
        "picture missing": 2,
        "picture unreadable": 2,
    }
    assert manifest.repaired == {"no mention id": 1}
    assert (manifest.entities, manifest.entities_with_image) == (4, 2)
    assert {split: (counts.mentions, counts.with_image) for split, counts in manifest.splits.items()} == {
        "train": (6, 3),
        "validation": (1, 0),
        "test": (1, 1),
    }


def test_records_come_back(release: MimicRelease, tmp_path: Path) -> None:
    prepare(release, tmp_path / "data", DatasetOptions(name="small", images=ImageSettings(size=100, quality=92)))
    dataset = Dataset.open(tmp_path / "data")
    entities = list(dataset.entities())
    assert [entity.entity_id for entity in entities] == ["Q1", "Q2", "Q3", "Q6"]
    assert [_size(image) for image in entities[0].images] == [(100, 133), (20, 10)]
    assert [_size(image) for image in entities[2].images] == [(50, 50)]
    mentions = {mention.mention_id: mention for mention in dataset.mentions("train")}
    assert set(mentions) == {"a", "7", "T_train-7", "i", "k", "l"}
    ash = mentions["a"]
    assert (ash.word, ash.sentence, ash.entity_id, ash.entity_row, ash.groups) == (
        "ash",
        "The ash.",
        "Q1",
        0,
        {"kind": "t"},
    )
    assert {key for key, mention in mentions.items() if mention.image} == {"a", "i", "l"}


def test_the_result_does_not_depend_on_runner_or_folder(
    release: MimicRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(release, tmp_path / "first", DatasetOptions(name="small"))

    def backwards(tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
        return (task.run(tick) for task in reversed(tasks))

    monkeypatch.chdir(tmp_path)
    prepare(release, Path("second"), DatasetOptions(name="small"), run=backwards)
    with run_in_processes(2) as run:
        prepare(release, tmp_path / "third", DatasetOptions(name="small"), run=run)
    first = _contents(tmp_path / "first")
    assert first == _contents(tmp_path / "second") == _contents(tmp_path / "third")
    assert str(tmp_path).encode() not in first["manifest.json"]


def test_the_seed_orders_the_training_mentions(tmp_path: Path) -> None:
    release = MimicRelease(plain_release(tmp_path / "release", 5, 40))

    def order(seed: int) -> list[str]:
        prepare(release, tmp_path / str(seed), DatasetOptions(name="plain", seed=seed))
        return [mention.mention_id for mention in Dataset.open(tmp_path / str(seed)).mentions("train")]

    first, second = order(0), order(1)
    assert first != second
    assert sorted(first) == sorted(second) == sorted(f"m{n}" for n in range(40))
    assert [mention.mention_id for mention in Dataset.open(tmp_path / "0").mentions("test")] == ["m42", "m43"]


def test_shards_of_training_are_many_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mention_shards, "MAX_MENTIONS_PER_SHARD", 2)
    release = MimicRelease(plain_release(tmp_path / "release", 7, 35))
    manifest = prepare(release, tmp_path / "data", DatasetOptions(name="plain", shard_bytes=4000))
    assert [shard.samples for shard in manifest.shards_of("kb")] == [1, 3, 3]
    assert sum(shard.samples for shard in manifest.shards_of("train")) == 35
    assert len(manifest.shards_of("train")) == 18
    assert max(shard.samples for shard in manifest.shards_of("train")) == 2
    entities = list(Dataset.open(tmp_path / "data").entities(range(1, 7)))
    assert [entity.entity_id for entity in entities] == [f"Q{row}" for row in range(1, 7)]
    assert [len(entity.images) for entity in entities] == [0, 0, 1, 0, 0, 1]
    few = prepare(
        MimicRelease(plain_release(tmp_path / "few", 2, 20)), tmp_path / "few_data", DatasetOptions(name="plain")
    )
    assert len(few.shards_of("train")) == 16


@pytest.mark.parametrize("stop_at", ["kb", "train", "test", "a record"])
def test_an_interrupted_build_is_not_a_dataset_and_goes_on(
    release: MimicRelease, tmp_path: Path, stop_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    made: list[str] = []

    def counted(tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
        for task in tasks:
            result = task.run(tick)
            if hasattr(task, "shard"):
                made.append(task.shard.path)
            yield result

    def interrupted(tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
        for result in counted(tasks, tick):
            yield result
            if made and made[-1].startswith(stop_at):
                raise KeyboardInterrupt

    def stop(part: str, done: int, total: int) -> None:
        if stop_at == "a record" and part == "reading train" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(release, out, DatasetOptions(name="small"), run=interrupted, progress=stop)
    with pytest.raises(UserError, match="no complete dataset"):
        Dataset.open(out)
    (out / "train").mkdir(exist_ok=True)
    for leftover in ("train/.train-000003.tar.1.tmp", ".manifest.json.1.tmp"):
        (out / leftover).write_bytes(b"left over")
    finished, made[:] = list(made), []
    manifest = prepare(release, out, DatasetOptions(name="small"), run=counted)
    assert sorted(finished + made) == sorted(shard.path for shard in manifest.shards)
    prepare(release, tmp_path / "fresh", DatasetOptions(name="small"))
    assert _contents(out) == _contents(tmp_path / "fresh")


def test_chunks_of_a_shard_are_kept_and_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = MimicRelease(plain_release(tmp_path / "release", 7, 9))
    prepare(release, tmp_path / "whole", DatasetOptions(name="plain"))
    monkeypatch.setattr(plan, "MAX_RECORDS_PER_CHUNK", 2)
    chunks: list[int] = []

    def counted(tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
        for task in tasks:
            yield task.run(tick)
            if isinstance(task, KbTask):
                chunks.append(task.chunk.number)
                if len(chunks) == 3:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(release, tmp_path / "parts", DatasetOptions(name="plain"), run=counted)
    prepare(release, tmp_path / "parts", DatasetOptions(name="plain"), run=counted)
    assert chunks == [0, 1, 2, 3]
    assert _contents(tmp_path / "parts") == _contents(tmp_path / "whole")


def test_a_finished_shard_that_was_altered_is_made_again(release: MimicRelease, tmp_path: Path) -> None:
    out = tmp_path / "data"

    def altered(tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
        if any(isinstance(task, SplitTask) for task in tasks):
            shard = out / "kb/kb-000000.tar"
            shard.write_bytes(shard.read_bytes()[:-1] + b"x")
            raise KeyboardInterrupt
        return run_serially(tasks, tick)

    with pytest.raises(KeyboardInterrupt):
        prepare(release, out, DatasetOptions(name="small"), run=altered)
    prepare(release, out, DatasetOptions(name="small"))
    prepare(release, tmp_path / "fresh", DatasetOptions(name="small"))
    assert _contents(out) == _contents(tmp_path / "fresh")


def test_an_interrupted_build_of_something_else_starts_again(release: MimicRelease, tmp_path: Path) -> None:
    def never(tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
        if any(isinstance(task, SplitTask) for task in tasks):
            raise KeyboardInterrupt
        return run_serially(tasks, tick)

    with pytest.raises(KeyboardInterrupt):
        prepare(release, tmp_path / "data", DatasetOptions(name="small"), run=never)
    (release.folder / "kb_image/Q1.jpg").unlink()
    manifest = prepare(MimicRelease(release.folder), tmp_path / "data", DatasetOptions(name="small"))
    prepare(MimicRelease(release.folder), tmp_path / "fresh", DatasetOptions(name="small"))
    assert manifest.degraded["picture missing"] == 3
    assert _contents(tmp_path / "data") == _contents(tmp_path / "fresh")


def test_a_picture_that_goes_while_the_build_runs_is_no_missing_one(release: MimicRelease, tmp_path: Path) -> None:
    def lost(tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
        if any(isinstance(task, KbTask) for task in tasks):
            (release.folder / "kb_image/Q1.jpg").unlink()
        return run_serially(tasks, tick)

    with pytest.raises(UserError, match=r"Q1\.jpg: cannot be read any more: No such file"):
        prepare(release, tmp_path / "data", DatasetOptions(name="small"), run=lost)


def test_a_broken_plan_and_a_folder_that_is_no_utf8_are_no_obstacles(release: MimicRelease, tmp_path: Path) -> None:
    folder, out = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / "data"
    shutil.copytree(release.folder, folder)
    (out / ".unfinished").mkdir(parents=True)
    (out / ".unfinished/plan.json").write_bytes(b"\0\0")
    assert prepare(MimicRelease(folder), out, DatasetOptions(name="small")).source.name == "caf?"
    assert Dataset.open(out).manifest.source.name == "caf?"


def test_two_builds_of_one_folder_do_not_mix(release: MimicRelease, tmp_path: Path) -> None:
    def again(tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
        if any(isinstance(task, SplitTask) for task in tasks):
            with pytest.raises(UserError, match="is being prepared by another process"):
                prepare(release, tmp_path / "data", DatasetOptions(name="small"))
        return run_serially(tasks, tick)

    prepare(release, tmp_path / "data", DatasetOptions(name="small"), run=again)
    assert not list((tmp_path / "data").glob(".*"))


def test_a_complete_dataset_is_kept_repaired_or_refused(release: MimicRelease, tmp_path: Path) -> None:
    out = tmp_path / "data"
    manifest = prepare(release, out, DatasetOptions(name="small"))
    before = _contents(out)

    def never(tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
        assert not any(hasattr(task, "shard") for task in tasks)
        return run_serially(tasks, tick)

    assert prepare(release, out, DatasetOptions(name="small"), run=never) == manifest
    with pytest.raises(UserError, match=r"another dataset \(image differ"):
        prepare(release, out, DatasetOptions(name="small", images=ImageSettings(size=64, quality=92)))
    (out / manifest.shards[0].path).unlink()
    prepare(release, out, DatasetOptions(name="small"))
    assert _contents(out) == before
    (release.folder / "T_test.json").write_text("[]")
    with pytest.raises(UserError, match=r"another dataset \(source differ"):
        prepare(release, out, DatasetOptions(name="small"))


def test_foreign_folders_are_left_alone(release: MimicRelease, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty and no dataset"):
        prepare(release, tmp_path / "photos", DatasetOptions(name="small"))
    assert _contents(tmp_path / "photos") == {"mine.txt": b"keep"}
    with pytest.raises(UserError, match="is a file"):
        prepare(release, tmp_path / "photos/mine.txt", DatasetOptions(name="small"))


def test_a_release_without_entities_is_an_error(tmp_path: Path) -> None:
    folder = faulty_release(tmp_path / "release")
    (folder / "kb_entity.json").write_text('[{"entity_name": "x"}, 3]')
    with pytest.raises(UserError, match="no usable entity; rejected: no entity id 1, wrong type 1"):
        prepare(MimicRelease(folder), tmp_path / "data", DatasetOptions(name="none"))


def test_progress_counts_samples(release: MimicRelease, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    prepare(release, tmp_path / "data", DatasetOptions(name="small"), progress=lambda *step: seen.append(step))
    last = {part: (done, total) for part, done, total in seen if total}
    assert last == {"source files": (12, 12), "entities": (4, 4), "mentions": (8, 8)}
    assert ("reading kb", 3, 0) in seen


def test_a_picture_that_may_be_several_files_is_named(tmp_path: Path) -> None:
    folder = faulty_release(tmp_path / "release")
    for name in ("a/Q1.jpg", "b/Q1.jpg"):
        (folder / "kb_image" / name).parent.mkdir()
        (folder / "kb_image" / name).write_bytes(image_bytes((9, 9)))
    (folder / "kb_image/Q1.jpg").unlink()
    manifest = prepare(MimicRelease(folder), tmp_path / "data", DatasetOptions(name="small"))
    assert manifest.degraded["picture ambiguous"] == 1
    lines = [json.loads(line) for line in (tmp_path / "data/rejects.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["reason"] == "picture ambiguous"]
    assert line["detail"] == "Q1.jpg fits kb_image/a/Q1.jpg and kb_image/b/Q1.jpg"


def _warnings(folder: Path, out: Path) -> list[str]:
    lines: list[str] = []
    prepare(MimicRelease(folder), out, DatasetOptions(name="small"), warn=lines.append)
    return lines


def test_a_modality_that_is_lost_is_told_with_where_its_files_lie(tmp_path: Path) -> None:
    folder = plain_release(tmp_path / "release", 9, 4)
    assert _warnings(folder, tmp_path / "sound") == []
    (folder / "kb_image").rename(folder / "kb_pictures")
    (line,) = _warnings(folder, tmp_path / "renamed")
    assert line == (
        "warning: of 4 pictures that entities name none was found, and not 0-0.jpg: a file of that name is "
        "kb_pictures/0-0.jpg; docs/data.md says where pictures are looked for"
    )
    for path in (folder / "kb_pictures").iterdir():
        path.rename(path.with_name(f"own-{path.name}"))
    (line,) = _warnings(folder, tmp_path / "names")
    assert "4 pictures lie in kb_pictures, but none of that name" in line
    (folder / "kb_image").mkdir()
    (folder / "kb_pictures/own-0-1.jpg").rename(folder / "kb_image/0-1.jpg")
    (line,) = _warnings(folder, tmp_path / "some")
    assert "only 1 was found" in line
    for name in ("0-0.jpg", "3-0.jpg"):
        (folder / "kb_pictures" / f"own-{name}").rename(folder / "kb_image" / name)
    assert _warnings(folder, tmp_path / "most") == []


def test_pictures_of_a_split_that_are_nowhere_are_told(tmp_path: Path) -> None:
    folder = plain_release(tmp_path / "release", 2, 4)
    path = folder / "T_test.json"
    path.write_text(json.dumps([record | {"imgPath": "x/gone.png"} for record in json.loads(path.read_text())]))
    shutil.rmtree(folder / "kb_image")
    lines = _warnings(folder, tmp_path / "data")
    assert [line.split(":")[1] for line in lines] == [
        " of 2 pictures that entities name none was found, and not 0-0.jpg",
        " of 2 pictures that mentions of test name none was found, and not x/gone.png",
    ]
    assert f"there is no picture in {folder}" in lines[0]


def test_a_release_whose_mentions_are_all_rejected_is_an_error(tmp_path: Path) -> None:
    folder = plain_release(tmp_path / "release", 2, 4)
    for path in folder.glob("T_*.json"):
        records = json.loads(path.read_text())
        path.write_text(json.dumps([record | {"answer": "nil" if n else "Q99"} for n, record in enumerate(records)]))
    with pytest.raises(UserError, match=r"no usable mention; rejected: nil gold 5, unknown gold 3") as refused:
        prepare(MimicRelease(folder), tmp_path / "data", DatasetOptions(name="small"))
    assert refused.value.exit_code == 2
    for path in folder.glob("T_*.json"):
        path.write_text("[]")  # a knowledge base alone can be trained on by 'dsmip pretrain'
    assert prepare(MimicRelease(folder), tmp_path / "data", DatasetOptions(name="small")).entities == 2
