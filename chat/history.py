"""Reading conversations: the branch that is shown, a page of it at a time, as the browser gets it."""

from __future__ import annotations

import uuid
from typing import Any

from django.db.models import Prefetch

from chat.models import Chat, Message
from models_app.models import Generation

PAGE_SIZE = 50

#: What a viewer needs of a generation; the request and the token ids can be large.
_VIEWED = Generation.objects.only(
    "id", "status", "seq", "content", "reasoning", "stats", "error_code", "error_message", "model_key", "created_at", "started_at"
)


class Branch:
    """One path through the tree of a chat, from the first message to a last one."""

    def __init__(self, chat: Chat, through: uuid.UUID | None = None) -> None:
        """Take the newest branch, or the newest one that goes through a given message."""
        rows = list(chat.messages.values_list("id", "parent_id"))
        self._parents = dict(rows)
        self._children: dict[uuid.UUID | None, list[uuid.UUID]] = {}
        for message_id, parent_id in rows:
            self._children.setdefault(parent_id, []).append(message_id)
        #: The message that was stored last, on whichever branch.
        self.newest = rows[-1][0] if rows else None
        last = self._newest_below(through) if through in self._parents else self.newest
        self.ids = self.path_to(last)

    def _newest_below(self, message_id: uuid.UUID | None) -> uuid.UUID | None:
        while children := self._children.get(message_id):
            message_id = children[-1]
        return message_id

    def path_to(self, message_id: uuid.UUID | None) -> list[uuid.UUID]:
        """Return the ids from the first message to this one."""
        path = []
        while message_id is not None:
            path.append(message_id)
            message_id = self._parents[message_id]
        return path[::-1]

    def versions(self, message_id: uuid.UUID) -> list[uuid.UUID]:
        """Return this message and its alternatives, oldest first."""
        return self._children[self._parents[message_id]]

    def page(self, before: uuid.UUID | None = None, limit: int = PAGE_SIZE) -> tuple[list[dict[str, Any]], bool]:
        """Return the last messages (those before one, if given), and whether there are older ones."""
        end = self.ids.index(before) if before in self.ids else len(self.ids)
        start = max(0, end - limit)
        return [self.view(message) for message in fetch(self.ids[start:end])], start > 0

    def view(self, message: Message) -> dict[str, Any]:
        """Return a message as the browser gets it, with its place among its alternatives."""
        versions = self.versions(message.pk)
        return view(message) | {"versions": [str(version) for version in versions] if len(versions) > 1 else []}


def fetch(ids: list[uuid.UUID]) -> list[Message]:
    """Return these messages in this order, with their generations."""
    found = Message.objects.prefetch_related(Prefetch("generation", queryset=_VIEWED)).in_bulk(ids)
    return [found[message_id] for message_id in ids if message_id in found]


def view(message: Message) -> dict[str, Any]:
    """Return one message as the browser gets it: raw text, never HTML."""
    generation = message.generation
    return {
        "id": str(message.pk),
        "chat_id": str(message.chat_id),
        "parent_id": str(message.parent_id) if message.parent_id else None,
        "role": message.role,
        "text": message.text,
        "created_at": message.created_at.isoformat(),
        "model": generation.model_key if generation else "",
        "generation": generation.state() if generation else None,
    }
