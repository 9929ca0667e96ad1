"""What a worker would do for a generation, written by hand: entries in its stream, and its row."""

from __future__ import annotations

import redis
from django.conf import settings
from django.utils import timezone

from models_app.models import Generation
from workers import stream
from workers.events import AnyEvent, ChatEnd, MessageDelta, OutputItem, Result, Stats, encode_events


def add(generation: Generation, seq: int, *events: AnyEvent) -> None:
    """Append one entry to the generation's stream."""
    client = redis.Redis.from_url(settings.REDIS_URL)
    pipe = client.pipeline()
    stream.add(pipe, str(generation.pk), stream.Entry(seq, encode_events(list(events)), []))
    pipe.execute()
    client.close()


def say(generation: Generation, seq: int, text: str) -> None:
    """Append one piece of the answer."""
    add(generation, seq, MessageDelta(content=text))


def save(generation: Generation, seq: int, text: str, status: str = "running") -> None:
    """Save what is there so far, as the worker does about once a second."""
    finished_at = timezone.now() if status in Generation.TERMINAL else None
    Generation.objects.filter(pk=generation.pk).update(seq=seq, content=text, status=status, finished_at=finished_at)


def end(generation: Generation, seq: int, text: str, status: str = "completed") -> None:
    """Finish: the row first, then the last entry."""
    save(generation, seq, text, status)
    result = Result(model_instance_id=generation.model_key, output=[OutputItem(type="message", content=text)], stats=Stats())
    add(generation, seq, ChatEnd(result=result, status=status))
