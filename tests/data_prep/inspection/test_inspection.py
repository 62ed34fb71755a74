"""`dsmip inspect` finds each planted flaw, with exact numbers, and shows records as text."""

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from data_prep.inspection.batches import same_gold_pairs
from data_prep.inspection.image_hash import MAX_BITS, MAX_COLOUR, near_pairs, read_signature
from data_prep.inspection.presentation.page import write_page
from data_prep.inspection.report import Inspection, inspect_dataset
from dsmip.data.dataset import Dataset
from ray_jobs import cli
from tests.support.planted import noise
from tests.support.small_release import image_bytes, write_release

# counts in train, validation, test; None: not asked
MENTIONS = {
    "with_picture": (3, 1, 3),
    "gold_with_picture": (4, 1, 2),
    "both_with_picture": (3, 1, 2),
    "neither_with_picture": (0, 0, 0),
    "without_sentence": (0, 0, 1),
    "word_absent": (1, 0, 1),
    "text_cut": (0, 1, 0),
    "with_desc": (0, 0, 0),
    "desc_of_gold": (None, None, None),
    "word_is_gold_name": (3, 1, 2),
    "lookup_finds": (0, 1, 1),
    "word_names_none": (1, 0, 0),
    "word_names_several": (3, 0, 1),
    "word_names_another": (0, 0, 1),
    "word_of_several_golds": (3, 1, 2),
    "gold_has_twin": (3, 0, 1),
    "gold_unseen": (None, 1, 2),
    "sentence_in_train": (None, 0, 1),
    "sentence_in_validation": (0, None, 0),
    "sentence_in_test": (3, 0, None),
    "duplicate": (2, 0, 0),
    "contradicted": (3, 0, 0),
    "picture_exact_in_train": (None, 1, 0),
    "picture_near_in_train": (None, 1, 1),
    "picture_exact_in_validation": (1, None, 0),
    "picture_near_in_validation": (1, None, 1),
    "picture_exact_in_test": (0, 0, None),
    "picture_near_in_test": (1, 1, None),
    "picture_exact_of_gold": (1, 0, 0),
    "picture_near_of_gold": (1, 0, 0),
    "picture_exact_of_another": (1, 0, 1),
    "picture_near_of_another": (1, 0, 1),
    "picture_plain": (1, 0, 1),
    "picture_unreadable": (0, 0, 0),
}
ENTITIES = {
    "with_picture": 5,
    "without_attributes": 1,
    "text_cut": 1,
    "gold_of_a_mention": 6,
    "name_shared": 3,
    "duplicate": 2,
    "picture_exact_shared": 2,
    "picture_near_shared": 2,
    "picture_plain": 2,
    "picture_unreadable": 0,
}


def test_every_planted_flaw_is_counted(found: Inspection) -> None:
    splits = ("train", "validation", "test")
    counted = {
        row.name: tuple(row.counts[split].count if row.counts[split].of else None for split in splits)
        for row in found.mentions
    }
    assert counted == MENTIONS
    assert {row.name: row.counts["kb"].count for row in found.entities} == ENTITIES
    assert {split: (gold.count, gold.of) for split, gold in found.golds.items()} == {
        "train": (0, 3),
        "validation": (1, 1),
        "test": (2, 3),
    }
    assert found.lengths["kb"].cut == 1
    assert (found.same_gold.num_batches, found.same_gold.mean, found.same_gold.expected_mean) == (1, 1.0, 1.0)


def test_examples_show_both_records(found: Inspection) -> None:
    shown = {
        (example.title, example.split): [getattr(record, "mention_id", None) for _, record in example.records]
        for example in found.examples
    }
    assert shown["picture is or nearly in train too", "test"] == ["e0", None, "t2", None]
    assert shown["sentence is in train too", "test"][0] == "e0"


def test_pictures_may_be_left_out(data: Dataset, found: Inspection) -> None:
    texts = inspect_dataset(data, images=False)
    assert [row.name for row in texts.mentions] == [row.name for row in found.mentions if "picture_" not in row.name]


