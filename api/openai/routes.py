"""OpenAI's routes. They parse, start, follow and write; what is allowed is decided in ``lmweb.access``."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack
from functools import partial

import msgspec
from django.conf import settings
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from ninja import Router

from api import sse
from api.auth import begin, carries_secret, principal_of
from api.body import READ, json_body, json_response
from api.feed import Begun, Feed
from api.openai import embeddings, translate
from api.openai.schemas import ChatCompletionRequest, Model, ModelList
from lmweb.access import Action, Principal, require
from lmweb.db import run_db
from lmweb.errors import GenerationInterrupted, LmwebError
from models_app.generations import resolve_model, start_generation
from models_app.models import InstalledModel, ModelInstance
from workers.events import (
    AnyEvent,
    ChatEnd,
    Error,
    MessageDelta,
    ModelLoadProgress,
    PromptProcessingProgress,
    QueueUpdate,
    ReasoningDelta,
    Snapshot,
    TokenLogprob,
    ToolCallStart,
)

router = Router()

#: How long a stream's headers wait for the first token, so that an early failure is still a proper HTTP error.
HEADER_WAIT_SECONDS = 3.0
KEEP_ALIVE_SECONDS = 10.0

_encoder = msgspec.json.Encoder()


@router.api_operation(READ, "/models")
async def list_models(request: HttpRequest) -> HttpResponse:
    """List the models that requests may name; one that is not in memory is loaded on first use."""
    return json_response(ModelList(data=await run_db(_visible_models, principal_of(request))))


@router.api_operation(READ, "/models/{path:model_id}")
async def get_model(request: HttpRequest, model_id: str) -> HttpResponse:
    """Describe one model."""
    return json_response(await run_db(_visible_model, principal_of(request), model_id))


@router.post("/chat/completions", auth=carries_secret)
async def chat_completions(request: HttpRequest) -> HttpResponseBase:
    """Answer a conversation, as a stream or at once, once or in several ways. A closed connection cancels it all.

    Time to the first token counts here, so all work before it that needs the database is one visit to a database thread;
    authentication comes first in it.
    """
    feeds, body = await Feed.start_all(partial(_begin, request))
    if body.stream:
        return await _stream(feeds, body)
    try:
        answers = await asyncio.gather(*(_answer(feed, with_logprobs=bool(body.logprobs)) for feed in feeds))
    finally:
        _close(feeds)
    return json_response(translate.completion(feeds[0].generation.pk, feeds[0].generation.model_key, answers))


def _begin(request: HttpRequest, generation_id: uuid.UUID) -> Begun[ChatCompletionRequest]:
    """Authenticate, parse and start."""

    def start_all(principal: Principal) -> Begun[ChatCompletionRequest]:
        body = translate.parse_request(json_body(request))
        native, n = translate.to_generation_request(body), translate.choices(body)
        start = partial(start_generation, principal=principal, source="openai")
        if n == 1:
            return Begun(principal, start(request=native, generation_id=generation_id), body)
        with transaction.atomic():  # all or none
            first, *others = [start(request=translate.with_choice(native, index)) for index in range(n)]
        return Begun(principal, first, body, tuple(others))

    return begin(request, start_all)


async def _answer(feed: Feed, *, with_logprobs: bool) -> translate.Answer:
    """Wait for the end of one choice. Raises the error that it failed with."""
    logprobs: list[TokenLogprob] = []

    def gather(events: list[AnyEvent]) -> None:
        logprobs.extend(item for event in events if isinstance(event, MessageDelta) for item in event.logprobs)

    end = await _end(feed, gather)
    return translate.Answer(end, logprobs if with_logprobs else None)


def _close(feeds: Iterable[Feed]) -> None:
    for feed in feeds:
        feed.close()


@router.post("/embeddings", auth=carries_secret)
async def create_embeddings(request: HttpRequest) -> HttpResponse:
    """Turn texts into vectors. A closed connection cancels the rest."""
    feed, collector = await Feed.start(partial(_begin_embeddings, request))
    try:
        end = await _end(feed, collector.take)
    finally:
        feed.close()
    return json_response(collector.answer(feed.generation.model_key, end.result.stats))


def _begin_embeddings(request: HttpRequest, generation_id: uuid.UUID) -> Begun[embeddings.Collector]:
    """Authenticate, parse and start."""

    def start(principal: Principal) -> Begun[embeddings.Collector]:
        body = embeddings.parse_request(json_body(request))
        native = embeddings.to_embedding_request(body)
        generation = start_generation(principal=principal, request=native, source="openai", generation_id=generation_id)
        return Begun(principal, generation, embeddings.Collector(len(native.inputs), as_base64=body.encoding_format == "base64"))

    return begin(request, start)


def _visible_models(principal: Principal) -> list[Model]:
    """Return every name that a request may use: models by key, then loaded ones by the identifiers that they were given."""
    require(principal, Action.READ_MODELS)
    models = list(InstalledModel.objects.visible_to(principal))
    names = {model.key: model for model in models} if settings.JIT else {}  # else requests reach only what is loaded
    instances = ModelInstance.objects.filter(model__in=models, status=ModelInstance.Status.READY)
    for instance in instances.select_related("model").order_by("identifier"):
        names.setdefault(instance.identifier, instance.model)
    return [_model(model, name) for name, model in names.items()]


def _visible_model(principal: Principal, name: str) -> Model:
    require(principal, Action.READ_MODELS)
    model = resolve_model(principal, name)
    is_key = name.lower() == model.key.lower()
    return _model(model, model.key if is_key else name)


def _model(model: InstalledModel, name: str) -> Model:
    return Model(id=name, created=int(model.created_at.timestamp()), owned_by=model.publisher)


async def _end(feed: Feed, take: Callable[[list[AnyEvent]], None] | None = None) -> ChatEnd:
    """Wait for the last event; ``take`` is given all of them. Raises the error that the generation failed with."""
    while events := await feed.events():
        _raise_failure(events)
        if take:
            take(events)
        for event in events:
            if isinstance(event, ChatEnd):
                return event
    raise GenerationInterrupted("The answer ended without a result. Please send the request again.")


#: A choice and its events.
Happening = tuple[int, list[AnyEvent]]


async def _stream(feeds: list[Feed], body: ChatCompletionRequest) -> HttpResponseBase:
    """Return the streaming response. The headers wait a little, so that failures before the first token are HTTP errors."""
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    generation = feeds[0].generation
    translator = translate.ChunkTranslator(generation.pk, generation.model_key, include_usage=include_usage, n=len(feeds))
    with ExitStack() as unless_streamed:
        unless_streamed.callback(_close, feeds)
        head = await _head(feeds)
        first = b"".join(written for happening in head for written in _written(translator, happening))
        unless_streamed.pop_all()
    return sse.response(_written_stream(feeds, translator, first))


async def _head(feeds: list[Feed]) -> list[Happening]:
    """Return the events up to the first text, the end, or the moment when headers must go out.

    Raises the error that a generation failed with by then.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + HEADER_WAIT_SECONDS
    head: list[Happening] = []
    while (remaining := deadline - loop.time()) > 0:
        happening = await Feed.first(feeds, remaining)
        if happening is None:
            break
        _raise_failure(happening[1])
        head.append(happening)
        if any(isinstance(event, MessageDelta | ReasoningDelta | ToolCallStart | Snapshot | ChatEnd) for event in happening[1]):
            break
    return head


