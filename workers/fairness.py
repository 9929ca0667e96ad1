"""Who is next: a fair share of a model's time for every person, whatever they throw at it.

Lanes come first (somebody who watches a chat before a program, a program before a batch), and waiting moves up a lane every
``AGEING_SECONDS``, so that nobody starves. Within a lane the person with the fewest running sequences is next, and among equals
the one who used the least GPU time lately (the service counter of "Fairness in Serving Large Language Models", Sheng et al.,
OSDI 2024: a person who comes back does not keep credit from the time they were away).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from workers.engines.base import Sequence

AGEING_SECONDS = 30.0
#: Preempting costs a save and a restore, so a difference of one running sequence is not worth it.
PREEMPT_DIFFERENCE = 2


class FairShare:
    """Keeps count of GPU seconds per owner and orders waiting sequences."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}

    def arrive(self, owner: str, active: Iterable[str]) -> None:
        """Note a new request: an owner without others starts level with the least served active one."""
        others = [self._used.get(name, 0.0) for name in active if name != owner]
        if others:
            self._used[owner] = max(self._used.get(owner, 0.0), min(others))
        else:
            self._used = {owner: 0.0}

    def charge(self, owner: str, seconds: float) -> None:
        """Add GPU time."""
        self._used[owner] = self._used.get(owner, 0.0) + seconds

    def order(self, waiting: Iterable[Sequence], running: Iterable[Sequence], now: float) -> list[Sequence]:
        """Return the waiting sequences in the order in which free slots would be given to them."""
        counts = Counter(sequence.owner for sequence in running)
        left = list(waiting)
        ordered = []
        while left:
            best = min(left, key=lambda s: (lane(s, now), counts[s.owner], self._used.get(s.owner, 0.0), s.submitted_at))
            left.remove(best)
            ordered.append(best)
            counts[best.owner] += 1
        return ordered

    @staticmethod
    def victim(newcomer: Sequence, running: list[Sequence], now: float) -> Sequence | None:
        """Return the running sequence that must make room for the newcomer, if somebody holds more than their share.

        That is the youngest one of the person with most sequences, if that person holds clearly more than the newcomer's.
        """
        counts = Counter(sequence.owner for sequence in running)
        greedy = [s for s in running if counts[s.owner] - counts[newcomer.owner] >= PREEMPT_DIFFERENCE and s.lane >= lane(newcomer, now)]
        return max(greedy, key=lambda s: (counts[s.owner], s.lane, s.submitted_at), default=None)


def lane(sequence: Sequence, now: float) -> int:
    """Return the lane that a sequence counts in by now: it moves up while it waits."""
    return max(0, sequence.lane - int((now - sequence.submitted_at) / AGEING_SECONDS))
