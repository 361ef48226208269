"""Between the server and the app: refuses uploads that are too large, too slow or too many, and adds headers."""

import asyncio
import json
from contextlib import suppress
from typing import Any

from fastapi import HTTPException

AT_ONCE = 64
"""Uploads that are taken in or worked on at the same time."""
SILENCE = 10.0
"""Seconds for which an upload may send nothing."""
PACE, BEHIND = 10_000, 3.0
"""Where all places are taken, an upload gives way that is slower than so many bytes a second, by so many seconds."""
PATIENCE = 5.0
"""Seconds for which the rest of a refused request is read and thrown away."""
HEADERS = [
    (b"content-security-policy", b"default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """ASGI middleware that refuses a body as soon as it is known not to be taken in, and adds `HEADERS`."""

    def __init__(self, app: Any, most: int) -> None:
        """
        Args:
            app: to guard.
            most: bytes of a request.
        """
        self.app = app
        self.most = most
        self._uploads: set[_Exchange] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request; what is not HTTP passes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(self.most, scope, receive, send)
        if exchange.is_too_large:
            await exchange.refuse(exchange.too_large())
        elif not exchange.has_body:
            await exchange.run(self.app)
        elif not self._make_room():
            busy = f"{AT_ONCE} uploads are in hand; try again"
            await exchange.refuse(HTTPException(503, busy, headers={"Retry-After": "1"}))
        else:
            self._uploads.add(exchange)
            try:
                await exchange.run(self.app)
            finally:
                self._uploads.discard(exchange)

    def _make_room(self) -> bool:
        """Whether one more upload may come in; that which is most behind has to give way to it."""
        if len(self._uploads) < AT_ONCE:
            return True
        slowest = max(self._uploads, key=_Exchange.seconds_behind)
        if slowest.seconds_behind() < BEHIND:
            return False
        slowest.give_way()
        self._uploads.discard(slowest)
        return True


class _Exchange:
    """A request and its response."""

    def __init__(self, most: int, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        self.is_too_large = not (declared.isdigit() and int(declared) <= most)
        self.has_body = declared != b"0" or b"transfer-encoding" in headers
        self._unread = self.has_body
        self._most, self._received = most, 0
        self._is_answered, self._patience = False, PATIENCE
        self._begun = asyncio.get_running_loop().time()
        self._waiting: asyncio.Timeout | None = None
        self._scope, self._receive, self._send = scope, receive, send

    async def run(self, app: Any) -> None:
        try:
            await app(self._scope, self._receive_part, self._send_on)
        except asyncio.CancelledError:
            # The server ends, and has waited for this long enough.
            if not self._is_answered:
                self._patience = 0.0
                await self.refuse(HTTPException(503, "the server is being stopped"))

    async def refuse(self, refusal: HTTPException) -> None:
        content = json.dumps({"detail": refusal.detail}).encode()
        kind = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        more = [(name.lower().encode(), value.encode()) for name, value in (refusal.headers or {}).items()]
        await self._send_on({"type": "http.response.start", "status": refusal.status_code, "headers": [*kind, *more]})
        await self._send_on({"type": "http.response.body", "body": content})

    def too_large(self) -> HTTPException:
        return HTTPException(413, f"a request may hold {self._most / 1e6:g} MB")

    def seconds_behind(self) -> float:
        """How much later than at `PACE` the bytes have come that are here, if there are more to come."""
        if self._waiting is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._begun - self._received / PACE

    def give_way(self) -> None:
        """Ends the waiting for more bytes."""
        assert self._waiting is not None
        self._waiting.reschedule(asyncio.get_running_loop().time())

    async def _receive_part(self) -> Any:
        try:
            message = await self._receive_next()
        except TimeoutError as error:
            raise HTTPException(408, "the upload came too slowly") from error
        if self._received > self._most:
            raise self.too_large()
        return message

    async def _receive_next(self) -> Any:
        if not self._unread:
            return await self._receive()
        try:
            async with asyncio.timeout(SILENCE) as self._waiting:
                message = await self._receive()
        finally:
            self._waiting = None
        self._received += len(message.get("body", b""))
        self._unread = message.get("more_body", False)
        return message

    async def _send_on(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._is_answered = True
            closing = [(b"connection", b"close")] if self._unread else []
            message = {**message, "headers": [*message["headers"], *HEADERS, *closing]}
        elif self._unread and not message.get("more_body"):
            # To close on bytes that nobody has read resets the connection, and the answer may be lost with it.
            await self._send({**message, "more_body": True})
            with suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(self._patience):
                    while self._unread:
                        await self._receive_next()
            message = {"type": "http.response.body"}
        await self._send(message)
