"""The one event vocabulary of a generation: LM Studio's documented streaming events plus ``queue.update`` and ``generation.snapshot``.

A runner emits these structs, the worker stores them in the Redis Stream of the generation (one entry per engine step),
and every viewer (browser, SSE of each API dialect) translates them at the edge. Source of the names and fields: LM Studio's
REST v1 documentation, "Streaming events".
"""

from __future__ import annotations

from typing import Any

import msgspec

from workers.schemas import ToolCall


class Event(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all events; ``type`` in the encoded form tells which."""


class ChatStart(Event, tag="chat.start"):
    """The first event of a stream."""

    model_instance_id: str


class QueueUpdate(Event, tag="queue.update"):
    """Where the generation stands: ``position`` 0 means next; ``eta_seconds`` is absent while unknown."""

    position: int
    reason: str
    eta_seconds: float | None = None


class ModelLoadStart(Event, tag="model_load.start"):
    """The model has to be loaded first."""

    model_instance_id: str


class ModelLoadProgress(Event, tag="model_load.progress"):
    """``progress`` is a fraction between 0 and 1."""

    model_instance_id: str
    progress: float


class ModelLoadEnd(Event, tag="model_load.end"):
    """The model is ready."""

    model_instance_id: str
    load_time_seconds: float


class ContextOverflow(Event, tag="context.overflow"):
    """The conversation did not fit: so many of its messages are not seen by the model, by this policy.

    ``dropped_tokens`` are those that went out of sight since, while the answer grew past the context.
    """

    policy: str
    dropped_messages: int
    dropped_tokens: int = 0


class PromptProcessingStart(Event, tag="prompt_processing.start"):
    """Prefill begins."""


class PromptProcessingProgress(Event, tag="prompt_processing.progress"):
    """``progress`` is a fraction between 0 and 1 of the prompt's tokens."""

    progress: float


class PromptProcessingEnd(Event, tag="prompt_processing.end"):
    """The whole prompt is in the KV cache."""


class ReasoningStart(Event, tag="reasoning.start"):
    """The model begins to think."""


class ReasoningDelta(Event, tag="reasoning.delta"):
    """More reasoning text."""

    content: str


class ReasoningEnd(Event, tag="reasoning.end"):
    """The model has thought."""


class MessageStart(Event, tag="message.start"):
    """The answer begins."""


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token that was possible: its text, its bytes (a token may be part of a character) and its natural log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, frozen=True, kw_only=True):
    """A token that was chosen, with the likeliest alternatives."""

    top_logprobs: list[TopLogprob] = []


class MessageDelta(Event, tag="message.delta"):
    """More text of the answer; ``logprobs`` only if they were asked for."""

    content: str
    logprobs: list[TokenLogprob] = []


class MessageEnd(Event, tag="message.end"):
    """The answer is complete."""


class ToolCallStart(Event, tag="tool_call.start"):
    """The model begins to call ``tool``; ``id`` is unique within the generation's conversation."""

    tool: str
    id: str


class ToolCallArguments(Event, tag="tool_call.arguments"):
    """More of the JSON text of the arguments of the call that began last."""

    content: str


class EmbeddingVectors(Event, tag="embedding.vectors"):
    """Vectors of an embedding request, from input ``start`` on: 32-bit little-endian floats, ``width`` per input."""

    start: int
    width: int
    data: bytes


class Snapshot(Event, tag="generation.snapshot"):
    """All text so far; replaces what a viewer has. Sent when a stream was lost and the row took its place."""

    content: str
    reasoning: str = ""
    tool_calls: list[ToolCall] = []


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What went wrong; ``code`` is that of a class in ``lmweb.errors``."""

    code: str
    message: str
    param: str | None = None
    details: dict[str, Any] = {}


class Error(Event, tag="error"):
    """The generation failed; ``chat.end`` with the text so far still follows."""

    error: ErrorInfo


class Stats(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Token counts and timings of one generation, named as in LM Studio's REST v1; times in seconds.

    The counts of draft tokens are there if tokens were guessed ahead: total = accepted + rejected + ignored (guessed after a rejected
    one); ``draft_model`` is the key of the model that guessed, None for lookups in the text. Ours alone: ``reasoning_time_seconds``
    from the first token to the last of reasoning, and what did not fit:
    ``dropped_messages``, and ``dropped_tokens`` while the answer grew.
    """

    input_tokens: int = 0
    total_output_tokens: int = 0
    reasoning_output_tokens: int = 0
    reasoning_time_seconds: float = 0.0
    cached_input_tokens: int = 0
    tokens_per_second: float = 0.0
    time_to_first_token_seconds: float = 0.0
    generation_time_seconds: float = 0.0
    model_load_time_seconds: float | None = None
    stop_reason: str = ""
    dropped_messages: int = 0
    dropped_tokens: int = 0
    draft_model: str | None = None
    total_draft_tokens_count: int | None = None
    accepted_draft_tokens_count: int | None = None
    rejected_draft_tokens_count: int | None = None
    ignored_draft_tokens_count: int | None = None


class OutputItem(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One part of the result: ``type`` is ``reasoning`` or ``message``, each with ``content``, or ``tool_call``."""

    type: str
    content: str = ""
    tool_call: ToolCall | None = None


def output_items(content: str, reasoning: str, tool_calls: list[ToolCall]) -> list[OutputItem]:
    """Return the parts of a result in their order. There is always a message, if only an empty one, unless there are calls."""
    items = [OutputItem(type="reasoning", content=reasoning)] if reasoning else []
    if content or not tool_calls:
        items.append(OutputItem(type="message", content=content))
    return items + [OutputItem(type="tool_call", tool_call=call) for call in tool_calls]


class Result(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The aggregated answer in ``chat.end``."""

    model_instance_id: str
    output: list[OutputItem]
    stats: Stats
    response_id: str | None = None


class ChatEnd(Event, tag="chat.end"):
    """The last event of every stream, also of failed and cancelled ones."""

    result: Result
    status: str = "completed"


AnyEvent = (
    ChatStart | QueueUpdate | ModelLoadStart | ModelLoadProgress | ModelLoadEnd | ContextOverflow | PromptProcessingStart | PromptProcessingProgress
    | PromptProcessingEnd | ReasoningStart | ReasoningDelta | ReasoningEnd | MessageStart | MessageDelta | MessageEnd | ToolCallStart
    | ToolCallArguments | Snapshot | EmbeddingVectors | Error | ChatEnd
)  # fmt: skip

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(list[AnyEvent])


def encode_events(events: list[AnyEvent]) -> bytes:
    """Return the events of one engine step as a JSON array."""
    return _encoder.encode(events)


def decode_events(data: bytes | str) -> list[AnyEvent]:
    """Parse ``encode_events``'s output. Raises ``msgspec.ValidationError`` for anything outside the vocabulary."""
    return _decoder.decode(data)
