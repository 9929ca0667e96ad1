"""Between OpenAI's format and ours: pure functions, tested with tables."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from api.openai.schemas import (
    AnswerMessage,
    ChatCompletionRequest,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    CompletionTokensDetails,
    Delta,
    ErrorBody,
    ErrorResponse,
    FinishReason,
    Message,
    PromptTokensDetails,
    Usage,
)
from lmweb.errors import GenerationInterrupted, InvalidRequest, LmwebError, error_class
from workers.events import AnyEvent, ChatEnd, Error, ErrorInfo, MessageDelta, ReasoningDelta, Snapshot, Stats
from workers.schemas import GenerationRequest

# --- requests ---------------------------------------------------------------------------------------------------------

SUPPORTED_ROLES = ("system", "developer", "user", "assistant")

#: Parameters that we do not support, each with the test for values that ask for nothing.
UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "n": lambda value: value == 1 and value is not True,
    "tools": lambda value: value == [],
    "tool_choice": lambda value: value in ("none", "auto"),
    "functions": lambda value: value == [],
    "function_call": lambda value: value in ("none", "auto"),
    "response_format": lambda value: value == {"type": "text"},
    "logprobs": lambda value: value is False,
    "top_logprobs": lambda value: value == 0 and value is not False,
    "modalities": lambda value: value == ["text"],
    "audio": lambda value: False,
    "prediction": lambda value: False,
    "reasoning_effort": lambda value: False,
    "verbosity": lambda value: value == "medium",
    "web_search_options": lambda value: False,
}

SAMPLING_NAMES = (
    "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "seed", "logit_bias", "ignore_eos",
)  # fmt: skip

#: What the chat template is given by us; a request may not replace it.
RESERVED_TEMPLATE_NAMES = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})

_request_decoder = msgspec.json.Decoder(ChatCompletionRequest)
_FAULT = re.compile(r"^(?P<what>.*?) - at (?P<key>`key` in )?`\$\.?(?P<where>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>\w+)`")


def parse_request(body: bytes) -> ChatCompletionRequest:
    """Decode a request body. Raises ``InvalidRequest`` that names the field at fault."""
    try:
        return _request_decoder.decode(body)
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except ValueError as error:  # malformed JSON, or bytes that are no UTF-8
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None


def to_generation_request(request: ChatCompletionRequest) -> GenerationRequest:
    """Translate a request. Raises ``InvalidRequest`` for values out of range and for whatever we could not honour."""
    _refuse_unsupported(request)
    data = {
        "model": request.model,
        "messages": [{"role": message.role, "content": _text(message, index)} for index, message in enumerate(request.messages)],
        "sampling": _sampling(request),
        "template_kwargs": _template_kwargs(request),
    }
    try:
        return msgspec.convert(data, GenerationRequest)
    except msgspec.ValidationError as error:
        raise invalid(error, max_tokens=_limit_name(request)) from None


def _refuse_unsupported(request: ChatCompletionRequest) -> None:
    for name, asks_for_nothing in UNSUPPORTED.items():
        value = getattr(request, name)
        if value is None or asks_for_nothing(value):
            continue
        if name == "n":
            raise InvalidRequest("'n' must be 1: this server gives one choice per request.", param=name)
        raise InvalidRequest(f"'{name}' is not supported by this server. Leave it out.", param=name)


def _text(message: Message, index: int) -> str:
    """Return a message's text. Raises ``InvalidRequest`` for roles and parts that are not text."""
    where = f"messages[{index}]"
    if message.role in {"tool", "function"} or message.tool_calls or message.function_call:
        raise InvalidRequest(f"'{where}' belongs to a tool call; tools are not supported by this server.", param=where)
    if message.role not in SUPPORTED_ROLES:
        raise InvalidRequest(f"'{where}.role' must be one of {', '.join(SUPPORTED_ROLES)}.", param=f"{where}.role")
    if message.audio:
        raise InvalidRequest(f"'{where}.audio' is not supported by this server.", param=f"{where}.audio")
    if message.content is None:
        raise InvalidRequest(f"'{where}.content' is missing.", param=f"{where}.content")
    if isinstance(message.content, str):
        return without_nul(message.content, f"{where}.content")
    texts = []
    for number, part in enumerate(message.content):
        here = f"{where}.content[{number}]"
        if part.type != "text":
            raise InvalidRequest(f"'{here}' is of type '{part.type[:40]}'; this server reads text parts only.", param=here)
        if part.text is None:
            raise InvalidRequest(f"'{here}.text' is missing.", param=f"{here}.text")
        texts.append(without_nul(part.text, f"{here}.text"))
    return "\n".join(texts)


def _sampling(request: ChatCompletionRequest) -> dict[str, Any]:
    """Return the sampling parameters that were given; ``SamplingParams`` holds the defaults and the ranges."""
    given = {name: value for name in SAMPLING_NAMES if (value := getattr(request, name)) is not None}
    limit: int | None = getattr(request, _limit_name(request))
    if limit is not None and limit != -1:  # LM Studio's "no limit"
        given["max_tokens"] = limit
    if request.stop is not None:
        stop = [request.stop] if isinstance(request.stop, str) else request.stop
        given["stop"] = [without_nul(text, "stop") for text in stop]
    return given


def _limit_name(request: ChatCompletionRequest) -> str:
    """Return which of its two names the limit on the answer was given by."""
    return "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"


def _template_kwargs(request: ChatCompletionRequest) -> dict[str, Any]:
    given = request.chat_template_kwargs or {}
    for name, value in given.items():
        if name in RESERVED_TEMPLATE_NAMES:
            raise InvalidRequest(f"'chat_template_kwargs.{name}' cannot be set by a request.", param="chat_template_kwargs")
        without_nul(name, "chat_template_kwargs")
        if isinstance(value, str):
            without_nul(value, "chat_template_kwargs")
    return given


