"""The Redis Stream of a generation: how tokens travel from the worker to every viewer.

Key ``gen:{id}``; entry ids are ``{seq}-0``, assigned by the worker, so adding an entry twice is harmless and a viewer resumes
from the ``seq`` it has. Field ``e`` is the JSON array of events of one engine step (``workers.events``), field ``t`` the token
ids sampled in it (packed int32), which a resumed generation needs and viewers ignore.
"""

from __future__ import annotations

import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

EXPIRE_SECONDS = 15 * 60
RUNNING_EXPIRE_SECONDS = 24 * 3600
#: Vectors are large, and read once by the request that waits for them.
EMBEDDING_EXPIRE_SECONDS = 60


@dataclass(frozen=True)
class Entry:
    """One entry: everything that one engine step brought. ``events`` is a JSON array, passed on to browsers as it is."""

    seq: int
    events: bytes
    tokens: list[int]


def key(generation_id: str) -> str:
    """Return the stream's key."""
    return f"gen:{generation_id}"


def connect(url: str) -> redis.Redis:
    """Return a blocking client for the worker. Reads never time out by themselves; failures surface at once."""
    return redis.Redis.from_url(url, socket_timeout=None, socket_connect_timeout=5, retry=Retry(NoBackoff(), 0))


def connect_async(url: str) -> redis.asyncio.Redis:
    """Return an asyncio client for viewers, likewise."""
    from redis.asyncio.retry import Retry as AsyncRetry

    return redis.asyncio.Redis.from_url(
        url, socket_timeout=None, socket_connect_timeout=5, max_connections=10_000, retry=AsyncRetry(NoBackoff(), 0)
    )


def add(pipe: redis.client.Pipeline, generation_id: str, entry: Entry) -> None:
    """Queue an entry on a pipeline."""
    fields: dict[str, bytes] = {"e": entry.events}
    if entry.tokens:
        fields["t"] = array.array("i", entry.tokens).tobytes()
    pipe.xadd(key(generation_id), fields, id=f"{entry.seq}-0")  # type: ignore[arg-type]


def parse(raw_id: bytes, fields: dict[bytes, bytes]) -> Entry:
    """Build an entry from what Redis returned."""
    tokens = array.array("i")
    tokens.frombytes(fields.get(b"t", b""))
    return Entry(int(raw_id.split(b"-")[0]), fields[b"e"], tokens.tolist())


def read_after(client: redis.Redis, generation_id: str, seq: int) -> list[Entry]:
    """Return all stored entries after ``seq``."""
    rows: Iterable[tuple[bytes, dict[bytes, bytes]]] = client.xrange(key(generation_id), min=f"({seq}-0")  # type: ignore[assignment]
    return [parse(raw_id, fields) for raw_id, fields in rows]


def last_seq(client: redis.Redis, generation_id: str) -> int:
    """Return the ``seq`` of the newest stored entry, 0 if there is none."""
    rows: list[tuple[bytes, dict[bytes, bytes]]] = client.xrevrange(key(generation_id), count=1)  # type: ignore[assignment]
    return int(rows[0][0].split(b"-")[0]) if rows else 0


async def wait_after(client: redis.asyncio.Redis, generation_id: str, seq: int, *, timeout_seconds: float) -> list[Entry]:
    """Return the entries after ``seq``, waiting for the first one up to the timeout (then an empty list)."""
    found: Any = await client.xread({key(generation_id): f"{seq}-0"}, block=max(1, int(timeout_seconds * 1000)), count=512)
    return [parse(raw_id, fields) for _, rows in found or [] for raw_id, fields in rows]
