"""How good confidences are, against slow twins and cases made by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmip.ops.confidence import (
    area_under_risk,
    auroc,
    expected_calibration_error,
    precision_and_f1,
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


@given(ANSWERS, st.floats(0.05, 0.95))
def test_precision_and_f1_are_those_of_answers_that_are_weighed(
    answers: list[tuple[float, bool]], share: float
) -> None:
    score_N, true_N = tensors(answers)
    if true_N.all() or not true_N.any():
        return
    found_N = score_N > 0.3
    weight_N = torch.where(true_N, share / true_N.sum(), (1 - share) / (~true_N).sum()).double()
    both, found = float(weight_N[found_N & true_N].sum()), float(weight_N[found_N].sum())
    recall, false_alarms = found_N[true_N].double().mean(), found_N[~true_N].double().mean()
    precision, f1 = precision_and_f1(recall, false_alarms, share)
    assert float(precision) == pytest.approx(both / found if found else 0, rel=1e-5)
    assert float(f1) == pytest.approx(2 * both / (found + share), rel=1e-5)
