"""The reconciliation service: the W3C protocol 0.2 that OpenRefine speaks, and `/match` of the 1.0 draft beside it.

A query's text is the mention's word; its sentence and picture are the properties `sentence` and `image`. Results have
what each expert or unit of the system says as `features`. Source: https://www.w3.org/community/reports/reconciliation/.
"""

import json
from collections.abc import Mapping
from itertools import accumulate
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import Environment
from starlette.concurrency import run_in_threadpool

from dsmip.linking.links import Links
from dsmip.linking.mentions import Unreadable
from dsmip.serving.addresses import Fetcher
from dsmip.serving.batcher import Batcher, Given
from dsmip.serving.entity_routes import row_of
from dsmip.serving.limits import Limits
from dsmip.serving.link_routes import linked
from dsmip.serving.schemas import Unusable, image_address, json_object
from dsmip.serving.served import Served

TYPE = {"id": "entity", "name": "Entity"}
PROPERTIES = ({"id": "sentence", "name": "Sentence"}, {"id": "image", "name": "Image"})
EXTENSIONS = ({"id": "name", "name": "Name"}, {"id": "attributes", "name": "Attributes"})
DEFAULT_LIMIT = 5
SURE = 0.5  # of a calibrated model; OpenRefine then takes the link without being asked


def reconciliation_router(served: Served, batcher: Batcher, limits: Limits, pages: Environment, name: str) -> APIRouter:
    """All routes below `/reconcile`."""
    router = APIRouter(prefix="/reconcile")

    async def answers(request: Request, queries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        if len(queries) > limits.mentions:
            raise Unusable("queries", f"a request may have {limits.mentions} queries", status=413)
        top = max(limit_of(query, f"{key}.", limits) for key, query in queries.items())
        mentions = await run_in_threadpool(mentions_of, queries, limits)  # it may fetch pictures
        found = await linked(request, batcher, mentions, top, explain=True)
        return {
            key: results(links)[: limit_of(query, f"{key}.", limits)]
            for (key, query), links in zip(queries.items(), found, strict=True)
        }

    async def reconcile(request: Request, queries: str) -> JSONResponse:
        asked = json_object(queries, "queries")
        if not asked or not all(isinstance(each, dict) for each in asked.values()):
            raise Unusable("queries", "is a JSON object of queries by key")
        return JSONResponse({key: {"result": found} for key, found in (await answers(request, asked)).items()})

    async def asked(request: Request, queries: str | None, extend: str | None) -> JSONResponse | None:
        if queries is not None:
            return await reconcile(request, queries)
        if extend is not None:
            return JSONResponse(await run_in_threadpool(extended, served, json_object(extend, "extend")))
        return None

    @router.get("", summary="The manifest, or what a POST of the same answers")
    async def get(request: Request, queries: str | None = None, extend: str | None = None) -> JSONResponse:
        return await asked(request, queries, extend) or JSONResponse(manifest(name, str(request.base_url)))

    @router.post("", summary="The answers to `queries`, or the values that `extend` asks for")
    async def post(
        request: Request, queries: Annotated[str | None, Form()] = None, extend: Annotated[str | None, Form()] = None
    ) -> JSONResponse:
        if (answer := await asked(request, queries, extend)) is None:
            raise Unusable("queries", "is missing")
        return answer

    @router.post("/match", summary="The answers to a list of queries (1.0 draft)")
    async def match(request: Request) -> JSONResponse:
        body = json_object(await request.body(), "body")
        asked = body.get("queries")
        if not isinstance(asked, list) or not asked or not all(isinstance(each, dict) for each in asked):
            raise Unusable("queries", "is a list of queries")
        queries = {f"queries.{number}": of_conditions(each, number) for number, each in enumerate(asked)}
        found = await answers(request, queries)
        return JSONResponse({"results": [{"candidates": each} for each in found.values()]})

    _add_entities(router, served, pages)
    return router


def _add_entities(router: APIRouter, served: Served, pages: Environment) -> None:
    """What a client asks of entities that it has: suggestions, further values, and a card."""

    @router.get("/suggest/entity", summary="Entities whose name holds a text")
    def suggest(prefix: Annotated[str, Query(max_length=200)] = "", cursor: int = 0) -> JSONResponse:
        kb = served.linker.knowledge_base
        rows = kb.find(prefix, max(cursor, 0) + 10)[max(cursor, 0) :] if prefix else []
        found = [{"id": each["entity_id"], "name": each["name"], "notable": [TYPE]} for each in kb.texts(rows)]
        return JSONResponse({"result": found})

    @router.get("/suggest/property", summary="Properties that a query may have")
    def suggest_property(prefix: str = "") -> JSONResponse:
        return JSONResponse({"result": [each for each in PROPERTIES if prefix.lower() in each["name"].lower()]})

    @router.get("/extend/propose", summary="What entities may be extended by")
    def propose(type: str = "") -> JSONResponse:
        return JSONResponse({"type": type, "properties": list(EXTENSIONS)})

    @router.get("/preview", response_class=HTMLResponse, summary="A card of an entity")
    def preview(request: Request, id: str) -> HTMLResponse:
        kb = served.linker.knowledge_base
        (text,) = kb.texts([row_of(kb, id)])
        card = pages.get_template("preview.html").render(
            **text, image=image_address(id).removeprefix("/"), base=str(request.base_url)
        )
        framed = {"content-security-policy": "default-src 'none'; img-src 'self'; style-src 'self'"}
        return HTMLResponse(card, headers=framed)  # OpenRefine shows it in a frame


def manifest(name: str, base: str) -> dict[str, Any]:
    """What the service is and where its parts are; `base` ends with a slash."""
    own = f"{base}reconcile"
    return {
        "versions": ["0.2", "1.0-draft"],
        "name": name,
        "identifierSpace": f"{base}entities/",
        "schemaSpace": f"{base}schema/",
        "defaultTypes": [TYPE],
        "view": {"url": base + "entities/{{id}}"},
        "preview": {"url": own + "/preview?id={{id}}", "width": 360, "height": 160},
        "suggest": {
            "entity": {"service_url": own, "service_path": "/suggest/entity"},
            "property": {"service_url": own, "service_path": "/suggest/property"},
        },
        "extend": {
            "propose_properties": {"service_url": own, "service_path": "/extend/propose"},
            "property_settings": [],
        },
        "batchSize": 32,
    }


def mentions_of(queries: Mapping[str, Mapping[str, Any]], limits: Limits) -> list[Given]:
    """Queries by key as mentions; of many, one that cannot be used has its reason instead, and will have no result.

    Raises:
        Unusable: The only one cannot be used.
    """
    fetcher, mentions = Fetcher(limits), list[Given]()
    for key, query in queries.items():
        try:
            mentions.append(mention_of(query, f"{key}.", fetcher))
        except Unusable as error:
            if len(queries) == 1:
                raise
            mentions.append(Unreadable(f"{error.field}: {error.message}"))
    return mentions


def mention_of(query: Mapping[str, Any], before: str, fetcher: Fetcher) -> dict[str, Any]:
    """A query as a mention.

    Raises:
        Unusable: A value of it cannot be used.
    """
    word = query.get("query")
    if not isinstance(word, str) or not word.strip():
        raise Unusable(f"{before}query", "is the text that is to be linked")
    given: dict[str, Any] = {"word": word, "sentence": "", "image": None}
    properties = query.get("properties") or []
    if not isinstance(properties, list):
        raise Unusable(f"{before}properties", "is a list of {pid, v}")
    for each in properties:
        pid, value = (each.get("pid"), each.get("v")) if isinstance(each, dict) else (None, None)
        if pid not in ("sentence", "image"):
            continue  # a client may send columns that mean nothing here
        value = value_of_cell(value)
        if pid == "sentence" and isinstance(value, bool | int | float):
            value = json.dumps(value)  # as the client writes it
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise Unusable(f"{before}{pid}", "is a text")
        given[pid] = fetcher.decoded(value, f"{before}image") if pid == "image" else value
    for name in ("word", "sentence"):
        if len(given[name]) > fetcher.limits.text_length:
            raise Unusable(f"{before}{name}", f"a text may have {fetcher.limits.text_length} characters")
    return given


def value_of_cell(value: Any) -> Any:
    """What a property's value says: of a list the first value that is not empty, of a reconciled cell its name."""
    for each in value if isinstance(value, list) else [value]:
        said = each.get("name", each) if isinstance(each, dict) else each
        if said is not None and said != "":
            return said
    return None


def limit_of(query: Mapping[str, Any], before: str, limits: Limits) -> int:
    """How many results a query gets."""
    limit = query.get("limit") or DEFAULT_LIMIT
    if type(limit) is not int or limit < 1:
        raise Unusable(f"{before}limit", "is a number from 1 on")
    return min(limit, limits.top)


def of_conditions(query: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A query of the 1.0 draft in the form of 0.2."""
    conditions = query.get("conditions")
    if not isinstance(conditions, list) or not all(isinstance(each, dict) for each in conditions):
        raise Unusable(f"queries.{number}.conditions", "is a list of conditions")
    names = [each.get("propertyValue") for each in conditions if each.get("matchType") == "name"]
    properties = [
        {"pid": each.get("propertyId"), "v": each.get("propertyValue")}
        for each in conditions
        if each.get("matchType") == "property"
    ]
    return {"query": names[0] if names else None, "properties": properties, "limit": query.get("limit")}


def results(links: Links) -> list[dict[str, Any]]:
    """Entities for one query; `match` says that the first one may be taken."""
    found = []
    for number, (link, score) in enumerate(zip(links, falling_scores(links), strict=True)):
        sure = not number and not links.is_nil and (link.confidence or 0) >= SURE  # there is none where not calibrated
        features = [{"id": "score", "value": link.score}]
        if link.confidence is not None:
            features.append({"id": "confidence", "value": link.confidence})
        features += [{"id": name, "value": scores[number]} for name, scores in links.parts.items()]
        found.append(
            {
                "id": link.entity_id,
                "name": link.name,
                "description": link.attributes,
                "type": [TYPE],
                "score": score,
                "match": sure,
                "features": features,
            }
        )
    return found


def falling_scores(links: Links) -> list[float]:
    """Scores on one scale, in the order of the links: clients sort by them and may take the first one alone.

    Of a calibrated model 100 * confidence, and of the others that over their rank. Only the best link has a
    probability: those of the others say which comes first and no more. They do not go by the model's own scores, which
    two experts, or a re-ranker and its first stage, give on scales of their own.

    Of other models their own scores; one that is above that before it (the first stage's) becomes as low as that.
    """
    confidence = links[0].confidence if links else None
    if confidence is None:
        return list(accumulate((link.score for link in links), min))
    return [100 * confidence / rank for rank in range(1, len(links) + 1)]


def extended(served: Served, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Names and attributes of entities by id; nothing of ids that are not there.

    Raises:
        Unusable: It is no request for an extension.
    """
    ids, properties = asked.get("ids"), asked.get("properties")
    if not isinstance(ids, list) or not isinstance(properties, list):
        raise Unusable("extend", "has ids and properties, a list each")
    known = {each["id"]: each for each in EXTENSIONS}
    wanted = [each["id"] for each in properties if isinstance(each, dict) and each.get("id") in known]
    kb = served.linker.knowledge_base
    rows: dict[str, Any] = {}
    for entity_id in map(str, ids):
        text = kb.texts([row])[0] if (row := kb.find_id(entity_id)) is not None else None
        rows[entity_id] = {name: [{"str": text[name]}] if text and text[name] else [] for name in wanted}
    return {"meta": [known[name] for name in wanted], "rows": rows}
