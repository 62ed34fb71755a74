"""Stage one of a part: two workers train like one, and a split without mentions is named."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.config import ExperimentConfig, merged
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.runs.load_config import changed, load_config, parse_config, to_yaml
from dsmip.runs.run import Run
from dsmip.training.local_context import LocalContext
from dsmip.training.monitor import StepFigures
from dsmip.training.stages import train_part
from tests.support.small_release import plain_release
from tests.support.training.workers import run_workers


def train_in_worker(folder: Path, config_path: Path, data: Path, parts: list[str]) -> dict[str, Any]:
    run = Run(folder, load_config(str(config_path)), Dataset.open(data))
    results = {part: train_part(run, part, RankContext(folder / "checkpoints" / part)) for part in parts}
    return {part: {"history": result.history, "best": result.best_epoch} for part, result in results.items()}


class RankContext(LocalContext):
    """Workers share a folder of checkpoints, which only rank 0 writes and cleans."""

    def epoch_done(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        if checkpoint is not None:
            super().epoch_done(metrics, checkpoint)


@pytest.mark.slow
def test_two_workers_train_like_one(tmp_path: Path, small_config: ExperimentConfig) -> None:
    """From cached features (text) and from streamed shards (multimodal); each worker ranks a slice of the kb.

    Five mentions in batches of one or two: the first worker's share of a batch of one is empty.
    """
    prepare(MimicRelease(plain_release(tmp_path / "release", 6, 5)), tmp_path / "data", DatasetOptions(name="tiny"))
    settings = {
        "batch_size": 2,
        "epochs": 2,
        "learning_rate": 1e-3,
        "extra_negatives": 3,
        "self_mentions": 3,
        "hard_negatives": 2,
        "augment": {"flip": 0.5, "shift": 0.2, "drop_tokens": 0.3, "drop_pictures": 0.3},
    }
    config = small_config.model_copy(update={"train": merged(small_config.train, settings)})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    parts = ["text", "multimodal"]
    arguments = (tmp_path / "config.yaml", tmp_path / "data", parts)
    alone = train_in_worker(tmp_path / "alone", *arguments)
    workers = run_workers(train_in_worker, 2, tmp_path / "workers", tmp_path / "together", *arguments)
    assert workers[0] == workers[1]
    for part in parts:
        assert alone[part]["history"][1]["loss"] != alone[part]["history"][0]["loss"]
        for expected, found in zip(alone[part]["history"], workers[0][part]["history"], strict=True):
            assert 0 < found.pop("band") < 1e-2  # each worker measures it on its own slice
            assert 0 < expected.pop("band") < 1e-2
            assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("model", "system"),
    [
        ("clip", {}),
        pytest.param("m3el", {"width": 8, "num_tokens": 10}, marks=pytest.mark.slow),
        pytest.param("mmoe", {"width": 8, "num_tokens": 10}, marks=pytest.mark.slow),
    ],
)
def test_a_system_over_one_clip_trains_with_its_towers(
    tmp_path: Path, narrow_backbone: Path, small_data: Dataset, model: str, system: dict[str, int]
) -> None:
    """Whole batches and micro-batches alike, although M3EL's loss is of the whole batch."""
    histories = []
    for micro_batch_size in (None, 2):
        tree = {
            "model": model,
            "backbone": {"architecture": str(narrow_backbone)},
            "system": system,
            "train": {"epochs": 1, "batch_size": 8, "extra_negatives": 2, "micro_batch_size": micro_batch_size},
        }
        folder = tmp_path / str(micro_batch_size)
        run = Run(folder / "run", parse_config(tree), small_data)
        (history,) = train_part(run, model, LocalContext(folder / "context", torch.device("cpu"))).history
        assert 0 < history["mrr"] <= 1
        histories.append(history["loss"])
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)


def test_a_part_may_have_nothing_to_train(tmp_path: Path, narrow_backbone: Path, small_data: Dataset) -> None:
    """CLIP zero-shot is validated once and saved, and ranks as any other."""
    tree = {"model": "clip", "backbone": {"architecture": str(narrow_backbone)}, "system": {"tune": "frozen"}}
    run = Run(tmp_path / "run", parse_config(tree), small_data)
    context = LocalContext(tmp_path / "context", torch.device("cpu"))
    (figures,) = train_part(run, "clip", context).history
    assert 0 < figures["mrr"] <= 1
    assert "loss" not in figures
    assert run.is_finished("clip")
    again = run.load_part("clip", with_encoder=True)
    assert not any(parameter.requires_grad for parameter in again.parameters())


class FeatureContext(LocalContext):
    """Notes how far features are."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen: list[tuple[int, int]] = []

    def features_done(self, done: int, total: int) -> None:
        self.seen.append((done, total))


def test_the_features_of_a_frozen_part_tell_how_far_they_are(tmp_path: Path, narrow_backbone: Path) -> None:
    prepare(MimicRelease(plain_release(tmp_path / "release", 6, 5)), tmp_path / "data", DatasetOptions(name="tiny"))
    data = Dataset.open(tmp_path / "data")
    tree = {"model": "clip", "backbone": {"architecture": str(narrow_backbone)}, "system": {"tune": "frozen"}}
    run = Run(tmp_path / "run", parse_config(tree), data)
    first, second = FeatureContext(tmp_path / "first"), FeatureContext(tmp_path / "second")
    train_part(run, "clip", first)
    sizes = [data.num_mentions("validation"), data.num_entities]
    assert [total for done, total in first.seen if done == total] == sizes
    train_part(Run(tmp_path / "again", run.config, data), "clip", second)
    assert second.seen == []  # they are kept beside the data


class KilledContext(LocalContext):
    """Its process is killed in the second epoch."""

    def step_done(self, epoch: int, step: int, num_steps: int, figures: StepFigures) -> None:
        if (epoch, step) == (1, 1):
            raise KeyboardInterrupt


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_a_resumed_part_ends_within_the_tolerance_of_gpus(
    tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset, device: str
) -> None:
    """docs/reliability.md states it: kernels of a GPU may add in another order each time."""
    settings = {"epochs": 3, "batch_size": 4, "augment": {"shift": 0.2, "drop_tokens": 0.3}}
    config = changed(small_config, {"train": settings, "parts": {"multimodal": {"checkpoint_steps": 1}}})
    where = torch.device(device)
    whole = train_part(Run(tmp_path / "whole", config, small_data), "multimodal", LocalContext(tmp_path / "a", where))
    run = Run(tmp_path / "run", config, small_data)
    with pytest.raises(KeyboardInterrupt):
        train_part(run, "multimodal", KilledContext(tmp_path / "b", where))
    resumed = train_part(run, "multimodal", LocalContext(tmp_path / "b", where))
    for found, expected in zip(resumed.history, whole.history, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_a_split_without_mentions_is_named(tmp_path: Path, small_config: ExperimentConfig) -> None:
    release = plain_release(tmp_path / "release", 3, 2)
    (release / "T_dev.json").write_text("[]")
    prepare(MimicRelease(release), tmp_path / "data", DatasetOptions(name="tiny"))
    run = Run(tmp_path / "run", small_config, Dataset.open(tmp_path / "data"))
    with pytest.raises(UserError, match=r"split 'validation' of .* has no mentions"):
        train_part(run, "text", LocalContext(tmp_path / "checkpoints"))
