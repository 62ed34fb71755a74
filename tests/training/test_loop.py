"""The training loop over a toy matcher: resume, leaving, divergence, patience and pauses."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsmip.config import TrainConfig
from dsmip.data.table import Table
from dsmip.errors import UserError
from dsmip.runs.checkpoints import load_checkpoint
from dsmip.training.batches import Step
from dsmip.training.local_context import LocalContext
from dsmip.training.loop import Left
from dsmip.training.trainer import train
from dsmip.units.matcher import BatchGold, Scores
from tests.support.training.toy_training import (
    CPU,
    RISING,
    SETTINGS,
    WIDTH,
    RecordingContext,
    ToyMatcher,
    assert_equal_weights,
    run,
    scripted,
    source,
)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path, last: int) -> None:
    config = TrainConfig(**SETTINGS)
    expected, whole = run(config, LocalContext(tmp_path / "whole"), RISING)
    with pytest.raises(KeyboardInterrupt):
        run(config, RecordingContext(tmp_path / "parts", last), RISING)
    torch.rand(7)  # the global generator stands elsewhere in a new process
    context = RecordingContext(tmp_path / "parts")
    resumed, result = run(config, context, RISING[last + 1 :])
    assert context.epochs == 3 - last
    assert result == whole
    assert_equal_weights(resumed, expected.state_dict())
    assert not torch.equal(expected.projection, ToyMatcher().projection)


STEPS = 4  # of an epoch: 23 mentions in batches of at most 6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("killed_at", [(0, 0), (0, 2), (1, 3), (2, 1)])
def test_a_training_killed_within_an_epoch_ends_with_the_same_bits(
    tmp_path: Path, killed_at: tuple[int, int], precision: str
) -> None:
    """It goes on at the last step that was saved: two of four steps here, and every epoch's end."""
    config = TrainConfig(**SETTINGS, precision=precision)
    expected, whole = run(config, LocalContext(tmp_path / "whole"), RISING)
    with pytest.raises(KeyboardInterrupt):
        run(config, RecordingContext(tmp_path / "parts", killed_at=killed_at), RISING, checkpoint_steps=2)
    torch.rand(7)
    context = RecordingContext(tmp_path / "parts")
    resumed, result = run(config, context, RISING[killed_at[0] :], checkpoint_steps=2)
    saved = STEPS * killed_at[0] + killed_at[1] // 2 * 2
    assert context.steps == 4 * STEPS - saved
    assert result == whole
    assert_equal_weights(resumed, expected.state_dict())


@pytest.mark.parametrize("leave_at", [(0, 0), (1, 1), (1, STEPS - 1), (3, STEPS - 1)])
def test_a_training_that_is_asked_to_leave_loses_no_step(tmp_path: Path, leave_at: tuple[int, int]) -> None:
    config = TrainConfig(**SETTINGS)
    expected, whole = run(config, LocalContext(tmp_path / "whole"), RISING)
    first = RecordingContext(tmp_path / "parts", leave_at=leave_at)
    with pytest.raises(Left):
        run(config, first, RISING)
    second = RecordingContext(tmp_path / "parts")
    resumed, result = run(config, second, RISING[leave_at[0] :])
    assert first.steps + second.steps == 4 * STEPS
    assert result == whole
    assert_equal_weights(resumed, expected.state_dict())


