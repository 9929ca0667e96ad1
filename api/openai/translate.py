"""Between OpenAI's format and ours: pure functions, tested with tables."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from api.body import parse
from api.openai import structured
from api.openai.checks import without_nul
from api.openai.schemas import (
    AnswerMessage,
    AnswerToolCall,
    CalledFunction,
    ChatCompletionRequest,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    CompletionTokensDetails,
    ContentPart,
    Delta,
    DraftStats,
    ErrorBody,
    ErrorResponse,
    FinishReason,
    FunctionDelta,
    Logprobs,
    Message,
    PromptTokensDetails,
    ToolCallDelta,
    Usage,
)
from lmweb.decoding import convert
from lmweb.errors import GenerationInterrupted, InvalidRequest, LmwebError, error_class
from workers.events import (
    AnyEvent,
    ChatEnd,
    Error,
    ErrorInfo,
    MessageDelta,
    QueueUpdate,
    ReasoningDelta,
    Snapshot,
    Stats,
    TokenLogprob,
    ToolCallArguments,
    ToolCallStart,
)
from workers.schemas import RESERVED_TEMPLATE_NAMES, GenerationRequest, Lane, ToolCall

# --- requests ---------------------------------------------------------------------------------------------------------

SUPPORTED_ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_CHOICES = 8
SERVICE_TIERS = ("auto", "default", "flex", "priority", "scale")

#: Parameters that we do not support, each with the test for values that ask for nothing.
UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "functions": lambda value: value == [],
    "function_call": lambda value: value in ("none", "auto"),
    "modalities": lambda value: value == ["text"],
    "audio": lambda value: False,
    "prediction": lambda value: False,
    "verbosity": lambda value: value == "medium",
    "web_search_options": lambda value: False,
}

SAMPLING_NAMES = (
    "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "seed", "logit_bias", "ignore_eos",
)  # fmt: skip

#: OpenAI's words for the effort of reasoning, and LM Studio's, which are ours.
REASONING_EFFORTS = {"none": "off", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high"}

_request_decoder = msgspec.json.Decoder(ChatCompletionRequest)
_FAULT = re.compile(r"^(?P<what>.*?) - at (?P<key>`key` in )?`\$\.?(?P<where>.*)`$", re.DOTALL)
_OUR_TOOL = re.compile(r"^tools\[\d*(\.\.\.)?\](?=\.(name|description|parameters|strict)\b)")
_MISSING = re.compile(r"^Object missing required field `(?P<field>\w+)`")


def parse_request(body: bytes) -> ChatCompletionRequest:
    """Decode a request body. Raises ``InvalidRequest`` that names the field at fault."""
    return parse(body, _request_decoder.decode, invalid)


def to_generation_request(request: ChatCompletionRequest) -> GenerationRequest:
    """Translate a request. Raises ``InvalidRequest`` for values out of range and for whatever we could not honour."""
    _refuse_unsupported(request)
    sampling = _sampling(request)
    data = {
        "model": request.model,
        "messages": [_message(message, f"messages[{index}]") for index, message in enumerate(request.messages)],
        "sampling": sampling,
        "given": list(sampling),
        "ttl_seconds": request.ttl,
        "template_kwargs": _template_kwargs(request),
        "reasoning": _reasoning(request),
        "output_format": structured.output_format(request),
        "tools": structured.tools(request),
        "tool_choice": structured.tool_choice(request),
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "top_logprobs": structured.top_logprobs(request),
        "lane": _lane(request),
        "draft_model": request.draft_model,
    }
    try:
        return convert(data, GenerationRequest)
    except msgspec.ValidationError as error:
        raise invalid(error, max_tokens=_limit_name(request)) from None


def _refuse_unsupported(request: ChatCompletionRequest) -> None:
    for name, asks_for_nothing in UNSUPPORTED.items():
        value = getattr(request, name)
        if value is None or asks_for_nothing(value):
            continue
        raise InvalidRequest(f"'{name}' is not supported by this server. Leave it out.", param=name)


def choices(request: ChatCompletionRequest) -> int:
    """Return how many answers are asked for. Raises ``InvalidRequest`` for too many."""
    n = 1 if request.n is None else request.n
    if not 1 <= n <= MAX_CHOICES:
        raise InvalidRequest(f"'n' must be between 1 and {MAX_CHOICES}.", param="n")
    return n


def with_choice(request: GenerationRequest, index: int) -> GenerationRequest:
    """Return the request for one of several answers: each has a seed of its own."""
    seed = request.sampling.seed
    if not index or seed is None:
        return request
    sampling = msgspec.structs.replace(request.sampling, seed=seed + index if seed < 2**62 else seed - index)
    return msgspec.structs.replace(request, sampling=sampling)


def _lane(request: ChatCompletionRequest) -> Lane:
    """Return the lane: who chooses the tier ``flex`` lets others go first."""
    if request.service_tier is not None and request.service_tier not in SERVICE_TIERS:
        raise InvalidRequest(f"'service_tier' must be one of {', '.join(SERVICE_TIERS)}.", param="service_tier")
    return Lane.BATCH if request.service_tier == "flex" else Lane.API


def _message(message: Message, where: str) -> dict[str, Any]:
    calls = structured.tool_calls(message, where)
    text = "" if calls and message.content is None else _text(message, where)
    return {"role": message.role, "content": text, "tool_calls": calls, "tool_call_id": structured.tool_call_id(message, where)}


def _text(message: Message, where: str) -> str:
    """Return a message's text. Raises ``InvalidRequest`` for roles and parts that are not text."""
    if message.role == "function" or message.function_call:
        raise InvalidRequest(f"'{where}' has a function call in OpenAI's old way; this server reads 'tool_calls'.", param=where)
    if message.role not in SUPPORTED_ROLES:
        raise InvalidRequest(f"'{where}.role' must be one of {', '.join(SUPPORTED_ROLES)}.", param=f"{where}.role")
    if message.audio:
        raise InvalidRequest(f"'{where}.audio' is not supported by this server.", param=f"{where}.audio")
    content = message.content
    if content is None and message.role == "assistant":
        content = message.refusal  # what OpenAI's models answer instead
    if content is None:
        raise InvalidRequest(f"'{where}.content' is missing.", param=f"{where}.content")
    if isinstance(content, str):
        return without_nul(content, f"{where}.content")
    return "\n".join(_part(part, message.role, f"{where}.content[{number}]") for number, part in enumerate(content))


