"""The feature cache: computed once, keyed by what it depends on, missing pictures stored once."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsmip.config import ExperimentConfig
from dsmip.data.collate import Collator
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.table import Ragged, Table
from dsmip.encoders import feature_cache
from dsmip.encoders.base import FeatureEncoder
from dsmip.encoders.feature_cache import (
    FeatureCache,
    chunked,
    encode_rows,
    encode_split,
    item_batches,
    whole_features,
)
from dsmip.encoders.feature_keys import fingerprint
from dsmip.evaluation.preparation import prepare_batches
from dsmip.runs.run import Run
from dsmip.units.matcher import Matcher
from tests.support.encoders.counting import CountingEncoder, patches

CPU = torch.device("cpu")


def untrained(run: Run) -> Matcher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return run.system.build_part("multimodal", run.config, with_encoder=True).eval()


@pytest.fixture
def run(small_data: Dataset, small_config: ExperimentConfig, tmp_path: Path) -> Run:
    return Run(tmp_path, small_config, small_data)


def test_features_are_computed_once(run: Run) -> None:
    encoder, cache = CountingEncoder(), FeatureCache(run.folder)
    arguments = ("text", "test", encoder, run.dataset, run.collator("text"), CPU)
    first = cache.table(*arguments)
    calls = encoder.calls
    again = cache.table(*arguments)
    assert encoder.calls == calls == 1
    assert not encoder.drops
    assert torch.equal(first.dense("text_global"), again.dense("text_global"))
    assert [path.name.startswith("text-test-") for path in run.folder.iterdir()] == [True]


def test_every_dependency_is_in_the_key(run: Run) -> None:
    """Weights, split, precision, text format: each makes a file of its own."""
    cache, collator = FeatureCache(run.folder), run.collator("text")
    cache.table("p", "test", CountingEncoder(), run.dataset, collator, CPU)
    cache.table("p", "validation", CountingEncoder(), run.dataset, collator, CPU)
    cache.table("p", "test", CountingEncoder(2.0), run.dataset, collator, CPU)
    cache.table("p", "test", CountingEncoder(), run.dataset, run.collator("multimodal"), CPU)
    FeatureCache(run.folder, torch.float16).table("p", "test", CountingEncoder(), run.dataset, collator, CPU)
    assert len(list(run.folder.iterdir())) == 5


def test_fingerprint_depends_on_names_and_bits() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    base = fingerprint({"a": one, "b": two}, "x")
    assert fingerprint({"b": two.clone(), "a": one.clone()}, "x") == base
    others = [
        fingerprint({"a": one, "c": two}, "x"),
        fingerprint({"a": two, "b": one}, "x"),
        fingerprint({"a": one, "b": two}, "y"),
        fingerprint({"a": one, "b": torch.nextafter(two, two + 1)}, "x"),
    ]
    assert len({base, *others}) == 5


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "BATCH_SIZE", 4)


def encoded(run: Run, split: str, encoder: FeatureEncoder, collator: Collator) -> Table:
    path = run.folder / f"{split}.safetensors"
    encode_split(path, split, encoder, run.dataset, collator, CPU)
    return Table.load(path)


@pytest.mark.usefixtures("small_batches")
def test_rows_are_those_of_the_items(run: Run) -> None:
    """In shard order for mentions, in row order for the kb, over several batches."""
    collator, encoder = run.collator("multimodal"), CountingEncoder()
    table = encoded(run, "validation", encoder, collator)
    mentions = collator.mentions(list(run.dataset.mentions("validation")))
    assert torch.equal(table.dense("text_global"), mentions.token_ids[:, :2].float())
    kb = encoded(run, KB, encoder, collator)
    entities = collator.entities(list(run.dataset.entities()))
    assert torch.equal(kb.ragged("image_tokens").padded()[0], patches(entities, encoder.weight))
    assert encoder.calls == 2 + 3


@pytest.mark.usefixtures("small_batches")
def test_preparing_in_one_go_equals_preparing_features(run: Run) -> None:
    """Of mentions, and of some rows of the kb."""
    expert, collator = untrained(run), run.collator("multimodal")
    pairs = [
        (KB, range(3, 9), expert.prepare_entities, slice(3, 9)),
        ("validation", None, expert.prepare_mentions, slice(None)),
    ]
    for split, rows, prepare, part in pairs:
        found = prepare_batches(item_batches(split, run.dataset, collator, rows), split, expert, CPU)
        with torch.no_grad():
            expected = prepare(encoded(run, split, expert, collator).rows(part))
        assert found.columns.keys() == expected.columns.keys()
        for name, column in expected.columns.items():
            other = found.columns[name]
            if isinstance(column, Ragged):
                assert isinstance(other, Ragged)
                column, other = column.padded()[0], other.padded()[0]
            assert isinstance(other, Tensor)
            torch.testing.assert_close(other, column, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("small_batches")
def test_missing_pictures_are_stored_once(run: Run) -> None:
    entities = list(run.dataset.entities())
    missing = [row for row, entity in enumerate(entities) if not entity.images]
    assert len(missing) == 3
    kb = encoded(run, KB, CountingEncoder(), run.collator("multimodal"))
    some = encode_rows(range(3, 11), CountingEncoder(), run.dataset, run.collator("multimodal"), CPU)
    for table, first, num_missing in ((kb, 0, 3), (some, 3, 2)):
        column = table.ragged("image_tokens")
        assert len(column.values) == (len(table) - num_missing + 1) * 4
        assert len({int(column.starts[row - first]) for row in missing if row >= first}) == 1
    assert torch.equal(some.dense("text_global"), kb.dense("text_global")[3:])
    assert torch.equal(some.ragged("image_tokens").padded()[0], kb.ragged("image_tokens").padded()[0][3:])


def test_half_precision_halves_the_file_and_scores_as_well(run: Run) -> None:
    expert, collator, sizes, scores = untrained(run), run.collator("multimodal"), [], []
    for dtype in (torch.float32, torch.float16):
        cache = FeatureCache(run.folder / str(dtype), dtype)
        mentions, kb = (cache.table("m", split, expert, run.dataset, collator, CPU) for split in ("test", KB))
        assert {kb.dense("text_global").dtype, kb.ragged("image_tokens").values.dtype} == {dtype}
        assert kb.ragged("image_tokens").starts.dtype == torch.int64
        with torch.no_grad():
            total = expert.score(expert.prepare_mentions(mentions), expert.prepare_entities(kb)).total_ME
        scores.append(total)
        sizes.append(sum(os.path.getsize(path) for path in (run.folder / str(dtype)).iterdir()))
    assert sizes[1] < 0.7 * sizes[0]
    assert scores[1].dtype == torch.float32
    torch.testing.assert_close(scores[1], scores[0], atol=0.05, rtol=0.01)


def test_features_of_parts_side_by_side() -> None:
    tables = {"b": Table({"x": torch.zeros(2)}), "a": Table({"x": torch.ones(2)})}
    assert sorted(whole_features(tables, ["a", "b"]).columns) == ["a.x", "b.x"]
    assert list(chunked(range(5), 2)) == [[0, 1], [2, 3], [4]]
