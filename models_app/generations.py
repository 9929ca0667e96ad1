"""The life of a generation seen from the web side. ``start_generation`` is the only way to reach a model, for every door."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

import msgspec
import redis.asyncio
from django.conf import settings
from django.db import IntegrityError
from django.db.models.functions import Lower
from django.db.utils import DatabaseError
from django.utils import timezone
from redis.exceptions import RedisError

from lmweb.access import Action, Principal, require
from lmweb.db import insert, run_db
from lmweb.errors import InvalidRequest, ModelNotFound, NotFound, TooManyRequests
from lmweb.models import User
from models_app import routing
from models_app.defaults import with_defaults
from models_app.drafts import check_draft
from models_app.models import Generation, InstalledModel, InstalledModelQuerySet
from workers import dispatch, stream
from workers.events import AnyEvent, ChatEnd, Error, ErrorInfo, Result, Snapshot, Stats, encode_events, output_items
from workers.schemas import AnyRequest, GenerationRequest, request_to_builtins

SILENCE_SECONDS = 2.0


def resolve_model(principal: Principal, name: str) -> InstalledModel:
    """Return the visible model of this key (any case) or loaded-instance identifier. Raises ``ModelNotFound``."""
    visible = InstalledModel.objects.visible_to(principal).only(
        "key", "publisher", "type", "format", "created_at", "inference_defaults", "custom_fields", "base"
    )
    if "\x00" not in name:
        found = InstalledModelQuerySet.named(principal, name) or visible.filter(instances__identifier=name).first()
        found = found or visible.annotate(lower=Lower("key")).filter(lower=name.lower()).first()
        if found:
            return found
    known = list(visible.values_list("key", flat=True)[:5])
    hint = f" Available: {', '.join(known)}." if known else " No model is installed yet."
    raise ModelNotFound(f"There is no model '{name[:200]}'.{hint}", param="model")


def start_generation(*, principal: Principal, request: AnyRequest, source: str, generation_id: uuid.UUID | None = None) -> Generation:
    """Check, and write the row (``queued``), whose commit wakes the worker of the node that was chosen. Returns at once.

    Raises ``PermissionDenied``, ``TooManyRequests``, ``ModelNotFound``, or ``InvalidRequest`` for a chat with a model that only makes
    embeddings (a language model does both) and for a draft model that does not match. What is wrong with the prompt itself (too
    long, refused by the chat template) is known to the runner only and arrives as an ``error`` event.

    Raises ``Stale`` if the principal was remembered (``unread``) and is not the same any more, or the model is not.
    """
    require(principal, Action.GENERATE)
    _require_room(principal.user)
    model = resolve_model(principal, request.model)
    if model.type == InstalledModel.Type.EMBEDDING and isinstance(request, GenerationRequest):
        raise InvalidRequest(f"{model.key} is an embedding model: it turns texts into vectors and cannot chat.", param="model")
    if isinstance(request, GenerationRequest) and request.draft_model:
        request = msgspec.structs.replace(request, draft_model=check_draft(principal, model, request.draft_model).key)
    node = routing.route(model, request, owner=principal.user.pk).node
    with _model_still_there(request.model):
        generation = Generation(
            id=generation_id or uuid.uuid4(),
            user=principal.user,
            token=principal.token,
            source=source,
            model=model,
            model_key=model.key,
            request=request_to_builtins(with_defaults(request, model)),
            node=node,
            lease_until=timezone.now() + timedelta(seconds=routing.DISPATCH_SECONDS) if node else None,
        )
        insert(generation, unless_changed=principal.unread + model.unread)
        return generation


#: How long a count of somebody's requests holds.
COUNT_SECONDS = 1.0
FEW_PLACES = 32
_sure_places: dict[int, tuple[float, int]] = {}


def _require_room(user: User) -> None:
    """Raise ``TooManyRequests`` if so many requests of this person wait that no more may.

    To count costs a round trip before each first token, so while there are more than a few places they are not counted again for a
    second. Requests that arrive at the same instant may each see the last place free.
    """
    running = settings.USER_RUNNING_LIMIT if user.running_limit is None else user.running_limit
    waiting = settings.USER_WAITING_LIMIT if user.waiting_limit is None else user.waiting_limit
    if not running or not waiting:
        return
    now = time.monotonic()
    counted_at, sure = _sure_places.get(user.pk, (0.0, 0))
    if sure and now - counted_at < COUNT_SECONDS:
        _sure_places[user.pk] = counted_at, sure - 1
        return
    free = running + waiting - Generation.objects.unfinished().filter(user=user).count()
    _sure_places[user.pk] = now, max(0, free - FEW_PLACES)
    if free <= 0:
        raise TooManyRequests(
            f"You have {running + waiting} requests running and waiting, as many as you may have. Try again when some have ended.",
            details={"running_limit": running, "waiting_limit": waiting},
        )


@contextmanager
def _model_still_there(name: str) -> Iterator[None]:
    """Turn the loss of a race against the model's deletion into ``ModelNotFound``."""
    try:
        yield
    except IntegrityError as error:
        raise ModelNotFound(f"The model '{name}' was deleted just now.", param="model") from error


