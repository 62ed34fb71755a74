"""The command `dsmip serve`: a linker behind HTTP in this process, until it is told to stop."""

import socket
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import uvicorn

from dsmip.errors import UserError
from dsmip.linking.linker import Linker
from dsmip.linking.load import LoadOptions, examples_of, load_linker
from dsmip.rank_options import device_here
from dsmip.serving.addresses import checked_prefix
from dsmip.serving.app import create_app
from dsmip.serving.limits import Limits
from dsmip.serving.served import Source, reloading, stamp_of
from dsmip.storage.locations import Location
from ray_jobs.terminal.display import Display
from ray_jobs.terminal.lines import say

STOP_SECONDS = 30  # in which requests that have begun are answered


def serve_model(
    location: Location,
    host: str,
    port: int,
    device: str,
    options: LoadOptions,
    image_urls: Sequence[str] = (),
    candidates: int | None = None,
) -> None:
    """Opens the model, says where it is served, and answers until SIGINT or SIGTERM.

    Args:
        location: Of the run or bundle.
        host, port: Where it is served.
        device: Where it links.
        options: How it is opened.
        image_urls: Starts of addresses below which pictures may be fetched.
        candidates: Entities that are scored for each mention; None: all.

    Raises:
        UserError: The model cannot be opened, or the address cannot be had.
    """
    limits = Limits(image_urls=tuple(map(checked_prefix, image_urls)))
    taken = _bound(host, port)  # before the model is opened, which takes long

    def opened() -> Linker:
        with Display() as progress:
            return load_linker(location, device_here(device), options, progress=progress, notice=say)

    with closing(taken):
        app = create_app(
            Source(reloading(opened), lambda: stamp_of(location)),
            name=f"dsmip: {Path(str(location)).name}",
            limits=limits,
            candidates=candidates,
            examples=examples_of(location, options),
            notice=say,
        )
        taken.listen()  # who comes from the next line on waits for the server, and is not refused
        say(f"{app.state.served.linker}")
        address = f"http://{f'[{host}]' if ':' in host else host}:{taken.getsockname()[1]}"
        say(f"serving on {address} (page: /, interface: /docs, OpenRefine: /reconcile); Ctrl-C ends it")
        config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=STOP_SECONDS)
        uvicorn.Server(config).run(sockets=[taken])


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address; port 0 is any free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror or error}; give another --port, or --host"
        ) from None
    return taken