class Spoiled(ToyMatcher):
    """Its loss, or only the gradient, is no number from the sixth step on."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.calls = what, 0

    def loss(self, mentions: Table, entities: Table, gold: BatchGold) -> Tensor:
        self.calls += 1
        loss = super().loss(mentions, entities, gold)
        if self.calls < 6:
            return loss
        if self.what == "loss":
            return loss * math.nan
        return loss + (self.bias * 0).abs().sum().sqrt()  # 0, with an infinite slope


def test_half_precision_that_never_has_a_finite_gradient_ends(tmp_path: Path) -> None:
    """Steps that overflow are passed over, but not for ever."""
    config, matcher = TrainConfig(**{**SETTINGS, "epochs": 12}, precision="fp16"), Spoiled("gradient")
    with pytest.raises(UserError, match="no step has had a finite gradient"):
        train(matcher, source(config), config, LocalContext(tmp_path), scripted([0.1] * 12), seed=3)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_training_that_diverges_says_where_and_leaves_a_sound_checkpoint(tmp_path: Path, what: str) -> None:
    config, matcher = TrainConfig(**SETTINGS), Spoiled(what)
    with pytest.raises(UserError, match=rf"{what}.* is nan in epoch 2, step 2: .*learning_rate"):
        train(matcher, source(config), config, LocalContext(tmp_path), scripted(RISING), seed=3, checkpoint_steps=1)
    assert all(bool(parameter.isfinite().all()) for parameter in matcher.parameters())
    newest = LocalContext(tmp_path).restore()
    assert newest is not None
    stored = load_checkpoint(newest, CPU)
    assert (stored.epoch, stored.step) == (1, 1)


def test_a_pause_changes_nothing(tmp_path: Path) -> None:
    """Rungs of successive halving: the schedule spans all epochs, whatever is done in one go."""
    config = TrainConfig(**SETTINGS)
    expected, whole = run(config, LocalContext(tmp_path / "whole"), RISING)
    first, paused = run(config, LocalContext(tmp_path / "parts"), RISING[:2], stop_epoch=2)
    assert [m["epoch"] for m in paused.history] == [0.0, 1.0]
    assert not torch.equal(first.projection, expected.projection)
    second, result = run(config, LocalContext(tmp_path / "parts"), RISING[2:], stop_epoch=10)
    assert result == whole
    assert_equal_weights(second, expected.state_dict())


def test_a_pause_goes_on_from_the_last_weights_not_the_best(tmp_path: Path) -> None:
    config = TrainConfig(**SETTINGS)
    falling = [0.4, 0.3, 0.2, 0.1]
    seen: list[dict[str, Tensor]] = []
    train(ToyMatcher(), source(config), config, LocalContext(tmp_path / "a"), scripted(falling, seen), seed=3)
    run(config, LocalContext(tmp_path / "b"), falling, stop_epoch=2)
    again: list[dict[str, Tensor]] = []
    validate = scripted(falling[2:], again)
    train(ToyMatcher(), source(config), config, LocalContext(tmp_path / "b"), validate, seed=3)
    assert torch.equal(again[0]["projection"], seen[2]["projection"])


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    config = TrainConfig(**SETTINGS)
    expected, whole = run(config, LocalContext(tmp_path), RISING)
    context = RecordingContext(tmp_path)
    again, result = run(config, context, [])
    assert context.steps == 0
    assert result == whole
    assert_equal_weights(again, expected.state_dict())


@pytest.mark.parametrize(("scores", "best"), [([0.1, 0.5, 0.3, 0.2], 1), ([0.4, 0.5, 0.2, 0.5], 3), ([0.0] * 4, 3)])
def test_the_best_weights_are_returned(tmp_path: Path, scores: list[float], best: int) -> None:
    """Of equal epochs the later one."""
    config = TrainConfig(**SETTINGS)
    seen: list[dict[str, Tensor]] = []
    matcher = ToyMatcher()
    result = train(matcher, source(config), config, LocalContext(tmp_path), scripted(scores, seen), seed=3)
    assert result.best_epoch == best
    assert result.best["mrr"] == scores[best]
    assert_equal_weights(matcher, seen[best])
    assert not torch.equal(seen[0]["projection"], seen[best]["projection"])
    resumed, stored = run(config, LocalContext(tmp_path), [])
    assert stored == result
    assert_equal_weights(resumed, seen[best])


@pytest.mark.parametrize(
    ("patience", "scores", "num_epochs"),
    [(1, [0.3, 0.2], 2), (2, [0.3, 0.2, 0.4, 0.4], 4), (2, [0.3, 0.3, 0.3], 3), (None, [0.3, 0.2, 0.1, 0.0], 4)],
)
def test_patience(tmp_path: Path, patience: int | None, scores: list[float], num_epochs: int) -> None:
    """An epoch that is only as good as the best so far is no rise."""
    config = TrainConfig(**SETTINGS, patience=patience)
    _, result = run(config, LocalContext(tmp_path), scores)
    assert len(result.history) == num_epochs
    context = RecordingContext(tmp_path)
    assert run(config, context, [])[1] == result  # a restart does not go on either
    assert context.steps == 0


def test_patience_waits_for_a_validation(tmp_path: Path) -> None:
    """Epochs without one say nothing about a rise."""
    config = TrainConfig(**{**SETTINGS, "epochs": 6}, validate_every=2, patience=1)
    _, result = run(config, LocalContext(tmp_path), [0.3, 0.2])
    assert [m.get("mrr") for m in result.history] == [None, 0.3, None, 0.2]


def test_validation_every_second_epoch(tmp_path: Path) -> None:
    """And always after the last one; epochs without are never the best."""
    config = TrainConfig(**{**SETTINGS, "epochs": 5}, validate_every=2)
    _, result = run(config, LocalContext(tmp_path), [0.3, 0.2, 0.1])
    assert [m.get("mrr") for m in result.history] == [None, 0.3, None, 0.2, 0.1]
    assert result.best_epoch == 1


def test_validations_between_choose_no_epoch_and_end_no_training(tmp_path: Path) -> None:
    """Their figures have other names: the best of them is passed over, and patience waits for a full validation."""
    config = TrainConfig(**{**SETTINGS, "epochs": 7}, validate_every=3, patience=3)
    between = iter([0.9, 0.1, 0.8, 0.2, 0.7])
    options = {"validate_between": lambda matcher: {"subset_mrr": next(between)}}
    _, result = run(config, LocalContext(tmp_path), [0.3, 0.2, 0.1], **options)
    assert [epoch.get("mrr") for epoch in result.history] == [None, None, 0.3, None, None, 0.2]
    assert [epoch.get("subset_mrr") for epoch in result.history] == [0.9, 0.1, None, 0.8, 0.2, None]
    assert result.best_epoch == 2


def test_the_loss_of_an_epoch_is_the_mean_over_mentions(tmp_path: Path) -> None:
    """Batches of 3, 3 and 2 mentions that all cost the same per mention: log of the number of columns."""

    class Constant(ToyMatcher):
        def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
            return Scores(0.0 * super().score(mentions, entities).total_ME)

    class Steps:
        hard_row_NK: Tensor | None = None

        def num_steps(self) -> int:
            return 2

        def steps(self, epoch: int, start: int = 0) -> Iterator[Step]:
            for size in (1, 3):
                rows = torch.arange(size)
                table = Table({"vector": torch.ones(size, WIDTH)})
                yield Step(table, table, rows, rows)

    result = train(Constant(), Steps(), TrainConfig(epochs=1), LocalContext(tmp_path), scripted([0.0]), seed=0)
    assert result.history[0]["loss"] == pytest.approx((1 * 0 + 3 * math.log(3)) / 4)


def test_an_unfinished_checkpoint_is_passed_over(tmp_path: Path) -> None:
    config = TrainConfig(**SETTINGS)
    expected, whole = run(config, LocalContext(tmp_path / "whole"), RISING)
    with pytest.raises(KeyboardInterrupt):
        run(config, RecordingContext(tmp_path / "parts", 1), RISING)
    (tmp_path / "parts" / "epoch-0003-step-0000000").mkdir()
    (tmp_path / "parts" / "epoch-0003-step-0000000" / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="not complete"):
        load_checkpoint(tmp_path / "parts" / "epoch-0003-step-0000000", CPU)
    resumed, result = run(config, LocalContext(tmp_path / "parts"), RISING[2:])
    assert result == whole
    assert_equal_weights(resumed, expected.state_dict())


def test_a_damaged_checkpoint_costs_an_epoch_and_changes_nothing(tmp_path: Path) -> None:
    config = TrainConfig(**SETTINGS)
    expected, whole = run(config, LocalContext(tmp_path / "whole"), RISING)
    with pytest.raises(KeyboardInterrupt):
        run(config, RecordingContext(tmp_path / "parts", 2), RISING)
    kept = sorted((tmp_path / "parts").iterdir())
    assert [folder.name for folder in kept] == ["epoch-0002-step-0000000", "epoch-0003-step-0000000"]
    content = bytearray((kept[1] / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (kept[1] / "optimizer.pt").write_bytes(content)
    said: list[str] = []
    resumed, result = run(config, LocalContext(tmp_path / "parts", warn=said.append), RISING[2:])
    assert len(said) == 1
    assert "epoch-0003-step-0000000/optimizer.pt is damaged" in said[0]
    assert result == whole
    assert_equal_weights(resumed, expected.state_dict())
