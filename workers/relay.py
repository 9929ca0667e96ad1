"""From a runner's output to viewers and rows: sequence numbers, the Redis Stream, the database.

Everything that a generation has said is kept in memory until it ends, so that neither Redis nor PostgreSQL has to be there
all the time: the stream is refilled and the row is saved when they are back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from redis.exceptions import RedisError, ResponseError

from workers import stream
from workers.events import (
    AnyEvent,
    ChatEnd,
    Error,
    ErrorInfo,
    MessageDelta,
    ReasoningDelta,
    Result,
    ToolCallArguments,
    ToolCallStart,
    decode_events,
    encode_events,
    output_items,
)
from workers.schemas import EmbeddingRequest, ToolCall
from workers.store import Claim, Outcome, Progress

logger = logging.getLogger(__name__)

#: Added to ``seq`` when a stream was lost together with its worker: past anything that a viewer can have seen, so that the
#: gap makes every viewer take the row's text first (``models_app.generations.watch``).
LOST_STREAM_JUMP = 1_000_000


@dataclass(slots=True, eq=False)
class Live:
    """A generation that this worker owns. Guarded by ``lock``; ``entries`` are those of this worker, in order of ``seq``."""

    claim: Claim
    seq: int
    resumes: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[tuple[str, str, list[str]]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    entries: list[stream.Entry] = field(default_factory=list)
    sent: int = 0
    pending_events: list[AnyEvent] = field(default_factory=list)
    pending_tokens: list[int] = field(default_factory=list)
    saved_seq: int = -1
    started_at: float = field(default_factory=time.monotonic)
    running_since: float = field(default_factory=time.monotonic)
    load_seconds: float | None = None
    ended: bool = False
    cancelled: bool = False
    instance_id: str = ""

    def __post_init__(self) -> None:
        """Until it has a runner, the name in the request stands for it."""
        self.instance_id = self.claim.identifier

    @property
    def id(self) -> str:
        """Return the generation's id."""
        return self.claim.id

    @property
    def is_embedding(self) -> bool:
        """Whether vectors are wanted, not an answer."""
        return isinstance(self.claim.request, EmbeddingRequest)

    @property
    def expire_seconds(self) -> int:
        """Return how long the stream stays after the end."""
        return stream.EMBEDDING_EXPIRE_SECONDS if self.is_embedding else stream.EXPIRE_SECONDS

    def add(self, events: Iterable[AnyEvent], tokens: Iterable[int] = ()) -> None:
        """Take what a step brought."""
        for event in events:
            self.pending_events.append(event)
            if isinstance(event, MessageDelta):
                self.content.append(event.content)
            elif isinstance(event, ReasoningDelta):
                self.reasoning.append(event.content)
            elif isinstance(event, ToolCallStart):
                self.calls.append((event.id, event.tool, []))
            elif isinstance(event, ToolCallArguments) and self.calls:
                self.calls[-1][2].append(event.content)
        new = list(tokens)
        self.pending_tokens += new
        self.tokens += new

    def close_entry(self) -> None:
        """Make an entry of what was gathered."""
        if self.pending_events or self.pending_tokens:
            self.seq += 1
            self.entries.append(stream.Entry(self.seq, encode_events(_merged(self.pending_events)), self.pending_tokens))
            self.pending_events, self.pending_tokens = [], []

    def progress(self) -> Progress:
        """Return the state as of the last entry; call ``close_entry`` first, so that text, tokens and ``seq`` belong together."""
        calls = [ToolCall(id=id_, name=name, arguments="".join(parts)) for id_, name, parts in self.calls]
        return Progress(self.id, self.seq, "".join(self.content), "".join(self.reasoning), calls, list(self.tokens), self.resumes)


def _merged(events: list[AnyEvent]) -> list[AnyEvent]:
    """Join neighbouring deltas of the same kind."""
    merged: list[AnyEvent] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, MessageDelta) and isinstance(last, MessageDelta):
            merged[-1] = MessageDelta(content=last.content + event.content, logprobs=last.logprobs + event.logprobs)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            merged[-1] = ReasoningDelta(content=last.content + event.content)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments):
            merged[-1] = ToolCallArguments(content=last.content + event.content)
        else:
            merged.append(event)
    return merged


