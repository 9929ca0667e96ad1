"""Which sequences run, and what goes into the next batch. Pure logic over token lists: knows neither llama.cpp nor time itself.

Continuous batching: every step holds one token of each decoding sequence, then prompt chunks, short prompts first. The prompt share
is sized by time, so that streams keep their pace while a long prompt comes in. Prefixes are looked up over all slots, busy
ones too; a newcomer whose prefix another sequence is computing right now waits for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from workers.engines.base import Sequence
from workers.fairness import FairShare

#: A running computation of a longer prefix is worth waiting for from this many tokens on.
COALESCE_TOKENS = 64
#: Cells reserved at admission for the answer of a sequence, at most; beyond that preemption is the fallback.
RESERVED_OUTPUT = 512
MIN_CHUNK = 32
#: llama.cpp's attention takes prompts in tiles of so many tokens on a CPU; what is less costs several times as much per token.
CPU_TILE = 64
#: So few tokens cost less by themselves than a tile that they do not fill.
CPU_REST = 16
#: While more people wait for the first token than for the next one, a turn may take in whole prompts up to so many times its room.
LONGEST_TURN = 4
#: Short prompts are computed before long ones, so that a chat need not wait for somebody's book; every second of waiting makes up
#: for so many tokens, so that the book gets its turn.
PROMPT_AGEING_TOKENS = 200.0


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence id of the engine. ``tokens`` is what it holds or will hold, of which ``n_kv`` are computed.

    The cells of its first ``borrowed`` tokens are those of ``lender``.
    """

    id: int
    sequence: Sequence | None = None
    tokens: list[int] = field(default_factory=list)
    n_kv: int = 0
    borrowed: int = 0
    lender: Slot | None = None

    @property
    def is_decoding(self) -> bool:
        """Whether only the token sampled last is missing."""
        return self.n_kv == len(self.tokens) - 1

    @property
    def remaining(self) -> int:
        """Return how many tokens are still to be computed."""
        return len(self.tokens) - self.n_kv


@dataclass(frozen=True, slots=True)
class Admission:
    """Put ``sequence`` into ``slot``; its first ``n_shared`` tokens are copied from ``source`` (a busy slot)."""

    slot: Slot
    sequence: Sequence
    source: Slot | None
    n_shared: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute tokens ``start`` to ``end`` (exclusive) of the slot in this step."""

    slot: Slot
    start: int
    end: int


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return the length of the longest common prefix. List slices compare in C, so bisection beats a loop."""
    high = min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def shareable(sequence: Sequence, tokens: list[int], other: list[int], other_owner: str, other_shared: int) -> int:
    """Return how many leading ``tokens`` of the sequence may come from another's: all within one owner, else the system prompt.

    What is private to one person must never speed up, and so reveal itself to, another.
    """
    n = common_prefix(tokens, other)
    if sequence.owner != other_owner:
        n = min(n, sequence.shared_prefix, other_shared)
    return n


