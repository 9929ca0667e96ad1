"""OpenAI's wire format: what we read and what we write. Unknown fields of requests are ignored, as compatible servers do."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

# --- requests ---------------------------------------------------------------------------------------------------------


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message; only ``type`` text is supported."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True):
    """One turn as clients send it."""

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None


class StreamOptions(msgspec.Struct, frozen=True):
    """What else a stream brings."""

    include_usage: bool | None = None


class ChatCompletionRequest(msgspec.Struct, frozen=True):
    """The body of ``POST /v1/chat/completions``. None stands for "not given" everywhere, as in OpenAI's own schema.

    ``top_k``, ``min_p``, ``repeat_penalty``, ``ignore_eos`` and ``chat_template_kwargs`` are not OpenAI's; LM Studio, llama.cpp
    and vLLM read them.
    """

    model: str
    messages: list[Message]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None

    # Known to OpenAI, would change the answer, not supported: refused by name unless they ask for nothing (translate.py).
    n: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


# --- responses --------------------------------------------------------------------------------------------------------

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """How much of the prompt was in the cache."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """How much of the answer was reasoning."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Exact token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Delta(msgspec.Struct, frozen=True):
    """What a chunk adds. ``reasoning_content`` is LM Studio's name for reasoning."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The only choice of a chunk."""

    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream. ``usage`` is there (null but in the last one) only if the client asked for it."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer."""

    role: str = "assistant"
    content: str
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The only choice of a completion."""

    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a request without ``stream``."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model that requests may name."""

    id: str
    object: str = "model"
    created: int
    owned_by: str


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``GET /v1/models``."""

    object: str = "list"
    data: list[Model]


class ErrorBody(msgspec.Struct, frozen=True):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(msgspec.Struct, frozen=True):
    """The body of every response from 400 up, and of the event that ends a failed stream."""

    error: ErrorBody
