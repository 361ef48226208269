"""Between the server and the app: requests that are too large are refused, and responses say what a page may do."""

import asyncio
import json
from contextlib import suppress
from typing import Any

from fastapi import HTTPException

PATIENCE = 5.0
"""Seconds for which the rest of a refused request is read and thrown away."""
HEADERS = [
    (b"content-security-policy", b"default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """ASGI middleware that refuses a body as soon as it is known to be too large, and adds `HEADERS`."""

    def __init__(self, app: Any, most: int) -> None:
        """
        Args:
            app: to guard.
            most: bytes of a request.
        """
        self.app = app
        self.most = most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request; what is not HTTP passes."""
        if scope["type"] == "http":
            await _Exchange(self.most, scope, receive, send).run(self.app)
        else:
            await self.app(scope, receive, send)


class _Exchange:
    """A request and its response."""

    def __init__(self, most: int, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        self._declared = headers.get(b"content-length", b"0")
        self._unread = self._declared != b"0" or b"transfer-encoding" in headers
        self._most, self._received = most, 0
        self._scope, self._receive, self._send = scope, receive, send

    async def run(self, app: Any) -> None:
        if self._declared.isdigit() and int(self._declared) <= self._most:
            await app(self._scope, self._receive_at_most, self._send_on)
            return
        content = json.dumps({"detail": self._refusal().detail}).encode()
        kind = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await self._send_on({"type": "http.response.start", "status": 413, "headers": kind})
        await self._send_on({"type": "http.response.body", "body": content})

    def _refusal(self) -> HTTPException:
        return HTTPException(413, f"a request may hold {self._most / 1e6:g} MB")

    async def _receive_at_most(self) -> Any:
        message = await self._receive_next()
        if self._received > self._most:
            raise self._refusal()
        return message

    async def _receive_next(self) -> Any:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        self._unread = message.get("more_body", False)
        return message

    async def _send_on(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            closing = [(b"connection", b"close")] if self._unread else []
            message = {**message, "headers": [*message["headers"], *HEADERS, *closing]}
        elif self._unread and not message.get("more_body"):
            # To close on bytes that nobody has read resets the connection, and the answer may be lost with it.
            await self._send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    while self._unread:
                        await self._receive_next()
            message = {"type": "http.response.body"}
        await self._send(message)
