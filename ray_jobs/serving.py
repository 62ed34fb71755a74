"""A served linker on Ray Serve: `serve run ray_jobs.serving:app model=RUN`."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import Field, ValidationError

from dsmip.config import Frozen
from dsmip.errors import UserError
from dsmip.linking.load import LoadOptions, examples_of, load_linker
from dsmip.rank_options import device_here
from dsmip.serving.addresses import checked_prefix
from dsmip.serving.app import create_app
from dsmip.serving.limits import Limits
from dsmip.serving.served import Source, reloading, stamp_of
from ray_jobs.cluster import connection  # noqa: F401  (before anything imports Ray)

# isort: split
from ray import serve

_ONGOING_AT_MOST = 8  # times `ongoing`; what is above waits in front of the replicas
_QUEUED_AT_MOST = 64  # times `ongoing` of all replicas; what is above is refused with status 503


class ServeArguments(Frozen):
    """What `serve run` or a Serve configuration's `args` may say.

    Attributes:
        model: Run or bundle: a directory that all nodes see, or a URI.
        part: A part, or the system's name (None: the system).
        device: Of each replica.
        num_replicas: How many there are at first, and at least.
        max_replicas: Up to how many come when requests queue.
        ongoing: Requests that a replica works on before another one is wanted.
        cpus, gpus: What a replica asks for; a fraction of a GPU is shared.
        candidates: Entities that are scored for each mention, found by global vectors; None: all.
        image_urls: Start of addresses, up to a slash, that pictures may be fetched from below; none: no address is.
    """

    model: str
    part: str | None = None
    device: str = "cpu"
    num_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    ongoing: int = Field(16, ge=1)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)
    candidates: int | None = Field(None, ge=1)
    image_urls: str | None = None


@serve.ingress()
class LinkerReplica:
    """One replica: it opens the model, and answers on all routes of `dsmip serve`."""

    def __init__(self, arguments: ServeArguments) -> None:
        """
        Args:
            arguments: which model.

        Raises:
            UserError: it cannot be opened.
        """
        location, options = arguments.model, LoadOptions(arguments.part)
        opened = reloading(lambda: load_linker(location, device_here(arguments.device), options))
        source = Source(opened, lambda: stamp_of(location))
        examples = examples_of(location, options)
        allowed = (checked_prefix(arguments.image_urls),) if arguments.image_urls else ()
        self._app = create_app(
            source,
            name=f"dsmip: {Path(location).name}",
            limits=Limits(image_urls=allowed),
            examples=examples,
            candidates=arguments.candidates,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def app(arguments: dict[str, Any]) -> serve.Application:
    """The application for `serve run` and for Serve's configuration files.

    Raises:
        UserError: An argument is unknown or of another kind.
    """
    try:
        given = ServeArguments.model_validate(arguments, strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"serve argument {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    deployment = serve.deployment(
        name="linker",
        ray_actor_options={"num_cpus": given.cpus, "num_gpus": given.gpus},
        max_ongoing_requests=_ONGOING_AT_MOST * given.ongoing,
        max_queued_requests=_QUEUED_AT_MOST * given.ongoing * max(given.max_replicas, given.num_replicas),
        autoscaling_config={
            "min_replicas": given.num_replicas,
            "max_replicas": max(given.max_replicas, given.num_replicas),
            "target_ongoing_requests": given.ongoing,
        },
        graceful_shutdown_timeout_s=30,
    )
    return deployment(LinkerReplica).bind(given)
