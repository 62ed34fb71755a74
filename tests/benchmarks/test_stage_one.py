"""The benchmark of training at a size of seconds, and that what it counts is what there is to count."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from benchmarks.training import first_step, stage_one
from benchmarks.training.stage_two_trial import trials
from benchmarks.training.steps import WARM_UP, Stopwatch, one_epoch
from benchmarks.training.tower_rate import CASES, count_operations, drawn_items, tower_rates, training_step
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.encoders.clip import Backbone
from dsmip.runs.load_config import changed, to_yaml
from dsmip.training.monitor import StepFigures

CPU = torch.device("cpu")
BATCH, TOKENS, PATCHES = 4, 77, 4


def tower_operations(tokens: int, width: int, layers: int) -> int:
    """Of the products of one item's layers: query, key, value, out, both of the MLP, and the two of attention."""
    return layers * (2 * tokens * width * width * (3 + 1 + 4 + 4) + 2 * 2 * tokens * tokens * width)


def test_operations_are_those_of_the_layers_products(narrow_backbone: Path) -> None:
    backbone = Backbone.build(str(narrow_backbone), None)
    backbone.tune("full")  # attention that needs no gradient is one call, whose products are not seen
    items = drawn_items(BATCH, TOKENS, 16, seed=0)
    text = count_operations(lambda: backbone.encode_text(items.token_ids, items.token_mask))  # type: ignore[arg-type, return-value]
    assert text == BATCH * (tower_operations(TOKENS, 16, 2) + 2 * 16 * 24)
    pixels = backbone.normalise(items.images, items.has_image)
    patches = 2 * PATCHES * (3 * 8 * 8) * 32
    image = count_operations(lambda: backbone.encode_image(pixels))  # type: ignore[arg-type, return-value]
    assert image == BATCH * (tower_operations(1 + PATCHES, 32, 2) + patches + 2 * 32 * 24)


def test_towers_that_train_take_a_forward_pass_more_than_frozen_ones() -> None:
    frozen, full = (count_operations(training_step(case, "tiny", 4, "fp32", CPU)[0]) for case in CASES)
    assert 1.3 < full / frozen < 1.6  # three passes against two; prompts are a few tokens more


@pytest.mark.slow
def test_towers_are_measured_as_they_are(narrow_backbone: Path) -> None:
    rates = tower_rates(str(narrow_backbone), 8, "fp32", CPU, rounds=1, compiled=False)
    assert [(one.case, one.compiled) for one in rates] == [(case.name, False) for case in CASES]
    for one in rates:
        assert 0 < one.share < 1
        assert one.samples_per_s == pytest.approx(8 / one.step_s)
    frozen, full = rates
    assert 0 < frozen.kept_bytes < full.kept_bytes


class Outside:
    """A context that keeps what it was told."""

    device = CPU

    def __init__(self) -> None:
        self.calls: list[object] = []

    def step_done(self, epoch: int, step: int, num_steps: int, figures: StepFigures) -> None:
        self.calls.append(step)

    def alive(self) -> None:
        self.calls.append("alive")

    def warn(self, line: str) -> None:
        self.calls.append(line)

    def features_done(self, done: int, total: int) -> None:
        self.calls.append(done)

    def asked_to_leave(self) -> bool:
        return True

    def step_saved(self, epoch: int, step: int, checkpoint: Path | None) -> None:
        self.calls.append(checkpoint)

    def epoch_done(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        self.calls.append(dict(metrics))

    def restore(self) -> Path | None:
        return None

    def checkpoint_folder(self, epoch: int, step: int) -> Path:
        return Path(f"epoch-{epoch}-{step}")


def test_a_stopwatch_counts_the_steps_after_the_warm_up_and_tells_the_context() -> None:
    outside = Outside()
    watch = Stopwatch(outside)
    for step in range(WARM_UP + 3):
        if step == WARM_UP:
            with pytest.raises(ValueError, match="take more mentions"):
                watch.steps()
        watch.step_done(0, step, 5, StepFigures(0.0, torch.zeros(()), 0.1, 10 + step, 1.0, 0.25))
    watch.epoch_done({"mrr": 1.0}, None)
    assert outside.calls == [*range(WARM_UP + 3), {"mrr": 1.0}]
    found = watch.steps()
    assert (found.count, found.samples, found.wait_s) == (3, 12 + 13 + 14, 0.75)
    assert found.wall_s > 0
    assert watch.checkpoint_folder(3, 4) == Path("epoch-3-4")
    assert watch.asked_to_leave()
    watch.alive()
    watch.step_saved(0, 2, Path("saved"))
    assert outside.calls[-2:] == ["alive", Path("saved")]


def test_every_part_has_one_epoch(small_config: ExperimentConfig) -> None:
    config = one_epoch(small_config)
    assert [config.train_of(part).epochs for part in ("text", "visual", "multimodal")] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.soak
def test_trials_train_alike_with_and_without_cached_features(
    small_config: ExperimentConfig, small_data: Dataset, tmp_path: Path
) -> None:
    found = trials(changed(small_config, {"tune": {"rungs": [1, 2]}}), small_data, tmp_path)
    assert [trial.epochs for trial in (found.once, found.cached, found.anew)] == [1, 1, 1]
    assert found.once.losses == found.cached.losses
    assert found.anew.losses == pytest.approx(found.cached.losses, rel=1e-4)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_small_run_answers_every_question(
    small_config: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {name: {"resources": {"cpu": 0.5}} for name in ("text", "visual", "multimodal")}
    config, path = tmp_path / "narrow.yaml", tmp_path / "figures.json"
    config.write_text(to_yaml(changed(small_config, {"parts": parts, "tune": {"rungs": [1]}})))
    sizes = ["--entities", "30", "--steps", "3", "--batch-size", "8", "--rounds", "1"]
    asked = ["--config", str(config), "--part", "visual", "--no-compile", "--work", str(tmp_path)]
    stage_one.main([*asked, *sizes, "--json", str(path)])
    found = json.loads(path.read_text())
    assert list(found["experts"]) == ["multimodal", "text", "visual"]
    assert min(one["samples_per_s"] for one in found["experts"].values()) > 0
    assert found["ray_train"]["part"] == "visual"
    assert found["workers"]["1"]["times_one"] == 1
    assert set(found["first_step"]) == set(first_step.STAGES)
    assert min(found["first_step"].values()) >= 0
    assert found["stage_two"]["epochs"] == found["stage_two"]["cached_ratio"] == 1
    assert len(found["towers"]) == len(CASES)
    said = capsys.readouterr().out
    for title in ("bare loop", "Ray Train against the bare loop: visual", "Workers", "first step", "A trial", "towers"):
        assert title in said
