"""Application configuration."""

from django.apps import AppConfig


class WorkersConfig(AppConfig):
    """Registers the workers application."""

    name = "workers"
    default_auto_field = "django.db.models.BigAutoField"
