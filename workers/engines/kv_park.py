"""KV states of ended or preempted sequences, kept in host RAM instead of cells: an idle cell slows every step of the others."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass

from workers.engines.base import Sequence
from workers.scheduler import shareable

#: Shorter prefixes are computed again faster than they are looked up.
MIN_TOKENS = 32
#: A state of which less than one part in this many would be used is not worth loading.
MAX_WASTE = 8
#: A search goes through all states while everybody's next token waits; so many chats are hardly in use at once.
MAX_STATES = 512


@dataclass(frozen=True, slots=True)
class Parked:
    """One saved state: the tokens it covers, whose it is, and the engine's bytes."""

    tokens: list[int]
    owner: str
    shared_prefix: int
    data: bytearray


class KvPark:
    """States up to ``limit_bytes`` and ``MAX_STATES``; the least recently used ones leave first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._entries: OrderedDict[int, Parked] = OrderedDict()
        self._next = 0
        self.used_bytes = 0

    def add(self, parked: Parked) -> None:
        """Keep a state; drops those that it extends, and the least recently used ones over the limits."""
        if len(parked.data) > self._limit:
            return
        for key, old in list(self._entries.items()):
            if old.owner == parked.owner and len(old.tokens) <= len(parked.tokens) and parked.tokens[: len(old.tokens)] == old.tokens:
                self._drop(key)
        self._entries[self._next] = parked
        self._next += 1
        self.used_bytes += len(parked.data)
        while self.used_bytes > self._limit or len(self._entries) > MAX_STATES:
            self._drop(next(iter(self._entries)))

    def find(self, sequence: Sequence, *, whole: bool) -> tuple[Parked, int] | None:
        """Return the state with the longest usable prefix of the sequence and its length.

        ``whole`` demands that all of the state's tokens are used (memories that cannot be cut).
        """
        tokens = sequence.tokens
        best: tuple[int, int] | None = None
        for key, parked in self._entries.items():
            n = min(len(tokens) - 1, shareable(sequence, tokens, parked.tokens, parked.owner, parked.shared_prefix))
            worth = n >= max(MIN_TOKENS, len(parked.tokens) // MAX_WASTE)
            if worth and (n == len(parked.tokens) or not whole) and (best is None or n > best[1]):
                best = key, n
        if best is None:
            return None
        self._entries.move_to_end(best[0])
        return self._entries[best[0]], best[1]

    def _drop(self, key: int) -> None:
        self.used_bytes -= len(self._entries.pop(key).data)


def park_bytes() -> int:
    """Return the RAM for parked states: a tenth of the machine's, at most 2 GiB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(2 * 1024**3, total // 10))
