"""The web application of a served linker: its routes, middleware and pages, put together."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from dsmip.linking.bundle import Example
from dsmip.serving.batcher import Batcher, Busy, Stopped
from dsmip.serving.entity_routes import entity_router
from dsmip.serving.limits import DEFAULT_LIMITS, Limits
from dsmip.serving.link_routes import link_router, of_error, refusal
from dsmip.serving.observed import CountRequests, Figures
from dsmip.serving.protection import BoundedBodies, SafeHeaders
from dsmip.serving.reconciliation import reconciliation_router
from dsmip.serving.schemas import Problem, Unusable, first_problem
from dsmip.serving.served import Served, Source
from dsmip.version import VERSION

_PAGES = "page"
_FILES = {"page.js": "text/javascript", "page.css": "text/css"}


def create_app(
    source: Source,
    *,
    name: str,
    limits: Limits = DEFAULT_LIMITS,
    examples: Sequence[Example] = (),
    candidates: int | None = None,
    check_seconds: float = 10.0,
    notice: Any = lambda line: None,
) -> FastAPI:
    """The application. The linker is opened here, so that what is wrong with it is said before anything listens.

    Args:
        source: Opens linkers, and says when one must be opened anew.
        name: What the service is called, on its page and in OpenRefine.
        limits: What it takes.
        examples: Mentions on the page.
        candidates: Entities that are scored for each mention, as `Linker.link` has it; None: all.
        check_seconds: How often the source is looked at for changes.
        notice: Takes lines of what happens.

    Raises:
        UserError: The linker cannot be opened, or has no vectors that would find candidates, or broken ones.
    """
    figures = Figures()
    served = Served(source, notice, figures.reloads.inc)
    if candidates is not None:
        _ = served.linker.search.candidates
    batcher = Batcher(lambda: served.linker, limits.batch, limits.waiting, figures.batches.observe, candidates)
    figures.waiting.set_function(lambda: batcher.num_waiting)
    figures.entities.set_function(lambda: len(served.linker))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served.watch(check_seconds)
        yield
        served.close()
        batcher.close()

    app = FastAPI(title=name, version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.served = served
    pages = Environment(loader=PackageLoader("dsmip.serving", _PAGES), autoescape=True, undefined=StrictUndefined)
    app.include_router(link_router(served, batcher, limits))
    app.include_router(entity_router(served))
    app.include_router(reconciliation_router(served, batcher, limits, pages, name))
    _add_facts(app, served, batcher, figures)
    _add_pages(app, served, pages, name, examples)
    _add_refusals(app, limits)
    app.add_middleware(BoundedBodies, max_bytes=limits.body_bytes)
    app.add_middleware(_OpenToAll, path="/reconcile")
    app.add_middleware(SafeHeaders)
    app.add_middleware(CountRequests, figures=figures)
    return app


class _OpenToAll:
    """ASGI middleware: CORS for every origin below a path, which OpenRefine in a browser needs."""

    def __init__(self, app: ASGIApp, path: str) -> None:
        self._app, self._path = app, path
        self._open = CORSMiddleware(app, allow_origins=["*"], allow_methods=["GET", "POST"], allow_headers=["*"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] == "http" and scope["path"].startswith(self._path)
        await (self._open if is_open else self._app)(scope, receive, send)


def _add_facts(app: FastAPI, served: Served, batcher: Batcher, figures: Figures) -> None:
    @app.get("/health/live", summary="The process answers")
    async def live() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/health/ready", summary="Facts of the model and its index")
    async def ready() -> dict[str, Any]:
        linker = served.linker
        return {
            "status": "ready",
            "system": linker.model.name,
            "entities": len(linker),
            "index_bytes": linker.search.index.num_bytes,
            "experts": list(linker.model.choices),
            "device": str(linker.device),
            "calibrated": linker.calibration is not None,
            "waiting": batcher.num_waiting,
            "opened": served.since,
        }

    @app.get("/metrics", response_class=Response, summary="Figures for Prometheus")
    async def metrics() -> Response:
        return Response(figures.text(), media_type=CONTENT_TYPE_LATEST)


def _add_pages(app: FastAPI, served: Served, pages: Environment, name: str, examples: Sequence[Example]) -> None:
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> str:
        linker = served.linker
        return pages.get_template("index.html").render(
            name=name, entities=len(linker), calibrated=linker.calibration is not None, examples=examples
        )

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    def docs() -> str:
        return pages.get_template("docs.html").render(name=name, schema=app.openapi())

    @app.get("/page/{file}", include_in_schema=False)
    def static(file: str) -> Response:
        if file not in _FILES:
            raise HTTPException(404)
        content = files("dsmip.serving").joinpath(_PAGES, file).read_bytes()
        return Response(content, media_type=_FILES[file])


def _add_refusals(app: FastAPI, limits: Limits) -> None:
    """Errors as a Problem, without what was sent and without anything of the server's."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        return of_error(error, limits)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return refusal(422, first_problem(error.errors()))

    async def missing(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        return refusal(error.status_code, Problem(message=str(error.detail)))

    for kind in (Unusable, Busy, Stopped, ClientDisconnect, Exception):
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, missing)  # of routes that there are none, too