def cancel_generation(*, principal: Principal, generation_id: uuid.UUID | str) -> None:
    """Stop a generation from any device; what was written so far is kept. Finished ones are left alone.

    Raises ``NotFound`` for a generation that the principal cannot see.
    """
    visible = Generation.objects.visible_to(principal).filter(pk=generation_id)
    if not visible.unfinished().update(cancel_requested=True):
        if not visible.exists():
            raise NotFound("There is no such generation.")
        return
    dispatch.broadcast_cancel(str(generation_id))


def final_entry(generation: Generation) -> stream.Entry:
    """Return the end of a finished generation as one entry, made from its row, for viewers whose stream is gone."""
    events: list[AnyEvent] = [_snapshot(generation)]
    if generation.error_code:
        events.append(Error(error=ErrorInfo(code=generation.error_code, message=generation.error_message)))
    events.append(end_event(generation))
    return stream.Entry(generation.seq + 1, encode_events(events), [])


def _snapshot(generation: Generation) -> Snapshot:
    return Snapshot(content=generation.content, reasoning=generation.reasoning, tool_calls=generation.calls())


def end_event(generation: Generation) -> ChatEnd:
    """Return the ``chat.end`` of a finished generation."""
    output = output_items(generation.content, generation.reasoning, generation.calls())
    known: dict[str, Any] = {name: generation.stats[name] for name in Stats.__struct_fields__ if name in generation.stats}
    return ChatEnd(result=Result(model_instance_id=generation.model_key, output=output, stats=Stats(**known)), status=generation.status)


@lru_cache(maxsize=1)
def _client() -> redis.asyncio.Redis:
    return stream.connect_async(settings.REDIS_URL)


async def watch(generation_id: str, after_seq: int = 0) -> AsyncIterator[stream.Entry]:
    """Yield the entries after ``after_seq`` until the one with ``chat.end``; survives restarts of Redis and PostgreSQL.

    The caller has checked that its principal may see this generation. Any number of viewers may watch, from any ``seq``.
    """
    seq = after_seq
    while True:
        try:
            entries = await stream.wait_after(_client(), generation_id, seq, timeout_seconds=SILENCE_SECONDS)
        except (RedisError, OSError):
            entries = []
            await asyncio.sleep(random.uniform(0.1, 0.3))  # noqa: S311  (only spreads the reconnecting viewers)
        if entries and seq and entries[0].seq != seq + 1:
            entries = await _bridge(generation_id, entries)
        for entry in entries:
            seq = entry.seq
            yield entry
            if b'"type":"chat.end"' in entry.events:
                return
        if not entries and (last := await _ended(generation_id)):
            if last.seq <= seq:
                last = stream.Entry(seq + 1, last.events, [])
            yield last
            return


async def _bridge(generation_id: str, entries: list[stream.Entry]) -> list[stream.Entry]:
    """Close the gap that a lost stream left before these entries: with the row's text, once the row is that far."""
    while True:
        try:
            row = await run_db(Generation.objects.filter(pk=generation_id).first)
        except DatabaseError:
            row = None
        if row is not None and row.seq >= entries[0].seq - 1:
            snapshot = stream.Entry(row.seq, encode_events([_snapshot(row)]), [])
            return [snapshot, *(entry for entry in entries if entry.seq > row.seq)]
        await asyncio.sleep(0.3)


async def _ended(generation_id: str) -> stream.Entry | None:
    """Return the closing entry if the row says that the generation has ended."""
    try:
        generation = await run_db(Generation.objects.filter(pk=generation_id).first)
    except DatabaseError:
        return None
    if generation is None:
        return _lost_entry()
    return final_entry(generation) if generation.is_finished else None


def _lost_entry() -> stream.Entry:
    """Return the closing entry of a generation without a row: deleted with its person, or lost with PostgreSQL's last half second."""
    error = ErrorInfo(code="generation_interrupted", message="This request is gone from the database. Please send it again.")
    result = Result(model_instance_id="", output=[], stats=Stats(stop_reason="failed"))
    return stream.Entry(1, encode_events([Error(error=error), ChatEnd(result=result, status="failed")]), [])
