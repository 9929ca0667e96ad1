"""A hand that plays the worker: it writes stream entries and rows as a worker does."""

from __future__ import annotations

import asyncio
from typing import Any

from django.conf import settings

from lmweb.db import run_db
from models_app.models import Generation
from workers import stream
from workers.events import AnyEvent, ChatEnd, ChatStart, MessageDelta, MessageEnd, MessageStart, OutputItem, Result, Stats, encode_events


class Hand:
    """Plays the worker of one generation."""

    def __init__(self, generation: Generation) -> None:
        self.id = str(generation.pk)
        self.seq = 0
        self.text = ""

    def write(self, *events: AnyEvent) -> None:
        client = stream.connect(settings.REDIS_URL)
        self.seq += 1
        pipe = client.pipeline()
        stream.add(pipe, self.id, stream.Entry(self.seq, encode_events(list(events)), []))
        pipe.execute()
        client.close()

    def say(self, *words: str) -> None:
        if not self.seq:
            self.write(ChatStart(model_instance_id="acme/tiny"), MessageStart())
        for word in words:
            self.text += word
            self.write(MessageDelta(content=word))

    def end(self, *before: AnyEvent, status: str = "completed", output: list[OutputItem] | None = None, **stats: Any) -> None:
        stats = {"stop_reason": "eosFound", "input_tokens": 7, "total_output_tokens": 3} | stats
        Generation.objects.filter(pk=self.id).update(status=status, content=self.text, stats=stats)
        items = output or [OutputItem(type="message", content=self.text)]
        result = Result(model_instance_id="acme/tiny", output=items, stats=Stats(**stats))
        self.write(*before, MessageEnd(), ChatEnd(result=result, status=status))


async def hand(count: int = 1) -> Hand:
    """Wait for the newest generation and take it over."""
    for _ in range(500):
        rows = await run_db(list, Generation.objects.order_by("-created_at"))
        if len(rows) >= count:
            return Hand(rows[0])
        await asyncio.sleep(0.01)
    raise AssertionError("no generation was started")


async def status_becomes_cancelled(generation_id: str) -> bool:
    """Wait until somebody asked for the end of a generation."""
    for _ in range(300):
        if await run_db(Generation.objects.filter(pk=generation_id, cancel_requested=True).exists):
            return True
        await asyncio.sleep(0.01)
    return False
