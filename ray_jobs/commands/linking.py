"""Commands of linking. Torch is imported inside: help and errors are quick."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dsmip.errors import UserError
from ray_jobs.commands.options import MovedDataOption, RunArgument, VerboseOption

IndexDtypeName = Literal["float32", "float16", "int8"]
VectorChoiceName = Literal["auto", "distilled", "global"]


def link(
    model: Annotated[
        str,
        typer.Argument(help="Run: a directory or a URI; bundle: a directory or hf-hub:owner/name.", metavar="MODEL"),
    ],
    mentions: Annotated[
        str | None,
        typer.Argument(
            help="File of mentions, .jsonl or .parquet (word, sentence, image, mention_id), a folder or a pattern"
            " of some: a path or a URI.",
            metavar="MENTIONS",
        ),
    ] = None,
    word: Annotated[str | None, typer.Option("--word", help="The text that is to be linked.")] = None,
    sentence: Annotated[str, typer.Option("--sentence", help="Where it stands.")] = "",
    image: Annotated[str | None, typer.Option("--image", help="Its picture.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Parquet file to write, a path or a URI: a row for each mention.")
    ] = None,
    workers: Annotated[
        int,
        typer.Option("--workers", min=1, help="Ray workers that link a file, each with the model; 1: this process."),
    ] = 1,
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
    verbose: VerboseOption = False,
) -> None:
    """Links a mention, or files of them, to the knowledge base's entities. Run again, files go on where they were."""
    if (word is None) == (mentions is None):
        raise UserError("say what to link: either --word (with --sentence, --image), or a file of mentions and --out")
    if mentions is not None and (out is None or json_file is not None or sentence or image):
        raise UserError(f"{mentions}: a file of mentions goes with --out, and not with --sentence, --image or --json")
    if word is not None and out is not None:
        raise UserError("--out goes with a file of mentions; --json writes the links of one")
    if word is not None and workers > 1:
        raise UserError("--workers goes with a file of mentions")
    from dsmip.linking.bulk import BulkOptions
    from dsmip.linking.load import LoadOptions
    from ray_jobs.local_jobs.linking.many import link_mentions
    from ray_jobs.local_jobs.linking.one import LinkModel, link_one
    from ray_jobs.terminal.display import Display

    linked, options = LinkModel(model, device, LoadOptions(part, data)), BulkOptions(top, min_confidence, candidates)
    if mentions is None or out is None:
        link_one(linked, {"word": word, "sentence": sentence, "image": image}, options, json_file)
    elif workers == 1:
        link_mentions(linked, mentions, out, options, Display())
    else:
        from ray_jobs.jobs.link import link_on_ray

        link_on_ray(linked, mentions, out, options, Display(), workers=workers, verbose=verbose)


def export(
    run: RunArgument,
    out: Annotated[str, typer.Argument(help="New folder for the bundle.", metavar="OUT")],
    part: Annotated[str | None, typer.Option("--model", help="A part, or the system's name (default).")] = None,
    with_backbone: Annotated[
        bool, typer.Option("--with-backbone", help="Put the pretrained backbone's tensors in, where its tag would do.")
    ] = False,
    index_dtype: Annotated[
        IndexDtypeName, typer.Option("--index-dtype", help="Of the index on disk; float16: half, int8: a quarter.")
    ] = "float32",
    candidate_vectors: Annotated[
        VectorChoiceName,
        typer.Option(
            "--candidate-vectors",
            help="What finds candidates: the model's global vectors, or small ones learned from its exact scores "
            "(auto: where 100 candidates by global ones hold less than 99 % of the best entities).",
        ),
    ] = "auto",
    push: Annotated[
        str | None,
        typer.Option(
            "--push",
            help="owner/name: also put it onto the Hugging Face hub (private if new), in the place of a bundle there.",
        ),
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
    options = ExportOptions(part, data, with_backbone, index_dtype, candidate_vectors)
    export_bundle(run, folder, device, options, push)
