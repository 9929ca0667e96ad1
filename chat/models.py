"""Conversations: one row per message, as a tree, so that regenerating and branching never overwrite anything."""

from __future__ import annotations

import uuid
from typing import ClassVar

from django.db import models

from lmweb.access import Principal
from lmweb.models import User
from models_app.models import Generation


class ChatQuerySet(models.QuerySet["Chat"]):
    """Queries over chats."""

    def visible_to(self, principal: Principal) -> ChatQuerySet:
        """Return the chats of this person. Admins see their own only; tokens see none."""
        return self.filter(user=principal.user) if principal.token is None else self.none()


class Chat(models.Model):
    """One conversation of one person."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="chats")
    title = models.CharField(max_length=200, blank=True)
    model_key = models.CharField(max_length=512, blank=True, help_text="The model that was used last.")
    system_prompt = models.TextField(blank=True)
    sampling = models.JSONField(default=dict, help_text="Overrides of workers.schemas.SamplingParams.")
    context_overflow = models.CharField(max_length=32, default="truncateMiddle", help_text="workers.schemas.OverflowPolicy")
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now_add=True)

    objects: ClassVar[ChatQuerySet] = ChatQuerySet.as_manager()  # type: ignore[assignment]

    class Meta:
        ordering: ClassVar[list[str]] = ["-updated_at"]
        indexes: ClassVar[list[models.Index]] = [models.Index(fields=["user", "-updated_at"], name="chat_by_user")]

    def __str__(self) -> str:
        return self.title or "New chat"


class Message(models.Model):
    """One turn. The text of an answer lives in its generation row until somebody edits it; ``text`` knows which counts.

    ``id`` comes from the browser, which makes sending a message again after a lost connection harmless.
    """

    class Role(models.TextChoices):
        USER = "user", "User"
        ASSISTANT = "assistant", "Assistant"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    chat = models.ForeignKey(Chat, on_delete=models.CASCADE, related_name="messages")
    parent = models.ForeignKey("self", null=True, on_delete=models.CASCADE, related_name="children")
    role = models.CharField(max_length=16, choices=Role.choices)
    content = models.TextField(null=True, help_text="Null: the generation's text.")
    generation = models.OneToOneField(Generation, null=True, on_delete=models.RESTRICT, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar[list[str]] = ["created_at"]
        indexes: ClassVar[list[models.Index]] = [models.Index(fields=["chat", "created_at"], name="message_by_chat")]

    def __str__(self) -> str:
        return f"{self.role}: {self.text[:40]}"

    @property
    def text(self) -> str:
        """Return what the message says (of a running answer: what has been saved so far)."""
        if self.content is not None:
            return self.content
        return self.generation.content if self.generation else ""
