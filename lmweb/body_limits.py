"""How much a client may send, checked before Django sees a request.

``RequestLimits`` wraps the ASGI application and knows the limit of each path. Daphne, however, writes a whole body to disk before
it calls the application, so ``lmweb.daphne_limits`` makes it stop at the largest limit of all, and after a bounded time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmweb.errors import InvalidRequest, LmwebError, PayloadTooLarge

MIB = 1024 * 1024
DEFAULT_MAX_BYTES = 32 * MIB
BODY_SECONDS = 600.0

Scope = dict[str, Any]
Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
#: Returns the content type and the body of an error on a path.
Render = Callable[[str, LmwebError], tuple[str, bytes]]


@dataclass(frozen=True)
class Limit:
    """The largest body, in bytes, of the paths that start with ``prefix``."""

    prefix: str
    max_bytes: int


class RequestTimeout(InvalidRequest):
    """The body did not arrive in time."""

    code, status = "request_timeout", 408


def plain_text(path: str, error: LmwebError) -> tuple[str, bytes]:
    """Render an error as its message."""
    return "text/plain; charset=utf-8", error.message.encode()


class RequestLimits:
    """ASGI wrapper for ``http``: refuses bodies that are too large or too slow, and paths with NUL characters.

    It also forgets the prefix that a client can make Daphne take off the path: which handler gets a request is decided by the path.
    """

    def __init__(self, application: Application, limits: tuple[Limit, ...] = (), render: Render = plain_text) -> None:
        self._application = application
        self._limits = limits
        self._render = render

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        path: str = scope["path"]
        limit = self._limit(path)
        error = _fault(scope, limit)
        if error is None:
            body = _BoundedBody(receive, limit)
            await self._application({**scope, "root_path": ""}, body.receive, send)
            error = body.error
        if error is not None:
            await self._refuse(path, error, send)

    def _limit(self, path: str) -> int:
        return next((limit.max_bytes for limit in self._limits if path.startswith(limit.prefix)), DEFAULT_MAX_BYTES)

    async def _refuse(self, path: str, error: LmwebError, send: Send) -> None:
        content_type, body = self._render(path, error)
        headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _BoundedBody:
    """Counts and times a body. To the application a body over the limit looks like a client that went away; ``error`` tells why."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self.error: LmwebError | None = None
        self._receive = receive
        self._max_bytes = max_bytes
        self._size = 0
        self._deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            return self._give_up(too_slow())
        self._size += len(message.get("body", b""))
        if self._size > self._max_bytes:
            return self._give_up(too_large(self._max_bytes))
        self._complete = not message.get("more_body", False)
        return message

    def _give_up(self, error: LmwebError) -> Message:
        self.error = error
        return {"type": "http.disconnect"}


def too_large(max_bytes: int) -> PayloadTooLarge:
    """Return the error for a body over a limit."""
    return PayloadTooLarge(f"The request body is larger than {max_bytes // MIB} MiB.", details={"max_bytes": max_bytes})


def too_slow() -> RequestTimeout:
    """Return the error for a body that takes too long."""
    return RequestTimeout(f"The request body did not arrive within {BODY_SECONDS:.0f} seconds.")


def _fault(scope: Scope, max_bytes: int) -> LmwebError | None:
    """Return what is wrong with a request before its body is read."""
    if "\x00" in scope["path"] or b"%00" in scope.get("query_string", b""):
        return InvalidRequest("The address contains a NUL character.")
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value[:20]) > max_bytes:
            return too_large(max_bytes)
    return None
