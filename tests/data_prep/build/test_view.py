"""Views: some of the training mentions of a dataset directory, and everything else as it is there."""

import json
import shutil
from pathlib import Path

import pytest

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.build.view import make_view
from data_prep.formats.mimic import MimicRelease
from data_prep.inspection.report import inspect_dataset
from data_prep.inspection.verification import verify_dataset
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from tests.support.small_release import plain_release


@pytest.fixture
def base(tmp_path: Path) -> Dataset:
    prepare(MimicRelease(plain_release(tmp_path / "release", 7, 60)), tmp_path / "data", DatasetOptions(name="plain"))
    return Dataset.open(tmp_path / "data")


def _ids(dataset: Dataset, split: str = "train") -> list[str]:
    return [mention.mention_id for mention in dataset.mentions(split)]


def test_a_view_keeps_a_share_of_training_and_all_else(base: Dataset, tmp_path: Path) -> None:
    view = make_view(base.folder, tmp_path / "tenth", 0.1, 0)
    kept = _ids(view)
    assert len(kept) == view.num_mentions("train") == 6
    assert [name for name in _ids(base) if name in kept] == kept
    assert _ids(view, "test") == _ids(base, "test")
    assert list(view.entities()) == list(base.entities())
    assert list(view.mentions("train", range(2, 4))) == list(view.mentions("train"))[2:4]
    assert view.manifest_hash != base.manifest_hash
    assert [path.name for path in view.folder.iterdir()] == ["manifest.json"]


def test_an_epoch_over_a_view_has_its_mentions_once(base: Dataset, tmp_path: Path) -> None:
    view = make_view(base.folder, tmp_path / "third", 0.35, 3)
    for world_size in (1, 2):
        seen = []
        for rank in range(world_size):
            for batch in view.training_batches("train", 4, seed=1, epoch=2, rank=rank, world_size=world_size):
                seen += [mention.mention_id for mention in batch.mentions]
                assert [mention.entity_id for mention in batch.mentions] == [e.entity_id for e in batch.entities]
        assert sorted(seen) == sorted(_ids(view))


def test_smaller_views_lie_in_larger_ones_and_seeds_differ(base: Dataset, tmp_path: Path) -> None:
    half, tenth = (set(_ids(make_view(base.folder, tmp_path / str(share), share, 0))) for share in (0.5, 0.1))
    assert tenth < half
    assert set(_ids(make_view(base.folder, tmp_path / "other", 0.5, 1))) != half
    assert _ids(make_view(base.folder, tmp_path / "all", 1.0, 0)) == _ids(base)


def test_folders_may_move_together_but_the_data_may_not_change(base: Dataset, tmp_path: Path) -> None:
    make_view(base.folder, tmp_path / "views/half", 0.5, 0)
    (tmp_path / "moved").mkdir()
    shutil.move(base.folder, tmp_path / "moved/data")
    shutil.move(tmp_path / "views", tmp_path / "moved/views")
    moved = Dataset.open(tmp_path / "moved/views/half")
    assert len(_ids(moved)) == 30
    manifest = tmp_path / "moved/data/manifest.json"
    manifest.write_text(manifest.read_text().replace('"plain"', '"other"'))
    with pytest.raises(UserError, match="which has changed; make the view again"):
        Dataset.open(moved.folder)
    shutil.rmtree(tmp_path / "moved/data")
    with pytest.raises(UserError, match="no such dataset directory"):
        Dataset.open(moved.folder)


def test_a_view_below_a_linked_folder_finds_its_data(base: Dataset, tmp_path: Path) -> None:
    (tmp_path / "deep/disk").mkdir(parents=True)
    (tmp_path / "views").symlink_to(tmp_path / "deep/disk")
    view = make_view(base.folder, tmp_path / "views/half", 0.5, 0)
    assert _ids(Dataset.open(tmp_path / "deep/disk/half")) == _ids(view)


@pytest.mark.parametrize(("share", "count"), [(0.1, 6), (0.13, 7), (0.001, 1), (1.0, 60)])
def test_the_first_mentions_of_the_release_are_kept_as_published(
    base: Dataset, tmp_path: Path, share: float, count: int
) -> None:
    """File order and int(n * share), though the shards hold training mentions in another order."""
    view = make_view(base.folder, tmp_path / "first", share, 0, "first")
    assert set(_ids(view)) == {f"m{number}" for number in range(count)}
    assert [name for name in _ids(base) if name in _ids(view)] == _ids(view)
    stored = json.loads((view.folder / "manifest.json").read_text())
    assert (stored["take"], stored["seed"], stored["train_fraction"]) == ("first", None, share)


def test_the_first_mentions_do_not_depend_on_the_order_of_the_shards(base: Dataset, tmp_path: Path) -> None:
    release, options = MimicRelease(tmp_path / "release"), DatasetOptions(name="plain", seed=7)
    prepare(release, tmp_path / "other", options)
    ids = [
        _ids(make_view(data, tmp_path / f"of-{data.name}", 0.2, 0, "first"))
        for data in (base.folder, tmp_path / "other")
    ]
    assert ids[0] != ids[1]
    assert sorted(ids[0]) == sorted(ids[1])


def test_a_view_of_an_older_version_opens(base: Dataset, tmp_path: Path) -> None:
    view = make_view(base.folder, tmp_path / "half", 0.5, 0)
    manifest = view.folder / "manifest.json"
    stored = json.loads(manifest.read_text())
    assert stored.pop("take") == "random"
    manifest.write_text(json.dumps(stored))
    assert _ids(Dataset.open(view.folder)) == _ids(view)
    assert _ids(make_view(base.folder, view.folder, 0.5, 0)) == _ids(view)


def test_what_cannot_be_a_view_is_refused(base: Dataset, tmp_path: Path) -> None:
    view = make_view(base.folder, tmp_path / "half", 0.5, 0)
    assert make_view(base.folder, tmp_path / "half", 0.5, 0).manifest_hash == view.manifest_hash
    with pytest.raises(UserError, match="is not empty and no such view"):
        make_view(base.folder, tmp_path / "half", 0.4, 0)
    with pytest.raises(UserError, match="is not empty and no such view"):
        make_view(base.folder, tmp_path / "half", 0.5, 0, "first")
    with pytest.raises(UserError, match="is not empty and no such view"):
        make_view(base.folder, tmp_path / "release", 0.5, 0)
    with pytest.raises(UserError, match="is a view itself"):
        make_view(view.folder, tmp_path / "again", 0.5, 0)
    manifest = view.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"train-', '"train_'))
    with pytest.raises(UserError, match="no view of a dataset"):
        Dataset.open(view.folder)


def test_a_view_is_inspected_and_verified(base: Dataset, tmp_path: Path) -> None:
    view = make_view(base.folder, tmp_path / "half", 0.5, 0)
    report = inspect_dataset(view)
    assert [report.sizes[split] for split in ("train", "validation", "test")] == [30, 2, 2]
    assert verify_dataset(view.folder).ok
    shard = base.folder / base.manifest.shards_of("train")[0].path
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert not verify_dataset(view.folder).ok
