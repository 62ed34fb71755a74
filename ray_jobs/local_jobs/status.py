"""The command `dsmip status`: a run's state from its files alone, and where its data lies. No Ray is needed."""

import shlex
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsmip.errors import UserError
from dsmip.runs.run import Run, data_of_run
from dsmip.runs.status import Status, TrainingState, read_status
from dsmip.storage.atomic import write_masked_json
from dsmip.storage.locations import Location, open_run_storage
from ray_jobs.terminal.lines import result_console, say

_SHOWN = ("loss", "mrr", "hits_at_1", "subset_mrr", "samples_per_second", "data_wait_share")


def show_status(
    location: Location, json_file: Path | None = None, data: Location | None = None, *, remember: bool = False
) -> Status:
    """Prints the state of a run.

    Args:
        location: Where it lies.
        json_file: Where to write all of it as well.
        data: Where its data lies now; it is opened and checked.
        remember: Makes the run remember `data`.

    Raises:
        UserError: There is no run, or `data` is not its data.
    """
    status = read_status(location)
    if data is not None:
        _check_data(location, data, remember=remember)
    console = result_console()
    console.print(f"{status.folder}: {status.model} on {status.data}", soft_wrap=True)
    console.print(f"last command: {status.last_command}", soft_wrap=True)
    _print_progress(console, "part", status.parts)
    if status.trials:
        _print_progress(console, "trial", status.trials)
    if status.evaluations:
        table = _table("evaluated", "split", "mentions", "hits@1", "MRR")
        for each in status.evaluations:
            figures = [f"{each.figures[name]:.3f}" if name in each.figures else "" for name in ("hits@1", "mrr")]
            table.add_row(each.model, each.split, str(each.mentions), *figures)
        console.print(table)
    sizes = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in status.disk.items() if size >= 1 << 16)
    console.print(f"disk: {sum(status.disk.values()) / 2**20:.1f} MiB ({sizes})", soft_wrap=True)
    if status.removable:
        size = sum(status.removable.values()) / 2**20
        command = shlex.join(["dsmip", "clean", str(location)])
        console.print(f"of these {size:.1f} MiB are checkpoints that nothing needs any more: {command}", soft_wrap=True)
    for problem in status.problems:
        console.print(f"problem: {problem}", soft_wrap=True)
    console.print(f"next: {status.next}", soft_wrap=True)
    if json_file is not None:
        write_masked_json(json_file, asdict(status))
    return status


def clean_run(location: Location) -> None:
    """Deletes what a run no longer needs and prints it.

    Raises:
        UserError: There is no run, it is being trained, or something cannot be deleted.
    """
    status, storage = read_status(location), open_run_storage(location)
    if training := [each.name for each in status.parts + status.trials if each.state == "training"]:
        raise UserError(f"run {status.folder}: {', '.join(training)} is being trained; wait for it, then clean")
    for name in status.removable:
        storage.delete(name)
    left = read_status(location).removable
    for name, size in status.removable.items():
        if name not in left:
            say(f"  deleted {name}: {size / 2**20:.1f} MiB")
    if left:
        raise UserError(f"run {status.folder}: {', '.join(left)} cannot be deleted; are these files another user's?")
    say(f"{status.folder}: {sum(status.removable.values()) / 2**20:.1f} MiB deleted that nothing needs any more")


def _check_data(location: Location, data: Location, *, remember: bool) -> None:
    if not remember:
        open_run(location, data)
        return
    run = Run.open(location, data)
    run.remember_data()
    say(f"data: {run.dataset.location} (remembered)")


def _print_progress(console: Console, what: str, rows: list[TrainingState]) -> None:
    table = _table(what, "state", "epoch", "step", "figures", "")
    for row in rows:
        epoch = f"{row.epochs_done}" + (f" of {row.num_epochs}" if row.num_epochs else "")
        step = f"{row.step} of {row.num_steps}" if row.state in ("training", "interrupted") and row.step else ""
        table.add_row(row.name, row.state, epoch if row.epochs_done or step else "", step, _figures(row), row.note)
    console.print(table)


def _figures(row: TrainingState) -> str:
    """The main ones, whether of a step, of an epoch or of a finished part."""
    plain = {name.rpartition("/")[2].replace("@", "_at_"): value for name, value in row.figures.items()}
    return "  ".join(f"{name.replace('_at_', '@')} {plain[name]:.3f}" for name in _SHOWN if name in plain)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def open_run(location: Location, data: Location | None = None, *, any_data: bool = False) -> Run:
    """Opens a run; where its data is not where the run remembers it, prints the command that makes it remember.

    Args:
        location: Where the run lies.
        data: Where its data lies now; None: where the run remembers it.
        any_data: `data` may be other data than the run's own; then this is printed.

    Raises:
        UserError: There is no run or no data, or the data's manifest is another one.
    """
    run = Run.open(location, data, any_data=any_data)
    if run.of_other_data:
        manifest = run.dataset.manifest
        say(f"data: {manifest.name} at {run.dataset.location}, on which the run was not made: its figures go into")
        say(f"  {run.storage}/{run.below}")
        return run
    remembered = data_of_run(run.storage).folder
    if run.dataset.location != remembered:
        again = shlex.join(["dsmip", "status", str(location), "--data", str(data), "--remember"])
        say(f"data: {run.dataset.location} (the run remembers {remembered}; to remember this one: {again})")
    return run