def without_nul(text: str, where: str) -> str:
    """Return the text. Raises ``InvalidRequest`` for NUL characters, which neither the database nor a tokenizer takes."""
    if "\x00" in text:
        raise InvalidRequest(f"'{where}' contains a NUL character.", param=where)
    return text


def invalid(error: msgspec.ValidationError, max_tokens: str = "max_tokens") -> InvalidRequest:
    """Return the error in words that name the field as the client wrote it; ``max_tokens`` is the name that it used for that one."""
    message = str(error)
    fault = _FAULT.match(message)
    what, where = (fault["what"], fault["where"].removeprefix("sampling.").removesuffix("[...]")) if fault else (message, "")
    where = max_tokens if where == "max_tokens" else where
    missing = _MISSING.match(what)
    if missing:
        where = f"{where}.{missing['field']}".lstrip(".")
        return InvalidRequest(f"'{where}' is missing.", param=where)
    if fault and fault["key"]:
        what = f"in a key: {what}"
    return InvalidRequest(f"'{where}': {what}." if where else f"{what}.", param=where or None)


# --- answers ----------------------------------------------------------------------------------------------------------

_LENGTH_REASONS = frozenset({"maxPredictedTokensReached", "contextLengthReached"})


def completion_id(generation_id: uuid.UUID) -> str:
    """Return the public id of an answer."""
    return f"chatcmpl-{generation_id.hex}"


def finish_reason(stats: Stats) -> FinishReason:
    """Return OpenAI's name of the reason why the answer ended."""
    return "length" if stats.stop_reason in _LENGTH_REASONS else "stop"


def usage(stats: Stats) -> Usage:
    """Return the token counts."""
    return Usage(
        prompt_tokens=stats.input_tokens,
        completion_tokens=stats.total_output_tokens,
        total_tokens=stats.input_tokens + stats.total_output_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=stats.cached_input_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=stats.reasoning_output_tokens),
    )


def error_of(info: ErrorInfo) -> LmwebError:
    """Rebuild the error that an event carries."""
    return error_class(info.code)(info.message, param=info.param, details=info.details)


def error_response(error: LmwebError) -> ErrorResponse:
    """Return an error in OpenAI's format."""
    return ErrorResponse(ErrorBody(message=error.message, type=_error_type(error.status), param=error.param, code=error.code))


def _error_type(status: int) -> str:
    if status >= 500:
        return "server_error"
    known = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return known.get(status, "invalid_request_error")


def completion(generation_id: uuid.UUID, model: str, end: ChatEnd) -> Completion:
    """Return the whole answer from the last event of its stream."""
    texts = {"message": "", "reasoning": ""}
    for item in end.result.output:
        texts[item.type] = texts.get(item.type, "") + item.content
    message = AnswerMessage(content=texts["message"], reasoning_content=texts["reasoning"] or msgspec.UNSET)
    return Completion(
        id=completion_id(generation_id),
        created=int(time.time()),
        model=model,
        choices=[Choice(message=message, finish_reason=finish_reason(end.result.stats))],
        usage=usage(end.result.stats),
    )


class ChunkTranslator:
    """Turns the events of one generation into the chunks of one stream. It knows what was sent, so that a snapshot continues it."""

    def __init__(self, generation_id: uuid.UUID, model: str, *, include_usage: bool) -> None:
        self._id = completion_id(generation_id)
        self._created = int(time.time())
        self._model = model
        self._include_usage = include_usage
        self.failed = False
        self._begun = False
        self._content: list[str] = []
        self._reasoning: list[str] = []

    def chunks(self, event: AnyEvent) -> Iterator[Chunk]:
        """Yield the chunks of one event; nothing after an error. Raises ``GenerationInterrupted`` if a snapshot contradicts what was sent."""
        if self.failed:
            return
        match event:
            case MessageDelta(content=text) if text:
                yield from self._add(content=text)
            case ReasoningDelta(content=text) if text:
                yield from self._add(reasoning=text)
            case Snapshot():
                yield from self._catch_up(event)
            case Error():
                self.failed = True
            case ChatEnd():
                yield from self._end(event.result.stats)

    def _add(self, *, content: str = "", reasoning: str = "") -> Iterator[Chunk]:
        yield from self._begin()
        if reasoning:
            self._reasoning.append(reasoning)
            yield self._chunk(Delta(reasoning_content=reasoning))
        if content:
            self._content.append(content)
            yield self._chunk(Delta(content=content))

    def _begin(self) -> Iterator[Chunk]:
        if not self._begun:
            self._begun = True
            yield self._chunk(Delta(role="assistant", content=""))

    def _catch_up(self, snapshot: Snapshot) -> Iterator[Chunk]:
        """Send what the snapshot has beyond what was sent. What a client has read cannot be taken back."""
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        if not snapshot.content.startswith(content) or not snapshot.reasoning.startswith(reasoning):
            raise GenerationInterrupted("The stream was interrupted and could not be continued. Please send the request again.")
        yield from self._add(content=snapshot.content[len(content) :], reasoning=snapshot.reasoning[len(reasoning) :])

    def _end(self, stats: Stats) -> Iterator[Chunk]:
        yield from self._begin()
        yield self._chunk(Delta(), finish_reason(stats))
        if self._include_usage:
            yield Chunk(id=self._id, created=self._created, model=self._model, choices=[], usage=usage(stats))

    def _chunk(self, delta: Delta, reason: FinishReason | None = None) -> Chunk:
        return Chunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[ChunkChoice(delta=delta, finish_reason=reason)],
            usage=None if self._include_usage else msgspec.UNSET,
        )
