"""The page of a report: one file, which asks nobody for anything and runs no script but its own."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from dsmip.config import flat
from dsmip.data.manifest import SPLITS
from dsmip.errors import UserError
from dsmip.evaluation.metrics import shown_metrics
from dsmip.evaluation.stored.comparison import Comparison, compare, read_evaluation, unlike
from dsmip.pages.templates import asset, base_style, page_environment
from dsmip.progress import Progress, no_progress
from dsmip.reporting.confidences import Confidences, confidences
from dsmip.reporting.evaluations import EvaluatedRun, read_evaluated_run
from dsmip.reporting.figures import GROUP_METRICS, difficulty_tables, gate_usage, group_tables, model_rows
from dsmip.reporting.mentions import MAX_MENTIONS, ShownMentions, shown_mentions
from dsmip.reporting.trainings import trainings
from dsmip.runs.run import Run
from dsmip.storage.atomic import write_text
from dsmip.storage.locations import Location

_PACKAGE = "dsmip.reporting"
_IN_SCRIPT = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class ReportOptions:
    """Of what a report is.

    Attributes:
        split: Of the evaluations.
        models: What it is about, of each run; None: what `dsmip evaluate` takes by default.
        across: Also of two that were not evaluated alike, if their mentions and golds are the same.
        max_mentions: No more in the browser of mentions.
    """

    split: str = "test"
    models: tuple[str | None, str | None] = (None, None)
    across: bool = False
    max_mentions: int = MAX_MENTIONS


def write_report(
    html: Path,
    location: Location,
    second: Location | None = None,
    *,
    options: ReportOptions = ReportOptions(),
    data: Location | None = None,
    progress: Progress = no_progress,
) -> ShownMentions:
    """Writes the page of a run, or of two on the same mentions, whole or not at all; no model is loaded.

    Args:
        html: The page's file.
        location: Where the run lies.
        second: Where the other one lies; its data need not be there.
        options: Of what it is.
        data: Where the first run's data lies, if it has moved.
        progress: Of what is read.

    Raises:
        UserError: No such split, run, model or evaluation, evaluations of different mentions, a damaged file, no data,
            or no folder for the page.
    """
    if options.split not in SPLITS:
        raise UserError(f"unknown split '{options.split}'; there are {', '.join(SPLITS)}")
    if html.is_dir():
        raise UserError(f"--html {html} is a folder; give a file")
    if not html.absolute().parent.is_dir():
        raise UserError(f"--html {html}: there is no folder {html.parent}; make it first")
    runs = [read_evaluated_run(location, options.split, options.models[0])]
    comparison, not_alike = None, list[str]()
    if second is not None:
        runs.append(read_evaluated_run(second, options.split, options.models[1]))
        comparison, not_alike = _compared(runs, options.across)
    dataset = Run.open(runs[0].parts.storage, data).dataset
    sure = [confidences(run) for run in runs]
    right = [each.right for each in sure]
    shown = shown_mentions(runs, right, dataset, progress, max_mentions=options.max_mentions)
    about = {
        "parts": [_part(run, confidence) for run, confidence in zip(runs, sure, strict=True)],
        "comparison": comparison,
        "not_alike": not_alike,
        "outcomes": _outcomes(runs) if comparison else None,
        "groups": group_tables(runs),
        "difficulties": difficulty_tables(runs, dataset),
        "dataset": dataset.manifest,
        "split": options.split,
        "shown": shown,
    }
    write_text(html, _rendered(about, shown))
    return shown


def _part(run: EvaluatedRun, confidence: Confidences) -> dict[str, Any]:
    """What the page says of one run alone."""
    return {
        "run": run,
        "models": model_rows(run),
        "protocol": flat(run.main.metrics.get("protocol", {})),
        "gate": gate_usage(run),
        "unknown_experts": _not_evaluated(run),
        "confidences": confidence,
        "trainings": trainings(run),
    }


def _rendered(about: Mapping[str, Any], shown: ShownMentions) -> str:
    style, script = base_style() + asset(_PACKAGE, "page.css"), asset(_PACKAGE, "page.js")
    return (
        page_environment(_PACKAGE)
        .get_template("page.html.j2")
        .render(
            about,
            style=style,
            script=script,
            policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
            data=_script_json(shown.data),
            metrics=shown_metrics(),
            group_metrics=GROUP_METRICS,
        )
    )


def _compared(runs: Sequence[EvaluatedRun], across: bool) -> tuple[Comparison, list[str]]:
    """The comparison, and what was not alike in the two evaluations."""
    first, second = (read_evaluation(run.parts.storage, run.split, run.shown) for run in runs)
    if (first.run.location, first.model) == (second.run.location, second.model):
        raise UserError(f"both are {first}; give another RUN2, or --model and --model2")
    found = compare([first], [second], torch.Generator().manual_seed(0), across=across)
    return found, unlike([first, second])


def _outcomes(runs: Sequence[EvaluatedRun]) -> list[list[int]]:
    """How many mentions are right by the first run (rows: right, wrong) and by the second (columns)."""
    found = [[0, 0], [0, 0]]
    for key, row in runs[0].main.rows.items():
        found[row["rank"] > 1][runs[1].main.rows[key]["rank"] > 1] += 1
    return found


def _not_evaluated(run: EvaluatedRun) -> list[str]:
    """Commands without which the experts' own answers are not known."""
    if not run.main.has_choices or run.expert_ranks():
        return []
    rows = run.main.rows.keys()
    missing = [name for name in run.experts if name not in run.stored or run.stored[name].rows.keys() != rows]
    return [run.evaluate_command(name) for name in missing]


def _script_json(value: Any) -> Markup:
    """JSON for a script element that is data: nothing in it can end the element or begin a comment in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate(_IN_SCRIPT))


def _hash(content: str) -> str:
    """By which a policy names the content of an element that may stand in the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
