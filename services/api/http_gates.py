"""What a request passes before any route sees it: the token, and the size of its body."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tutelage_client.errors import TutelageError

from services.access import OPEN_PATHS, TokenCheck
from services.api.http_errors import error_body, error_response


class Gates:
    """ASGI middleware: 401 without an accepted token, 413 for a body over `max_bytes`."""

    def __init__(self, app: ASGIApp, tokens: TokenCheck, max_bytes: int) -> None:
        self._app = app
        self._tokens = tokens
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN_PATHS and not self._tokens.allows(headers.get(b"authorization")):
            refusal = TutelageError("UNAUTHENTICATED", "authorization: got no accepted bearer token")
            await error_response(refusal)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_bytes:
            await self._too_large(int(length))(scope, receive, send)
            return
        await self._counting(scope, receive, send)

    async def _counting(self, scope: Scope, receive: Receive, send: Send) -> None:
        """For bodies that do not say their length, or lie about it."""
        got, answered = 0, False

        async def counted_receive() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self._max_bytes:
                raise _TooLargeError
            return message

        async def noted_send(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, counted_receive, noted_send)
        except _TooLargeError:
            if answered:
                raise
            await self._too_large(got)(scope, receive, send)

    def _too_large(self, got: int) -> JSONResponse:
        message = f"body: got {got} bytes, allowed are {self._max_bytes}"
        return JSONResponse(error_body(413, message, "INVALID_ARGUMENT"), 413)


class _TooLargeError(Exception):
    """The body grew over the limit while it was read."""
