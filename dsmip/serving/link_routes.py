"""The route `POST /link`: one mention or many, as JSON with base64 pictures, or as a form with a file."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from dsmip.linking.links import Links
from dsmip.linking.mentions import Unreadable
from dsmip.serving.addresses import Fetcher, too_large
from dsmip.serving.batcher import Batcher, Busy, Given, Stopped
from dsmip.serving.limits import Limits
from dsmip.serving.observed import GONE
from dsmip.serving.schemas import (
    LinkRequest,
    LinkResponse,
    MentionIn,
    Problem,
    Unusable,
    first_problem,
    json_object,
    links_out,
)
from dsmip.serving.served import Served

_SHARED = ("top", "explain", "min_confidence")
_REFUSALS: dict[int | str, dict[str, Any]] = {
    413: {"model": Problem, "description": "The body or a picture is too large, or mentions are too many."},
    422: {"model": Problem, "description": "A field cannot be used."},
    429: {"model": Problem, "description": "Too many wait; `Retry-After` says how long."},
    503: {"model": Problem, "description": "The service ends."},
}
_FORM = {
    "type": "object",
    "required": ["word"],
    "properties": {
        "word": {"type": "string"},
        "sentence": {"type": "string"},
        "desc": {"type": "string"},
        "image": {"type": "string", "format": "binary"},
        "top": {"type": "integer"},
        "explain": {"type": "boolean"},
        "min_confidence": {"type": "number"},
    },
}


def link_router(served: Served, batcher: Batcher, limits: Limits) -> APIRouter:
    """The route, over what links and within what bounds."""
    router = APIRouter()
    one = MentionIn.model_json_schema()
    one["properties"] |= {name: LinkRequest.model_json_schema()["properties"][name] for name in _SHARED}
    bodies = {
        "application/json": {
            "schema": {"anyOf": [one, LinkRequest.model_json_schema(ref_template="#/components/schemas/{model}")]}
        },
        "multipart/form-data": {"schema": _FORM},
    }

    @router.post(
        "/link",
        response_model=LinkResponse,
        responses=_REFUSALS,
        summary="Links one mention, or many",
        openapi_extra={"requestBody": {"required": True, "content": bodies}},
    )
    async def link(request: Request) -> Any:
        asked, images = await _read(request)
        mentions = await run_in_threadpool(_checked, asked, images, limits, served)  # it may fetch pictures
        found = await linked(request, batcher, mentions, asked.top, explain=asked.explain)
        if len(found) == 1 and found[0].reason:
            field, _, message = found[0].reason.partition(": ")
            raise Unusable(field, message)
        answers = zip(asked.mentions, found, strict=True)
        return LinkResponse(
            mentions=[
                links_out(each.id, each.word, links, asked.min_confidence, explain=asked.explain)
                for each, links in answers
            ]
        )

    return router


async def linked(
    request: Request, batcher: Batcher, mentions: Sequence[Given], top: int, *, explain: bool
) -> list[Links]:
    """Waits for the links of a request whose body is read.

    Raises:
        ClientDisconnect: The client is gone; its mentions are taken out of the queue.
    """
    links = batcher.submit(mentions, top, explain=explain)
    answer, gone = asyncio.wrap_future(links), asyncio.ensure_future(_hung_up(request))
    first: list[asyncio.Future[Any]] = [answer, gone]
    try:
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        gone.cancel()
        answer.cancel()  # and with it what waits in the queue; done, it stays as it is


async def _hung_up(request: Request) -> None:
    """Ends when the client has ended the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request) -> tuple[LinkRequest, dict[int, bytes]]:
    """What is asked for, and pictures that came as files, by number of the mention."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=8) as form:
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
            files = {name: await value.read() for name, value in form.items() if isinstance(value, UploadFile)}
        if unknown := files.keys() - {"image"}:
            raise Unusable(min(unknown), "is no field for a file; the picture is `image`")
        given = {name: value for name, value in fields.items() if value or name == "word"}
        return _parsed(given), {0: files["image"]} if files.get("image") else {}
    if kind != "application/json":
        raise Unusable("content-type", "send application/json or multipart/form-data")
    return _parsed(json_object(await request.body(), "body")), {}


def _parsed(given: dict[str, Any]) -> LinkRequest:
    """A single mention is a list of one."""
    single = "mentions" not in given
    if single:
        shared = {name: given[name] for name in _SHARED if name in given}
        given = {"mentions": [{name: value for name, value in given.items() if name not in _SHARED}], **shared}
    try:
        return LinkRequest.model_validate(given)
    except ValidationError as error:
        problem = first_problem(error.errors(include_url=False, include_input=False, include_context=False))
        field = (problem.field or "").removeprefix("mentions.0." if single else "")
        raise Unusable(field, problem.message.rpartition(": ")[2]) from None


def _checked(asked: LinkRequest, images: Mapping[int, bytes], limits: Limits, served: Served) -> list[Given]:
    """Mentions for the linker, within the limits; of many, one that cannot be used has its reason instead."""
    if len(asked.mentions) > limits.mentions:
        raise Unusable("mentions", f"a request may have {limits.mentions} mentions", status=413)
    if asked.top > limits.top:
        raise Unusable("top", f"a mention may get {limits.top} entities")
    if asked.min_confidence is not None and served.linker.calibration is None:
        raise Unusable("min_confidence", "the served model is not calibrated; it has no confidences")
    fetcher = Fetcher(limits)
    mentions = list[Given]()
    for number, each in enumerate(asked.mentions):
        try:
            mentions.append(_within_limits(each, images.get(number), fetcher))
        except Unusable as error:
            if len(asked.mentions) == 1:
                raise
            mentions.append(Unreadable(f"{error.field}: {error.message}"))
    return mentions


def _within_limits(each: MentionIn, image: bytes | None, fetcher: Fetcher) -> dict[str, Any]:
    texts, limits = {"word": each.word, "sentence": each.sentence, "desc": each.desc}, fetcher.limits
    for name, text in texts.items():
        if len(text) > limits.text_length:
            raise Unusable(name, f"a text may have {limits.text_length} characters")
    if image is not None and len(image) > limits.image_bytes:
        raise too_large("image", limits)
    if image is None and each.image:
        image = fetcher.decoded(each.image, "image")
    return {**texts, "image": image}


def refusal(status: int, problem: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An answer that says why there is none."""
    return JSONResponse(problem.model_dump(), status, headers=dict(headers or {}))


def of_error(error: Exception, limits: Limits) -> JSONResponse:
    """The answer to a request that was refused."""
    if isinstance(error, ClientDisconnect):
        return refusal(GONE, Problem(message="nobody is there any more to be answered"))
    if isinstance(error, Unusable):
        return refusal(error.status, Problem(message=error.message, field=error.field or None))
    if isinstance(error, Busy):
        return refusal(
            429, Problem(message="too many mentions wait; try again"), {"Retry-After": str(limits.retry_after)}
        )
    if isinstance(error, Stopped):
        return refusal(503, Problem(message="the service ends"))
    return refusal(500, Problem(message="the mention could not be linked"))
