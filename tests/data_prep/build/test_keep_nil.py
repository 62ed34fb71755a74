"""Mentions whose entity is not in the knowledge base, kept: in shards of their own, out of everything else's way."""

import json
from pathlib import Path

import pytest

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.build.view import make_view
from data_prep.formats.mimic import MimicRelease
from data_prep.formats.registry import open_release
from data_prep.formats.release import ReleaseOptions
from data_prep.inspection.presentation.tables import figure_tables
from data_prep.inspection.report import inspect_dataset
from data_prep.inspection.verification import verify_dataset
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import SPLITS
from dsmip.errors import UserError
from tests.support.small_release import NUM_INPUTS, faulty_release, image_bytes

KEPT, LEFT = DatasetOptions(name="small", keep_nil=True), DatasetOptions(name="small")


@pytest.fixture
def release(tmp_path: Path) -> MimicRelease:
    return MimicRelease(faulty_release(tmp_path / "release"))


@pytest.fixture
def kept(release: MimicRelease, tmp_path: Path) -> Dataset:
    prepare(release, tmp_path / "kept", KEPT)
    return Dataset.open(tmp_path / "kept")


def test_they_have_shards_of_their_own(release: MimicRelease, kept: Dataset, tmp_path: Path) -> None:
    plain = prepare(release, tmp_path / "plain", LEFT)
    own = [mention for split in SPLITS for mention in kept.unknown_mentions(split)]
    said = [(each.mention_id, each.word, each.sentence, each.entity_id, each.entity_row) for each in own]
    assert said == [
        ("c", "none", "nothing", "", -1),  # nil
        ("d", "none", "nothing", "", -1),  # null
        ("e", "word", "unknown", "Q99", -1),  # what the release calls it is kept
    ]
    assert {split: each.mentions for split, each in kept.manifest.unknown.items()} == {"train": 3}
    assert kept.manifest.splits == plain.splits
    for split in ("kb", *SPLITS):
        assert kept.manifest.shards_of(split) == plain.shards_of(split)  # SHA-256 and all
    in_shards = sum(shard.samples for shard in kept.manifest.shards)
    assert in_shards + sum(kept.manifest.rejects.values()) == NUM_INPUTS
    for reason in ("nil gold", "null gold", "unknown gold"):
        assert plain.rejects[reason] == kept.manifest.degraded[reason] == 1
        assert reason not in kept.manifest.rejects
    assert verify_dataset(kept.location).ok
    assert list(kept.unknown_mentions("test")) == []
    with pytest.raises(ValueError, match="no split 'dev'"):
        list(kept.unknown_mentions("dev"))


def test_data_without_them_has_the_manifest_that_it_always_had(release: MimicRelease, tmp_path: Path) -> None:
    prepare(release, tmp_path / "plain", LEFT)
    assert "unknown" not in json.loads((tmp_path / "plain/manifest.json").read_text())


def test_it_is_a_choice_of_the_data_set(release: MimicRelease, kept: Dataset) -> None:
    prepare(release, kept.folder, KEPT)  # stays
    with pytest.raises(UserError, match=r"holds another dataset \(choices differ\)"):
        prepare(release, kept.folder, LEFT)


def test_views_and_inspections_have_them(kept: Dataset, tmp_path: Path) -> None:
    view = make_view(kept.location, tmp_path / "view", 0.5, 0)
    assert [each.mention_id for each in view.unknown_mentions("train")] == ["c", "d", "e"]
    found = inspect_dataset(kept, images=False)
    assert found.to_json()["unknown"] == {"train": 3}
    assert found.sizes["train"] == kept.num_mentions("train")
    assert ("besides, of what is not in the kb", "3", "0", "0") in figure_tables(found)[0].rows


def test_verification_sees_a_gold_where_none_should_be(kept: Dataset) -> None:
    (shard,) = kept.manifest.shards_of("train-unknown")
    path = kept.folder / shard.path
    path.write_bytes(path.read_bytes().replace(b'"entity_row": -1', b'"entity_row":  1', 1))
    problems = [str(problem) for problem in verify_dataset(kept.location).problems]
    what = "train-unknown/train-unknown-000000.tar: sample train-unknown-00000000: its gold is row 1"
    assert any(problem.startswith(what) for problem in problems), problems


def test_nil_mentions_of_wikidiverse_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "release"
    (folder / "wikinewsImgs").mkdir(parents=True)
    (folder / "wikinewsImgs/map.jpg").write_bytes(image_bytes((20, 20)))
    lions = ["Lions", "Organization", 4, 9, "https://en.wikipedia.org/wiki/Detroit_Lions"]
    nobody, unheard = ["Cubs", "Other", 4, 8, "nil"], ["Bears", "Other", 4, 9, "https://en.wikipedia.org/wiki/Bears"]
    passages = [["The Lions", "x/map.jpg", "sports", [lions]], ["The Cubs, The Bears", "", "news", [nobody, unheard]]]
    for name in ("train", "valid", "test"):
        (folder / f"{name}.json").write_text(json.dumps(passages))
    (folder / "kb_entity.json").write_text(json.dumps([{"qid": "Q1", "entity_name": "Detroit Lions", "attr": "team"}]))
    prepare(open_release(folder, "wikidiverse", ReleaseOptions()), tmp_path / "data", KEPT)
    dataset = Dataset.open(tmp_path / "data")
    for split in SPLITS:
        assert [each.word for each in dataset.mentions(split)] == ["Lions"]
        cubs, bears = dataset.unknown_mentions(split)
        assert (cubs.word, cubs.entity_id, dict(cubs.groups)) == ("Cubs", "", {"topic": "news", "type": "Other"})
        assert (bears.word, bears.entity_id) == ("Bears", "https://en.wikipedia.org/wiki/Bears")
    assert dataset.manifest.degraded["nil gold"] == dataset.manifest.degraded["unknown gold"] == 3
    assert verify_dataset(dataset.location).ok
