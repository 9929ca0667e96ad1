"""Application configuration."""

from django.apps import AppConfig


class ApiConfig(AppConfig):
    """Registers the api application."""

    name = "api"
    default_auto_field = "django.db.models.BigAutoField"
