"""Who is next: a fair share of a model's time for every person, whatever they throw at it.

Lanes come first (somebody who watches a chat before a program, a program before a batch), and who waits with nothing running moves
up a lane every ``AGEING_SECONDS``, so that nobody starves. Within a lane the person with the fewest running sequences is next, and among equals
the one who used the least GPU time lately (the service counter of "Fairness in Serving Large Language Models", Sheng et al.,
OSDI 2024: a person who comes back does not keep credit from the time they were away).

Before all that, ``PersonalLimits`` holds back what a person has beyond the number of answers that they may have at once, whichever
models they come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the host uses ``PersonalLimits`` and need not hold what engines use
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
            best = min(left, key=lambda s: self._turn(s, counts[s.owner], now))
            left.remove(best)
            ordered.append(best)
            counts[best.owner] += 1
        return ordered

    def _turn(self, sequence: Sequence, running: int, now: float) -> tuple[int, int, float, float]:
        """Return what orders sequences, smallest first; ``running`` counts those of the same person.

        Who has something running does not starve: what else they wait for keeps its lane, or the last of a person's many requests
        would at some point stand before somebody's only one.
        """
        place = sequence.lane if running else lane(sequence, now)
        return place, running, self._used.get(sequence.owner, 0.0), sequence.submitted_at

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


@dataclass(slots=True)
class _Person:
    """What one person has here: what runs, what is held back (in order of arrival, with its lane), how long theirs take in seconds."""

    running: set[str] = field(default_factory=set)
    held: dict[str, int] = field(default_factory=dict)
    limit: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Hold:
    """Why a generation is held back: ``position`` of the person's own are before it; ``eta_seconds`` None while unknown."""

    position: int
    limit: int
    eta_seconds: float | None

    @property
    def reason(self) -> str:
        """Return the reason in words."""
        return f"You have {self.limit} answer{'s' if self.limit > 1 else ''} running, as many as you may have at once."


class PersonalLimits:
    """Counts the generations of each person on this machine. Not safe for threads: the host's lock is around it."""

    def __init__(self) -> None:
        self._people: dict[str, _Person] = {}

    def enter(self, owner: str, generation_id: str, *, lane: int, limit: int) -> bool:
        """Note a generation; returns whether it may run now. ``limit`` is how many the person may have at once, 0 for any number."""
        person = self._people.setdefault(owner, _Person())
        person.limit = limit
        if generation_id in person.running or not limit or len(person.running) < limit:
            person.running.add(generation_id)
            return True
        person.held[generation_id] = lane
        return False

    def leave(self, owner: str, generation_id: str, *, seconds: float = 0.0) -> list[str]:
        """Note the end of a generation, which ran for ``seconds``; returns those that may run now."""
        person = self._people.get(owner)
        if person is None:
            return []
        person.held.pop(generation_id, None)
        if generation_id in person.running:
            person.running.discard(generation_id)
            person.seconds = seconds if not person.seconds else 0.8 * person.seconds + 0.2 * seconds
        freed = []
        while person.held and (not person.limit or len(person.running) < person.limit):
            freed.append(self._order(person)[0])
            del person.held[freed[-1]]
            person.running.add(freed[-1])
        if not person.running and not person.held:
            del self._people[owner]
        return freed

    def holds(self) -> dict[str, Hold]:
        """Return all generations that are held back, with the reasons."""
        found = {}
        for person in self._people.values():
            for position, generation_id in enumerate(self._order(person)):
                eta = round((position + 1) * person.seconds / max(person.limit, 1), 1) or None
                found[generation_id] = Hold(position, person.limit, eta)
        return found

    @staticmethod
    def _order(person: _Person) -> list[str]:
        """Return what is held back in the order of its turns: by lane, then as it came."""
        return sorted(person.held, key=lambda generation_id: person.held[generation_id])
