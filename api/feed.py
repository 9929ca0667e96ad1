"""A generation as an API request sees it: started by the request, followed by it, and cancelled when its client goes away."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from django.db.utils import DatabaseError

from lmweb.access import Principal
from lmweb.db import run_db
from lmweb.errors import LmwebError
from models_app.generations import cancel_generation, watch
from models_app.models import Generation
from workers.events import AnyEvent, decode_events
from workers.stream import Entry

logger = logging.getLogger(__name__)

CANCEL_ATTEMPTS = 5

_background: set[asyncio.Task[None]] = set()


T = TypeVar("T")


@dataclass(frozen=True)
class Begun(Generic[T]):
    """A generation that was started (with ``others`` beside it), for whom, and the dialect's request that asked for it."""

    principal: Principal
    generation: Generation
    request: T
    others: tuple[Generation, ...] = ()


class Feed:
    """The events of one generation, in the order of their making. ``close`` it when done: what has not ended by then is cancelled."""

    def __init__(self, principal: Principal, generation: Generation) -> None:
        self.generation = generation
        self._principal = principal
        self._entries: AsyncIterator[Entry] = watch(str(generation.pk))
        self._next: asyncio.Future[Entry] | None = None
        self.ended = False

    @classmethod
    async def start(cls, begin: Callable[[uuid.UUID], Begun[T]]) -> tuple[Feed, T]:
        """Start a generation with ``begin``, which runs in a database thread and is given the generation's id."""
        feeds, request = await cls.start_all(begin)
        return feeds[0], request

    @classmethod
    async def start_all(cls, begin: Callable[[uuid.UUID], Begun[T]]) -> tuple[list[Feed], T]:
        """Start a generation, and perhaps others beside it, with ``begin``.

        That thread cannot be interrupted: if the client goes away while it writes the row, the row is cancelled afterwards.
        """
        starting = asyncio.ensure_future(run_db(begin, uuid.uuid4()))
        try:
            begun = await asyncio.shield(starting)
        except asyncio.CancelledError:
            _in_background(_cancel_begun(starting))
            raise
        return [cls(begun.principal, generation) for generation in (begun.generation, *begun.others)], begun.request

    @staticmethod
    async def first(feeds: Sequence[Feed], timeout_seconds: float | None = None) -> tuple[int, list[AnyEvent]] | None:
        """Return the events of the next step of any of several feeds, with its place among them.

        None if nothing came in time; no events after the end of all.
        """
        while waits := {feed.waiting(): index for index, feed in enumerate(feeds) if not feed.ended}:
            done, _ = await asyncio.wait(waits, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                return None
            index = min(waits[future] for future in done)
            if events := feeds[index].take():  # a step may bring tokens whose text is not certain yet
                return index, events
        return 0, []

    async def events(self, timeout_seconds: float | None = None) -> list[AnyEvent] | None:
        """Return the events of the next step; None if nothing came in time; an empty list after the end."""
        happening = await self.first([self], timeout_seconds)
        return None if happening is None else happening[1]

    def waiting(self) -> asyncio.Future[Entry]:
        """Return the wait for the next entry; it goes on in the next call, because cancelling it would end the iterator."""
        self._next = self._next or asyncio.ensure_future(_following(self._entries))
        return self._next

    def take(self) -> list[AnyEvent]:
        """Return the events of the entry that came."""
        assert self._next is not None
        entry = self._next.result()
        self._next = None
        events = decode_events(entry.events)
        self.ended = any(event.__struct_config__.tag == "chat.end" for event in events)
        return events

    def close(self) -> None:
        """Stop following, and cancel the generation unless it has ended. Safe to call more than once."""
        if self._next:
            self._next.cancel()
            self._next = None
        if not self.ended:
            self.ended = True
            _in_background(_cancel(self._principal, self.generation.pk))


async def _following(entries: AsyncIterator[Entry]) -> Entry:
    return await anext(entries)


async def _cancel_begun(starting: asyncio.Future[Begun[Any]]) -> None:
    """Cancel what was begun for a client that has gone, if it began at all."""
    try:
        begun = await starting
    except (LmwebError, DatabaseError):
        return
    for generation in (begun.generation, *begun.others):
        await _cancel(begun.principal, generation.pk)


async def _cancel(principal: Principal, generation_id: uuid.UUID) -> None:
    """Cancel a generation whose client has gone; nobody is left to tell of errors but the log."""
    for attempt in range(CANCEL_ATTEMPTS):
        await asyncio.sleep(attempt)
        try:
            await run_db(cancel_generation, principal=principal, generation_id=generation_id)
        except (LmwebError, DatabaseError) as error:
            logger.warning("could not cancel generation %s: %s", generation_id, type(error).__name__)
        else:
            return


def _in_background(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` past the end of the request; the event loop itself holds tasks by weak references only."""
    task = asyncio.ensure_future(work)
    _background.add(task)
    task.add_done_callback(_background.discard)
