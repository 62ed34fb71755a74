"""The job `dsmip bench`: all steps of a suite, then its tables, tests and page. Run again it goes on."""

import os
import shlex
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ray_jobs.cluster.connection import check_cluster, connected

# isort: split
import ray
import torch
from rich.table import Table

from dsmip.config import deep_merged
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.runs.load_config import load_config, parse_config
from dsmip.suites.figures import MentionKey, Result, compared, result_line, write_lines
from dsmip.suites.groups import linked_groups, mention_keys
from dsmip.suites.report import (
    LATEX,
    MARKDOWN,
    PAGE,
    StepFailure,
    SuiteReport,
    protocol_tables,
    share_charts,
    write_report,
)
from dsmip.suites.schema import ParameterSuite, load_suite
from dsmip.suites.steps import KINDS, SPLIT, Places, Step
from dsmip.suites.tables import TableView, comparison_table, decline_table, figure_tables, parameter_table
from ray_jobs.cluster.failures import JobFailed
from ray_jobs.jobs.benching.plan import Plan, make_plan
from ray_jobs.jobs.benching.runner import Room, Setting, run_steps
from ray_jobs.local_jobs.systems import describe
from ray_jobs.terminal.lines import result_console, say
from ray_jobs.terminal.stage_table import StageTable

RESULTS = "results.parquet"


@dataclass(frozen=True)
class BenchOptions:
    """Of a run of a suite.

    Attributes:
        only: Systems and data sets; none: all.
        across: Also where members of one table are not evaluated alike.
        dry_run: The steps are listed, and none is run.
    """

    only: Sequence[str] = ()
    across: bool = False
    dry_run: bool = False


def run_bench(name: str, data_root: Path | None, out: Path, options: BenchOptions = BenchOptions()) -> None:
    """Runs a suite and writes its report into `out`.

    Args:
        name: A shipped suite's, or a YAML file.
        data_root: Folder of the data sets; None where the suite needs none.
        out: Of all that it makes.
        options: Of this run of it.

    Raises:
        UserError: Whatever can be known to be wrong before anything runs.
        JobFailed: A step has failed; all others have been run.
    """
    suite, out = load_suite(name), out.resolve()
    if isinstance(suite, ParameterSuite):
        _count_parameters(name, suite, out, options)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    places = Places(None if data_root is None else data_root.resolve(), out, device)
    plan = make_plan(name, suite, places, options.only, across=options.across)
    if options.dry_run:
        _list(plan)
        return
    plan.prepare()
    failures = _run(plan)
    _report(plan, failures, across=options.across)
    if failures:
        raise JobFailed(
            f"{len(failures)} steps failed: {', '.join(each.step for each in failures)}; the same command goes on", 1
        )


def _list(plan: Plan) -> None:
    for step in plan.chosen.values():
        say(f"{'done' if step.done else 'to do':<6} {step.name}")
        say(f"       {shlex.join(['dsmip', *step.arguments])}")
    done = sum(step.done for step in plan.chosen.values())
    say(f"{len(plan.chosen)} steps, {done} of them done")


