"""The way of API requests through Django: their own routes, and no middleware at all.

They carry their own credentials, so sessions, cookies, CSRF, messages and the redirect to the sign-in page have no business here,
and each synchronous middleware would cost every request two changes of thread. What the middleware does for pages
(authentication by default) ``api.api`` does for routes; pages cannot be reached through this handler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIHandler, ASGIRequest
from django.core.handlers.exception import convert_exception_to_response

from lmweb.body_limits import Receive, Scope, Send

PREFIXES = ("/v1/", "/api/")


def is_api_path(path: str) -> bool:
    """Return whether this path is one of programs: what is below it and unknown is told in their format, not as a page."""
    return f"{path}/".startswith(PREFIXES)


class ApiRequest(ASGIRequest):
    """A request that resolves to API routes only."""

    urlconf = "api.urls"


class ApiHandler(ASGIHandler):
    """Django's request handler with an empty middleware chain."""

    request_class = ApiRequest
    _get_response_async: Callable[..., Any]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, and stop handling it when its client goes away.

        Django's own version starts a thread per request for synchronous middleware and signal handlers. There are none here:
        database connections are looked after by ``lmweb.db.run_db``.
        """
        if (request := await self._read(scope, receive)) is None:
            return
        answering = asyncio.ensure_future(self._answer(request, send))
        leaving = asyncio.ensure_future(self.listen_for_disconnect(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, leaving):
                task.cancel()
            results = await asyncio.gather(answering, leaving, return_exceptions=True)
            request.close()
        if isinstance(results[0], Exception):
            raise results[0]

    async def _read(self, scope: Scope, receive: Receive) -> ApiRequest | None:
        """Return the request with its whole body, or None if its client went away."""
        try:
            body = await self.read_body(receive)
        except RequestAborted:
            return None
        return self.request_class(scope, body)

    async def _answer(self, request: ApiRequest, send: Send) -> None:
        response = await self.run_get_response(request)
        await self.send_response(response, send)

    def load_middleware(self, is_async: bool = False) -> None:
        """Put the view resolver straight behind the outermost error handler."""
        self._view_middleware: list[Any] = []
        self._template_response_middleware: list[Any] = []
        self._exception_middleware: list[Any] = []
        self._middleware_chain = convert_exception_to_response(self._get_response_async)
