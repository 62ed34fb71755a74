"""The command `dsmip bench`. Ray and torch are imported inside: help and errors are quick."""

from pathlib import Path
from typing import Annotated

import typer


def bench(
    suite: Annotated[
        str, typer.Argument(help="table1, table2, table3, low_resource, demo, or a YAML file.", metavar="SUITE")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for runs, tables and page.")],
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="Folder of the suite's data sets, each made by 'dsmip prepare'.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A system or a data set of the suite; may be repeated.")
    ] = None,
    across: Annotated[
        bool, typer.Option("--across", help="Also where members of one table are not evaluated alike.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the steps and run none.")] = False,
) -> None:
    """Runs a suite of experiments to tables, tests and a page. Run again, it goes on and repeats nothing."""
    from dsmip.storage.locations import path_here
    from ray_jobs.jobs.benching.bench import BenchOptions, run_bench

    root = None if data_root is None else path_here(data_root)
    run_bench(suite, root, path_here(out), BenchOptions(only or [], across, dry_run))
