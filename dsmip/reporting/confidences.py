"""Calibration of an evaluated run: its figures, how sure it is of each mention, and both curves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from dsmip.calibration.calibration import BestScores, Calibration, read_calibration
from dsmip.evaluation.stored.layout import CALIBRATED_ON, CALIBRATION, evaluation_name
from dsmip.ops.confidence import BINS, area_under_risk, risk_coverage
from dsmip.reporting.charts import Line, line_chart
from dsmip.reporting.evaluations import EvaluatedRun, Key
from dsmip.reporting.figures import Figure, figure

_CURVE_POINTS = 200
_LABELS = {
    "expected_calibration_error": "expected calibration error",
    "auroc": "AUROC",
    "area_under_risk": "area under risk and coverage",
    "hits@1_of_the_surest_half": "hits@1 of the surest half",
    "precision": "precision",
    "recall": "recall",
    "false_alarms": "false alarms",
    "f1": "F1",
}
_RIGHT, _KNOWN, _UNKNOWN = (
    "the best link is right",
    "the entity is in the knowledge base",
    "saying that it is not there",
)
_TITLES = {"right": _RIGHT, "known": _KNOWN}


@dataclass(frozen=True)
class Confidences:
    """Of the shown model.

    Attributes:
        note: What is missing, and the command that makes it; "" where nothing is.
        rows: Question, figure's name, and figure, as metrics.json has them.
        right: How sure it is of each mention's best link; empty where that is not known.
        charts: Reliability, and risk and coverage.
        fitted_on_these: The same mentions were calibrated with.
    """

    note: str = ""
    rows: tuple[tuple[str, str, Figure], ...] = ()
    right: Mapping[Key, float] | None = None
    charts: tuple[Markup, ...] = ()
    fitted_on_these: bool = False


def confidences(run: EvaluatedRun) -> Confidences:
    """What is known of the shown model's confidences.

    Raises:
        UserError: The file of its calibration is damaged.
    """
    stored = run.main.metrics.get("calibration")
    path = run.parts.folder / evaluation_name(CALIBRATED_ON, run.shown) / CALIBRATION
    again = run.evaluate_command(run.shown)
    if not stored:
        before = "" if path.is_file() else run.command("calibrate", "--model", run.shown) + " && "
        return Confidences(note=f"Not calibrated on this split. Make it: {before}{again}")
    rows = tuple(_rows(stored))
    on_these = bool(stored.get("fitted_on_these"))
    if not path.is_file():
        return Confidences(f"The calibration itself is missing. Make it again: {again}", rows, None, (), on_these)
    calibration = read_calibration(path)
    known = list(run.main.rows.values())
    if (right_M := _right(run, calibration, [*known, *run.main.unknown])) is None:
        needed = run.command(
            "evaluate", "--split", run.split, "--model", run.shown, "--top-k", str(calibration.num_scores)
        )
        note = f"The curves need the {calibration.num_scores} best scores of each mention. Make them: {needed}"
        return Confidences(note, rows, None, (), on_these)
    is_right = [bool(row["top"]) and row["top"][0] == row["gold"] for row in known]
    is_right_M = torch.tensor([*is_right, *(False for _ in run.main.unknown)])
    found = float(area_under_risk(right_M, is_right_M))
    if not math.isclose(found, stored["right"]["area_under_risk"], rel_tol=1e-6, abs_tol=1e-9):
        note = f"The model was calibrated anew after this evaluation. Make it again: {again}"
        return Confidences(note, rows, None, (), on_these)
    charts = (_reliability(right_M, is_right_M), _risk(right_M, is_right_M))
    right = dict(zip(run.main.rows, right_M[: len(known)].tolist(), strict=True))
    return Confidences("", rows, right, charts, on_these)


def _rows(stored: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    rows = []
    for question, title in _TITLES.items():
        for name, label in _LABELS.items():
            value = stored.get(question, {}).get(name)
            if value is not None:
                interval = stored[question].get("confidence", {}).get(name)
                answer = _UNKNOWN if question == "known" and name != "auroc" else title
                rows.append((answer, label, figure(name, value, interval)))
    return rows


def _right(run: EvaluatedRun, calibration: Calibration, rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """float64 [M]; None where the rows hold fewer scores than the calibration reads, or other experts."""
    k = calibration.num_scores
    if any(len(row["top_scores"]) < k for row in rows):
        return None
    number_of = {name: number for number, name in enumerate(calibration.experts)}
    experts = [[0] * k for _ in rows]
    if run.main.has_choices:
        experts = [[number_of.get(name, -1) for name in row["top_experts"][:k]] for row in rows]
    expert_MK = torch.tensor(experts)
    if bool((expert_MK < 0).any()):
        return None
    score_MK = torch.tensor([row["top_scores"][:k] for row in rows], dtype=torch.float64)
    return calibration.probabilities(BestScores(score_MK, expert_MK))[0]


def _reliability(right_M: Tensor, is_right_M: Tensor) -> Markup:
    bin_M = (right_M * BINS).long().clamp(max=BINS - 1)
    points, weights = [], []
    for number in range(BINS):
        rows_M = bin_M == number
        if count := int(rows_M.sum()):
            points.append((float(right_M[rows_M].mean()), float(is_right_M[rows_M].double().mean())))
            weights.append(count)
    lines = [Line("calibrated perfectly", [(0, 0), (1, 1)], reference=True), Line("this model", points, weights)]
    return line_chart("Reliability", lines, x="confidence", y="share that is right", x_range=(0, 1), y_range=(0, 1))


def _risk(right_M: Tensor, is_right_M: Tensor) -> Markup:
    coverage_M, risk_M = risk_coverage(right_M, is_right_M)
    points = _thinned(list(zip(coverage_M.tolist(), risk_M.tolist(), strict=True)))
    risk = points[-1][1]
    lines = [Line("answers at random", [(0, risk), (1, risk)], reference=True), Line("the surest first", points)]
    return line_chart("Risk and coverage", lines, x="coverage", y="risk", x_range=(0, 1), y_range=(0, 1))


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    step = max(1, len(points) // _CURVE_POINTS)
    return [*points[:-1:step], points[-1]]
