"""The command `dsmip`. Ray and torch are imported inside the commands that need them: help and errors are quick."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dsmip.errors import UserError
from dsmip.rank_options import BackendName, PrecisionName, PruneName, RankOptions
from ray_jobs import environment  # noqa: F401  (before anything imports Ray)
from ray_jobs.failures import JobFailed

app = typer.Typer(
    name="dsmip",
    help="Multimodal entity linking on Ray: prepare data, train experts, tune the gate, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[str, typer.Option("--config", help="A shipped configuration's name or a YAML file.")]
DataOption = Annotated[Path, typer.Option("--data", help="Dataset directory made by 'dsmip prepare'.")]
DataArgument = Annotated[Path, typer.Argument(help="Dataset directory made by 'dsmip prepare'.", metavar="DATA")]
RunOption = Annotated[Path, typer.Option("--run", help="Run directory.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="key=value of the configuration; may be repeated.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Show Ray's own log.")]


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="Release folder; for demo: a seed, or a YAML of the generator.")],
    out: Annotated[Path, typer.Argument(help="Dataset directory to make.")],
    format: Annotated[str, typer.Option("--format", help="Layout of the source: mimic or demo.")] = "mimic",
    name: Annotated[str | None, typer.Option(help="Name of the data set (default: the folder's).")] = None,
    image_size: Annotated[int, typer.Option(min=16, help="Longest shorter side of stored pictures (mimic).")] = 224,
    seed: Annotated[int, typer.Option(min=0, help="Orders the training mentions (mimic).")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that build shards.")] = 1,
) -> None:
    """Makes a dataset directory from a raw release."""
    from ray_jobs import prepare as job

    if format not in ("mimic", "demo"):
        raise UserError(f"--format {format} is unknown; known: mimic, demo")
    if format == "demo":
        manifest = job.prepare_demo(job.demo_config(source), out, name=name, workers=workers, progress=_print_progress)
    else:
        manifest = job.prepare_mimic(
            Path(source), out, name=name, image_size=image_size, seed=seed, workers=workers, progress=_print_progress
        )
    mentions = ", ".join(f"{split} {counts.mentions}" for split, counts in manifest.splits.items())
    touched = {"rejected": manifest.rejects, "repaired": manifest.repaired, "degraded": manifest.degraded}
    counts = ", ".join(f"{action} {sum(reasons.values())}" for action, reasons in touched.items())
    print(f"{out}: {manifest.entities} entities; mentions: {mentions}; records {counts} (see {out / 'rejects.jsonl'})")


@app.command()
def inspect(
    data: DataArgument,
    html: Annotated[
        Path | None, typer.Option("--html", dir_okay=False, help="Also write a page with samples and examples.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the figures to this file.")
    ] = None,
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Compare pictures.")] = True,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that read shards.")] = 1,
) -> None:
    """Shows what a dataset holds and its flaws: coverage, ambiguity, duplicates, and what its splits share."""
    from ray_jobs.inspect_data import inspect_data

    inspect_data(data, html=html, json_file=json_file, pictures=pictures, workers=workers)


@app.command()
def verify(
    data: DataArgument,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write what was found to this file.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that read shards.")] = 1,
) -> None:
    """Reads every file of a dataset and checks it against the manifest; exit code 1 when something is wrong."""
    from ray_jobs.verify import verify_data

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
    from ray_jobs.settings import job_config

    settings = job_config(config, set or [])
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} must end in .safetensors")
    from dsmip.shards import Dataset
    from ray_jobs.pretrain import pretrain_backbone
    from ray_jobs.progress import Display

    pretrain_backbone(settings, Dataset.open(data), out, Display(), verbose=verbose)


@app.command()
def train(
    config: ConfigOption, data: DataOption, run: RunOption, set: SetOption = None, verbose: VerboseOption = False
) -> None:
    """Stage one: trains all parts of the system at once. Run again, it resumes."""
    from ray_jobs.settings import job_config

    settings = job_config(config, set or [])
    from dsmip.shards import Dataset
    from ray_jobs.progress import Display
    from ray_jobs.train_experts import train_experts

    train_experts(settings, Dataset.open(data), run, Display(), verbose=verbose)


@app.command()
def tune(
    run: RunOption,
    seed: Annotated[int, typer.Option(min=0, help="Draws the trials.")] = 0,
    set: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Stage two: sweeps gate and units on cached features and keeps the best trial. Run again, it resumes."""
    from dsmip.runs import Run
    from ray_jobs.progress import Display
    from ray_jobs.settings import job_config
    from ray_jobs.tune_gate import tune_gate

    opened = Run.open(run.resolve())
    tune_gate(opened, job_config(str(opened.folder / "config.yaml"), set or []), Display(), seed=seed, verbose=verbose)


@app.command()
def evaluate(
    run: RunOption,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "test",
    model: Annotated[str | None, typer.Option("--model", help="A part, or the system's name (default).")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = "cpu",
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Ray workers that rank slices of the kb; 1: this process, no Ray.")
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
    prune: Annotated[
        PruneName, typer.Option("--prune", help="hull: no token-level scores of pairs that cannot matter; same ranks.")
    ] = "none",
) -> None:
    """Ranks the whole knowledge base for every mention of a split."""
    from ray_jobs.evaluate import evaluate_run

    options = RankOptions(top_k=top_k, backend=backend, precision=precision, prune=prune)
    evaluate_run(run, split, model, device, workers=workers, options=options, candidates=candidates)


@app.command()
def compare(
    run1: Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN1")],
    run2: Annotated[Path, typer.Argument(help="Run directory to compare with it; may be the same.", metavar="RUN2")],
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "test",
    model1: Annotated[str | None, typer.Option("--model1", help="A part, or the system's name (default).")] = None,
    model2: Annotated[str | None, typer.Option("--model2", help="A part, or the system's name (default).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws resamples and sign flips.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the comparison to this file.")
    ] = None,
) -> None:
    """Says whether RUN2 differs from RUN1 by more than luck, from what 'dsmip evaluate' wrote of both."""
    from ray_jobs.compare import compare_runs

    compare_runs(run1, run2, split=split, model1=model1, model2=model2, seed=seed, json_file=json_file)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything that the demo makes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Draws the world and the trials.")] = 0,
    verbose: VerboseOption = False,
) -> None:
    """Draws a data set and goes all the way to a comparison of experts, gate and oracle, in a few minutes."""
    from data_prep.demo_release import DemoConfig
    from ray_jobs.demo import run_demo

    run_demo(out, DemoConfig(seed=seed), verbose=verbose)


def _print_progress(part: str, done: int, total: int) -> None:
    if done == total:
        print(f"  {part}: {total}", flush=True)


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
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
