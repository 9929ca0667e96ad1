"""Guessing ahead: tokens that are cheap to guess are checked by the model several at a time, in one step.

The model's own sampler chooses every token from the model's own logits, one after the other; a guess only decides whether the
logits after it are there already. So nothing that is written depends on guesses, and all that is decided here is whether they
pay: how many tokens a step is expected to bring, over what it was measured to cost. Pure logic, no engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from workers.engines.base import Sequence
from workers.scheduler import Slot

#: Guesses per sequence and step at most.
MAX_GUESSES = 8
#: With more sequences than this, a step has enough to do.
MAX_SEQUENCES = 4
#: A plan must promise this much more than going on without guesses.
MARGIN = 1.03
#: Once guessing does not pay, it is tried again after so many steps, each time twice as many: texts change their character.
RETRY_STEPS = 48
MAX_RETRY_STEPS = 1024
#: How many tokens in a row must repeat for the text after them to be a guess.
LOOKUP_TOKENS = 3
#: What is assumed of guesses before any were checked, and how many checked ones that assumption weighs.
FIRST_CHANCE = 0.7
FIRST_WEIGHT = 4.0
REMEMBERED = 64.0


class Chance:
    """How probable it is that a guess is right, given that those before it were."""

    def __init__(self, prior: float = FIRST_CHANCE) -> None:
        self._right, self._checked = prior * FIRST_WEIGHT, FIRST_WEIGHT

    @property
    def value(self) -> float:
        """Return the probability."""
        return self._right / self._checked

    def note(self, *, right: int, wrong: int) -> None:
        """Learn from guesses that were checked; old ones fade."""
        self._right += right
        self._checked += right + wrong
        if self._checked > REMEMBERED:
            self._right, self._checked = self._right / 2, self._checked / 2


class StepTimes:
    """How long a step takes by the number of tokens in it, measured; in seconds. Single slow steps (a busy machine) count little."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def note(self, tokens: int, seconds: float) -> None:
        """Learn from a step. Many tokens never take longer than as many steps of fewer would."""
        old = self._seconds.get(tokens)
        if old is None:
            seconds = min([seconds, *(known * tokens / n for n, known in self._seconds.items() if n < tokens)])
        self._seconds[tokens] = seconds if old is None else 0.7 * old + 0.3 * min(seconds, 2 * old)

    def expect(self, tokens: int) -> float:
        """Return the time of such a step: no more than one of more tokens took, else between its measured neighbours.

        More tokens than were ever measured are expected to take no longer, so that they are tried.
        """
        below = max((n for n in self._seconds if n < tokens), default=0)
        longer = [n for n in self._seconds if n >= tokens]
        if not longer:
            return self._seconds.get(below, 0.0)
        at_most = min(self._seconds[n] for n in longer)
        if not below or tokens in self._seconds:
            return at_most
        share = (tokens - below) / (min(longer) - below)
        return min(at_most, self._seconds[below] + share * (at_most - self._seconds[below]))


def best_length(times: StepTimes, sequences: int, offers: Iterable[tuple[float, int]], *, room: int, guess_seconds: float = 0.0) -> int:
    """Return how many tokens to guess per sequence; 0 if it does not pay.

    Args:
        times: what steps cost.
        sequences: how many sequences the step advances by at least one token.
        offers: for each sequence that may guess, the chance of a guess and how many there are.
        room: guesses in the step at most.
        guess_seconds: what one round of guesses costs by itself (a draft model's step).
    """
    offers = list(offers)
    plain = times.expect(sequences)
    if not plain or not offers:
        return 0
    best, best_rate = 0, MARGIN * sequences / plain
    for length in range(1, min(MAX_GUESSES, max(n for _, n in offers)) + 1):
        guesses = sum(min(length, n) for _, n in offers)
        if guesses > room:
            break
        gained = sum(_expected(chance, min(length, n)) for chance, n in offers)
        rate = (sequences + gained) / (times.expect(sequences + guesses) + length * guess_seconds)
        if rate > best_rate:
            best, best_rate = length, rate
    return best


def _expected(chance: float, n: int) -> float:
    """Return how many of ``n`` guesses in a row are expected to be right."""
    return sum(chance**i for i in range(1, n + 1))