class Scheduler:
    """Waiting and running sequences of one engine.

    Args:
        slots: how many sequences run at once.
        cells: KV cells in all.
        batch_tokens: tokens per step at most.
        can_share: whether the model's memory allows copying part of a sequence (recurrent ones do not).
        on_cpu: whether decoding sequences and prompts take turns instead of sharing a step. A GPU reads its weights once for
            both; a CPU has to multiply either way, and a tile of its attention that holds both visits the cells of all.
        is_unified: whether the sequences share one KV cache. With caches of their own a CPU computes the attention of each prompt in
            a step by itself, without tiles where there are less than a tile of its tokens.
    """

    def __init__(self, *, slots: int, cells: int, batch_tokens: int, can_share: bool, on_cpu: bool, is_unified: bool = True) -> None:
        self.slots = [Slot(i) for i in range(slots)]
        self.waiting: list[Sequence] = []
        self.fair = FairShare()
        self.cells = cells
        self.batch_tokens = batch_tokens
        self.can_share = can_share
        self.on_cpu = on_cpu
        self.one_prompt_per_step = on_cpu and not is_unified
        self._turn: tuple[int, int] | None = None  # of the prompts: tokens it may have, tokens it had; None: it begins with the next step

    @property
    def running(self) -> list[Slot]:
        """Return the busy slots."""
        return [slot for slot in self.slots if slot.sequence is not None]

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting) or any(slot.sequence is not None for slot in self.slots)

    @property
    def sequences(self) -> list[Sequence]:
        """Return everything that waits or runs."""
        return self.waiting + self._running_sequences()

    def find(self, sequence_id: str) -> Slot | None:
        """Return the slot that runs this sequence."""
        return next((slot for slot in self.running if slot.sequence and slot.sequence.id == sequence_id), None)

    def enqueue(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn."""
        active = {other.owner for other in self.waiting} | {slot.sequence.owner for slot in self.running if slot.sequence}
        self.fair.arrive(sequence.owner, active)
        self.waiting.append(sequence)

    def queue(self) -> list[Sequence]:
        """Return the waiting sequences in the order of their turns."""
        return self.fair.order(self.waiting, self._running_sequences(), time.perf_counter())

    def withdraw(self, sequence_id: str) -> bool:
        """Take a sequence out of the waiting ones; returns whether it was there."""
        for sequence in self.waiting:
            if sequence.id == sequence_id:
                self.waiting.remove(sequence)
                return True
        return False

    def next_admission(self) -> Admission | None:
        """Return the next sequence to admit with its slot and the prefix to copy, or None. Call ``occupy`` with the outcome."""
        free = next((slot for slot in self.slots if slot.sequence is None), None)
        if free is None:
            return None
        for sequence in self.queue() if len(self.waiting) > 1 else self.waiting:
            source, n_shared, is_growing = self._best_prefix(sequence)
            if is_growing:
                continue  # somebody computes a longer common prefix right now: come back when it is there
            if not self._fits(sequence, n_shared):
                return None  # nobody overtakes whose turn it is, or a long prompt would wait for ever
            self.waiting.remove(sequence)
            return Admission(free, sequence, source, n_shared)
        return None

    def occupy(self, slot: Slot, sequence: Sequence, n_kv: int, *, lender: Slot | None = None) -> None:
        """Note that the slot holds this sequence now, with ``n_kv`` tokens computed already, which may be ``lender``'s."""
        slot.sequence, slot.tokens, slot.n_kv = sequence, sequence.tokens, n_kv
        slot.lender, slot.borrowed = lender, n_kv if lender else 0

    def slide(self, slot: Slot, n_kv: int) -> None:
        """Note that the sequence's window has moved on: of what it sees now, ``n_kv`` tokens are computed."""
        assert slot.sequence is not None
        slot.tokens, slot.n_kv, slot.borrowed = slot.sequence.tokens, n_kv, min(slot.borrowed, n_kv)
        for other in self.slots:
            if other.lender is slot:
                other.borrowed = min(other.borrowed, n_kv)

    def release(self, slot: Slot) -> None:
        """Free the slot. Cells that others borrowed stay in use: whoever has most of them is their owner from now on."""
        borrowers = [other for other in self.slots if other.lender is slot]
        if borrowers:
            heir = max(borrowers, key=lambda other: other.borrowed)
            for other in borrowers:
                other.lender = heir
            heir.lender, heir.borrowed = slot.lender, min(heir.borrowed, slot.borrowed)
        slot.sequence, slot.tokens, slot.n_kv, slot.borrowed, slot.lender = None, [], 0, 0, None

    def gap(self) -> tuple[Slot, Slot] | None:
        """Return the last busy slot and the first free one, if the free one comes before it."""
        free = next((slot for slot in self.slots if slot.sequence is None), None)
        last = next((slot for slot in reversed(self.slots) if slot.sequence is not None), None)
        return (last, free) if free is not None and last is not None and free.id < last.id else None

    def overdue(self) -> Slot | None:
        """Return the slot that has to make room, when somebody who has less than their share finds no slot or no cells."""
        if not self.waiting:
            return None
        now = time.perf_counter()
        running = self._running_sequences()
        first = self.fair.order(self.waiting, running, now)[0]
        if len(running) < len(self.slots) and self._fits(first, 0):
            return None
        victim = self.fair.victim(first, running, now)
        return self.find(victim.id) if victim else None

    def preempt(self) -> Slot | None:
        """Return the youngest running slot, to be parked and queued again; None when only one runs."""
        running = self.running
        if len(running) < 2:
            return None
        return max(running, key=lambda slot: slot.sequence.submitted_at if slot.sequence else 0.0)

    def plan(self, prefill_budget: int) -> tuple[list[Slot], list[Chunk]]:
        """Return the decoding slots and the prompt chunks of the next step.

        ``prefill_budget`` bounds the prompt tokens between two tokens of those who decode; with nobody decoding the whole batch
        is used.
        """
        running = self.running
        decoding = [slot for slot in running if slot.is_decoding and slot.sequence and slot.sequence.output]
        now = time.perf_counter()
        prefilling = [slot for slot in running if slot not in decoding]
        prefilling.sort(key=lambda slot: (self._prompt_turn(slot, now), slot.id))
        room = self._prompt_room(len(decoding), prefill_budget)
        if self.on_cpu and decoding and prefilling:
            return self._take_turns(decoding, prefilling, room)
        self._turn = None
        return decoding, self._chunks(prefilling, room)

    def _take_turns(self, decoding: list[Slot], prefilling: list[Slot], room: int) -> tuple[list[Slot], list[Chunk]]:
        """Return a step of prompts, until ``room`` of their tokens are computed, and then a step of those who decode.

        Each prompt has a step of its own, so that its answer begins as soon as it is read and not when its neighbours are; those
        shorter than a tile share one. What is left of a prompt is not cut once more for less than a tile. A turn is longer for
        whole prompts while more wait for their first token than for the next: few who decode leave a CPU half idle.
        """
        room, used = self._turn or (room, 0)
        left = (room - used) // CPU_TILE * CPU_TILE if used else room
        first = prefilling[0].remaining
        if left <= 0:
            if len(prefilling) <= len(decoding) or used + first > room * LONGEST_TURN:
                self._turn = None
                return decoding, []
            left = first
        wanted = max(first, CPU_TILE) if first < left + CPU_TILE else left
        chunks = self._chunks(prefilling, min(wanted, self.batch_tokens))
        if len(chunks) > 1 and chunks[-1].end < len(chunks[-1].slot.tokens):
            chunks.pop()
        self._turn = room, used + sum(chunk.end - chunk.start for chunk in chunks)
        return [], chunks

    def _chunks(self, prefilling: list[Slot], room: int) -> list[Chunk]:
        """Return what of these prompts is computed next, so many tokens at most."""
        chunks = []
        for slot in prefilling[:1] if self.one_prompt_per_step else prefilling:
            n = min(slot.remaining, room)
            if n <= 0:
                break
            if self.on_cpu and CPU_REST < slot.remaining - n < CPU_TILE < n:
                n -= CPU_TILE  # else its last tokens would be less than a tile
            chunks.append(Chunk(slot, slot.n_kv, slot.n_kv + n))
            room -= n
        return chunks

    @staticmethod
    def _prompt_turn(slot: Slot, now: float) -> float:
        """Return what orders the prompts that are being computed, smallest first."""
        waited = now - slot.sequence.submitted_at if slot.sequence else 0.0
        return slot.remaining - PROMPT_AGEING_TOKENS * waited

    def _prompt_room(self, decoding: int, prefill_budget: int) -> int:
        """Return how many prompt tokens may be computed in one go."""
        if not decoding:
            return self.batch_tokens
        if self.on_cpu:
            return min(self.batch_tokens, max(CPU_TILE, round(prefill_budget / CPU_TILE) * CPU_TILE))
        return max(MIN_CHUNK, min(self.batch_tokens - decoding, prefill_budget))

    def _running_sequences(self) -> list[Sequence]:
        return [slot.sequence for slot in self.slots if slot.sequence is not None]

    def _best_prefix(self, sequence: Sequence) -> tuple[Slot | None, int, bool]:
        """Return the slot with the longest computed common prefix, its length, and whether to wait for more.

        It is worth waiting for a much longer one that is being computed, and on a CPU for any that is finished before this prompt
        would have its turn, because there prompts are computed one after the other, shortest first.
        """
        if not self.can_share:
            return None, 0, False
        best, length, growing = None, 0, []
        tokens = sequence.tokens
        limit = len(tokens) - 1  # one token must be computed to get logits
        for slot in self.running:
            assert slot.sequence is not None
            n = min(limit, shareable(sequence, tokens, slot.tokens, slot.sequence.owner, slot.sequence.shared_prefix))
            if min(n, slot.n_kv) > length:
                best, length = slot, min(n, slot.n_kv)
            if n > slot.n_kv:
                growing.append((n, slot.remaining))
        is_growing = any(
            n > length + COALESCE_TOKENS or (self.on_cpu and n > length and remaining <= len(tokens) - length) for n, remaining in growing
        )
        return best, length, is_growing

    def _fits(self, sequence: Sequence, n_shared: int) -> bool:
        used = sum(len(slot.tokens) - slot.borrowed + self._reserve(slot.sequence) for slot in self.running if slot.sequence)
        needed = len(sequence.prompt) + len(sequence.output) - sequence.dropped - n_shared + self._reserve(sequence)
        return used + needed <= self.cells or not self.running

    @staticmethod
    def _reserve(sequence: Sequence) -> int:
        """Return the cells to keep free for what the sequence still says."""
        left = max(sequence.limit - len(sequence.output), 0)
        if sequence.window:
            left = min(left, sequence.window - len(sequence.prompt) - len(sequence.output) + sequence.dropped)
        return min(left, RESERVED_OUTPUT)
