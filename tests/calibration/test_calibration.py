"""The fit of a calibration: what it says of worlds whose truth is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmip.calibration.calibration import BestScores, Calibration
from dsmip.calibration.evidence import evidence, without
from dsmip.calibration.logistic import fit_logistic
from dsmip.errors import UserError
from dsmip.ops.confidence import auroc, expected_calibration_error


def world(num_mentions: int, seed: int, scales: tuple[float, ...] = (1.0,)) -> tuple[BestScores, Tensor]:
    """Mentions whose gold scores higher the clearer they are; an expert's scores have a scale and an offset."""
    generator = torch.Generator().manual_seed(seed)
    clear_M = 8 * torch.rand(num_mentions, generator=generator, dtype=torch.float64)
    score_ME = torch.randn(num_mentions, 60, generator=generator, dtype=torch.float64)
    score_ME[:, 0] += clear_M
    expert_M = torch.randint(len(scales), (num_mentions,), generator=generator)
    scale_M = torch.tensor(scales, dtype=torch.float64)[expert_M]
    score_MK, row_MK = (score_ME * scale_M[:, None] + 7 * expert_M[:, None]).sort(descending=True)
    return BestScores(score_MK[:, :20], expert_M[:, None].expand(-1, 20)), row_MK[:, :20] == 0


def fitted(best: BestScores, is_gold_MK: Tensor, unknown: BestScores | None = None) -> Calibration:
    return Calibration.fit("it", "index", ("a", "b", "c"), best, is_gold_MK, unknown)


def test_it_says_how_sure_one_may_be_on_mentions_it_has_not_seen() -> None:
    scales = (1.0, 30.0, 0.01)
    calibration = fitted(*world(3000, 0, scales))
    best, is_gold_MK = world(3000, 1, scales)
    right_M, known_M = calibration.probabilities(best)
    assert float(expected_calibration_error(right_M, is_gold_MK[:, 0])) < 0.03
    by_score = float(auroc(best.score_MK[:, 0], is_gold_MK[:, 0]))
    assert float(auroc(right_M, is_gold_MK[:, 0])) > by_score + 0.15
    _, without_M = calibration.probabilities(best.without(is_gold_MK))
    is_known_2M = torch.arange(6000) < 3000
    assert float(auroc(torch.cat([known_M, without_M]), is_known_2M)) > 0.8
    assert float((without_M < calibration.min_known).double().mean()) > 0.2
    assert float((known_M < calibration.min_known).double().mean()) < 0.1
    weight_2M = torch.where(is_known_2M, 0.8, 0.2)  # in a world where one in five is unknown, P(known) is calibrated
    known_2M = torch.cat([known_M, without_M])
    assert float((known_2M * weight_2M).sum() / 3000) == pytest.approx(0.8, abs=0.02)


def test_mentions_of_something_unknown_lower_the_share_that_is_right() -> None:
    best, is_gold_MK = world(600, 0)
    unknown = best.without(is_gold_MK)
    alone, with_unknown = fitted(best, is_gold_MK), fitted(best, is_gold_MK, unknown)
    both = BestScores(
        torch.cat([best.first(19).score_MK, unknown.score_MK]), torch.cat([best.first(19).expert_MK, unknown.expert_MK])
    )
    right_N = torch.cat([is_gold_MK[:, 0], torch.zeros(600, dtype=torch.bool)])
    assert float(with_unknown.probabilities(both)[0].mean()) == pytest.approx(float(right_N.double().mean()), abs=0.02)
    assert float(alone.probabilities(best)[0].mean()) == pytest.approx(
        float(is_gold_MK[:, 0].double().mean()), abs=0.02
    )
    assert (alone.unknown, with_unknown.unknown) == (0, 600)
    assert (alone.unknown_share, with_unknown.unknown_share) == (0.2, 0.5)


def test_it_is_kept_as_text_and_fitted_the_same_again() -> None:
    best, is_gold_MK = world(100, 0, (1.0, 2.0))
    calibration = fitted(best, is_gold_MK)
    again = Calibration.model_validate_json(calibration.model_dump_json())
    assert again == calibration == fitted(best, is_gold_MK)
    assert torch.equal(again.probabilities(best)[0], calibration.probabilities(best)[0])


def test_all_right_or_nothing_to_compare_still_fits() -> None:
    best, is_gold_MK = world(40, 0)
    always_MK = torch.zeros_like(is_gold_MK)
    always_MK[:, 0] = True
    right_M, _ = fitted(best, always_MK).probabilities(best)
    assert right_M.isfinite().all()
    assert float(right_M.mean()) > 0.9
    one = BestScores(best.score_MK[:, :1], best.expert_MK[:, :1])  # a knowledge base of one entity
    _, known_M = fitted(one, always_MK[:, :1]).probabilities(one)
    assert known_M.isfinite().all()


def test_few_mentions_are_refused() -> None:
    best, is_gold_MK = world(19, 0)
    with pytest.raises(UserError, match="19 validation mentions are too few to calibrate it: 20 at least"):
        fitted(best, is_gold_MK)


@settings(max_examples=30)
@given(st.floats(0.01, 100), st.floats(-50, 50), st.integers(0, 5))
def test_evidence_but_the_top_score_does_not_know_scale_and_offset(scale: float, offset: float, seed: int) -> None:
    score_MK = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(
        descending=True
    )[0]
    unit_M = torch.ones(4, dtype=torch.float64)
    expected, found = evidence(score_MK, unit_M), evidence(score_MK * scale + offset, unit_M * scale)
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], rtol=1e-6, atol=1e-6)


def test_leaving_one_out_is_what_a_list_without_it_has() -> None:
    score_MK = torch.tensor([[5.0, 4.0, 3.0, 2.0]] * 3)
    left_out_MK = torch.zeros(3, 4, dtype=torch.bool)
    left_out_MK[0, 0] = left_out_MK[1, 2] = True
    assert without(score_MK, left_out_MK).tolist() == [[4, 3, 2], [5, 4, 2], [5, 4, 3]]


def test_more_evidence_is_never_less_sure() -> None:
    """A feature that speaks against the target gets no weight."""
    evidence_NF = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target_N = (evidence_NF[:, 0] - evidence_NF[:, 1] > 0).double()
    weights_F, _ = fit_logistic(evidence_NF, torch.zeros(400, dtype=torch.long), target_N, 1)
    assert float(weights_F[0]) > 1
    assert 0 <= float(weights_F[1]) < 1e-3


def test_without_evidence_nothing_is_called_unknown() -> None:
    """Where leaving a gold out changes no list, the likelier answer is that the entity is there."""
    best, _ = world(200, 0)
    nowhere_MK = torch.zeros(200, 20, dtype=torch.bool)
    _, known_M = fitted(best, nowhere_MK).probabilities(best)
    assert float(known_M.min()) > 0.5
    assert float(known_M.mean()) == pytest.approx(0.8, abs=0.02)
