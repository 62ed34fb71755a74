"""Training curves of a run's parts, from what their trainings have said."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dsmip.reporting.charts import Line, line_chart
from dsmip.reporting.evaluations import EvaluatedRun
from dsmip.runs.loaded_model import PART
from dsmip.storage.parsing import read_json

_CURVES = {
    "loss": "loss",
    "mrr": "validation MRR",
    "subset_mrr": "validation MRR over a part of the knowledge base",
    "log_likelihood": "validation log-likelihood",
    "product_log_likelihood": "validation log-likelihood among rivals",
}


@dataclass(frozen=True)
class PartTraining:
    """A part, or the gated whole.

    Attributes:
        name: The part's.
        summary: Its best epoch in words, or that it is not finished.
        charts: Loss and validation figures by epoch.
        warnings: What `dsmip tune` said of it.
    """

    name: str
    summary: str
    charts: tuple[Markup, ...] = ()
    warnings: tuple[str, ...] = ()


def trainings(run: EvaluatedRun) -> list[PartTraining]:
    """Of all parts of the system, the gated whole last.

    Raises:
        UserError: A part's report is damaged.
    """
    system, folder = run.parts.system, run.parts.folder
    names = [*run.parts.part_names, *([system.name] if system.gated else [])]
    found = []
    for name in names:
        path = folder / name / PART
        if not path.is_file():
            found.append(PartTraining(name, "not trained"))
            continue
        remedy = f"; remove {folder / name} and run the command that made it again"
        found.append(read_json(path, lambda report, name=name: _training(name, report), remedy))  # type: ignore[misc]
    return found


def _training(name: str, report: Mapping[str, Any]) -> PartTraining:
    history = [{key: float(value) for key, value in epoch.items()} for epoch in report.get("history", [])]
    best = report.get("best", {})
    summary = "no epochs"
    if history:
        summary = f"{len(history)} epochs"
        if "epoch" in best:
            summary += f", the best {int(best['epoch']) + 1}"
        summary += "".join(f", {label} {best[key]:.3f}" for key, label in (("mrr", "validation MRR"),) if key in best)
    charts = []
    for key, label in _CURVES.items():
        points = [
            (epoch.get("epoch", number) + 1, epoch[key])
            for number, epoch in enumerate(history)
            if math.isfinite(epoch.get(key, math.nan))
        ]
        if len(points) > 1:
            charts.append(line_chart(f"{name}: {label}", [Line(label, points)], x="epoch", y=label, counts=True))
    return PartTraining(name, summary, tuple(charts), tuple(map(str, report.get("warnings", []))))
