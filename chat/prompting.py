"""From the tree of messages to the request that a model gets."""

from __future__ import annotations

import uuid
from typing import Any, cast

import msgspec

from chat.history import Branch, fetch
from chat.models import Chat, Message
from lmweb.decoding import convert
from lmweb.errors import InvalidRequest
from workers.schemas import ChatMessage, GenerationRequest, Lane, OverflowPolicy, Role, SamplingParams

#: The overrides that a chat may keep, with their names on the page: all of SamplingParams but what only the API offers.
LABELS = {
    "temperature": "Temperature",
    "top_k": "Top K",
    "top_p": "Top P",
    "min_p": "Min P",
    "repeat_penalty": "Repeat penalty",
    "max_tokens": "Max tokens",
    "stop": "Stop strings",
    "seed": "Seed",
}


def sampling_of(overrides: dict[str, Any]) -> SamplingParams:
    """Return the sampling parameters of a chat. Raises ``InvalidRequest`` naming the field at fault."""
    for name, value in overrides.items():
        if name not in LABELS:
            raise InvalidRequest(f"There is no setting '{name[:100]}'.", param=name[:100])
        try:
            convert({name: value}, SamplingParams)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"{LABELS[name]}: {str(error).partition(' - at ')[0].lower()}.", param=name) from None
    return convert(overrides, SamplingParams)


def build_request(chat: Chat, *, model: str, last: uuid.UUID) -> GenerationRequest:
    """Return the request whose last turn is the message ``last`` of this chat."""
    path = Branch(chat).path_to(last)
    turns = [ChatMessage(role="system", content=chat.system_prompt)] if chat.system_prompt.strip() else []
    for message in fetch(path):
        role: Role = "assistant" if message.role == Message.Role.ASSISTANT else "user"
        text = message.text
        if not text:
            continue  # an answer that failed before its first word says nothing to the model
        if turns and turns[-1].role == role:
            text = f"{turns.pop().content}\n\n{text}"  # templates want the roles to alternate
        turns.append(ChatMessage(role=role, content=text))
    return GenerationRequest(
        model=model,
        messages=turns,
        sampling=sampling_of(chat.sampling),
        given=frozenset(chat.sampling),
        context_overflow=cast("OverflowPolicy", chat.context_overflow),  # nothing else is stored
        lane=Lane.INTERACTIVE,
    )