class Lookup:
    """Prompt lookup: where the last tokens stood before in the text, what followed there is the guess."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = LOOKUP_TOKENS

    def guess(self, tokens: list[int], n: int) -> list[int]:
        """Return up to ``n`` tokens that may follow. ``tokens`` only ever grows between calls."""
        for end in range(self._indexed, len(tokens)):
            self._after[tuple(tokens[end - LOOKUP_TOKENS : end])] = end
        self._indexed = max(self._indexed, len(tokens))
        start = self._after.get(tuple(tokens[-LOOKUP_TOKENS:]))
        return [] if start is None else tokens[start : start + n]


@dataclass(slots=True)
class Guesser:
    """What is known of one sequence: its text for lookups, and how good guesses were; ``paused`` counts steps without any."""

    lookup_chance: Chance
    draft_chance: Chance
    lookup: Lookup = field(default_factory=Lookup)
    paused: int = 0
    patience: int = RETRY_STEPS
    retries: int = 0

    def retry_length(self) -> int:
        """Return how many tokens to guess although it does not seem to pay: now and then a few, by turns 1, 2 and 4."""
        self.paused += 1
        if self.paused < self.patience:
            return 0
        self.paused = 0
        self.patience = min(2 * self.patience, MAX_RETRY_STEPS)
        self.retries += 1
        return 1 << self.retries % 3


@dataclass(slots=True)
class Guesses:
    """The guesses for one sequence in one step, and by whom they are."""

    tokens: list[int]
    by_draft: bool


class Drafter(Protocol):
    """A draft model: see ``workers.engines.llama_draft.DraftModel``."""

    key: str
    round_seconds: float

    def guess(self, wanted: list[tuple[str, list[int]]], n: int) -> dict[str, list[int]]:
        """Return up to ``n`` guesses for each sequence (an id and its tokens so far)."""

    def forget(self, owner: str) -> None:
        """Forget a sequence."""

    def close(self) -> None:
        """Free the model."""


class Speculation:
    """Guesses for all sequences of an engine: by lookup if ``lookup`` is set, and by ``draft`` for those that want it."""

    def __init__(self, *, lookup: bool) -> None:
        self.lookup = lookup
        self.draft: Drafter | None = None
        self._times = StepTimes()
        self._guessers: dict[str, Guesser] = {}
        self._chances = {False: Chance(), True: Chance()}  # over all sequences, by whether a draft model guessed
        self._skip = False

    @property
    def is_on(self) -> bool:
        """Whether anybody may have guesses."""
        return self.lookup or self.draft is not None

    def plan(self, slots: list[Slot], room: int) -> dict[int, Guesses]:
        """Return the guesses to check in a step that advances these slots, by slot; ``room`` is how many at most."""
        if self._skip or len(slots) > min(MAX_SEQUENCES, room):
            self._skip = False
            return {}
        offers = [offer for slot in slots if slot.sequence is not None and (offer := self._offer(slot, slot.sequence)) is not None]
        if not offers:
            return {}
        cost = self.draft.round_seconds if self.draft is not None and any(offer.by_draft for offer in offers) else 0.0
        n = best_length(self._times, len(slots), [(o.chance, o.available) for o in offers], room=room, guess_seconds=cost)
        if not n and cost and not best_length(self._times, len(slots), [(1.0, o.available) for o in offers], room=room, guess_seconds=cost):
            return {}  # not even if all were right
        lengths = [min(o.available, n or o.guesser.retry_length()) for o in offers]
        if not n and sum(lengths) > room:
            return {}
        plan = {
            o.slot.id: Guesses(o.found[:length], by_draft=False) for o, length in zip(offers, lengths, strict=True) if o.found and length
        }
        drafted = {o.slot.sequence.id: (o.slot, n) for o, n in zip(offers, lengths, strict=True) if o.by_draft and n and o.slot.sequence}
        if drafted and self.draft is not None:
            longest = max(n for _, n in drafted.values())
            found = self.draft.guess([(owner, slot.tokens) for owner, (slot, _) in drafted.items()], longest)
            for owner, tokens in found.items():
                slot, length = drafted[owner]
                plan[slot.id] = Guesses(tokens[:length], by_draft=True)
        return plan

    def skip_next(self) -> None:
        """Guess nothing in the next step: there was no room for it."""
        self._skip = True

    def note_step(self, tokens: int, seconds: float) -> None:
        """Learn what a step without prompts took."""
        if self.is_on:
            self._times.note(tokens, seconds)

    def note(self, sequence: Sequence, guesses: Guesses, accepted: int, *, mismatch: bool) -> None:
        """Learn how guesses did: the first ``accepted`` were right, the next one was wrong if there was a ``mismatch``."""
        guesser, counts = self._guessers[sequence.id], sequence.drafts
        chance = guesser.draft_chance if guesses.by_draft else guesser.lookup_chance
        chance.note(right=accepted, wrong=int(mismatch))
        self._chances[guesses.by_draft].note(right=accepted, wrong=int(mismatch))
        counts.by_draft |= guesses.by_draft
        counts.accepted += accepted
        counts.rejected += mismatch
        counts.ignored += len(guesses.tokens) - accepted - mismatch

    def forget(self, sequence_id: str) -> None:
        """Drop what is known of a sequence that has ended, or whose text was changed."""
        if self._guessers.pop(sequence_id, None) is not None and self.draft is not None:
            self.draft.forget(sequence_id)

    def _offer(self, slot: Slot, sequence: Sequence) -> _Offer | None:
        """Return what may be guessed for a slot, None for nothing."""
        left = sequence.limit - len(sequence.output) - 1
        if sequence.window:
            left = min(left, sequence.window - len(slot.tokens))
        if left <= 0:
            return None
        guesser = self._guessers.get(sequence.id)
        if guesser is None:
            lookup, draft = (Chance(self._chances[by_draft].value) for by_draft in (False, True))
            guesser = self._guessers[sequence.id] = Guesser(lookup, draft)
        drafted = self.draft is not None and sequence.draft == self.draft.key
        found = guesser.lookup.guess(slot.tokens, min(MAX_GUESSES, left)) if self.lookup else []
        if found and not (drafted and guesser.draft_chance.value > guesser.lookup_chance.value):
            return _Offer(slot, guesser, found, False, guesser.lookup_chance.value, len(found))
        return _Offer(slot, guesser, [], True, guesser.draft_chance.value, min(MAX_GUESSES, left)) if drafted else None


@dataclass(frozen=True, slots=True)
class _Offer:
    """What one slot could try: guesses that were found, or ``available`` ones that the draft model would have to make."""

    slot: Slot
    guesser: Guesser
    found: list[int]
    by_draft: bool
    chance: float
    available: int
