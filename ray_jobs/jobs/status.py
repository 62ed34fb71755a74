"""The command `dsmip status`: a run's state as a table, from its files alone. It needs no Ray."""

from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsmip.runs.status import Status, TrainingState, read_status
from dsmip.storage.atomic import write_masked_json
from dsmip.storage.locations import Location
from ray_jobs.terminal.lines import result_console

_SHOWN = ("loss", "mrr", "hits_at_1", "samples_per_second", "data_wait_share")


def show_status(location: Location, json_file: Path | None = None) -> Status:
    """Prints the state of a run and, with `json_file`, writes all of it there. UserError when there is no run."""
    status = read_status(location)
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
    for problem in status.problems:
        console.print(f"problem: {problem}", soft_wrap=True)
    console.print(f"next: {status.next}", soft_wrap=True)
    if json_file is not None:
        write_masked_json(json_file, asdict(status))
    return status


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
