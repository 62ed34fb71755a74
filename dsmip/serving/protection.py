"""Middleware that bounds bodies and sets the headers a browser needs to be safe with strangers' texts."""

from contextlib import suppress

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Scripts, styles and pictures come from this service alone; nobody may frame it. Pictures of a form are blob: or data:.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class _TooLarge(Exception):
    pass


class BoundedBodies:
    """ASGI middleware: 413 for bodies above `max_bytes`, read no further than that, announced or not."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        received, is_refused = 0, False

        async def counting() -> Message:
            nonlocal received, is_refused
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                is_refused = True
                raise _TooLarge
            return message

        async def unless_refused(message: Message) -> None:
            if not is_refused:  # a reader of forms answers every error itself, with another status
                await send(message)

        with suppress(_TooLarge):
            await self._app(scope, counting, unless_refused)
        if is_refused:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"a request may have {self._max_bytes} bytes; send fewer mentions, or smaller pictures"
        await JSONResponse({"message": message, "field": None}, 413)(scope, receive, send)


class SafeHeaders:
    """ASGI middleware: HEADERS on every answer that has not set them itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                added = [
                    (name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in present
                ]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)
