"""Application configuration."""

from django.apps import AppConfig


class LmwebConfig(AppConfig):
    """People, access and the pieces that hold the project together."""

    name = "lmweb"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Connect the signal receivers."""
        from lmweb import signals  # noqa: F401
