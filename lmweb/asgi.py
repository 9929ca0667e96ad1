"""The ASGI entry point of the web process (Daphne): which requests go where, and what every request has to pass first."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lmweb.settings")

from django.core.asgi import get_asgi_application  # needs the variable above

django_application = get_asgi_application()

from channels.auth import AuthMiddlewareStack  # needs the applications to be set up
from channels.routing import ProtocolTypeRouter, URLRouter

from api.handler import ApiHandler, is_api_path
from api.render import BODY_LIMITS, render_refusal
from lmweb.body_limits import Receive, RequestLimits, Scope, Send
from lmweb.origin import SameOrigin
from lmweb.routing import websocket_urlpatterns
from lmweb.static_files import StaticFiles

api_application = ApiHandler()


async def http_application(scope: Scope, receive: Receive, send: Send) -> None:
    """Programs and people: each path has exactly one handler."""
    handler = api_application if is_api_path(scope["path"]) else django_application
    await handler(scope, receive, send)


application = ProtocolTypeRouter(
    {
        "http": RequestLimits(StaticFiles(http_application), BODY_LIMITS, render_refusal),
        "websocket": SameOrigin(AuthMiddlewareStack(URLRouter(websocket_urlpatterns))),
    }
)

if "daphne.server" in sys.modules:
    from lmweb import daphne_limits

    daphne_limits.install(render_refusal)
