"""The way of API requests through Django: their own routes, and no middleware at all.

They carry their own credentials, so sessions, cookies, CSRF, messages and the redirect to the sign-in page have no business here,
and each synchronous middleware would cost every request two changes of thread. What the middleware does for pages
(authentication by default) ``api.api`` does for routes; pages cannot be reached through this handler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.core.handlers.asgi import ASGIHandler, ASGIRequest
from django.core.handlers.exception import convert_exception_to_response

PREFIXES = ("/v1/",)


def is_api_path(path: str) -> bool:
    """Return whether this path belongs to an API dialect."""
    return path.startswith(PREFIXES)


class ApiRequest(ASGIRequest):
    """A request that resolves to API routes only."""

    urlconf = "api.urls"


class ApiHandler(ASGIHandler):
    """Django's request handler with an empty middleware chain."""

    request_class = ApiRequest
    _get_response_async: Callable[..., Any]

    def load_middleware(self, is_async: bool = False) -> None:
        """Put the view resolver straight behind the outermost error handler."""
        self._view_middleware: list[Any] = []
        self._template_response_middleware: list[Any] = []
        self._exception_middleware: list[Any] = []
        self._middleware_chain = convert_exception_to_response(self._get_response_async)
