"""Static files, answered by the ASGI entry point itself: a page asks for two dozen, and Django's way to each of them is a long one."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from whitenoise.middleware import WhiteNoiseMiddleware

from lmweb.body_limits import Application, Receive, Scope, Send
from lmweb.middleware import HEADERS


class StaticFiles:
    """ASGI wrapper for ``http``: answers with the file that a path names, and passes on every other request.

    WhiteNoise knows the files, their compressed variants and what may be cached; here its answers become ASGI messages. The files are
    small and in the system's cache, so that reading one takes less time than handing it to a thread would.
    """

    def __init__(self, application: Application) -> None:
        self._application = application
        self._files = WhiteNoiseMiddleware()
        self._headers = [(name.lower().encode(), value.encode()) for name, value in headers().items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        file = self._find(scope["path"])
        if file is None:
            await self._application(scope, receive, send)
            return
        answer = file.get_response(scope["method"], _environ(scope))
        found = [(name.lower().encode(), value.encode()) for name, value in answer.headers]
        await send({"type": "http.response.start", "status": int(answer.status), "headers": found + self._headers})
        await send({"type": "http.response.body", "body": _content(answer.file)})

    def _find(self, path: str) -> Any:
        if not path.startswith(self._files.static_prefix):
            return None
        return self._files.find_file(path) if self._files.autorefresh else self._files.files.get(path)


def headers() -> dict[str, str]:
    """Return the headers that Django's middleware adds to every answer."""
    return HEADERS | {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": settings.SECURE_REFERRER_POLICY,
        "Cross-Origin-Opener-Policy": settings.SECURE_CROSS_ORIGIN_OPENER_POLICY,
    }


def _environ(scope: Scope) -> dict[str, str]:
    """Return the headers of a request as WSGI names them."""
    return {f"HTTP_{name.decode('latin-1').upper().replace('-', '_')}": value.decode("latin-1") for name, value in scope["headers"]}


def _content(file: Any) -> bytes:
    """Read a file, or the range of it that was asked for, to its end, and close it."""
    if file is None:
        return b""
    with file:
        content: bytes = file.read()
    return content
