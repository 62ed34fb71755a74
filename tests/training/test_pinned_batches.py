"""What a seed draws stays what it is: the order of mentions, random entities, words and pictures of every step.

Whole numbers and orders are compared as they are; augmented pixels by two means of each picture, which a last bit of
another machine does not move. A change here changes the figures of every run that anybody repeats.
"""

import hashlib

import pytest
import torch
from torch import Tensor

from dsmip.config import AugmentConfig, PretrainConfig, TrainConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.data.sampler import draw, permutation
from dsmip.data.table import Table
from dsmip.data.text import Template
from dsmip.encoders.architecture import resolve_architecture
from dsmip.runs.run import Run
from dsmip.training.batches import CachedSource, StreamSource, is_held_out
from dsmip.training.pretraining import PairSource
from tests.support.old_run import unpack

Summary = tuple[str, str, list[tuple[float, float]]]
"""A batch: digest of its tokens, which items have a picture, two means of each picture."""
AUGMENT = AugmentConfig(
    scale=0.2,
    shift=0.2,
    rotation=20,
    flip=0.5,
    colour=0.3,
    hue=0.1,
    grayscale=0.2,
    erase=0.3,
    drop_tokens=0.2,
    drop_pictures=0.2,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(unpack(tmp_path_factory.mktemp("old")) / "run")


def order(data: Dataset, seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Numbers of each step's mentions."""
    batches = data.training_batches("train", 5, seed=seed, epoch=epoch, rank=rank, world_size=world_size, start_step=0)
    return [[int(mention.mention_id[1:]) for mention in batch.mentions] for batch in batches]


def digest(numbers: Tensor) -> str:
    return hashlib.sha256(repr(numbers.tolist()).encode()).hexdigest()[:12]


def means(images: Tensor) -> list[tuple[float, float]]:
    """Of each picture uint8 [N, 3, S, S]: the mean, and the mean with weights that grow from 0 to 1 over its bytes."""
    bytes_NB = images.flatten(1).double()
    weights_B = torch.linspace(0, 1, bytes_NB.shape[1], dtype=torch.float64)
    return [(round(float(b.mean()), 2), round(float((b * weights_B).mean()), 2)) for b in bytes_NB]


def assert_alike(batches: list[ItemBatch], expected: list[Summary]) -> None:
    found = [(digest(batch.token_ids), flags(batch.has_image)) for batch in batches]
    assert found == [(tokens, shown) for tokens, shown, _ in expected]
    for batch, (_, _, of_images) in zip(batches, expected, strict=True):
        assert means(batch.images[batch.has_image]) == [pytest.approx(each, abs=0.2) for each in of_images]


def flags(values: Tensor) -> str:
    return "".join("01"[int(value)] for value in values)


def test_mentions_come_in_the_same_order(run: Run) -> None:
    """Four steps of 16 mentions, by seed and epoch; and the second of three workers' share."""
    assert {(seed, epoch): order(run.dataset, seed, epoch) for seed in (0, 7) for epoch in (0, 1)} == {
        (0, 0): [[8, 12, 15, 11], [13, 2, 6, 9], [14, 10, 7, 5], [4, 3, 1, 0]],
        (0, 1): [[10, 5, 8, 12], [6, 4, 14, 9], [11, 0, 1, 13], [2, 3, 7, 15]],
        (7, 0): [[9, 5, 13, 0], [10, 7, 11, 15], [14, 2, 6, 8], [4, 3, 12, 1]],
        (7, 1): [[2, 5, 0, 11], [14, 12, 1, 15], [7, 3, 13, 10], [4, 9, 8, 6]],
    }
    assert order(run.dataset, 0, 0, rank=1, world_size=3) == [[12], [2], [10], [3]]


def test_single_draws_are_the_same() -> None:
    assert [draw(1000, "picture", 0, 1, "m1"), draw(2**63, "noise", 3, 0, 5, 0)] == [845, 2736564836332010596]
    assert [row for row in range(9) if is_held_out(f"Q{row}", 0.3)] == [2, 6, 7]
    assert permutation(9, "x", 2).tolist() == [2, 4, 1, 8, 3, 5, 0, 6, 7]


def test_streamed_batches_are_the_same(run: Run) -> None:
    """From step 1 on of the first epoch, for the expert that reads texts and pictures."""
    config = TrainConfig(batch_size=4, extra_negatives=2, self_mentions=2, augment=AUGMENT)
    source = StreamSource(run.dataset, "train", run.collator("multimodal"), config, seed=3)
    steps = list(source.steps(0, 1))
    assert [(step.gold_row_M.tolist(), step.entity_row_E.tolist()) for step in steps] == [
        ([8, 7, 1, 0, 6, 2], [8, 7, 1, 0, 6, 2, 4, 3]),
        ([4, 1, 6, 3, 5, 1], [4, 1, 6, 3, 5, 1, 6, 6]),
        ([2, 2, 0, 3, 4, 8], [2, 2, 0, 3, 4, 8, 7, 7]),
    ]
    batches = [batch for step in steps for batch in (step.mentions, step.entities)]
    assert_alike(
        [batch for batch in batches if isinstance(batch, ItemBatch)],
        [
            ("9250556909be", "101001", [(90.66, 36.27), (87.47, 43.18), (84.67, 70.59)]),
            ("323d15dca064", "00000010", [(104.0, 43.66)]),
            ("c9c961c20167", "110011", [(89.67, 35.15), (47.67, 23.39), (140.0, 41.63), (43.0, 21.61)]),
            ("d2f2b5080014", "00000100", [(47.33, 23.67)]),
            ("9deffeda8563", "110011", [(61.33, 50.25), (96.33, 72.75), (85.33, 42.44), (83.33, 27.98)]),
            (
                "56465f75a315",
                "11001111",
                [(70.33, 55.64), (23.0, 11.5), (70.67, 30.66), (102.0, 51.0), (235.67, 116.39), (246.33, 121.39)],
            ),
        ],
    )


def test_cached_batches_are_the_same() -> None:
    """Two epochs: golds, then all columns."""
    config = TrainConfig(batch_size=5, extra_negatives=2)
    mentions, entities = Table({"id": torch.arange(16)}), Table({"id": torch.arange(9)})
    source = CachedSource(mentions, entities, torch.arange(16) % 9, config, seed=3)
    steps = [step for epoch in (0, 1) for step in source.steps(epoch)]
    assert [(step.gold_row_M.tolist(), step.entity_row_E.tolist()) for step in steps] == [
        ([1, 6, 0, 0], [1, 6, 0, 0, 4, 0]),
        ([1, 7, 2, 6], [1, 7, 2, 6, 6, 1]),
        ([8, 4, 4, 5], [8, 4, 4, 5, 5, 7]),
        ([5, 3, 2, 3], [5, 3, 2, 3, 4, 0]),
        ([6, 3, 1, 7], [6, 3, 1, 7, 5, 4]),
        ([1, 2, 4, 0], [1, 2, 4, 0, 8, 1]),
        ([2, 3, 0, 6], [2, 3, 0, 6, 2, 0]),
        ([5, 8, 5, 4], [5, 8, 5, 4, 4, 3]),
    ]


def test_pairs_of_the_kb_are_the_same(run: Run) -> None:
    config = PretrainConfig(batch_size=3, augment=AUGMENT)
    network = resolve_architecture(run.config.backbone.architecture)
    source = PairSource(run.dataset, network, Template(), config, seed=3)
    assert_alike(
        list(source.steps(1)),
        [
            ("158dbb4b69b1", "111", [(61.26, 25.62), (102.0, 73.03), (164.08, 82.75)]),
            ("5e04da689ff6", "111", [(94.0, 36.1), (110.7, 37.83), (61.92, 30.75)]),
        ],
    )