def _run(plan: Plan) -> list[StepFailure]:
    left = [step for step in plan.chosen.values() if not step.done]
    say(f"{plan.suite.title}: {len(plan.chosen)} steps, {len(plan.chosen) - len(left)} of them done")
    if not left:
        return []
    table = StageTable(plan.name, KINDS)
    for name, step in plan.chosen.items():
        table.add(name, _row_of(plan, step), step.kind, done=step.done)
    check_cluster()
    with ExitStack() as stack:
        most = os.cpu_count() or 1
        variables, room = dict[str, str](), Room(most, torch.cuda.device_count(), most)
        if any(step.kind in ("backbone", "train", "tune") for step in left):
            stack.enter_context(connected())
            all_of_it: Mapping[str, float] = ray.cluster_resources()
            room = Room(all_of_it.get("CPU", 1.0), all_of_it.get("GPU", 0.0), most)
            variables["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        stack.enter_context(table)
        return run_steps(plan.chosen, Setting(room, plan.places.out / "logs", variables), table)


def _row_of(plan: Plan, step: Step) -> str:
    """Of the live table: a data set, or a system on a data set with a share."""
    if step.kind in ("data", "backbone"):
        return step.name.partition("/")[2]
    column, system, _ = step.name.split("/", 2)
    return f"{column} {plan.suite.all_systems()[system].label or system}"


def _report(plan: Plan, failures: Sequence[StepFailure], *, across: bool) -> None:
    results = _results(plan)
    suite, out = plan.suite, plan.places.out
    number = len(plan.rows) * len(suite.data) * len(suite.shares) * len(suite.seeds)
    warnings = [f"Not alike: {each}." for each in plan.warnings]
    if len(results) < number:
        warnings.append(f"{number - len(results)} of {number} figures are missing: their runs are not evaluated.")
    if not results:
        say(f"nothing is evaluated yet; no tables in {out}")
        return
    tested = [] if suite.significance is None else compared(results, suite.significance, _groups(plan), across=across)
    tables = [*figure_tables(suite, plan.rows, results, tested)]
    tables += filter(None, [comparison_table(suite, tested), decline_table(suite, plan.rows, results)])
    report = SuiteReport(
        plan.name,
        suite.title,
        suite.about,
        tuple(tables),
        tuple(share_charts(suite, plan.rows, results)),
        tuple(protocol_tables(suite, results)),
        tuple(warnings),
        tuple(failures),
    )
    write_lines(out / RESULTS, [result_line(plan.name, each) for each in results])
    _write(out, report)


def _write(out: Path, report: SuiteReport) -> None:
    write_report(out, report)
    for view in report.tables:
        show_table(view)
    for warning in report.warnings:
        say(warning)
    say(f"  {', '.join(str(out / name) for name in (RESULTS, MARKDOWN, LATEX, PAGE))}")


def show_table(view: TableView) -> None:
    """Prints a table with its notes."""
    table = Table(*view.header, title=view.title)
    for row in view.rows:
        table.add_row(*(f"*{entry.text}" if entry.bold else entry.text for entry in row))
    console = result_console()
    console.print(table)
    for note in view.notes:
        console.print(f"  {note}", soft_wrap=True)


def _results(plan: Plan) -> list[Result]:
    """Of all members that are evaluated, those of earlier runs of the suite too."""
    rows = {(row.system, row.model): row for row in plan.rows}
    found = []
    for member in plan.members:
        for model in member.models:
            if plan.steps[f"{member.name}/evaluate-{model}"].done:
                run = str(plan.places.run(member))
                found.append(Result.read(rows[member.system, model], member, run, SPLIT))
    return found


def _groups(plan: Plan) -> Callable[[str, Sequence[MentionKey]], list[int]]:
    """Groups of test mentions that share something, by their keys; a data set's pictures are read once."""
    data_of = {member.folder: member.column.data for member in plan.members}

    @cache
    def keys_of(folder: str) -> dict[MentionKey, tuple[Hashable, ...]]:
        dataset = Dataset.open(plan.places.base(plan.suite, data_of[folder], folder))
        seen: Counter[str] = Counter()
        found = {}
        for mention in dataset.mentions(SPLIT):
            found[mention.mention_id, seen[mention.mention_id]] = mention_keys(mention)
            seen[mention.mention_id] += 1
        return found

    def groups(folder: str, keys: Sequence[MentionKey]) -> list[int]:
        known = keys_of(folder)
        return linked_groups([known[key] for key in keys])

    return groups


def _count_parameters(name: str, suite: ParameterSuite, out: Path, options: BenchOptions) -> None:
    if options.only:
        raise UserError(f"--only: suite {name} counts parameters, all at once; leave it out")
    counts: dict[str, tuple[int, int]] = {}
    for row, about in suite.parameters.items():
        source = f"suite {name}: parameters.{row}"
        try:
            tree = deep_merged(load_config(about.config).model_dump(mode="json"), about.set)
        except UserError as error:
            raise UserError(f"{source}.config: {error}") from error
        parts = {part.name: part for part in describe(parse_config(tree, source), about.config).parts}
        part = parts.get(about.part or next(iter(parts)))
        if part is None:
            raise UserError(f"{source}.part: unknown part '{about.part}'; there are {', '.join(parts)}")
        counts[row] = part.trained, part.total
    if options.dry_run:
        say(f"{len(counts)} rows, counted from configurations alone; nothing is trained")
        return
    lines = [
        {"suite": name, "row": row, "trained": trained, "total": total} for row, (trained, total) in counts.items()
    ]
    write_lines(out / RESULTS, lines)
    _write(out, SuiteReport(name, suite.title, suite.about, (parameter_table(suite, counts),)))
