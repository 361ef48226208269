"""Limits of a request, and ASGI middleware that enforces its size, duration and number, and adds security headers."""

import asyncio
from contextlib import suppress
from typing import Any, NamedTuple

from fastapi import HTTPException
from fastapi.responses import JSONResponse

MAX_UPLOADS = 64
"""Uploads that are received or classified at the same time."""
UPLOAD_SECONDS = 60.0
"""Time for receiving a request."""
DRAIN_SECONDS = 5.0
"""Time for which the rest of a refused request is read and discarded."""
HEADERS = [
    (b"content-security-policy", b"default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Limits(NamedTuple):
    """Limits of a request: bytes of its body, pixels of an image, and number of files."""

    body: int
    pixels: int
    files: int


class Guard:
    """Refuses a request as soon as it exceeds a limit, and adds `HEADERS` to every response."""

    def __init__(self, app: Any, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self._uploads = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one ASGI connection; only HTTP is guarded."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self.max_bytes)
        if exchange.declared > self.max_bytes:
            await exchange.refuse(exchange.too_large)
        elif not exchange.unread:
            await exchange.run(self.app)
        elif self._uploads >= MAX_UPLOADS:
            busy = f"the server is busy with {MAX_UPLOADS} uploads; try again"
            await exchange.refuse(HTTPException(503, busy, headers={"Retry-After": "1"}))
        else:
            self._uploads += 1
            try:
                await exchange.run(self.app)
            finally:
                self._uploads -= 1


class _Exchange:
    """A request and its response."""

    def __init__(self, scope: Any, receive: Any, send: Any, max_bytes: int) -> None:
        self._scope, self._receive, self._send, self._max_bytes = scope, receive, send, max_bytes
        headers = dict(scope["headers"])
        self.declared = int(headers.get(b"content-length", 0))
        self.unread = self.declared > 0 or b"transfer-encoding" in headers
        self.too_large = HTTPException(413, f"a request may have at most {max_bytes / 1e6:g} MB")
        self._received = 0
        self._is_answered = False
        self._deadline = asyncio.get_running_loop().time() + UPLOAD_SECONDS

    async def run(self, app: Any) -> None:
        try:
            await app(self._scope, self._limited_receive, self._guarded_send)
        except asyncio.CancelledError:
            # uvicorn cancels open requests when its grace period ends.
            if not self._is_answered:
                self.unread = False
                await self.refuse(HTTPException(503, "the server is shutting down"))

    async def refuse(self, refusal: HTTPException) -> None:
        response = JSONResponse({"detail": refusal.detail}, refusal.status_code, refusal.headers)
        await response(self._scope, self._receive, self._guarded_send)

    async def _limited_receive(self) -> Any:
        if not self.unread:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(408, f"the upload took longer than {UPLOAD_SECONDS:g} s") from error
        self._received += len(message.get("body", b""))
        self.unread = message.get("more_body", False)
        if self._received > self._max_bytes:
            raise self.too_large
        return message

    async def _guarded_send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._is_answered = True
            closing = [(b"connection", b"close")] if self.unread else []
            message = {**message, "headers": [*message["headers"], *HEADERS, *closing]}
        elif self.unread and not message.get("more_body"):
            # Closing a connection with unread bytes resets it, and the client may lose the response.
            await self._send({**message, "more_body": True})
            with suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    while self.unread:
                        self.unread = (await self._receive()).get("more_body", False)
            message = {"type": "http.response.body"}
        await self._send(message)