def test_a_dataset_without_any_picture_is_inspected(tmp_path: Path) -> None:
    kb = [{"qid": "Q1", "entity_name": "Ash", "attr": "tree", "image_list": []}]
    mention = {"id": "a", "mentions": "ash", "sentence": "An ash.", "answer": "Q1", "imgPath": ""}
    records: dict[str, list[Any]] = {"kb": kb, "train": [mention], "dev": [], "test": []}
    prepare(
        MimicRelease(write_release(tmp_path / "release", records, {})), tmp_path / "data", DatasetOptions(name="texts")
    )
    found = inspect_dataset(Dataset.open(tmp_path / "data"))
    assert found.to_json()["entities"]["picture_plain"] == {"count": 0, "of": 0, "share": None}
    write_page(found, tmp_path / "page.html")
    assert "no picture" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_workers_do_not_matter(data: Dataset, found: Inspection) -> None:
    assert inspect_dataset(data, workers=2).to_json() == found.to_json()


def test_the_page_stands_alone_and_shows_text_as_text(found: Inspection, tmp_path: Path) -> None:
    write_page(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert "http" not in page
    assert 'src="data:image/jpeg;base64,' in page


def test_the_command_writes_what_it_shows(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "i.json"), "--html", str(tmp_path / "i.html")]
    monkeypatch.setattr(sys, "argv", ["dsmip", "inspect", str(data.folder), *files])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "gold is unseen in training" in capsys.readouterr().out
    figures = json.loads((tmp_path / "i.json").read_text())
    assert figures["mentions"]["gold_unseen"]["test"] == {"count": 2, "of": 3, "share": pytest.approx(2 / 3)}
    assert figures["dataset"]["manifest_sha256"] == data.manifest_hash
    assert (tmp_path / "i.html").stat().st_size < 5 << 20


def test_signatures_bear_resizing_and_compression_but_not_another_picture() -> None:
    def near(one: bytes, other: bytes) -> bool:
        signatures = [read_signature(one), read_signature(other)]
        assert all(signatures)
        bits = np.array([each.bits for each in signatures if each], np.uint64)
        colours = np.stack([np.frombuffer(each.colours, np.uint8) for each in signatures if each])
        return len(near_pairs(bits, colours)) == 1

    for seed in range(20):
        assert near(noise(seed, 200), noise(seed, 90, 60))
        assert not near(noise(seed), noise(seed + 100))
    assert not near(image_bytes((30, 30), "red"), image_bytes((30, 30), "blue"))
    plain = read_signature(image_bytes((30, 30), "grey"))
    assert plain is not None
    assert plain.plain
    assert read_signature(b"\xff\xd8 no picture") is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 40), st.sampled_from([2, 16, 64]))
def test_all_near_pairs_are_found(seed: int, count: int, num_bits: int) -> None:
    """Against all pairs, of hashes that are full of near ones."""
    draw = np.random.default_rng(seed)
    bits = draw.integers(0, 2**63, 3, np.uint64)[draw.integers(0, 3, count)]
    for number in range(count):
        for bit in draw.choice(num_bits, min(num_bits, int(draw.integers(0, 5))), replace=False):
            bits[number] ^= np.uint64(1 << int(bit))
    colours = draw.integers(100, 100 + MAX_COLOUR + 2, (count, 4)).astype(np.uint8)
    slow = [
        [i, j]
        for i, j in combinations(range(count), 2)
        if (int(bits[i]) ^ int(bits[j])).bit_count() <= MAX_BITS
        and np.abs(colours[i].astype(int) - colours[j].astype(int)).max() <= MAX_COLOUR
    ]
    assert near_pairs(bits, colours).tolist() == slow


def test_same_gold_pairs_are_those_of_training(data: Dataset, small_data: Dataset) -> None:
    for dataset in (data, small_data):
        gold = np.array([mention.entity_row for mention in dataset.mentions("train")])
        sizes = [shard.samples for shard in dataset.manifest.shards_of("train")]
        counted = same_gold_pairs(gold, sizes, batch_size=5)
        pairs = [
            sum(one.entity_row == other.entity_row for one, other in combinations(batch.entities, 2))
            for batch in dataset.training_batches("train", 5, seed=0, epoch=0)
        ]
        assert (counted.num_batches, counted.largest) == (len(pairs), max(pairs))
        assert counted.mean == pytest.approx(sum(pairs) / len(pairs))
