"""The order of training: every sample once per epoch, equal steps on every rank, resumable anywhere."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.build import mention_shards
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.data import sampler
from dsmip.data.dataset import Dataset, TrainingBatch
from dsmip.data.sampler import count_steps, draw, permutation, step_bounds, windows
from tests.support.small_release import plain_release

NUM_TRAIN = 53
PERMUTATION_0_1 = [7, 5, 1, 4, 0, 6, 2, 3]
DRAWS = [1, 2, 0, 0, 0, 0, 2, 0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("streams")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mention_shards, "MIN_TRAIN_SHARDS", 9)
        prepare(
            MimicRelease(plain_release(folder / "release", 5, NUM_TRAIN)), folder / "data", DatasetOptions(name="plain")
        )
    return Dataset.open(folder / "data")


def _ids(batches: list[TrainingBatch]) -> list[list[str]]:
    return [[mention.mention_id for mention in batch.mentions] for batch in batches]


@given(
    num_samples=st.integers(1, 500),
    batch_size=st.integers(1, 600),
    world_size=st.integers(1, 9),
)
def test_steps_and_ranks_share_evenly(num_samples: int, batch_size: int, world_size: int) -> None:
    num_steps = count_steps(num_samples, batch_size)
    shares = [
        [step_bounds(num_samples, num_steps, step, rank, world_size) for rank in range(world_size)]
        for step in range(num_steps)
    ]
    assert [number for step in shares for share in step for number in share] == list(range(num_samples))
    step_sizes = [sum(map(len, step)) for step in shares]
    assert max(step_sizes) <= batch_size
    assert max(step_sizes) - min(step_sizes) <= 1
    assert all(max(map(len, step)) - min(map(len, step)) <= 1 for step in shares)


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(), st.integers(0, 5))
def test_windows_hold_every_sample_once(shard_sizes: list[int], seed: int, epoch: int) -> None:
    made = list(windows(shard_sizes, seed, epoch))
    everything = [(shard, index) for shard, size in enumerate(shard_sizes) for index in range(size)]
    assert sorted(sample for window in made for sample in window.order) == everything
    num_read = 0
    for window in made:
        assert window.start == num_read
        assert len(window.shards) <= sampler.WINDOW_SHARDS
        assert {shard for shard, _ in window.order} <= set(window.shards)
        num_read += len(window.order)


def test_permutations_are_fixed_for_ever() -> None:
    assert permutation(8, "shards", 0, 1).tolist() == PERMUTATION_0_1
    assert permutation(8, "shards", 0, 2).tolist() != PERMUTATION_0_1
    assert permutation(8, "shards", 1, 1).tolist() != PERMUTATION_0_1
    assert [draw(3, "picture", 0, 0, f"m{n}") for n in range(8)] == DRAWS


def test_draws_are_fair() -> None:
    counts = Counter(draw(4, "picture", 3, 1, n) for n in range(4000))
    assert all(abs(counts[choice] - 1000) < 120 for choice in range(4))


def test_an_epoch_has_every_mention_once_with_its_gold(dataset: Dataset) -> None:
    batches = list(dataset.training_batches("train", 8, seed=0, epoch=0))
    assert [batch.step for batch in batches] == list(range(7)) == list(range(dataset.num_steps("train", 8)))
    assert {len(batch.mentions) for batch in batches} == {7, 8}
    assert Counter(name for ids in _ids(batches) for name in ids) == Counter(f"m{n}" for n in range(NUM_TRAIN))
    for batch in batches:
        for mention, entity in zip(batch.mentions, batch.entities, strict=True):
            assert (mention.entity_row, mention.entity_id) == (entity.entity_row, entity.entity_id)
            assert entity.name == f"name {entity.entity_row}"
            assert len(entity.images) == (entity.entity_row % 3 == 0)


def test_the_order_is_a_pure_function_of_seed_and_epoch(dataset: Dataset) -> None:
    def order(seed: int, epoch: int) -> list[list[str]]:
        return _ids(list(dataset.training_batches("train", 8, seed=seed, epoch=epoch)))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


@given(
    batch_size=st.integers(1, 60), world_size=st.integers(1, 5), start_step=st.integers(0, 60), epoch=st.integers(0, 2)
)
def test_ranks_and_resumes_give_the_same_batches(
    dataset: Dataset, batch_size: int, world_size: int, start_step: int, epoch: int
) -> None:
    whole = list(dataset.training_batches("train", batch_size, seed=5, epoch=epoch))
    ranks = [
        list(
            dataset.training_batches(
                "train", batch_size, seed=5, epoch=epoch, rank=rank, world_size=world_size, start_step=start_step
            )
        )
        for rank in range(world_size)
    ]
    for shares in zip(*ranks, strict=True):
        step = shares[0].step
        assert {share.step for share in shares} == {step}
        assert [mention for share in shares for mention in share.mentions] == whole[step].mentions
        assert [entity for share in shares for entity in share.entities] == whole[step].entities
    assert [batch.step for batch in ranks[0]] == list(range(start_step, len(whole)))


def test_another_epoch_may_draw_another_picture(tmp_path: Path) -> None:
    release = MimicRelease(plain_release(tmp_path / "release", 1, 1))
    (release.folder / "kb_image/0-1.jpg").write_bytes((release.folder / "kb_image/0-1.jpg").read_bytes() + b"\0")
    prepare(release, tmp_path / "data", DatasetOptions(name="plain"))
    dataset = Dataset.open(tmp_path / "data")
    drawn = [next(dataset.training_batches("train", 1, seed=0, epoch=epoch)).entities[0].images for epoch in range(12)]
    assert set(drawn) == {(image,) for image in dataset.entity_images(0)}
    assert len(set(drawn)) == 2


def test_wrong_arguments_are_refused_at_once(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="rank 2"):
        dataset.training_batches("train", 8, seed=0, epoch=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size"):
        dataset.training_batches("train", 0, seed=0, epoch=0)
    with pytest.raises(ValueError, match="no split 'dev'"):
        dataset.training_batches("dev", 8, seed=0, epoch=0)
