"""Where batches come from: the same for every reader, divided over workers, made ahead by a thread that ends."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsmip import distributed
from dsmip.config import AugmentConfig, ExperimentConfig, TrainConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.data.table import Table
from dsmip.data.text import ClipTokenizer
from dsmip.ops.augmentation import Draws
from dsmip.runs.run import Run
from dsmip.training.batches import CachedSource, Step, StreamSource, augmented, distinct_rows

Pretend = Callable[[int, int], None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Makes this process believe that it is one of several workers."""

    def be(rank: int, world_size: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world_size)

    return be


def cached(config: TrainConfig, seed: int = 1) -> CachedSource:
    mentions, entities = Table({"id": torch.arange(23)}), Table({"id": torch.arange(9)})
    return CachedSource(mentions, entities, torch.arange(23) % 9, config, seed)


def streamed(data: Dataset, config: ExperimentConfig, folder: Path, train: TrainConfig, seed: int = 1) -> StreamSource:
    return StreamSource(data, "train", Run(folder, config, data).collator("multimodal"), train, seed)


def mention_ids(step: Step) -> list[int]:
    assert isinstance(step.mentions, Table)
    return [int(row) for row in step.mentions.dense("id")]


def summary(steps: Iterator[Step]) -> list[tuple[list[int], list[int], list[int]]]:
    return [(mention_ids(step), step.gold_row_M.tolist(), step.entity_row_E.tolist()) for step in steps]


def test_cached_batches_are_a_function_of_seed_and_epoch() -> None:
    config = TrainConfig(batch_size=5, extra_negatives=2)
    first = summary(cached(config).steps(0))
    torch.rand(3)
    assert summary(cached(config).steps(0)) == first
    assert summary(cached(config).steps(1)) != first
    assert summary(cached(config, seed=2).steps(0)) != first


