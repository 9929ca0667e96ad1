"""Application configuration."""

from django.apps import AppConfig


class ModelsAppConfig(AppConfig):
    """Registers the models_app application."""

    name = "models_app"
    default_auto_field = "django.db.models.BigAutoField"
