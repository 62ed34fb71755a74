"""Preparation: accounting, byte-identical results, and what an interrupted or repeated build does."""

import json
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from small_release import NUM_INPUTS, faulty_release, plain_release

from data_prep import build
from data_prep.build import prepare, run_in_processes
from data_prep.mimic_release import MimicRelease
from data_prep.tasks import BuiltShard, ShardTask
from dsmip.errors import UserError
from dsmip.shards import Dataset


@pytest.fixture
def release(tmp_path: Path) -> MimicRelease:
    return MimicRelease(faulty_release(tmp_path / "release"))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _size(content: bytes) -> tuple[int, int]:
    with Image.open(BytesIO(content)) as picture:
        return picture.size


def test_every_input_is_in_a_shard_or_rejected(release: MimicRelease, tmp_path: Path) -> None:
    manifest = prepare(release, tmp_path / "data", name="small", licence="CC0")
    in_shards = sum(shard.samples for shard in manifest.shards)
    lines = [json.loads(line) for line in (tmp_path / "data/rejects.jsonl").read_text().splitlines()]
    rejected = [line for line in lines if line["action"] == "rejected"]
    assert in_shards + len(rejected) == NUM_INPUTS
    assert len(rejected) == sum(manifest.rejects.values()) == 9
    assert len({(line["source"], line["record"]) for line in rejected}) == len(rejected)
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
    prepare(release, tmp_path / "data", name="small", image_size=100)
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
    prepare(release, tmp_path / "first", name="small")

    def backwards(make: Callable[[ShardTask], BuiltShard], tasks: Sequence[ShardTask]) -> Iterator[BuiltShard]:
        return map(make, reversed(tasks))

    monkeypatch.chdir(tmp_path)
    prepare(release, Path("second"), name="small", run=backwards)
    prepare(release, tmp_path / "third", name="small", run=run_in_processes(2))
    first = _contents(tmp_path / "first")
    assert first == _contents(tmp_path / "second") == _contents(tmp_path / "third")
    assert str(tmp_path).encode() not in first["manifest.json"]


def test_the_seed_orders_the_training_mentions(tmp_path: Path) -> None:
    release = MimicRelease(plain_release(tmp_path / "release", 5, 40))

    def order(seed: int) -> list[str]:
        prepare(release, tmp_path / str(seed), name="plain", seed=seed)
        return [mention.mention_id for mention in Dataset.open(tmp_path / str(seed)).mentions("train")]

    first, second = order(0), order(1)
    assert first != second
    assert sorted(first) == sorted(second) == sorted(f"m{n}" for n in range(40))
    assert [mention.mention_id for mention in Dataset.open(tmp_path / "0").mentions("test")] == ["m42", "m43"]


def test_shards_of_training_are_many_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "MAX_MENTIONS_PER_SHARD", 2)
    monkeypatch.setattr(build, "MAX_ENTITIES_PER_SHARD", 3)
    release = MimicRelease(plain_release(tmp_path / "release", 7, 35))
    manifest = prepare(release, tmp_path / "data", name="plain")
    assert [shard.samples for shard in manifest.shards_of("kb")] == [2, 2, 3]
    assert sum(shard.samples for shard in manifest.shards_of("train")) == 35
    assert len(manifest.shards_of("train")) == 18
    assert max(shard.samples for shard in manifest.shards_of("train")) == 2
    entities = list(Dataset.open(tmp_path / "data").entities(range(1, 7)))
    assert [entity.entity_id for entity in entities] == [f"Q{row}" for row in range(1, 7)]
    assert [len(entity.images) for entity in entities] == [0, 0, 1, 0, 0, 1]
    few = prepare(MimicRelease(plain_release(tmp_path / "few", 2, 20)), tmp_path / "few_data", name="plain")
    assert len(few.shards_of("train")) == 16


def test_an_interrupted_build_is_not_a_dataset_and_starts_again(release: MimicRelease, tmp_path: Path) -> None:
    out = tmp_path / "data"

    def interrupted(make: Callable[[ShardTask], BuiltShard], tasks: Sequence[ShardTask]) -> Iterator[BuiltShard]:
        for task in tasks:
            yield make(task)
            if task.path.startswith("train"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(release, out, name="small", run=interrupted)
    assert list(out.glob("kb/*.tar"))
    with pytest.raises(UserError, match="no complete dataset"):
        Dataset.open(out)
    (out / "train/train-000099.tar").write_bytes(b"left over")
    prepare(release, out, name="small")
    prepare(release, tmp_path / "fresh", name="small")
    assert _contents(out) == _contents(tmp_path / "fresh")


def test_a_complete_dataset_is_kept_repaired_or_refused(release: MimicRelease, tmp_path: Path) -> None:
    out = tmp_path / "data"
    manifest = prepare(release, out, name="small")
    before = _contents(out)

    def never(make: Callable[[ShardTask], BuiltShard], tasks: Sequence[ShardTask]) -> Iterator[BuiltShard]:
        raise AssertionError("nothing is to be built")

    assert prepare(release, out, name="small", run=never) == manifest
    with pytest.raises(UserError, match=r"another dataset \(image differ"):
        prepare(release, out, name="small", image_size=64)
    (out / manifest.shards[0].path).unlink()
    prepare(release, out, name="small")
    assert _contents(out) == before
    (release.folder / "T_test.json").write_text("[]")
    with pytest.raises(UserError, match=r"another dataset \(source differ"):
        prepare(release, out, name="small")


def test_foreign_folders_are_left_alone(release: MimicRelease, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty and no dataset"):
        prepare(release, tmp_path / "photos", name="small")
    assert _contents(tmp_path / "photos") == {"mine.txt": b"keep"}
    with pytest.raises(UserError, match="is a file"):
        prepare(release, tmp_path / "photos/mine.txt", name="small")


def test_a_release_without_entities_is_an_error(tmp_path: Path) -> None:
    folder = faulty_release(tmp_path / "release")
    (folder / "kb_entity.json").write_text('[{"entity_name": "x"}, 3]')
    with pytest.raises(UserError, match="no usable entity; rejected: no entity id 1, wrong type 1"):
        prepare(MimicRelease(folder), tmp_path / "data", name="none")


def test_progress_counts_samples(release: MimicRelease, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    prepare(release, tmp_path / "data", name="small", progress=lambda *step: seen.append(step))
    last = {part: (done, total) for part, done, total in seen}
    assert last == {"kb": (4, 4), "train": (6, 6), "validation": (1, 1), "test": (1, 1)}
