"""The command `dsmip`. Ray and torch are imported inside the commands that need them: help and errors are quick."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dsmip.errors import ReportedError, UserError, no_room, no_room_message
from dsmip.messages import shown
from dsmip.rank_options import BackendName, PrecisionName, RankOptions
from ray_jobs.cluster import connection  # noqa: F401  (before anything imports Ray)
from ray_jobs.commands import bench as bench_command
from ray_jobs.commands import caching, calibration, entities, linking, planning, reporting, serving
from ray_jobs.commands import data as data_commands
from ray_jobs.commands import systems as system_commands
from ray_jobs.commands.options import (
    ConfigOption,
    DataArgument,
    DataOption,
    DeviceName,
    JsonOption,
    MovedDataOption,
    RunArgument,
    RunOption,
    SetOption,
    VerboseOption,
)
from ray_jobs.terminal.lines import complain, open_streams


class _Group(TyperGroup):
    """Commands whose usage errors, as all other lines, show no secret of what was typed."""

    def make_context(self, *about: Any, **more: Any) -> Any:
        with _masked_usage():
            return super().make_context(*about, **more)

    def invoke(self, ctx: Any) -> Any:
        with _masked_usage():
            return super().invoke(ctx)


@contextmanager
def _masked_usage() -> Iterator[None]:
    try:
        yield
    except typer.TyperException as error:
        error.message = shown(error.message)
        raise


app = typer.Typer(
    name="dsmip",
    cls=_Group,
    help="Multimodal entity linking on Ray: prepare data, train experts, tune the gate, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for _command in (data_commands.prepare, data_commands.enhance, data_commands.inspect, data_commands.verify):
    app.command()(_command)
app.command()(system_commands.systems)
app.command()(planning.plan)
app.command()(calibration.calibrate)
app.command()(reporting.report)
app.command()(bench_command.bench)
app.command()(linking.link)
app.command()(serving.serve)
app.command()(linking.export)
app.add_typer(entities.entities, name="entities")
app.add_typer(caching.cache, name="cache")
app.command("import")(system_commands.import_checkpoint)


@app.command()
def pretrain(
    config: ConfigOption,
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="Weights file to write (.safetensors).")],
    set: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Trains the backbone on the knowledge base's own picture-text pairs."""
    from dsmip.runs.load_config import job_config
    from dsmip.storage.locations import path_here

    settings = job_config(config, set or [])
    if path_here(out).suffix != ".safetensors":
        raise UserError(f"--out {out} must end in .safetensors")
    from dsmip.data.dataset import Dataset
    from ray_jobs.jobs.pretrain import pretrain_backbone
    from ray_jobs.terminal.display import Display

    pretrain_backbone(settings, Dataset.open(data), out, Display(), verbose=verbose)


@app.command()
def train(
    config: ConfigOption, data: DataOption, run: RunOption, set: SetOption = None, verbose: VerboseOption = False
) -> None:
    """Stage one: trains all parts of the system at once. Run again, it resumes."""
    from dsmip.runs.load_config import job_config, shadowed
    from dsmip.runs.moved_files import found_beside

    settings = found_beside(job_config(config, set or []), config)
    from dsmip.data.dataset import Dataset
    from ray_jobs.jobs.train_experts import train_experts
    from ray_jobs.terminal.display import Display

    dataset, display = Dataset.open(data), Display()
    for warning in shadowed(settings, set or []):
        display.say(warning)
    train_experts(settings, dataset, run, display, verbose=verbose)


