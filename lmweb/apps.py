"""Application configuration."""

from django.apps import AppConfig
from django.core.signals import request_started


class LmwebConfig(AppConfig):
    """People, access and the pieces that hold the project together."""

    name = "lmweb"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Connect the signal receivers."""
        from lmweb import signals  # noqa: F401
        from lmweb.db import drop_dead_connections

        request_started.connect(drop_dead_connections)
