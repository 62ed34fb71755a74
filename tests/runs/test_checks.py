"""What is known of a training before it begins: splits without mentions, pictures smaller than the backbone's."""

import json
from pathlib import Path

import pytest

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.registry import open_release
from data_prep.formats.release import ReleaseOptions
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import ImageSettings
from dsmip.errors import UserError
from dsmip.runs.checks import check_training
from dsmip.runs.load_config import job_config
from ray_jobs.jobs.prepare import BuildOptions, prepare_release


def _dataset(folder: Path, splits: list[str], images: ImageSettings) -> Dataset:
    folder.mkdir()
    entities = [{"entity_id": n, "name": f"n{n}", "attributes": "a"} for n in range(2)]
    mentions = [
        {"mention_id": n, "word": "w", "sentence": "s", "entity_id": n % 2, "split": split}
        for n, split in enumerate(splits)
    ]
    for name, records in (("entities", entities), ("mentions", mentions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    release = open_release(folder, None, ReleaseOptions(), lambda _: None)
    prepare(release, folder / "data", DatasetOptions(name="own", images=images))
    return Dataset.open(folder / "data")


def test_a_split_that_training_needs_is_missing(tmp_path: Path) -> None:
    config, images = job_config("demo", []), ImageSettings(size=64, quality=92)
    sound = _dataset(tmp_path / "sound", ["train", "validation"], images)
    assert check_training(config, sound) == []
    for missing, left in (("train", "validation"), ("validation", "train")):
        dataset = _dataset(tmp_path / missing, [left, "test"], images)
        with pytest.raises(UserError, match=f"has no mention of {missing}, so .*--split 70/10/20") as refused:
            check_training(config, dataset)
        assert refused.value.exit_code == 2


def test_pictures_smaller_than_the_backbones_are_told_with_the_remedy(tmp_path: Path) -> None:
    config = job_config("demo", [])
    small = ImageSettings(size=32, quality=92)
    dataset = _dataset(tmp_path / "small", ["train", "validation"], small)
    (line,) = check_training(config, dataset)
    assert line.startswith(f"warning: {dataset.location} has pictures of at most 32 pixels")
    assert "takes 64: they are enlarged; 'dsmip prepare --image-size 64'" in line
    kept = _dataset(tmp_path / "kept", ["train", "validation"], small.model_copy(update={"keep_original": True}))
    assert check_training(config, kept) == []


def test_prepare_says_which_split_is_missing_and_what_helps(tmp_path: Path) -> None:
    _dataset(tmp_path / "own", ["train", "train"], ImageSettings(size=64, quality=92))
    release = open_release(tmp_path / "own", None, ReleaseOptions(), lambda _: None)
    lines: list[str] = []
    prepare_release(release, tmp_path / "again", BuildOptions(), lambda part, done, total: None, lines.append)
    assert [line.partition(";")[0] for line in lines] == [
        "warning: no mention of validation is left, and 'dsmip train' needs some",
        "warning: no mention of test is left",
    ]
    assert all("--split 70/10/20" in line for line in lines)
    split = open_release(tmp_path / "own", None, ReleaseOptions(split=(34, 33, 33)), lambda _: None)
    assert {part: len(list(split.mentions(part))) for part in ("train", "validation", "test")}["train"] == 2
