"""How good confidences are, against slow twins and cases made by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmip.ops.confidence import (
    area_under_risk,
    auroc,
    best_f1_threshold,
    expected_calibration_error,
    precision_recall_f1,
    risk_coverage,
)

ANSWERS = st.lists(st.tuples(st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0]), st.booleans()), min_size=1)


def tensors(answers: list[tuple[float, bool]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([each[0] for each in answers]), torch.tensor([each[1] for each in answers])


@given(ANSWERS)
def test_auroc_is_the_share_of_pairs_that_are_won(answers: list[tuple[float, bool]]) -> None:
    positives = [score for score, positive in answers if positive]
    negatives = [score for score, positive in answers if not positive]
    found = auroc(*tensors(answers))
    if not positives or not negatives:
        assert found.isnan()
        return
    wins = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    assert float(found) == pytest.approx(wins / len(positives) / len(negatives))


@given(ANSWERS)
def test_risk_is_that_of_all_answers_at_least_as_sure(answers: list[tuple[float, bool]]) -> None:
    coverage_N, risk_N = risk_coverage(*tensors(answers))
    for number, (sure, _) in enumerate(sorted(answers, key=lambda each: -each[0])):
        answered = [right for score, right in answers if score >= sure]
        assert float(risk_N[number]) == pytest.approx(answered.count(False) / len(answered))
        assert float(coverage_N[number]) == pytest.approx((number + 1) / len(answers))
    assert float(area_under_risk(*tensors(answers))) == pytest.approx(float(risk_N.mean()))


@given(ANSWERS, st.integers(1, 6))
def test_calibration_error_is_the_weighted_gap_of_bins(answers: list[tuple[float, bool]], bins: int) -> None:
    error = 0.0
    for number in range(bins):
        inside = [each for each in answers if min(int(each[0] * bins), bins - 1) == number]
        if inside:
            right, sure = sum(each[1] for each in inside), sum(each[0] for each in inside)
            error += abs(right - sure) / len(answers)
    assert float(expected_calibration_error(*tensors(answers), bins)) == pytest.approx(error)


@given(ANSWERS)
def test_no_threshold_has_a_better_f1(answers: list[tuple[float, bool]]) -> None:
    score_N, true_N = tensors(answers)
    if not true_N.any():
        return

    def f1(threshold: float) -> float:
        return float(precision_recall_f1(score_N < threshold, true_N)[2])

    best = f1(best_f1_threshold(score_N, true_N))
    assert best >= max(f1(threshold) for threshold in [0.0, 0.05, 0.2, 0.3, 0.6, 0.9, 1.1])


def test_f1_of_nothing_is_nothing() -> None:
    nothing, something = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    assert [float(each) for each in precision_recall_f1(nothing, something)] == [0, 0, 0]
    assert [float(each) for each in precision_recall_f1(something, nothing)] == [0, 0, 0]
