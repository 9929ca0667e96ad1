"""A client of OpenAI-compatible servers that notes when every piece of an answer came. Plain asyncio, to cost little beside a server."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

TIMEOUT_SECONDS = 270.0

#: Short words that are one token each (with the space before them) in common vocabularies.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place "
    "case week company system program question work government number night point home water room mother area money story fact "
    "month lot right study book eye job word business issue side kind head house service friend father power hour game line end "
    "member law car city community name president team minute idea kid body information back parent face others level office door "
    "health person art war history party result change morning reason research girl guy moment air teacher force education"
)
WORDS = _WORDS.split()


class BadAnswer(Exception):
    """A server refused a request or ended an answer early."""


@dataclass(frozen=True)
class Endpoint:
    """A server, the name by which it knows the model, and a token for each of several people (none: the server asks for none)."""

    host: str
    port: int
    model: str
    tokens: Sequence[str] = ()

    def head(self, path: str, length: int, user: int) -> bytes:
        """Return the head of a request."""
        lines = [f"POST /v1{path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Content-Type: application/json", "Connection: close"]
        if self.tokens:
            lines.append(f"Authorization: Bearer {self.tokens[user % len(self.tokens)]}")
        return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


@dataclass
class Answer:
    """A streamed answer. Times are ``time.perf_counter`` seconds; ``stamps`` those of each piece of text."""

    began: float
    stamps: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Return the whole text."""
        return "".join(self.pieces)

    @property
    def first_seconds(self) -> float:
        """Return the time to the first text. Raises ``BadAnswer`` if none came."""
        if not self.stamps:
            raise BadAnswer("no text came")
        return self.stamps[0] - self.began

    def gaps(self, after: float = 0.0, before: float = float("inf")) -> list[float]:
        """Return the times between pieces, of those gaps that touch the given time."""
        return [later - earlier for earlier, later in pairwise(self.stamps) if later > after and earlier < before]


def words(count: int, rng: random.Random) -> str:
    """Return so many random words, of about one token each."""
    return " ".join(rng.choices(WORDS, k=count))


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


async def chat(
    endpoint: Endpoint,
    messages: list[dict[str, str]],
    *,
    max_tokens: int,
    user: int = 0,
    on_first: Callable[[], None] | None = None,
    options: Mapping[str, Any] | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Answer:
    """Stream one greedy answer of exactly ``max_tokens`` tokens. ``on_first`` is called when its first text is there.

    Raises ``BadAnswer``.
    """
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "repeat_penalty": 1,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **(options or {}),
    }
    answer = Answer(time.perf_counter())
    done = False
    async with asyncio.timeout(timeout_seconds):
        async for line in _lines(endpoint, "/chat/completions", msgspec.json.encode(body), user):
            if line == b"data: [DONE]":
                done = True
            elif line.startswith(b"data: "):
                _take(answer, msgspec.json.decode(line[6:]), on_first)
    if not done or answer.completion_tokens != max_tokens:
        raise BadAnswer(f"{endpoint.model}: {answer.completion_tokens} of {max_tokens} tokens came")
    return answer


def _take(answer: Answer, event: dict[str, Any], on_first: Callable[[], None] | None) -> None:
    if "error" in event:
        raise BadAnswer(str(event["error"])[:300])
    if usage := event.get("usage"):
        answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in event.get("choices") or ():
        if text := choice.get("delta", {}).get("content"):
            answer.stamps.append(time.perf_counter())
            answer.pieces.append(text)
            if on_first and len(answer.stamps) == 1:
                on_first()


async def post(endpoint: Endpoint, path: str, body: Mapping[str, Any], *, user: int = 0) -> Any:
    """Send a request that is answered at once; return the decoded answer. Raises ``BadAnswer``."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        raw = msgspec.json.encode({"model": endpoint.model, **body})
        text = b"\n".join([line async for line in _lines(endpoint, path, raw, user)])
    return msgspec.json.decode(text)


async def _lines(endpoint: Endpoint, path: str, body: bytes, user: int) -> AsyncIterator[bytes]:
    """Yield the lines of the answer's body, each as soon as it is there."""
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, limit=1 << 26)
    try:
        writer.write(endpoint.head(path, len(body), user) + body)
        status, chunked = await _read_head(reader)
        if status != 200:
            raise BadAnswer(f"{endpoint.model}: status {status}: {(await reader.read(2000)).decode(errors='replace')[:500]}")
        rest = b""
        async for data in _chunks(reader) if chunked else _reads(reader):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line
        if rest:
            yield rest
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    status, *headers = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    return int(status.split()[1]), any(line.startswith(b"transfer-encoding:") and b"chunked" in line for line in headers)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _reads(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(1 << 20):
        yield data
