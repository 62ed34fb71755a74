"""What is reported of confidences: hand-made cases, and intervals that hold the figures."""

import pytest
import torch

from dsmip.calibration.calibration import BestScores, Calibration
from dsmip.calibration.figures import confidence_figures


def sure_by_margin(num_mentions: int, seed: int) -> tuple[BestScores, torch.Tensor]:
    """The gold is best where the margin is wide, and any of the two best where it is not."""
    generator = torch.Generator().manual_seed(seed)
    wide_M = torch.rand(num_mentions, generator=generator) < 0.5
    right_M = wide_M | (torch.rand(num_mentions, generator=generator) < 0.5)
    score_MK = torch.tensor([1.0, 0.9, 0.0, -0.1]).repeat(num_mentions, 1)
    score_MK[wide_M, 0] = 3.0
    is_gold_MK = torch.zeros(num_mentions, 4, dtype=torch.bool)
    is_gold_MK[:, 0], is_gold_MK[:, 1] = right_M, ~right_M
    return BestScores(score_MK, torch.zeros(num_mentions, 4, dtype=torch.long)), is_gold_MK


def test_figures_of_a_world_by_hand() -> None:
    calibration = Calibration.fit("it", "index", (), *sure_by_margin(800, 0))
    figures = confidence_figures(calibration, *sure_by_margin(800, 1))
    right, known = figures["right"], figures["known"]
    assert right["expected_calibration_error"] < 0.05
    assert right["auroc"] == pytest.approx(0.5 + 0.5 * 2 / 3, abs=0.04)  # two in three right ones have the wide margin
    assert right["hits@1_of_the_surest_half"] > 0.95
    assert known["auroc"] > 0.6
    assert 0 <= known["false_alarms"] <= known["recall"] <= 1
    assert known["unknown_share"] == 0.2
    for of in (right, known):
        assert of["confidence"].keys() <= of.keys()
        for name, (low, high) in of["confidence"].items():
            assert low <= of[name] <= high
    assert confidence_figures(calibration, *sure_by_margin(800, 1)) == figures


def test_a_figure_that_nothing_defines_is_none() -> None:
    best, is_gold_MK = sure_by_margin(50, 0)
    calibration = Calibration.fit("it", "index", (), best, is_gold_MK)
    always_MK = torch.zeros_like(is_gold_MK)
    always_MK[:, 0] = True
    right = confidence_figures(calibration, best, always_MK)["right"]
    assert right["auroc"] is None
    assert "auroc" not in right["confidence"]
    assert right["area_under_risk"] == 0


def test_mentions_of_the_unknown_count_where_they_are_there() -> None:
    best, is_gold_MK = sure_by_margin(300, 0)
    flat_MK = torch.tensor([0.1, 0.09, 0.08, 0.07]).repeat(100, 1)
    unknown = BestScores(flat_MK, torch.zeros(100, 4, dtype=torch.long))
    calibration = Calibration.fit("it", "index", (), best, is_gold_MK, unknown)
    assert (calibration.unknown, calibration.unknown_share) == (100, 0.25)
    found = confidence_figures(calibration, best, is_gold_MK, unknown)
    assert found["known"]["auroc"] == 1  # the others' best scores are all higher
    assert (found["known"]["unknown_share"], found["known"]["unknown_mentions"]) == (0.25, 100)
    assert found["known"]["confidence"]["auroc"] == (1, 1)
    right = int(is_gold_MK[:, 0].sum())
    known_alone = confidence_figures(calibration, best, is_gold_MK)["right"]
    everyone = found["right"]
    assert everyone["hits@1_of_the_surest_half"] <= known_alone["hits@1_of_the_surest_half"]
    risk_of_all = 1 - right / 400  # no link of theirs is right, and they are answered last
    assert everyone["area_under_risk"] < risk_of_all
    low, high = found["known"]["confidence"]["f1"]
    assert low <= found["known"]["f1"] <= high
