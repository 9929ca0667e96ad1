"""The ASGI entry point of the web process (Daphne)."""

from __future__ import annotations

import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lmweb.settings")

from django.core.asgi import get_asgi_application  # needs the variable above

django_application = get_asgi_application()

from channels.auth import AuthMiddlewareStack  # needs the applications to be set up
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator

from lmweb.routing import websocket_urlpatterns

application = ProtocolTypeRouter(
    {
        "http": django_application,
        "websocket": AllowedHostsOriginValidator(AuthMiddlewareStack(URLRouter(websocket_urlpatterns))),
    }
)
