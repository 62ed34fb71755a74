"""Commands of data sets. Whatever needs torch is imported inside the functions: help and errors are quick."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from dsmip.data.manifest import REJECTS_FILE, SPLITS, Manifest
from dsmip.errors import UserError
from ray_jobs.commands.options import ChooserName, DataArgument, EntityText, JsonOption, MentionText, TakeName
from ray_jobs.terminal.lines import say

# What a demo draws itself, and all that a view has.
_NOT_OF_DEMOS = frozenset({"entity_text", "mention_text", "kb", "split", "image_size", "seed", "keep_nil"})
_OF_ENDPOINTS = ("url", "model", "prompt", "at_once", "timeout", "retries")
_OF_VIEWS = frozenset({"source", "out", "train_fraction", "take", "seed"})


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
    keep_nil: Annotated[
        bool, typer.Option("--keep-nil", help="Keep mentions whose entity is not in the knowledge base, for figures.")
    ] = False,
    keep_original: Annotated[bool, typer.Option("--keep-original", help="Store JPEGs as they are.")] = False,
    shard_size: Annotated[str, typer.Option(help="About the size of the kb's shards.")] = "256MB",
    train_fraction: Annotated[
        float | None, typer.Option(help="Of a dataset directory: a view that keeps this share of training mentions.")
    ] = None,
    take: Annotated[
        TakeName, typer.Option(help="Which mentions --train-fraction keeps: drawn, or the release's first (published).")
    ] = "random",
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
        if take == "first":
            _refuse_given(context, ["seed"], "--take first draws nothing")
        view = job.prepare_view(source, out, train_fraction, seed, take)
        say(f"{out}: a view of {source} with {view.num_mentions('train')} training mentions; its shards stay there")
        return
    _refuse_given(context, ["take"], "says which mentions a view keeps (--train-fraction)")
    options = job.BuildOptions(
        name=name,
        licence=licence,
        images=job.image_settings(image_size, keep_original=keep_original),
        shard_bytes=job.parse_size(shard_size),
        seed=seed,
        keep_nil=keep_nil,
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
    _say_prepared(out, manifest)


def _say_prepared(out: str, manifest: Manifest) -> None:
    rejects = f"{out.rstrip('/')}/{REJECTS_FILE}"
    mentions = ", ".join(f"{split} {manifest.splits[split].mentions}" for split in SPLITS)
    touched = {"rejected": manifest.rejects, "repaired": manifest.repaired, "degraded": manifest.degraded}
    counts = ", ".join(f"{action} {sum(reasons.values())}" for action, reasons in touched.items())
    if unknown := sum(each.mentions for each in manifest.unknown.values()):
        mentions += f", not in the knowledge base {unknown}"
    say(f"{out}: {manifest.entities} entities; mentions: {mentions}; records {counts} (see {rejects})")


def _refuse_given(context: typer.Context, names: Collection[str], why: str) -> None:
    """Refuses these parameters where they were given on the command line; `why` says what is wrong with that."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise UserError(f"{parameter.opts[0]}: {why}; leave it out")


def enhance(
    context: typer.Context,
    data: DataArgument,
    out: Annotated[str, typer.Argument(help="Dataset directory to make.")],
    chooser: Annotated[ChooserName, typer.Option(help="BM25 over the sentence, or a language model.")] = "lexical",
    descriptions: Annotated[
        Path | None,
        typer.Option(help="JSON lines of labels and descriptions, or Wikidata's dump (default: the knowledge base)."),
    ] = None,
    language: Annotated[str, typer.Option(help="Of the labels in Wikidata's dump.")] = "en",
    candidates: Annotated[int, typer.Option(min=1, help="How many descriptions to choose from.")] = 10,
    url: Annotated[
        str | None, typer.Option(help="Of an OpenAI-compatible API: http://.../v1. Its key: DSMIP_ENDPOINT_KEY.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="As the endpoint calls it.")] = None,
    prompt: Annotated[
        Path | None, typer.Option(help="Text file with {word}, {sentence} and {candidates} (default: one of ours).")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Questions under way at a time.")] = 8,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds without an answer.")] = 60.0,
    retries: Annotated[int, typer.Option(min=0, help="How often a question is asked again.")] = 5,
) -> None:
    """Gives mentions a description, chosen among those of their name. Run again, it goes on; no gold is looked at."""
    if chooser == "lexical":
        _refuse_given(context, _OF_ENDPOINTS, "belongs to --chooser endpoint")
    elif url is None or model is None:
        raise UserError("--chooser endpoint: say by --url and --model whom to ask")
    from data_prep.enhancement.endpoint import EndpointOptions
    from ray_jobs.local_jobs.enhance import EnhanceOptions, enhance_data
    from ray_jobs.terminal.display import Display

    asked = url and model and EndpointOptions(url, model, at_once=at_once, timeout=timeout, retries=retries)
    options = EnhanceOptions(descriptions, language, candidates, asked or None, prompt)
    enhance_data(data, out, options, Display())


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
    from ray_jobs.local_jobs.inspect_data import inspect_data

    inspect_data(data, html=html, json_file=json_file, images=images, workers=workers)


def verify(
    data: DataArgument,
    json_file: JsonOption = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that read shards.")] = 1,
) -> None:
    """Reads every file of a dataset and checks it against the manifest; exit code 1 when something is wrong."""
    from ray_jobs.local_jobs.verify import verify_data

    if not verify_data(data, json_file=json_file, workers=workers).ok:
        raise typer.Exit(1)
