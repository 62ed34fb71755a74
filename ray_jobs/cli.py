"""The command `dsmip`. Ray and torch are imported inside the commands that need them: help and errors are quick."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dsmip.config import BackendName, PrecisionName, RankOptions
from dsmip.data.manifest import REJECTS_FILE, SPLITS
from dsmip.errors import ReportedError, UserError, no_room, no_room_message
from ray_jobs.cluster import connection  # noqa: F401  (before anything imports Ray)
from ray_jobs.options import (
    ConfigOption,
    DataArgument,
    DataOption,
    DeviceName,
    EntityText,
    JsonOption,
    MentionText,
    MovedDataOption,
    RunArgument,
    RunOption,
    SetOption,
    VerboseOption,
)
from ray_jobs.terminal.lines import complain, open_streams, say

app = typer.Typer(
    name="dsmip",
    help="Multimodal entity linking on Ray: prepare data, train experts, tune the gate, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# What a demo draws itself, and all that a view has.
_NOT_OF_DEMOS = frozenset({"entity_text", "mention_text", "kb", "split", "image_size", "seed"})
_OF_VIEWS = frozenset({"source", "out", "train_fraction", "seed"})


@app.command()
def prepare(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Release folder; dataset directory; for demo: a seed or a YAML.")],
    out: Annotated[str, typer.Argument(help="Dataset directory to make, or its URI in an object store.")],
    format: Annotated[
        str | None, typer.Option("--format", help="A layout's name, such as mimic, or demo (default: as found).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the data set (default: the folder's).")] = None,
    licence: Annotated[str, typer.Option(help="Its licence, for the manifest.")] = "unknown",
    entity_text: Annotated[EntityText, typer.Option(help="Field that entities' attributes are read from.")] = "attr",
    mention_text: Annotated[MentionText, typer.Option(help="What mentions' sentences are made of.")] = "sentence",
    kb: Annotated[Path | None, typer.Option(help="Knowledge base, for layouts that come without one.")] = None,
    split: Annotated[str | None, typer.Option(help="Percentages, as 70/10/20, for layouts without splits.")] = None,
    image_size: Annotated[int, typer.Option(min=16, help="Shorter side that pictures are shrunk to.")] = 224,
    keep_original: Annotated[bool, typer.Option("--keep-original", help="Store JPEGs as they are.")] = False,
    shard_size: Annotated[str, typer.Option(help="About the size of the kb's shards.")] = "256MB",
    train_fraction: Annotated[
        float | None, typer.Option(help="Of a dataset directory: a view that keeps this share of training mentions.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Orders training mentions; draws --split, --train-fraction.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes, or Ray tasks at a time.")] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="Work on the Ray cluster of RAY_ADDRESS, or on a local one.")
    ] = False,
) -> None:
    """Makes a dataset directory from a raw release. Run again after an interruption it goes on where it was."""
    from data_prep.formats.registry import open_release
    from ray_jobs.jobs import prepare as job
    from ray_jobs.terminal.display import Display

    if train_fraction is not None:
        _refuse_given(context, {*context.params} - _OF_VIEWS, "a view (--train-fraction) has no such choice")
        view = job.prepare_view(source, out, train_fraction, seed)
        say(f"{out}: a view of {source} with {view.num_mentions('train')} training mentions; its shards stay there")
        return
    options = job.BuildOptions(
        name=name,
        licence=licence,
        images=job.image_settings(image_size, keep_original=keep_original),
        shard_bytes=job.parse_size(shard_size),
        seed=seed,
        workers=workers,
        on_ray=ray,
    )
    if format == "demo":
        _refuse_given(context, _NOT_OF_DEMOS, "a demo has what SOURCE says: a seed, or a YAML file")
        world = job.demo_config(source)
        with Display() as display:
            manifest = job.prepare_demo(world, out, options, display)
    else:
        chosen = job.release_options(entity_text, mention_text, kb, split, seed)
        release = open_release(Path(source), format, chosen, say)
        with Display() as display:
            manifest = job.prepare_release(release, out, options, display, display.say)
    rejects = f"{out.rstrip('/')}/{REJECTS_FILE}"
    mentions = ", ".join(f"{split} {manifest.splits[split].mentions}" for split in SPLITS)
    touched = {"rejected": manifest.rejects, "repaired": manifest.repaired, "degraded": manifest.degraded}
    counts = ", ".join(f"{action} {sum(reasons.values())}" for action, reasons in touched.items())
    say(f"{out}: {manifest.entities} entities; mentions: {mentions}; records {counts} (see {rejects})")


def _refuse_given(context: typer.Context, names: Collection[str], why: str) -> None:
    """Refuses these parameters where they were given on the command line; `why` says what is wrong with that."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise UserError(f"{parameter.opts[0]}: {why}; leave it out")


@app.command()
def inspect(
    data: DataArgument,
    html: Annotated[
        Path | None, typer.Option("--html", dir_okay=False, help="Also write a page with samples and examples.")
    ] = None,
    json_file: JsonOption = None,
    images: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Compare pictures.")] = True,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that read shards.")] = 1,
) -> None:
    """Shows what a dataset holds and its flaws: coverage, ambiguity, duplicates, and what its splits share."""
    from ray_jobs.jobs.inspect_data import inspect_data

    inspect_data(data, html=html, json_file=json_file, images=images, workers=workers)


@app.command()
def verify(
    data: DataArgument,
    json_file: JsonOption = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that read shards.")] = 1,
) -> None:
    """Reads every file of a dataset and checks it against the manifest; exit code 1 when something is wrong."""
    from ray_jobs.jobs.verify import verify_data

    if not verify_data(data, json_file=json_file, workers=workers).ok:
        raise typer.Exit(1)


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
    from dsmip.runs.load_config import overridden
    from dsmip.runs.run import CONFIG
    from ray_jobs.jobs.status import open_run
    from ray_jobs.jobs.tune_gate import tune_gate
    from ray_jobs.terminal.display import Display

    opened = open_run(run, data)
    config = overridden(opened.config, set or [], f"config {opened.folder / CONFIG}")
    tune_gate(opened, config, Display(), seed=seed, verbose=verbose)


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
    data: MovedDataOption = None,
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
    from ray_jobs.jobs.status import show_status

    if remember and not data:
        raise UserError("--remember: say by --data where the run's data lies now")
    show_status(run, json_file, data, remember=remember)


@app.command()
def clean(run: RunArgument) -> None:
    """Deletes what a run no longer needs: checkpoints of parts and trials that have finished."""
    from ray_jobs.jobs.status import clean_run

    clean_run(run)


@app.command()
def compare(
    run1: Annotated[str, typer.Argument(help="Run: a directory or a URI.", metavar="RUN1")],
    run2: Annotated[str, typer.Argument(help="Run to compare with it; may be the same.", metavar="RUN2")],
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "test",
    model1: Annotated[str | None, typer.Option("--model1", help="A part, or the system's name (default).")] = None,
    model2: Annotated[str | None, typer.Option("--model2", help="A part, or the system's name (default).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws resamples and sign flips.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Says whether RUN2 differs from RUN1 by more than luck, from what 'dsmip evaluate' wrote of both."""
    from ray_jobs.jobs.compare import compare_runs

    compare_runs(run1, run2, split=split, model1=model1, model2=model2, seed=seed, json_file=json_file)


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
