"""Application configuration."""

from django.apps import AppConfig


class ChatConfig(AppConfig):
    """Registers the chat application."""

    name = "chat"
    default_auto_field = "django.db.models.BigAutoField"
