"""What the engines do alike: sequences wait, are let in when it is their turn and there is room, and may have to leave again."""

from __future__ import annotations

from abc import ABC, abstractmethod

from workers.engines.base import Sequence
from workers.engines.sampling import TokenSampler
from workers.scheduler import Admission, Scheduler, Slot


class BatchingEngine(ABC):
    """The part of an engine over its scheduler. A sequence keeps its sampler, once it has one, until it is removed."""

    scheduler: Scheduler
    _samplers: dict[str, TokenSampler]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.scheduler.enqueue(sequence)

    def remove(self, sequence_id: str) -> None:
        """Take a sequence out; what it computed is kept for its next turn."""
        slot = self.scheduler.find(sequence_id)
        if slot is not None:
            self._vacate(slot)
        else:
            self.scheduler.withdraw(sequence_id)
        sampler = self._samplers.pop(sequence_id, None)
        if sampler:
            sampler.close()

    def queue(self) -> list[Sequence]:
        """Return the waiting sequences in the order of their turns."""
        return self.scheduler.queue()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def close(self) -> None:
        """Free the samplers."""
        for sampler in self._samplers.values():
            sampler.close()

    def _admit_waiting(self) -> None:
        """Let those in whose turn it is, and who fit."""
        if (overdue := self.scheduler.overdue()) is not None:
            self._preempt(overdue)
        while self.scheduler.waiting and (admission := self.scheduler.next_admission()) is not None:
            self._admit(admission)

    def _preempt(self, slot: Slot) -> None:
        """Let a running sequence wait; it goes on where it was."""
        sequence = slot.sequence
        assert sequence is not None
        self._vacate(slot)
        self.scheduler.waiting.append(sequence)

    @abstractmethod
    def _admit(self, admission: Admission) -> None:
        """Give a sequence its slot, with the longest prefix at hand."""

    @abstractmethod
    def _vacate(self, slot: Slot) -> None:
        """Keep what a slot has computed, and free it."""
