"""Figures of confidences on a split: calibration error, risk and coverage, and how well the unknown is told apart."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsmip.calibration.calibration import BestScores, Calibration
from dsmip.ops.confidence import area_under_risk, auroc, expected_calibration_error, precision_and_f1
from dsmip.ops.significance import percentile_interval, resamples

NUM_RESAMPLES = 300  # of figures that are sorted anew each time
LEFT_OUT = "of each mention twice: as it is, and with its gold left out of the knowledge base"


def confidence_figures(calibration: Calibration, best: BestScores, is_gold_MK: Tensor) -> dict[str, Any]:
    """What metrics.json holds of confidences, with 95 % bootstrap intervals over mentions, the same at every run.

    Args:
        calibration: Fitted on other mentions.
        best: Of mentions whose gold is in the knowledge base.
        is_gold_MK: bool [M, K], which of the kept entities is the gold.

    Returns:
        `right` (is the best link right: expected_calibration_error, auroc, area_under_risk, and hits@1 of the surest
        half) and `known` (is the entity there: auroc; of saying that it is not: recall, false alarms, and precision and
        f1 at the calibration's `unknown_share`).
    """
    right_M, known_M = calibration.probabilities(best)
    is_right_M = is_gold_MK[:, 0]
    figures: dict[str, Any] = {"right": _with_intervals(_of_right, {"p": right_M, "is": is_right_M})}
    if best.score_MK.shape[1] > 1:
        _, left_out_M = calibration.probabilities(best.without(is_gold_MK))
        rows = {"p": known_M, "without": left_out_M}
        figures["known"] = _with_intervals(lambda taken: _of_known(taken, calibration), rows)
        figures["known"] |= {"unknown_share": calibration.unknown_share, "measured": LEFT_OUT}
    return figures


def _of_right(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    p_M, is_M = rows["p"], rows["is"]
    surest = p_M.argsort(descending=True, stable=True)[: (len(p_M) + 1) // 2]
    return {
        "expected_calibration_error": expected_calibration_error(p_M, is_M),
        "auroc": auroc(p_M, is_M),
        "area_under_risk": area_under_risk(p_M, is_M),
        "hits@1_of_the_surest_half": is_M[surest].double().mean(),
    }


def _of_known(rows: Mapping[str, Tensor], calibration: Calibration) -> dict[str, Tensor]:
    p_N = torch.cat([rows["p"], rows["without"]])
    recall, false_alarms = ((rows[name] < calibration.min_known).double().mean() for name in ("without", "p"))
    precision, f1 = precision_and_f1(recall, false_alarms, calibration.unknown_share)
    area = auroc(p_N, torch.arange(len(p_N)) < len(rows["p"]))
    return {"auroc": area, "precision": precision, "recall": recall, "false_alarms": false_alarms, "f1": f1}


def _with_intervals(measure: Any, rows: Mapping[str, Tensor]) -> dict[str, Any]:
    """Figures, and `confidence` with their intervals; a figure that is not defined on these mentions is None."""
    found = measure(rows)
    generator = torch.Generator().manual_seed(0)
    num_mentions = len(next(iter(rows.values())))
    drawn = [
        torch.stack(list(measure({name: each[taken_M] for name, each in rows.items()}).values()))
        for taken_RM in resamples(num_mentions, NUM_RESAMPLES, generator)
        for taken_M in taken_RM
    ]
    low_K, high_K = percentile_interval(torch.stack(drawn).nan_to_num()).tolist()
    intervals = {
        name: (low, high)
        for (name, value), low, high in zip(found.items(), low_K, high_K, strict=True)
        if not value.isnan()
    }
    figures = {name: None if value.isnan() else float(value) for name, value in found.items()}
    return {**figures, "confidence": intervals}
