"""The command `dsmip serve`. Torch is imported inside: help and errors are quick."""

from typing import Annotated

import typer

from ray_jobs.commands.options import MovedDataOption


def serve(
    model: Annotated[str, typer.Argument(help="Run or bundle: a directory or a URI.", metavar="MODEL")],
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on; others than this machine's loopback are open to strangers."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8000,
    part: Annotated[str | None, typer.Option("--model", help="A part, or the system's name (default).")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = "cpu",
    candidates: Annotated[
        int | None, typer.Option("--candidates", min=1, help="Score only so many entities, found by global vectors.")
    ] = None,
    image_urls: Annotated[
        list[str] | None,
        typer.Option("--image-urls", help="Pictures may be fetched from addresses that start so (up to a slash)."),
    ] = None,
    data: MovedDataOption = None,
) -> None:
    """Serves a model: HTTP interface, OpenRefine's reconciliation service, and a page."""
    from dsmip.linking.load import LoadOptions
    from ray_jobs.local_jobs.serve import serve_model

    serve_model(model, host, port, device, LoadOptions(part, data), image_urls or (), candidates)