@app.command()
def tune(
    run: RunOption,
    seed: Annotated[int, typer.Option(min=0, help="Draws the trials.")] = 0,
    data: MovedDataOption = None,
    set: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Stage two: sweeps gate and units on cached features and keeps the best trial. Run again, it resumes."""
    from dsmip.runs.load_config import overridden, shadowed
    from dsmip.runs.loaded_model import CONFIG
    from ray_jobs.jobs.tune_gate import tune_gate
    from ray_jobs.local_jobs.status import open_run
    from ray_jobs.terminal.display import Display

    opened, display = open_run(run, data), Display()
    config = overridden(opened.config, set or [], f"config {opened.folder / CONFIG}")
    for warning in shadowed(config, set or []):
        display.say(warning)
    tune_gate(opened, config, display, seed=seed, verbose=verbose)


@app.command()
def features(
    data: DataArgument,
    kind: Annotated[str, typer.Option("--kind", help="vgg16: fc7; clip: the backbone's pooled picture.")],
    config: Annotated[
        str | None, typer.Option("--config", help="The runs' configuration: its backbone, gate and cache_dtype.")
    ] = None,
    set: SetOption = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Of VGG-16: a file, or torchvision (default: what the gate names).")
    ] = None,
    random_weights: Annotated[
        int | None, typer.Option("--random-weights", min=0, metavar="SEED", help="For trials: weights drawn from SEED.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Ray workers, each with the network and a CPU.")] = 1,
    device: Annotated[DeviceName, typer.Option("--device", help="auto: GPUs where the cluster has some.")] = "auto",
    verbose: VerboseOption = False,
) -> None:
    """Computes the gate's picture features of all pictures beside the shards. Run again, it resumes."""
    from ray_jobs.jobs.features import compute_features, feature_request

    asked = feature_request(kind, config, set or [], weights, random_weights)
    from dsmip.data.dataset import Dataset
    from ray_jobs.terminal.display import Display

    dataset, display = Dataset.open(data), Display()
    if random_weights is not None:
        display.say(f"warning: random weights of seed {random_weights}: these features are for trials only")
    compute_features(dataset, asked, workers=workers, device=device, display=display, verbose=verbose)


@app.command()
def evaluate(
    run: RunOption,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "test",
    model: Annotated[str | None, typer.Option("--model", help="A part, or the system's name (default).")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = "cpu",
    workers: Annotated[
        int,
        typer.Option(
            "--workers", min=1, help="Ray workers that build the index and rank slices of it; 1: this process, no Ray."
        ),
    ] = 1,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Best entities of each mention to write.")] = 20,
    backend: Annotated[
        BackendName, typer.Option("--backend", help="What computes token-level scores; auto: the fastest there is.")
    ] = "auto",
    candidates: Annotated[
        int | None,
        typer.Option(
            "--candidates", min=1, help="Also rank among so many candidates, as a section beside the metrics."
        ),
    ] = None,
    precision: Annotated[
        PrecisionName, typer.Option("--precision", help="Of token rows while they are scored; auto: fp16 with triton.")
    ] = "auto",
    data: Annotated[
        str | None,
        typer.Option("--data", help="Other data to rank; or where the run's own data lies, if it has moved."),
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show what exact ranks took.")] = False,
) -> None:
    """Ranks the whole knowledge base for every mention of a split."""
    from ray_jobs.jobs.evaluate import evaluate_run

    options = RankOptions(top_k=top_k, backend=backend, precision=precision)
    evaluate_run(
        run,
        split,
        model,
        device,
        data=data,
        workers=workers,
        options=options,
        candidates=candidates,
        verbose=verbose,
    )


@app.command()
def status(
    run: RunArgument,
    json_file: JsonOption = None,
    data: MovedDataOption = None,
    remember: Annotated[
        bool, typer.Option("--remember", help="From now on, look for the run's data where --data says.")
    ] = False,
) -> None:
    """Says how far a run is and what to do next, from its files alone; also while it is being trained."""
    from ray_jobs.local_jobs.status import show_status

    if remember and not data:
        raise UserError("--remember: say by --data where the run's data lies now")
    show_status(run, json_file, data, remember=remember)


@app.command()
def clean(run: RunArgument) -> None:
    """Deletes what a run no longer needs: checkpoints of parts and trials that have finished."""
    from ray_jobs.local_jobs.status import clean_run

    clean_run(run)


@app.command()
def compare(
    run1: Annotated[
        str, typer.Argument(help="Run, or runs of several seeds: a directory or a URI[,...].", metavar="RUN1")
    ],
    run2: Annotated[str, typer.Argument(help="What to compare with it; may be the same.", metavar="RUN2")],
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "test",
    model1: Annotated[str | None, typer.Option("--model1", help="A part, or the system's name (default).")] = None,
    model2: Annotated[str | None, typer.Option("--model2", help="A part, or the system's name (default).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws resamples and sign flips.")] = 0,
    across: Annotated[bool, typer.Option("--across", help="Also where they were not evaluated alike.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Says whether RUN2 differs from RUN1 by more than luck, from what 'dsmip evaluate' wrote of both."""
    from ray_jobs.local_jobs.compare import Side, compare_runs

    sides = Side.of(run1, model1), Side.of(run2, model2)
    compare_runs(*sides, split=split, seed=seed, across=across, json_file=json_file)


@app.command("export-ranks")
def export_ranks(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for run.trec and qrels.trec.")],
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "test",
    model: Annotated[str | None, typer.Option("--model", help="A part, or the system's name (default).")] = None,
) -> None:
    """Writes what 'dsmip evaluate' found as TREC files, which trec_eval, ranx and ir-measures read."""
    from dsmip.storage.locations import path_here
    from ray_jobs.local_jobs.export import export_trec

    export_trec(run, path_here(out), split, model)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything that the demo makes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Draws the world and the trials.")] = 0,
    verbose: VerboseOption = False,
) -> None:
    """Draws a data set and goes all the way to a comparison of experts, gate and oracle, in a few minutes."""
    from data_prep.demo.release import DemoConfig
    from dsmip.storage.locations import path_here
    from ray_jobs.jobs.demo import run_demo

    run_demo(path_here(out), DemoConfig(seed=seed), verbose=verbose)


def main() -> None:
    """Entry point: a user's mistake ends with one line on stderr and exit code 2."""
    with _exit_codes():
        app()


def run_script(command: str) -> None:
    """Entry point of a job file started as a script: `python ray_jobs/<job>.py <options of the command>`."""
    with _exit_codes():
        app([command, *sys.argv[1:]])


@contextmanager
def _exit_codes() -> Iterator[None]:
    open_streams()
    try:
        yield
    except ReportedError as error:
        complain(f"error: {error}")
        sys.exit(error.exit_code)
    except Exception as error:
        if no_room(error):
            complain(f"error: {no_room_message(error, 'of standard output or of the temporary folder')}")
        elif isinstance(error, OSError) and error.filename is not None:
            complain(f"error: {error.filename}: {error.strerror}")
        else:
            raise
        sys.exit(2)
