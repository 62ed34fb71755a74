"""Routes of entities: by id, by name, and their pictures."""

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import Response

from dsmip.errors import UserError
from dsmip.linking.knowledge_base import KnowledgeBase
from dsmip.serving.schemas import EntityOut, image_address
from dsmip.serving.served import Served

_FOUND_AT_MOST = 50
_CACHE = {"Cache-Control": "max-age=300"}


def entity_router(served: Served) -> APIRouter:
    """The routes, over the linker of the moment."""
    router = APIRouter(prefix="/entities")

    @router.get("", summary="Entities whose name holds a text")
    def find(
        query: Annotated[str, Query(min_length=1, max_length=200)],
        limit: Annotated[int, Query(ge=1, le=_FOUND_AT_MOST)] = 10,
    ) -> list[EntityOut]:
        kb = served.linker.knowledge_base
        return [entity_out(kb, row) for row in kb.find(query, limit)]

    @router.get("/{entity_id:path}/image", response_class=Response, summary="Its picture (JPEG)")
    def image(entity_id: str) -> Response:
        kb = served.linker.knowledge_base
        content = kb.image(row_of(kb, entity_id))
        if content is None:
            raise HTTPException(404, "the entity has no picture")
        return Response(content, media_type="image/jpeg", headers=_CACHE)

    @router.get("/{entity_id:path}", summary="One entity")
    def entity(entity_id: str) -> EntityOut:
        kb = served.linker.knowledge_base
        return entity_out(kb, row_of(kb, entity_id))

    return router


def row_of(kb: KnowledgeBase, entity_id: str) -> int:
    """The row of an id; 404 where there is none."""
    try:
        return kb.row_of(entity_id)
    except UserError:
        raise HTTPException(404, "no such entity") from None


def entity_out(kb: KnowledgeBase, row: int) -> EntityOut:
    (text,) = kb.texts([row])
    return EntityOut(**text, image=image_address(text["entity_id"]))
