"""Figures of confidences on a split: calibration error, risk and coverage, and how well the unknown is told apart."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsmip.calibration.calibration import BestScores, Calibration
from dsmip.ops.confidence import area_under_risk, auroc, expected_calibration_error, precision_and_f1
from dsmip.ops.significance import percentile_interval, resamples

Measure = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
NUM_RESAMPLES = 300  # of figures that are sorted anew each time
LEFT_OUT = "of each mention twice: as it is, and with its gold left out of the knowledge base"
THERE = "of mentions that have a gold in the knowledge base, and of those that have none"


def confidence_figures(
    calibration: Calibration, best: BestScores, is_gold_MK: Tensor, unknown: BestScores | None = None
) -> dict[str, Any]:
    """What metrics.json holds of confidences, with 95 % bootstrap intervals over mentions, the same at every run.

    Args:
        calibration: Fitted on other mentions.
        best: Of mentions whose gold is in the knowledge base.
        is_gold_MK: bool [M, K], which of the kept entities is the gold.
        unknown: Of mentions whose entity is not in the knowledge base, where there are any; no link of theirs is right.

    Returns:
        `right` (is the best link right: expected_calibration_error, auroc, area_under_risk, and hits@1 of the surest
        half) and `known` (is the entity there: auroc; of saying that it is not: recall, false alarms, and precision and
        f1 at an `unknown_share`: that of these mentions, or without unknown ones the calibration's).
    """
    right_M, known_M = calibration.probabilities(best)
    is_right_M = is_gold_MK[:, 0]
    if unknown is not None:
        right_U, known_U = calibration.probabilities(unknown)
        share = len(unknown) / (len(best) + len(unknown))
        right_M, is_right_M = torch.cat([right_M, right_U]), torch.cat([is_right_M, torch.zeros_like(right_U).bool()])
        known = _with_intervals(partial(_of_known, calibration, share), {"p": known_M}, {"without": known_U})
        known |= {"unknown_share": share, "unknown_mentions": len(unknown), "measured": THERE}
        return {"right": _with_intervals(_of_right, {"p": right_M, "is": is_right_M}), "known": known}
    figures: dict[str, Any] = {"right": _with_intervals(_of_right, {"p": right_M, "is": is_right_M})}
    if best.score_MK.shape[1] > 1:
        _, left_out_M = calibration.probabilities(best.without(is_gold_MK))
        rows = {"p": known_M, "without": left_out_M}
        figures["known"] = _with_intervals(partial(_of_known, calibration, calibration.unknown_share), rows)
        figures["known"] |= {"unknown_share": calibration.unknown_share, "measured": LEFT_OUT}
    return figures


def _resampled(group: Mapping[str, Tensor], seed: int) -> Iterator[Mapping[str, Tensor]]:
    num_mentions = len(next(iter(group.values())))
    for taken_RM in resamples(num_mentions, NUM_RESAMPLES, torch.Generator().manual_seed(seed)):
        for taken_M in taken_RM:
            yield {name: each[taken_M] for name, each in group.items()}


def _joined(groups: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: each for group in groups for name, each in group.items()}


def _of_right(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    p_M, is_M = rows["p"], rows["is"]
    surest = p_M.argsort(descending=True, stable=True)[: (len(p_M) + 1) // 2]
    return {
        "expected_calibration_error": expected_calibration_error(p_M, is_M),
        "auroc": auroc(p_M, is_M),
        "area_under_risk": area_under_risk(p_M, is_M),
        "hits@1_of_the_surest_half": is_M[surest].double().mean(),
    }


def _of_known(calibration: Calibration, unknown_share: float, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    p_N = torch.cat([rows["p"], rows["without"]])
    recall, false_alarms = ((rows[name] < calibration.min_known).double().mean() for name in ("without", "p"))
    precision, f1 = precision_and_f1(recall, false_alarms, unknown_share)
    area = auroc(p_N, torch.arange(len(p_N)) < len(rows["p"]))
    return {"auroc": area, "precision": precision, "recall": recall, "false_alarms": false_alarms, "f1": f1}


def _with_intervals(measure: Measure, *groups: Mapping[str, Tensor]) -> dict[str, Any]:
    """Figures, and `confidence` with their intervals; a figure that is not defined on these mentions is None.

    Args:
        measure: The figures of rows.
        groups: Of mentions, each resampled on its own: rows by name, all of one group as long.
    """
    found = measure(_joined(groups))
    taken = zip(*(_resampled(group, seed) for seed, group in enumerate(groups)), strict=True)
    drawn = [torch.stack(list(measure(_joined(each)).values())) for each in taken]
    low_K, high_K = percentile_interval(torch.stack(drawn).nan_to_num()).tolist()
    intervals = {
        name: (low, high)
        for (name, value), low, high in zip(found.items(), low_K, high_K, strict=True)
        if not value.isnan()
    }
    figures = {name: None if value.isnan() else float(value) for name, value in found.items()}
    return {**figures, "confidence": intervals}
