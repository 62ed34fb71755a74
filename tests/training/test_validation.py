"""Validation of towers that train: workers share the items, and all get what one of them alone would."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmip import distributed
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.data.table import Ragged, Table
from dsmip.encoders import feature_cache
from dsmip.evaluation import preparation
from dsmip.runs.load_config import changed, load_config, to_yaml
from dsmip.runs.run import Run
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import train_part
from dsmip.training.validation.hard_negatives import alike_groups
from dsmip.training.validation.shares import own_share
from dsmip.training.validation.subset import subset_rows, validation_between
from dsmip.training.validation.validation import EncodingValidation
from dsmip.units.matcher import Matcher
from tests.support.training.toy_training import RecordingContext
from tests.support.training.workers import run_workers

PART = "multimodal"


@given(count=st.integers(0, 60), size=st.integers(1, 9), world=st.integers(1, 7))
def test_shares_are_whole_batches_and_together_all_items(count: int, size: int, world: int) -> None:
    found = list[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: world)
        for rank in range(world):
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            share = own_share(count, size)
            assert not share or share.start % size == 0
            found += share
    assert found == list(range(count))


def opened(config: Path, data: Path, folder: Path) -> tuple[Run, Matcher, EncodingValidation]:
    run = Run(folder, load_config(str(config)), Dataset.open(data))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        matcher = run.system.build_part(PART, run.config, with_encoder=True)
    return run, matcher, EncodingValidation(run.dataset, run.collator(PART), LocalContext(folder / "context"))


def tensors(table: Table) -> dict[str, Tensor]:
    """All rows of a table; those of several tables side by side are those of one."""
    found = dict[str, Tensor]()
    for name, column in table.columns.items():
        if isinstance(column, Ragged):
            used = column.in_use()
            found |= {f"{name} values": used.values, f"{name} lengths": used.lengths}
        else:
            found[name] = table.dense(name)
    return found


def validated(config: Path, data: Path, folder: Path, batch: int) -> dict[str, Any]:
    """What a worker gets: its entities, all mentions, metrics, hard negatives."""
    feature_cache.BATCH_SIZE = preparation.TILE = batch
    run, matcher, validation = opened(config, data, folder)
    with torch.no_grad():
        share = own_share(run.dataset.num_entities, batch)
        entities = validation.prepared_entities(matcher, share) if share else Table({})
        mentions = validation.prepared_mentions(matcher, "validation")
    golds = torch.tensor([mention.entity_row for mention in run.dataset.mentions("train")])
    return {
        "entities": tensors(entities),
        "mentions": tensors(mentions),
        "metrics": dict(validation(matcher)),
        "hard": validation.hard_negatives(matcher, golds, alike_groups(run.dataset), 3),
    }


@pytest.fixture
def arguments(tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset) -> tuple[Path, Path, Path]:
    (tmp_path / "config.yaml").write_text(to_yaml(small_config))
    return tmp_path / "config.yaml", Path(small_data.location), tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "batch"), [(2, 2), (3, 6)])
def test_workers_get_what_one_alone_gets(
    arguments: tuple[Path, Path, Path], tmp_path: Path, num_workers: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit; eleven entities and seven mentions in batches of six leave one of three workers without any."""
    monkeypatch.setattr(feature_cache, "BATCH_SIZE", batch)
    monkeypatch.setattr(preparation, "TILE", batch)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = validated(*arguments, batch)
    torch.set_num_threads(num_threads)
    workers = run_workers(validated, num_workers, tmp_path / "workers", *arguments, batch)
    for name, values in alone["entities"].items():
        own = [worker["entities"][name] for worker in workers if worker["entities"]]
        assert torch.equal(torch.cat(own), values)
    assert sum(not worker["entities"] for worker in workers) == (num_workers * batch > 11 + batch)
    for worker in workers:
        for name, values in alone["mentions"].items():
            assert torch.equal(worker["mentions"][name], values)
        assert torch.equal(worker["hard"], alone["hard"])
        exact = {name: value for name, value in alone["metrics"].items() if name != "band"}
        assert {name: worker["metrics"][name] for name in exact} == exact


@given(num_entities=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 5), data=st.data())
def test_a_subset_has_all_golds_and_a_fixed_draw_of_others(
    num_entities: int, size: int, seed: int, data: st.DataObject
) -> None:
    golds = data.draw(st.lists(st.integers(0, num_entities - 1), min_size=1, max_size=9))
    rows = subset_rows(torch.tensor(golds), num_entities, size, seed)
    assert rows == sorted(set(rows)) == subset_rows(torch.tensor(golds), num_entities, size, seed)
    assert {*golds} <= {*rows} <= {*range(num_entities)}
    assert len(rows) == min(max(size, len({*golds})), num_entities)


def test_seeds_draw_other_subsets() -> None:
    assert subset_rows(torch.tensor([3]), 1000, 20, 1) != subset_rows(torch.tensor([3]), 1000, 20, 2)


def test_ranks_over_a_subset_are_those_of_its_columns(arguments: tuple[Path, Path, Path]) -> None:
    """A slow twin: every pair scored, the subset's columns counted mention by mention."""
    run, matcher, validation = opened(*arguments)
    matcher.eval()
    with torch.no_grad():
        entities = validation.prepared_entities(matcher, range(run.dataset.num_entities))
        scores_ME = matcher.score(validation.prepared_mentions(matcher, "validation"), entities).total_ME
    between = validation_between(validation, 8, seed=4)
    rows = subset_rows(validation.gold_row_M, run.dataset.num_entities, 8, 4)
    ranks = []
    for scores_E, gold in zip(scores_ME.tolist(), validation.gold_row_M.tolist(), strict=True):
        others = [scores_E[row] for row in rows if row != gold]
        tied = sum(score == scores_E[gold] for score in others)
        ranks.append(1 + sum(score > scores_E[gold] for score in others) + tied / 2)
    assert between is not None
    found = between(matcher)
    assert all(name.startswith("subset_") for name in found)
    assert found["subset_mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    assert found["subset_mean_rank"] == pytest.approx(sum(ranks) / len(ranks))
    assert found["subset_mrr"] >= validation(matcher)["mrr"]


def test_a_subset_as_large_as_the_kb_is_the_kb(arguments: tuple[Path, Path, Path]) -> None:
    run, matcher, validation = opened(*arguments)
    between = validation_between(validation, run.dataset.num_entities, seed=4)
    assert between is not None
    assert between(matcher) == validation(matcher)
    assert validation_between(validation, None, seed=4) is None


@pytest.mark.slow
def test_a_part_is_validated_over_a_subset_between_full_validations(
    arguments: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """With towers that train and from cached features; a resumed training goes on with the same draw."""
    settings = {"epochs": 4, "validate_every": 3, "validate_entities": 8, "batch_size": 8}
    config = changed(load_config(str(arguments[0])), {"train": settings})
    data = Dataset.open(arguments[1])
    for part in ("multimodal", "text"):
        whole = train_part(Run(tmp_path / "whole", config, data), part, LocalContext(tmp_path / f"whole {part}"))
        has = [("mrr" in epoch, "subset_mrr" in epoch) for epoch in whole.history]
        assert has == [(False, True), (False, True), (True, False), (True, False)]
        assert whole.best_epoch >= 2
        context, run = RecordingContext(tmp_path / f"parts {part}", 0), Run(tmp_path / "parts", config, data)
        with pytest.raises(KeyboardInterrupt):
            train_part(run, part, context)
        assert train_part(run, part, LocalContext(context.folder)) == whole
