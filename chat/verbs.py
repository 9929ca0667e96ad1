"""What a browser may say on the chat page's websocket: one struct per verb, decoded strictly."""

from __future__ import annotations

import uuid
from typing import Annotated

import msgspec
from msgspec import Meta

from chat.services import ChatSettings

MAX_FRAME_CHARACTERS = 8_000_000


class Verb(msgspec.Struct, tag_field="type", forbid_unknown_fields=True, kw_only=True):
    """Base of all verbs; an error frame repeats ``ref``."""

    ref: Annotated[str, Meta(max_length=64)] = ""


class Ping(Verb, tag="ping"):
    """Is the connection alive, and may this person still use it?"""


class ChatOpen(Verb, tag="chat.open"):
    """Follow a chat from here on. ``known`` are messages that the tab knows of; what came after them is sent."""

    chat_id: uuid.UUID
    known: Annotated[list[uuid.UUID], Meta(max_length=200)] = []


class MessageSend(Verb, tag="message.send"):
    """Say something; without ``chat_id`` it starts a new chat."""

    message_id: uuid.UUID
    model: Annotated[str, Meta(max_length=512)]
    content: str
    chat_id: uuid.UUID | None = None
    parent_id: uuid.UUID | None = None
    settings: ChatSettings | None = None


class MessageRegenerate(Verb, tag="message.regenerate"):
    """Answer again; ``answer_id`` is the id of the new answer."""

    message_id: uuid.UUID
    answer_id: uuid.UUID
    model: Annotated[str, Meta(max_length=512)] = ""


class GenerationStop(Verb, tag="generation.stop"):
    """Stop an answer; its text so far is kept."""

    generation_id: uuid.UUID


class GenerationWatch(Verb, tag="generation.watch"):
    """Send the events of a generation after ``seq``."""

    generation_id: uuid.UUID
    seq: Annotated[int, Meta(ge=0)] = 0


AnyVerb = Ping | ChatOpen | MessageSend | MessageRegenerate | GenerationStop | GenerationWatch

_decoder = msgspec.json.Decoder(AnyVerb)


def decode(text: str) -> AnyVerb:
    """Parse one frame. Raises ``msgspec.DecodeError`` (also its subclass ``ValidationError``)."""
    verb: AnyVerb = _decoder.decode(text)
    return verb