async def _written_stream(feeds: list[Feed], translator: translate.ChunkTranslator, first: bytes) -> AsyncIterator[bytes]:
    """Yield the bytes of a stream, and cancel the generations if the client goes away, or one of them fails."""
    try:
        yield first or sse.KEEP_ALIVE
        while not translator.is_complete and not translator.failed:
            happening = await Feed.first(feeds, KEEP_ALIVE_SECONDS)
            if happening is None:
                yield sse.KEEP_ALIVE
                continue
            if not happening[1]:
                return
            written = b"".join(_written(translator, happening))
            if written:
                yield written
    except LmwebError as error:
        yield _written_error(error)
    finally:
        _close(feeds)


def _raise_failure(events: Iterable[AnyEvent]) -> None:
    for event in events:
        if isinstance(event, Error):
            raise translate.error_of(event.error)


def _written_error(error: LmwebError) -> bytes:
    return sse.data(_encoder.encode(translate.error_response(error)))


def _written(translator: translate.ChunkTranslator, happening: Happening) -> Iterable[bytes]:
    """Yield the events as OpenAI's stream has them; what it has no word for becomes a comment that keeps the connection awake.

    A failed generation ends with an error event and without ``[DONE]``.
    """
    index, events = happening
    for event in events:
        match event:
            case QueueUpdate():
                yield sse.comment(translate.queue_comment(event))
            case ModelLoadProgress():
                yield sse.comment(f"loading the model {event.progress:.0%}")
            case PromptProcessingProgress():
                yield sse.comment(f"reading the prompt {event.progress:.0%}")
            case Error():
                yield _written_error(translate.error_of(event.error))
        for chunk in translator.chunks(event, index):
            yield sse.data(_encoder.encode(chunk))
        if isinstance(event, ChatEnd) and translator.is_complete:
            yield sse.DONE
