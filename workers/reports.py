"""What a runner tells besides its loop: outputs to the host, positions to those who wait, a line per step to a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from workers.engines.base import Sequence, StepResult
from workers.events import QueueUpdate
from workers.protocol import Channel, Output, Step

QUEUE_REPORT_SECONDS = 1.0
#: What fast streams bring is gathered for so long: viewers get fifty entries a second.
GATHER_SECONDS = 0.02
STEP_LOG_BYTES = 4 * 1024 * 1024


class Outbox:
    """Sends what steps bring: a generation's first words and its end at once, and otherwise what gathered in ``GATHER_SECONDS``.

    A small model makes hundreds of steps a second, and a message for each would wake other processes as often.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._outputs: dict[str, Output] = {}
        self._begun: set[str] = set()
        self._sent_at = 0.0

    def add(self, outputs: list[Output]) -> None:
        """Take what a step brought."""
        urgent = False
        for output in outputs:
            key = output.generation_id
            urgent |= output.stats is not None or key not in self._begun
            self._begun.add(key)
            if output.stats is not None:
                self._begun.discard(key)
            self._outputs[key] = joined(self._outputs[key], output) if key in self._outputs else output
        if urgent or time.monotonic() - self._sent_at >= GATHER_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what gathered."""
        if self._outputs:
            self._channel.send(Step(outputs=list(self._outputs.values())))
            self._outputs = {}
            self._sent_at = time.monotonic()


def joined(earlier: Output, later: Output) -> Output:
    """Return two outputs of a generation as one."""
    return msgspec.structs.replace(later, events=[*earlier.events, *later.events], tokens=[*earlier.tokens, *later.tokens])


class QueueReport:
    """Tells those who wait where they stand, at most once a second and only when it changed."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._seconds_per_generation = 0.0
        self._told: dict[str, tuple[int, bool]] = {}
        self._told_at = 0.0

    def note_end(self, seconds: float) -> None:
        """Learn how long generations take."""
        self._seconds_per_generation = seconds if not self._seconds_per_generation else 0.8 * self._seconds_per_generation + 0.2 * seconds

    def due(self, queue: Callable[[], list[Sequence]]) -> Iterator[tuple[str, QueueUpdate]]:
        """Yield the events that are due now, with the generation that each belongs to."""
        now = time.monotonic()
        if now - self._told_at < QUEUE_REPORT_SECONDS:
            return
        self._told_at = now
        is_known = self._seconds_per_generation > 0
        standing = {sequence.id: (position, is_known) for position, sequence in enumerate(queue())}
        for generation_id, (position, _) in standing.items():
            if self._told.get(generation_id) != standing[generation_id]:
                eta = round((position + 1) * self._seconds_per_generation / self._slots, 1) or None
                yield generation_id, QueueUpdate(position=position, reason="The model is busy with other answers.", eta_seconds=eta)
        self._told = standing


class StepLog:
    """One JSON line per engine step, flushed about once a second, in at most two files of ``STEP_LOG_BYTES``."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._file: IO[str] | None = self._path.open("w") if self._path else None
        self._step = 0
        self._flushed_at = 0.0

    def write(self, result: StepResult) -> None:
        """Note a step: how many sequences decoded, how many prompt tokens were computed, how many were guessed, and the time in ms."""
        if self._file is None or self._path is None or not (result.decode_sequences or result.prefill_tokens):
            return
        self._step += 1
        record = {
            "step": self._step,
            "decode": result.decode_sequences,
            "prefill": result.prefill_tokens,
            "ms": round(result.seconds * 1e3, 3),
            **({"guessed": result.guessed_tokens} if result.guessed_tokens else {}),
        }
        self._file.write(json.dumps(record) + "\n")
        now = time.monotonic()
        if now - self._flushed_at > 1.0:
            self.flush()
            self._flushed_at = now
            if self._file.tell() > STEP_LOG_BYTES:
                self._file.close()
                self._path.replace(self._path.with_suffix(".1.jsonl"))
                self._file = self._path.open("w")

    def flush(self) -> None:
        """Write out what is buffered (also when the runner falls idle)."""
        if self._file is not None:
            self._file.flush()