def _part(part: ContentPart, role: str, where: str) -> str:
    """Return the text of a part. Raises ``InvalidRequest`` for parts that are not text."""
    name = "refusal" if part.type == "refusal" and role == "assistant" else "text"
    if part.type != name:
        raise InvalidRequest(f"'{where}' is of type '{part.type[:40]}'; this server reads text parts only.", param=where)
    text: str | None = getattr(part, name)
    if text is None:
        raise InvalidRequest(f"'{where}.{name}' is missing.", param=f"{where}.{name}")
    return without_nul(text, f"{where}.{name}")


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


def _reasoning(request: ChatCompletionRequest) -> str | None:
    """Return how much the model is to think, in LM Studio's words for OpenAI's."""
    effort = request.reasoning_effort
    if effort is not None and effort not in REASONING_EFFORTS:
        raise InvalidRequest(f"'reasoning_effort' must be one of {', '.join(REASONING_EFFORTS)}.", param="reasoning_effort")
    return None if effort is None else REASONING_EFFORTS[effort]


def _template_kwargs(request: ChatCompletionRequest) -> dict[str, Any]:
    given = request.chat_template_kwargs or {}
    for name, value in given.items():
        if name in RESERVED_TEMPLATE_NAMES:
            raise InvalidRequest(f"'chat_template_kwargs.{name}' cannot be set by a request.", param="chat_template_kwargs")
        without_nul(name, "chat_template_kwargs")
        if isinstance(value, str):
            without_nul(value, "chat_template_kwargs")
    return given


