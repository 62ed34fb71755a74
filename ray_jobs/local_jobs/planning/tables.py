"""The tables of `dsmip plan`."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from dsmip.planning.disk import Stored
from dsmip.planning.forecast import Forecast
from dsmip.planning.machine import Machines
from dsmip.planning.rates import stated_rates
from dsmip.planning.steps import mebibytes
from ray_jobs.terminal.lines import result_console

_KINDS = {
    "towers": "encodes its items anew at every step",
    "cached": "on features of frozen towers",
    "nothing": "nothing to train",
    "reranker": "pairs of a mention and a candidate",
}


def show_plan(forecast: Forecast, files: Sequence[Stored], machines: Machines, took: tuple[float, float]) -> None:
    """Prints parts, steps and files, where figures come from, and what does not fit."""
    console = result_console()
    parts = Table("part", "trains", "trained", "of", title="Parameters", title_justify="left")
    for name, part in forecast.costs.parts.items():
        parts.add_row(name, _KINDS[part.kind], _millions(part.trained), _millions(part.total))
    if (whole := forecast.costs.whole) is not None:
        parts.add_row(
            "gate and units (tune)", "trials on cached features", _millions(whole.trained), _millions(whole.total)
        )
    console.print(parts)
    console.print(_steps(forecast, machines))
    console.print(_files(files, machines.disk))
    if machines.stated:
        console.print(
            f"Times are from stated rates, not measured: {stated_rates().achieved:.0%} of what data sheets say "
            f"({'; '.join(machines.stated)}); operations were counted in a probe of {took[0]:.0f} s here.",
            soft_wrap=True,
        )
    else:
        console.print(
            f"Times are what the steps take where nothing else runs, from a probe on this machine of {took[0]:.0f} s "
            f"({took[1]:.0f} s of processor time); trainings that stop early (patience) take less.",
            soft_wrap=True,
        )
    for problem in forecast.problems:
        console.print(Text.assemble(("does not fit: ", "bold red"), str(problem)), soft_wrap=True)
    if not forecast.problems:
        console.print("all fits")


def _steps(forecast: Forecast, machines: Machines) -> Table:
    free = [f"{each.name}: {mebibytes(each.memory)}" for each in machines.nodes if each.memory is not None]
    table = Table(title="Steps", title_justify="left", caption=f"memory free: {', '.join(free)}" if free else None)
    for name in ("step", "time", "a worker", "of its GPU", "all at once", "where", "what"):
        table.add_column(name, justify="right" if name in ("time", "a worker", "of its GPU", "all at once") else "left")
    for step in forecast.steps:
        table.add_row(
            step.name,
            duration(step.seconds),
            mebibytes(step.worker_bytes),
            mebibytes(step.gpu_bytes) if step.gpu_bytes else "",
            "" if step.machine_bytes is None else mebibytes(step.machine_bytes),
            step.node,
            step.about,
        )
    table.add_section()
    whole = {"pretrain", "features", "train", "tune", "evaluate"}
    table.add_row("together", duration(sum(each.seconds for each in forecast.steps if each.name in whole)))
    return table


def _files(files: Sequence[Stored], free: int | None) -> Table:
    table = Table("file", "where", title="Disk", title_justify="left")
    table.add_column("size", justify="right")
    table.add_column("until")
    for each in files:
        table.add_row(each.what, each.place, mebibytes(each.num_bytes), each.until)
    table.add_section()
    there = "" if free is None else f"{mebibytes(free)} free"
    table.add_row("together", "", mebibytes(sum(each.num_bytes for each in files)), there)
    return table


def duration(seconds: float) -> str:
    """As `45 s`, `12 min` or `3.2 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
