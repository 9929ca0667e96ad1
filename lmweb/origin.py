"""Which web pages may open a websocket with a person's session."""

from __future__ import annotations

import logging
from urllib.parse import urlsplit

from channels.security.websocket import WebsocketDenier
from django.conf import settings

from lmweb.body_limits import Application, Receive, Scope, Send

logger = logging.getLogger(__name__)


class SameOrigin:
    """ASGI wrapper for ``websocket``: lets in the server's own pages only.

    Browsers send cookies with websockets from any page and do not apply CORS to them, so the page's origin has to be the address
    that the socket was opened to, or one of ``LMWEB_TRUSTED_ORIGINS``. A client without an ``Origin`` is no browser and has no
    session to use: it is refused too.
    """

    def __init__(self, application: Application) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the connection on, or close it before it is accepted."""
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if is_own_origin(origin, host):
            await self._application(scope, receive, send)
            return
        logger.warning("refused a websocket from the origin %r to the host %r", origin[:200], host[:200])
        await WebsocketDenier()(scope, receive, send)


def is_own_origin(origin: str, host: str) -> bool:
    """Return whether a page of ``origin`` (lower case, with scheme) belongs to this server, which the client calls ``host``."""
    if origin in {trusted.lower().rstrip("/") for trusted in settings.CSRF_TRUSTED_ORIGINS}:
        return True
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return bool(host) and parts.scheme in {"http", "https"} and parts.netloc == host