def invalid(error: msgspec.ValidationError, max_tokens: str = "max_tokens") -> InvalidRequest:
    """Return the error in words that name the field as the client wrote it; ``max_tokens`` is the name that it used for that one."""
    message = str(error)
    fault = _FAULT.match(message)
    what, where = (fault["what"], fault["where"].removeprefix("sampling.").removesuffix("[...]")) if fault else (message, "")
    where = {"max_tokens": max_tokens, "ttl_seconds": "ttl", "output_format.value": "response_format"}.get(where, where)
    where = _OUR_TOOL.sub(r"\g<0>.function", where)
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
    if stats.stop_reason == "toolCalls":
        return "tool_calls"
    return "length" if stats.stop_reason in _LENGTH_REASONS else "stop"


def usage(stats: Sequence[Stats]) -> Usage:
    """Return the token counts of all choices; they have the prompt in common."""
    prompt, completion = stats[0].input_tokens, sum(each.total_output_tokens for each in stats)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=stats[0].cached_input_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=sum(each.reasoning_output_tokens for each in stats)),
    )


def draft_stats(stats: Stats) -> DraftStats | msgspec.UnsetType:
    """Return how guessed tokens did, if there could be any."""
    if stats.total_draft_tokens_count is None:
        return msgspec.UNSET
    return DraftStats(
        tokens_per_second=stats.tokens_per_second,
        draft_model=stats.draft_model,
        total_draft_tokens_count=stats.total_draft_tokens_count,
        accepted_draft_tokens_count=stats.accepted_draft_tokens_count or 0,
        rejected_draft_tokens_count=stats.rejected_draft_tokens_count or 0,
        ignored_draft_tokens_count=stats.ignored_draft_tokens_count or 0,
    )


def queue_comment(event: QueueUpdate) -> str:
    """Return where a request stands, for the people who read a stream: position (0 is next), estimated wait, reason."""
    wait = "" if event.eta_seconds is None else f", about {max(1, round(event.eta_seconds))} s"
    return f"queue position {event.position}{wait}: {' '.join(event.reason.split())}"


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


@dataclass
class Answer:
    """A choice that has ended, with the log-probabilities that came on the way (None: not asked for)."""

    end: ChatEnd
    logprobs: list[TokenLogprob] | None = None


def completion(generation_id: uuid.UUID, model: str, answers: Sequence[Answer]) -> Completion:
    """Return the whole answer from the last events of its choices' streams."""
    return Completion(
        id=completion_id(generation_id),
        created=int(time.time()),
        model=model,
        choices=[_choice(index, answer) for index, answer in enumerate(answers)],
        usage=usage([answer.end.result.stats for answer in answers]),
        stats=draft_stats(answers[0].end.result.stats),
    )


def _choice(index: int, answer: Answer) -> Choice:
    texts = {"message": "", "reasoning": ""}
    calls: list[AnswerToolCall] = []
    for item in answer.end.result.output:
        texts[item.type] = texts.get(item.type, "") + item.content
        if item.tool_call is not None:
            function = CalledFunction(item.tool_call.name, item.tool_call.arguments)
            calls.append(AnswerToolCall(id=item.tool_call.id, function=function))
    message = AnswerMessage(
        content=texts["message"] or (None if calls else ""),
        reasoning_content=texts["reasoning"] or msgspec.UNSET,
        tool_calls=calls or msgspec.UNSET,
    )
    logprobs = None if answer.logprobs is None else Logprobs(content=answer.logprobs)
    return Choice(index=index, message=message, logprobs=logprobs, finish_reason=finish_reason(answer.end.result.stats))


class _Sent:
    """What was sent of one choice, so that a snapshot continues it."""

    def __init__(self) -> None:
        self.begun = False
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[ToolCall] = []
        self.stats: Stats | None = None


