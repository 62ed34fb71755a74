"""Commands of linking. Torch is imported inside: help and errors are quick."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dsmip.errors import UserError
from ray_jobs.commands.options import MovedDataOption, RunArgument

IndexDtypeName = Literal["float32", "float16"]


def link(
    model: Annotated[
        str,
        typer.Argument(help="Run: a directory or a URI; bundle: a directory or hf-hub:owner/name.", metavar="MODEL"),
    ],
    mentions: Annotated[
        Path | None,
        typer.Argument(
            help="File of mentions, .jsonl or .parquet: word, sentence, image (a path), mention_id.", metavar="MENTIONS"
        ),
    ] = None,
    word: Annotated[str | None, typer.Option("--word", help="The text that is to be linked.")] = None,
    sentence: Annotated[str, typer.Option("--sentence", help="Where it stands.")] = "",
    image: Annotated[str | None, typer.Option("--image", help="Its picture.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Parquet file to write: a row for each mention.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many entities to give.")] = 5,
    min_confidence: Annotated[
        float | None,
        typer.Option("--min-confidence", min=0, max=1, help="Less sure, it is not in the knowledge base."),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            "--candidates", min=1, help="Score only so many entities, which global vectors find (default: all)."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write one mention's links to this file; -: print JSON alone.")
    ] = None,
    part: Annotated[str | None, typer.Option("--model", help="A part, or the system's name (default).")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = "cpu",
    data: MovedDataOption = None,
) -> None:
    """Links a mention, or a file of them, to the knowledge base's entities. Run again, a file goes on where it was."""
    if (word is None) == (mentions is None):
        raise UserError("say what to link: either --word (with --sentence, --image), or a file of mentions and --out")
    if mentions is not None and (out is None or json_file is not None or sentence or image):
        raise UserError(f"{mentions}: a file of mentions goes with --out, and not with --sentence, --image or --json")
    if word is not None and out is not None:
        raise UserError("--out goes with a file of mentions; --json writes the links of one")
    from dsmip.linking.bulk import BulkOptions
    from dsmip.linking.load import LoadOptions
    from dsmip.storage.locations import path_here
    from ray_jobs.local_jobs import link as job
    from ray_jobs.terminal.display import Display

    linked = job.LinkModel(model, device, LoadOptions(part, data))
    if mentions is None or out is None:
        mention = {"word": word, "sentence": sentence, "image": image}
        job.link_one(linked, mention, BulkOptions(top, min_confidence, candidates), json_file)
        return
    source = path_here(mentions)
    options = BulkOptions(top, min_confidence, candidates, source.absolute().parent)
    job.link_mentions(linked, source, path_here(out), options, Display())


def export(
    run: RunArgument,
    out: Annotated[str, typer.Argument(help="New folder for the bundle.", metavar="OUT")],
    part: Annotated[str | None, typer.Option("--model", help="A part, or the system's name (default).")] = None,
    with_backbone: Annotated[
        bool, typer.Option("--with-backbone", help="Put the pretrained backbone's tensors in, where its tag would do.")
    ] = False,
    index_dtype: Annotated[
        IndexDtypeName, typer.Option("--index-dtype", help="Of the index; float16 takes half of the disk.")
    ] = "float32",
    push: Annotated[
        str | None, typer.Option("--push", help="owner/name: also put it onto the Hugging Face hub (private if new).")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = "cpu",
    data: MovedDataOption = None,
) -> None:
    """Makes a bundle: a folder that links mentions without the run and its data, with a model card."""
    from dsmip.exporting.export import ExportOptions
    from dsmip.storage.locations import local_path
    from ray_jobs.local_jobs.export import export_bundle

    folder = local_path(out)
    if folder is None:
        raise UserError(f"{out}: a bundle is made in a folder of this machine; give one as OUT")
    export_bundle(run, folder, device, ExportOptions(part, data, with_backbone, index_dtype), push)
