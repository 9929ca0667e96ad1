"""OpenAI's wire format: what we read and what we write. Unknown fields of requests are ignored, as compatible servers do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from workers.events import TokenLogprob
from workers.schemas import Int64

#: The database writes larger ones as whole numbers, which then are too large.
SmallFloat = Annotated[float, Meta(ge=-(2.0**63), lt=2.0**63)]

# --- requests ---------------------------------------------------------------------------------------------------------


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message; only text is supported, and the refusal that an assistant's message may be."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(msgspec.Struct, frozen=True):
    """What was called; ``arguments`` is JSON text."""

    name: str
    arguments: str = "{}"


class MessageToolCall(msgspec.Struct, frozen=True):
    """A call that an assistant's message made."""

    id: str
    function: CalledFunction | None = None
    type: str = "function"


class Message(msgspec.Struct, frozen=True):
    """One turn as clients send it."""

    role: str
    content: str | list[ContentPart] | None = None
    refusal: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None


class StreamOptions(msgspec.Struct, frozen=True):
    """What else a stream brings."""

    include_usage: bool | None = None


class FunctionParam(msgspec.Struct, frozen=True):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolParam(msgspec.Struct, frozen=True):
    """A tool; only functions are supported."""

    type: str
    function: FunctionParam | None = None


class FunctionName(msgspec.Struct, frozen=True):
    """The name of a function."""

    name: str


class ToolChoice(msgspec.Struct, frozen=True):
    """The choice of one function."""

    type: str
    function: FunctionName | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True):
    """A JSON schema for the answer."""

    schema: dict[str, Any] | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """What the answer must look like."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class ChatCompletionRequest(msgspec.Struct, frozen=True):
    """The body of ``POST /v1/chat/completions``. None stands for "not given" everywhere, as in OpenAI's own schema.

    ``ttl``, ``top_k``, ``min_p``, ``repeat_penalty``, ``ignore_eos``, ``draft_model``, ``chat_template_kwargs``, ``guided_regex``,
    ``guided_grammar`` and
    ``grammar`` are not OpenAI's; LM Studio, llama.cpp and vLLM read them.
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
    chat_template_kwargs: dict[str, str | Int64 | SmallFloat | bool | None] | None = None

    draft_model: str | None = None
    n: int | None = None
    tools: list[ToolParam] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None
    ttl: int | None = None

    # Known to OpenAI, would change the answer, not supported: refused by name unless they ask for nothing (translate.py).
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None


# --- responses --------------------------------------------------------------------------------------------------------

FinishReason = Literal["stop", "length", "tool_calls"]


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


class FunctionDelta(msgspec.Struct, frozen=True):
    """The name of a called function, or more of its arguments."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of a call, or more of it; ``index`` tells which call of the message."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta


class Delta(msgspec.Struct, frozen=True):
    """What a chunk adds. ``reasoning_content`` is LM Studio's name for reasoning."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class Logprobs(msgspec.Struct, frozen=True, kw_only=True):
    """The log-probabilities of the tokens of the text."""

    content: list[TokenLogprob]
    refusal: None = None


class DraftStats(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens that were guessed ahead did, as LM Studio reports it; of the first choice."""

    tokens_per_second: float
    draft_model: str | None
    total_draft_tokens_count: int
    accepted_draft_tokens_count: int
    rejected_draft_tokens_count: int
    ignored_draft_tokens_count: int


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What one choice adds with a chunk."""

    index: int = 0
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream. ``usage`` is there (null but in the last one) only if the client asked for it.

    ``stats`` is there at the end of a choice for which tokens were guessed ahead.
    """

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    stats: DraftStats | UnsetType = UNSET


class AnswerToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the model made."""

    id: str
    type: str = "function"
    function: CalledFunction


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer; ``content`` is null if there is nothing but calls."""

    role: str = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnswerToolCall] | UnsetType = UNSET


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    index: int = 0
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: FinishReason


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a request without ``stream``."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    stats: DraftStats | UnsetType = UNSET


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