class ChunkTranslator:
    """Turns the events of the generations of ``n`` choices into the chunks of one stream."""

    def __init__(self, generation_id: uuid.UUID, model: str, *, include_usage: bool, n: int = 1) -> None:
        self._id = completion_id(generation_id)
        self._created = int(time.time())
        self._model = model
        self._include_usage = include_usage
        self._choices = [_Sent() for _ in range(n)]
        self.failed = False

    @property
    def is_complete(self) -> bool:
        """Whether all choices have ended well."""
        return not self.failed and all(sent.stats is not None for sent in self._choices)

    def chunks(self, event: AnyEvent, index: int = 0) -> Iterator[Chunk]:
        """Yield the chunks of one event of a choice; nothing after an error.

        Raises ``GenerationInterrupted`` if a snapshot contradicts what was sent.
        """
        if self.failed:
            return
        match event:
            case MessageDelta(content=text, logprobs=logprobs) if text:
                yield from self._add(index, content=text, logprobs=logprobs)
            case ReasoningDelta(content=text) if text:
                yield from self._add(index, reasoning=text)
            case ToolCallStart(tool=name, id=call_id):
                yield from self._call(index, ToolCall(id=call_id, name=name, arguments=""))
            case ToolCallArguments(content=text) if text:
                yield from self._arguments(index, text)
            case Snapshot():
                yield from self._catch_up(index, event)
            case Error():
                self.failed = True
            case ChatEnd():
                yield from self._end(index, event.result.stats)

    def _add(self, index: int, *, content: str = "", reasoning: str = "", logprobs: list[TokenLogprob] | None = None) -> Iterator[Chunk]:
        sent = self._choices[index]
        yield from self._begin(index)
        if reasoning:
            sent.reasoning.append(reasoning)
            yield self._chunk(index, Delta(reasoning_content=reasoning))
        if content:
            sent.content.append(content)
            yield self._chunk(index, Delta(content=content), logprobs=logprobs)

    def _call(self, index: int, call: ToolCall) -> Iterator[Chunk]:
        yield from self._begin(index)
        calls = self._choices[index].calls
        calls.append(call)
        function = FunctionDelta(name=call.name, arguments=call.arguments)
        yield self._chunk(index, Delta(tool_calls=[ToolCallDelta(index=len(calls) - 1, id=call.id, type="function", function=function)]))

    def _arguments(self, index: int, text: str) -> Iterator[Chunk]:
        calls = self._choices[index].calls
        calls[-1] = msgspec.structs.replace(calls[-1], arguments=calls[-1].arguments + text)
        delta = ToolCallDelta(index=len(calls) - 1, function=FunctionDelta(arguments=text))
        yield self._chunk(index, Delta(tool_calls=[delta]))

    def _begin(self, index: int) -> Iterator[Chunk]:
        if not self._choices[index].begun:
            self._choices[index].begun = True
            yield self._chunk(index, Delta(role="assistant", content=""))

    def _catch_up(self, index: int, snapshot: Snapshot) -> Iterator[Chunk]:
        """Send what the snapshot has beyond what was sent. What a client has read cannot be taken back."""
        sent = self._choices[index]
        content, reasoning = "".join(sent.content), "".join(sent.reasoning)
        known = len(sent.calls)
        same = [call.id for call in snapshot.tool_calls[:known]] == [call.id for call in sent.calls] and all(
            new.arguments.startswith(old.arguments) for new, old in zip(snapshot.tool_calls, sent.calls, strict=False)
        )
        if not same or not snapshot.content.startswith(content) or not snapshot.reasoning.startswith(reasoning):
            raise GenerationInterrupted("The stream was interrupted and could not be continued. Please send the request again.")
        yield from self._add(index, content=snapshot.content[len(content) :], reasoning=snapshot.reasoning[len(reasoning) :])
        if known and (more := snapshot.tool_calls[known - 1].arguments[len(sent.calls[-1].arguments) :]):
            yield from self._arguments(index, more)
        for call in snapshot.tool_calls[known:]:
            yield from self._call(index, call)

    def _end(self, index: int, stats: Stats) -> Iterator[Chunk]:
        self._choices[index].stats = stats
        yield from self._begin(index)
        yield msgspec.structs.replace(self._chunk(index, Delta(), finish_reason(stats)), stats=draft_stats(stats))
        ends = [sent.stats for sent in self._choices if sent.stats is not None]
        if self._include_usage and self.is_complete:
            yield Chunk(id=self._id, created=self._created, model=self._model, choices=[], usage=usage(ends))

    def _chunk(self, index: int, delta: Delta, reason: FinishReason | None = None, *, logprobs: list[TokenLogprob] | None = None) -> Chunk:
        reported = Logprobs(content=logprobs) if logprobs else None
        return Chunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[ChunkChoice(index=index, delta=delta, logprobs=reported, finish_reason=reason)],
            usage=None if self._include_usage else msgspec.UNSET,
        )