def end_events(outcome: Outcome, instance_id: str) -> list[AnyEvent]:
    """Return the last events of a generation."""
    progress = outcome.progress
    output = output_items(progress.content, progress.reasoning, progress.tool_calls)
    events: list[AnyEvent] = [Error(error=outcome.error)] if outcome.error else []
    events.append(ChatEnd(result=Result(model_instance_id=instance_id, output=output, stats=outcome.stats), status=outcome.status))
    return events


def interrupted(message: str) -> ErrorInfo:
    """Return the error of a generation that its retries could not save."""
    return ErrorInfo(code="generation_interrupted", message=message)


class StreamWriter:
    """Writes entries to Redis; while Redis is away they stay in ``Live.entries`` and are written when it is back."""

    def __init__(self, url: str) -> None:
        self._client = stream.connect(url)
        self._behind = threading.Event()
        # Entries must arrive in order, or the older one would look like a repetition and be lost.
        self._lock = threading.Lock()

    @property
    def is_behind(self) -> bool:
        """Whether something could not be written: call ``refill``."""
        return self._behind.is_set()

    def catch_up(self, claim: Claim) -> Live:
        """Return the live form of a claimed generation, brought to the end of its stream, which may be newer than the row."""
        live = Live(claim, seq=claim.seq, resumes=claim.resumes)
        live.content, live.reasoning, live.tokens = [claim.content], [claim.reasoning], list(claim.output_tokens)
        live.calls = [(call.id, call.name, [call.arguments]) for call in claim.tool_calls]
        if not claim.resumes and not claim.seq:
            return live
        try:
            last = self._last_seq(claim.id)
            newer = stream.read_after(self._client, claim.id, claim.seq)
        except RedisError:
            last, newer = 0, []
        if last < claim.seq or (newer and newer[0].seq != claim.seq + 1):
            live.seq += LOST_STREAM_JUMP
            return live
        for entry in newer:
            live.add(decode_events(entry.events), entry.tokens)
            live.seq = entry.seq
        live.pending_events, live.pending_tokens = [], []
        return live

    def write(self, lives: Iterable[Live], *, last: bool = False) -> None:
        """Write all entries that are not in Redis yet, in one round trip; ``last`` lets the streams expire soon."""
        if self._behind.is_set():
            return
        lives = list(lives)
        try:
            with self._lock:
                self._write(lives, last=last)
        except (RedisError, OSError) as error:
            logger.warning("Redis is away, tokens are kept until it is back: %s", error)
            self._behind.set()

    def refill(self, lives: Iterable[Live]) -> bool:
        """Write everything that Redis lacks after it was away (a restart may have lost the newest entries). Returns success."""
        lives = list(lives)
        try:
            with self._lock:
                for live in lives:
                    have = self._last_seq(live.id)
                    live.sent = sum(entry.seq <= have for entry in live.entries)
                self._write(lives, last=False)
            for live in lives:
                if live.ended and live.entries:
                    self._client.expire(stream.key(live.id), live.expire_seconds)
        except (RedisError, OSError):
            return False
        self._behind.clear()
        return True

    def _write(self, lives: list[Live], *, last: bool) -> None:
        pipe = self._client.pipeline(transaction=False)
        counts = []
        for live in lives:
            entries = live.entries[live.sent :]
            for entry in entries:
                stream.add(pipe, live.id, entry)
            if last or (entries and live.sent == 0):
                pipe.expire(stream.key(live.id), live.expire_seconds if last else stream.RUNNING_EXPIRE_SECONDS)
            counts.append((live, live.sent + len(entries)))
        for result in pipe.execute(raise_on_error=False):
            # An explicit id that exists already means that an earlier try arrived: stored is stored.
            if isinstance(result, Exception) and not (isinstance(result, ResponseError) and "equal or smaller" in str(result)):
                raise result
        for live, sent in counts:
            live.sent = sent

    def _last_seq(self, generation_id: str) -> int:
        return stream.last_seq(self._client, generation_id)