def test_cached_batches_hold_each_mention_once_with_its_gold() -> None:
    source = cached(TrainConfig(batch_size=5, extra_negatives=2))
    steps = list(source.steps(3))
    assert len(steps) == source.num_steps() == 5
    assert sorted(row for step in steps for row in mention_ids(step)) == list(range(23))
    for step in steps:
        assert 4 <= len(mention_ids(step)) <= 5
        assert step.gold_row_M.tolist() == [row % 9 for row in mention_ids(step)]
        assert step.entity_row_E[: len(step.gold_row_M)].tolist() == step.gold_row_M.tolist()
        assert len(step.entity_row_E) == len(step.gold_row_M) + 2
        assert isinstance(step.entities, Table)
        assert step.entities.dense("id").tolist() == step.entity_row_E.tolist()


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_workers_divide_a_cached_batch(pretend: Pretend, world_size: int) -> None:
    """Also where there are more workers than mentions in a batch: then some shares are empty."""
    config = TrainConfig(batch_size=5, extra_negatives=3)
    whole = summary(cached(config).steps(0))
    shares = []
    for rank in range(world_size):
        pretend(rank, world_size)
        shares.append(summary(cached(config).steps(0)))
    assert {len(share) for share in shares} == {len(whole)}
    for number, (ids, gold, columns) in enumerate(whole):
        parts = [share[number] for share in shares]
        assert [row for part in parts for row in part[0]] == ids
        assert [row for part in parts for row in part[1]] == gold
        assert sorted(row for part in parts for row in part[2]) == sorted(columns)
        sizes = [len(part[0]) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def same(first: Step, second: Step) -> bool:
    pairs = [(first.gold_row_M, second.gold_row_M), (first.entity_row_E, second.entity_row_E)]
    for a, b in ((first.mentions, second.mentions), (first.entities, second.entities)):
        assert isinstance(a, ItemBatch)
        assert isinstance(b, ItemBatch)
        pairs += [(a.token_ids, b.token_ids), (a.images, b.images), (a.has_image, b.has_image)]
    return all(torch.equal(a, b) for a, b in pairs)


def test_streamed_batches_are_a_function_of_seed_and_epoch(
    small_data: Dataset, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    """Augmentation and random entities included."""
    config = TrainConfig(
        batch_size=9, extra_negatives=2, self_mentions=2, augment=AugmentConfig(flip=0.5, shift=0.2, drop_tokens=0.3)
    )
    first = list(streamed(small_data, small_config, tmp_path, config).steps(0))
    torch.rand(3)
    again = list(streamed(small_data, small_config, tmp_path, config).steps(0))
    assert len(first) == len(again) == 3
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not same(first[0], next(streamed(small_data, small_config, tmp_path, config).steps(1)))
    assert not same(first[0], next(streamed(small_data, small_config, tmp_path, config, seed=2).steps(0)))


def test_streamed_columns_are_golds_then_random_entities(
    small_data: Dataset, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    config = TrainConfig(batch_size=8, extra_negatives=3, self_mentions=2)
    counts: dict[int, int] = {}
    for step in streamed(small_data, small_config, tmp_path, config).steps(0):
        number = len(step.gold_row_M)
        assert len(step.mentions) == number
        assert len(step.entities) == len(step.entity_row_E) == number + 3
        assert step.entity_row_E[:number].tolist() == step.gold_row_M.tolist()
        for row in step.gold_row_M[:-2].tolist():
            counts[row] = counts.get(row, 0) + 1
    golds = [mention.entity_row for mention in small_data.mentions("train")]
    assert counts == {row: golds.count(row) for row in set(golds)}


EVERYTHING = TrainConfig(
    batch_size=3,
    extra_negatives=3,
    self_mentions=2,
    augment=AugmentConfig(flip=0.5, drop_tokens=0.3, drop_pictures=0.4, colour=0.2),
)


@pytest.mark.parametrize("world_size", [2, 5])
def test_workers_divide_a_streamed_batch(
    small_data: Dataset, small_config: ExperimentConfig, tmp_path: Path, pretend: Pretend, world_size: int
) -> None:
    """Whatever their number, the same items with the same changes. Empty shares have the right types too."""

    def described(step: Step) -> list[tuple[tuple[str, int, tuple[int, ...]], Tensor]]:
        found = []
        for side, items, rows in (("m", step.mentions, step.gold_row_M), ("e", step.entities, step.entity_row_E)):
            assert isinstance(items, ItemBatch)
            assert rows.dtype == torch.int64
            for row, ids, pixels in zip(rows.tolist(), items.token_ids, items.images, strict=True):
                found.append(((side, row, tuple(ids[ids > 0].tolist())), pixels.int()))
        return found

    whole = list(streamed(small_data, small_config, tmp_path, EVERYTHING).steps(0))
    shares = []
    for rank in range(world_size):
        pretend(rank, world_size)
        shares.append(list(streamed(small_data, small_config, tmp_path, EVERYTHING).steps(0)))
    for number, step in enumerate(whole):
        parts = [share[number] for share in shares]
        left = described(step)
        for key, pixels in (item for part in parts for item in described(part)):
            # colours may be rounded to the other side
            alike = [n for n, (k, p) in enumerate(left) if k == key and int((p - pixels).abs().max()) <= 1]
            assert alike
            del left[alike[0]]
        assert not left
    assert any(len(part.mentions) == 0 for share in shares for part in share) == (world_size == 5)


@pytest.mark.parametrize("start", [0, 1, 5, 8])
def test_a_streamed_epoch_goes_on_in_its_middle(
    small_data: Dataset, small_config: ExperimentConfig, tmp_path: Path, start: int
) -> None:
    source = streamed(small_data, small_config, tmp_path, EVERYTHING)
    rest = list(source.steps(1, start))
    expected = list(source.steps(1))[start:]
    assert len(rest) == source.num_steps() - start
    assert all(same(found, step) for found, step in zip(rest, expected, strict=True))


@pytest.mark.parametrize("start", [0, 2, 5])
def test_a_cached_epoch_goes_on_in_its_middle(start: int) -> None:
    source = cached(TrainConfig(batch_size=5, extra_negatives=2))
    assert summary(source.steps(1, start)) == summary(source.steps(1))[start:]


TOKENIZER = ClipTokenizer(77)


def items(count: int) -> ItemBatch:
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(1, 49000, (count, 8), generator=generator)
    token_ids[:, 0], token_ids[:, 7] = 49406, 49407
    images = torch.randint(1, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ItemBatch(
        token_ids, torch.ones_like(token_ids, dtype=torch.bool), images, torch.ones(count, dtype=torch.bool)
    )


def test_augmentation_that_is_off_returns_the_batch_itself() -> None:
    batch = items(3)
    assert augmented(batch, AugmentConfig(), Draws(torch.Generator(), 3), TOKENIZER, 8) is batch


def test_dropped_pictures_are_missing_pictures() -> None:
    draws = Draws(torch.Generator().manual_seed(2), 40)
    result = augmented(items(40), AugmentConfig(drop_pictures=0.5), draws, TOKENIZER, 8)
    assert 8 < int(result.has_image.sum()) < 32
    assert torch.equal(result.images.flatten(1).any(dim=1), result.has_image)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_hard_negatives_are_columns_of_their_own_mentions_whoever_has_these(
    small_data: Dataset, small_config: ExperimentConfig, tmp_path: Path, pretend: Pretend, world_size: int
) -> None:
    train = TrainConfig(batch_size=6, hard_negatives=2, extra_negatives=1)
    ids = [mention.mention_id for mention in small_data.mentions("train")]
    hard_row_NK = torch.tensor([[n % 9, -1 if n % 3 else (n + 5) % 9] for n in range(len(ids))])

    def columns(make: Callable[[], CachedSource | StreamSource]) -> list[list[int]]:
        """Of each step over all workers, those behind golds and random entities."""
        found: list[list[int]] = []
        for rank in range(world_size):
            pretend(rank, world_size)
            source = make()
            source.hard_row_NK = hard_row_NK
            for number, step in enumerate(source.steps(0)):
                found += [[]] if number == len(found) else []
                found[number] += step.entity_row_E.tolist()
        return [sorted(step) for step in found]

    for make in (lambda: cached(train), lambda: streamed(small_data, small_config, tmp_path, train)):
        together = columns(make)
        pretend(0, 1)
        source = make()
        source.hard_row_NK = hard_row_NK
        assert [sorted(step.entity_row_E.tolist()) for step in source.steps(0)] == together
        golds = [len(step.gold_row_M) for step in make().steps(0)]
        hard = sum(len(columns_) - count - 1 for columns_, count in zip(together, golds, strict=True))
        assert hard == int((hard_row_NK >= 0).sum())


@pytest.mark.parametrize("num_rows", [1, 7, 1 << 21])
@pytest.mark.parametrize("count", [0, 5, 700])
def test_random_rows_are_distinct_and_a_function_of_the_generator(num_rows: int, count: int) -> None:
    drawn = [distinct_rows(num_rows, count, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert len(drawn[0]) == len(drawn[0].unique()) == min(count, num_rows)
    assert ((drawn[0] >= 0) & (drawn[0] < num_rows)).all()
    assert torch.equal(drawn[0], drawn[1])
    if min(count, num_rows) > 5:
        assert not torch.equal(drawn[0], drawn[2])
        assert drawn[0].double().mean() == pytest.approx(num_rows / 2, rel=0.5)
