"""Embedding requests inside a runner: inputs of all of them are computed in shared batches, fairly between people.

Texts become tokens only when their turn comes, so that a request of thousands of inputs never holds up its neighbours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lmweb.errors import ContextLengthExceeded, InvalidRequest, LmwebError
from workers.engines.base import Embedder
from workers.events import EmbeddingVectors, ErrorInfo, Stats
from workers.protocol import Embed, Output

logger = logging.getLogger(__name__)

#: Vectors per event at most; a request's vectors leave when so many are there, and at its end.
EVENT_VECTORS = 64
#: Tokens per batch at most while the same model also writes answers: a step of theirs must not wait long.
SHARED_BATCH_TOKENS = 128


@dataclass(slots=True, eq=False)
class EmbeddingJob:
    """One request. ``taken`` inputs are in batches or done; ``vectors`` are those that were not sent yet, from ``sent`` on."""

    message: Embed
    taken: int = 0
    sent: int = 0
    input_tokens: int = 0
    vectors: list[NDArray[np.float32]] = field(default_factory=list)
    next_tokens: list[int] | None = None
    started_at: float = field(default_factory=time.perf_counter)
    first_at: float | None = None

    @property
    def id(self) -> str:
        """Return the generation's id."""
        return self.message.generation_id

    @property
    def is_complete(self) -> bool:
        """Whether all vectors are there."""
        return self.sent + len(self.vectors) == len(self.message.request.inputs)

    def events(self) -> list[EmbeddingVectors]:
        """Return the vectors that are due, as events."""
        if not self.vectors or (len(self.vectors) < EVENT_VECTORS and not self.is_complete):
            return []
        found = []
        for start in range(0, len(self.vectors), EVENT_VECTORS):
            rows = np.stack(self.vectors[start : start + EVENT_VECTORS])
            found.append(EmbeddingVectors(start=self.sent + start, width=rows.shape[1], data=rows.astype("<f4").tobytes()))
        self.sent += len(self.vectors)
        self.vectors = []
        return found

    def stats(self, stop_reason: str = "") -> Stats:
        """Return counts and times."""
        now = time.perf_counter()
        return Stats(
            input_tokens=self.input_tokens,
            time_to_first_token_seconds=round((self.first_at or now) - self.started_at, 6),
            generation_time_seconds=round(now - self.started_at, 6),
            stop_reason=stop_reason,
        )


class EmbeddingQueue:
    """All embedding requests of a runner. ``open_embedder`` is called when the first one arrives."""

    def __init__(self, open_embedder: Callable[[], Embedder], vocab_size: int) -> None:
        self._open_embedder = open_embedder
        self._vocab_size = vocab_size
        self._embedder: Embedder | None = None
        self._jobs: dict[str, EmbeddingJob] = {}
        self._served: dict[str, int] = {}
        self._batch: list[EmbeddingJob] = []
        self._running: Iterator[NDArray[np.float32] | None] | None = None

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._jobs)

    def submit(self, message: Embed) -> Output | None:
        """Queue a request; returns its only output if it is refused."""
        job = EmbeddingJob(message)
        try:
            self._embedder = self._embedder or self._open_embedder()
            self._check_dimensions(message.request.dimensions, self._embedder)
        except LmwebError as error:
            return _failed(job, error)
        active = [self._served.get(other.message.owner, 0) for other in self._jobs.values()]
        self._served[message.owner] = max(self._served.get(message.owner, 0), min(active, default=0))
        self._jobs[job.id] = job
        return None

    def cancel(self, generation_id: str) -> Output | None:
        """End a request; returns its last output, or None if it is not here."""
        job = self._jobs.pop(generation_id, None)
        return Output(generation_id=generation_id, stats=job.stats("userStopped")) if job else None

    def step(self, *, shared: bool) -> list[Output]:
        """Compute a batch, or a part of a long one. ``shared`` says that the model writes answers at the same time."""
        assert self._embedder is not None
        outputs: list[Output] = []
        try:
            if self._running is None:
                inputs = self._take_batch(self._embedder, SHARED_BATCH_TOKENS if shared else self._embedder.batch_tokens, outputs)
                if inputs:
                    self._running = self._embedder.embed(inputs)
            rows = next(self._running) if self._running else None
        except (LmwebError, RuntimeError) as error:
            logger.exception("a batch of embeddings failed")
            known = error if isinstance(error, LmwebError) else LmwebError("The engine could not compute these embeddings.")
            failed = {job.id: job for job in self._batch if self._jobs.pop(job.id, None)}
            self._batch, self._running = [], None
            return outputs + [_failed(job, known) for job in failed.values()]
        if rows is not None:
            outputs += self._deliver(rows)
        return outputs

    def _deliver(self, rows: NDArray[np.float32]) -> list[Output]:
        """Give each row of a finished batch to its request."""
        touched = {}
        for job, row in zip(self._batch, rows, strict=True):
            if job.id in self._jobs:
                job.first_at = job.first_at or time.perf_counter()
                job.vectors.append(_shortened(row, job.message.request.dimensions))
                touched[job.id] = job
        self._batch, self._running = [], None
        outputs = []
        for job in touched.values():
            complete = job.is_complete
            if events := job.events():
                outputs.append(Output(generation_id=job.id, events=list(events), stats=job.stats() if complete else None))
            if complete:
                del self._jobs[job.id]
        if not self._jobs:
            self._served.clear()
        return outputs

    def _take_batch(self, embedder: Embedder, budget: int, outputs: list[Output]) -> list[list[int]]:
        """Return the next inputs, at least one and then as many as fit into the budget; requests at fault end in ``outputs``."""
        inputs: list[list[int]] = []
        used = 0
        while len(inputs) < embedder.max_inputs and (job := self._next_job()):
            try:
                tokens = job.next_tokens = job.next_tokens or self._tokens(job, embedder)
            except LmwebError as error:
                del self._jobs[job.id]
                outputs.append(_failed(job, error))
                continue
            if inputs and used + len(tokens) > budget:
                break
            job.taken, job.next_tokens = job.taken + 1, None
            job.input_tokens += len(tokens)
            self._served[job.message.owner] += len(tokens)
            used += len(tokens)
            inputs.append(tokens)
            self._batch.append(job)
        return inputs

    def _next_job(self) -> EmbeddingJob | None:
        """Return whose input comes next: the more urgent lane, the person who had least, of their requests the one that had least."""
        waiting = [job for job in self._jobs.values() if job.taken < len(job.message.request.inputs)]
        return min(waiting, key=self._turn, default=None)

    def _turn(self, job: EmbeddingJob) -> tuple[int, int, int]:
        return job.message.request.lane, self._served[job.message.owner], job.input_tokens

    def _tokens(self, job: EmbeddingJob, embedder: Embedder) -> list[int]:
        """Return the tokens of the next input. Raises ``LmwebError`` for one that cannot be embedded."""
        request, index = job.message.request, job.taken
        item = request.inputs[index]
        tokens = embedder.tokenize(item) if isinstance(item, str) else list(item)
        if not tokens:
            raise InvalidRequest(f"Input {index} has no tokens.", param="input")
        if max(tokens) >= self._vocab_size or min(tokens) < 0:
            raise InvalidRequest(f"Input {index} has token ids outside the model's vocabulary of {self._vocab_size}.", param="input")
        if len(tokens) <= embedder.limit:
            return tokens
        if not request.truncate:
            raise ContextLengthExceeded(
                f'Input {index} has {len(tokens)} tokens, but the model takes {embedder.limit}. Shorten it, or send "truncate": true.',
                param="input",
                details={"input": index, "input_tokens": len(tokens), "context_length": embedder.limit},
            )
        if isinstance(item, str):  # the token that closes a text closes the shorter one too
            closing = embedder.closing_tokens
            return tokens[: embedder.limit - closing] + tokens[len(tokens) - closing :]
        return tokens[: embedder.limit]

    @staticmethod
    def _check_dimensions(dimensions: int | None, embedder: Embedder) -> None:
        if dimensions is None or dimensions == embedder.width:
            return
        if dimensions > embedder.width:
            raise InvalidRequest(f"The model's embeddings have {embedder.width} dimensions, not {dimensions}.", param="dimensions")
        if not embedder.can_shorten:
            raise InvalidRequest(
                f"The model's embeddings have {embedder.width} dimensions and were not trained to be shortened. Leave 'dimensions' out.",
                param="dimensions",
            )


def _shortened(row: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    if dimensions is None or dimensions == len(row):
        return row
    part = row[:dimensions]
    shorter: NDArray[np.float32] = part / max(float(np.linalg.norm(part)), 1e-12)
    return shorter


def _failed(job: EmbeddingJob, error: LmwebError) -> Output:
    info = ErrorInfo(code=error.code, message=error.message, param=error.param, details=error.details)
    return Output(generation_id=job.id, error=info, stats=job.stats("failed"))
