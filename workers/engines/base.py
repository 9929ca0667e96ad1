"""What an engine is: it holds one model and advances many sequences at once, one step at a time.

The runner (``workers.runner``) owns requests, text and events; an engine knows tokens only. An engine module is imported
only when it is chosen, so a library that is not installed costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from workers.constraints import Constraint, ConstraintFactory
from workers.schemas import LoadConfig, SamplingParams


@dataclass(slots=True)
class DraftCounts:
    """Guessed tokens by what became of them; ``ignored`` were not looked at. ``by_draft``: a draft model made some."""

    accepted: int = 0
    rejected: int = 0
    ignored: int = 0
    by_draft: bool = False


@dataclass(slots=True)
class Sequence:
    """One generation inside an engine. Token ids only; times are ``time.perf_counter`` seconds.

    Attributes:
        id: the generation's id.
        owner: whose it is; cached prefixes beyond ``shared_prefix`` are used for the same owner only.
        prompt: the prompt's tokens.
        shared_prefix: how many of them (the system prompt) may be shared between owners.
        sampling: how tokens are chosen; the seed is always set.
        limit: number of output tokens at most.
        lane: ``workers.schemas.Lane``.
        output: tokens sampled so far, also those of an interrupted earlier run.
        constraint: what the answer must look like, if anything.
        top_logprobs: how many alternatives to report per token; None reports nothing.
        draft: the key of the draft model that is to guess ahead, if any.
        window: how many tokens the model sees at once if the sequence may grow past that; 0: ``limit`` keeps it within.
        keep: how many of the first tokens stay in sight then; at most half of ``window``.
        cached: prompt tokens that came out of a cache.
        drafts: how guesses at its tokens did.
    """

    id: str
    owner: str
    prompt: list[int]
    shared_prefix: int
    sampling: SamplingParams
    limit: int
    lane: int = 0
    output: list[int] = field(default_factory=list)
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    draft: str = ""
    window: int = 0
    keep: int = 0
    cached: int = 0
    drafts: DraftCounts = field(default_factory=DraftCounts)
    submitted_at: float = field(default_factory=time.perf_counter)

    @property
    def dropped(self) -> int:
        """Return how many tokens after the first ``keep`` are out of sight.

        Whenever the window is full, half of what need not be kept goes. That depends on nothing but the number of tokens, so a
        sequence that was interrupted goes on with the same ones in sight.
        """
        excess = len(self.prompt) + len(self.output) - self.window
        if not self.window or excess <= 0:
            return 0
        part = (self.window + 1 - self.keep) // 2
        return -(-excess // part) * part

    @property
    def tokens(self) -> list[int]:
        """Return prompt and output, as far as the model sees them."""
        everything, dropped = self.prompt + self.output, self.dropped
        return everything[: self.keep] + everything[self.keep + dropped :] if dropped else everything


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was really loaded: ``context_length`` per sequence, ``cells`` in all sequences together (tokens), sizes in bytes."""

    context_length: int
    cells: int
    parallel: int
    vocab_size: int
    weights_bytes: int
    eval_batch_size: int
    chat_template: str
    bos_text: str
    eos_text: str
    can_generate: bool = True


class Logprob(NamedTuple):
    """A sampled token's natural log-probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


#: Told of each token as soon as it is sampled (the token is in ``Sequence.output`` then, its log-probability comes if it was asked
#: for); returns whether the sequence goes on. Between two tokens of one step it must bring a constraint up to date.
TokenTaker = Callable[[Sequence, int, Logprob | None], bool]


@dataclass(slots=True)
class StepResult:
    """What one step did: prompt progress per sequence (tokens done), whose window moved on, and counts for the step log."""

    prefilled: list[tuple[Sequence, int]] = field(default_factory=list)
    failed: list[tuple[Sequence, str]] = field(default_factory=list)
    slid: list[Sequence] = field(default_factory=list)
    decode_sequences: int = 0
    prefill_tokens: int = 0
    guessed_tokens: int = 0
    seconds: float = 0.0


class Embedder(Protocol):
    """Turns token lists into vectors.

    Attributes:
        limit: the longest input, in tokens.
        width: numbers per vector.
        batch_tokens: how many tokens of inputs are best computed together.
        max_inputs: how many inputs a batch holds at most.
        closing_tokens: how many tokens ``tokenize`` puts after a text.
        can_shorten: whether the first part of a vector is a vector too.
    """

    limit: int
    width: int
    batch_tokens: int
    max_inputs: int
    closing_tokens: int
    can_shorten: bool

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, with those that the model wants around it."""

    def embed(self, inputs: list[list[int]]) -> Iterator[NDArray[np.float32] | None]:
        """Yield None while there is more to compute, then one row of length 1 per input, in their order."""


class Engine(Protocol):
    """A loaded model. All methods are called from one thread."""

    info: EngineInfo

    def embedder(self) -> Embedder:
        """Return what computes embeddings. Raises ``ModelLoadFailed`` when there is no memory for it, ``InvalidRequest`` if it has none."""

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """Return the tokens of a text in which special tokens count as such."""

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token stands for; empty for control tokens."""

    def is_end(self, token: int) -> bool:
        """Return whether the token ends a generation."""

    def constraints(self) -> ConstraintFactory:
        """Return what makes constraints over the vocabulary."""

    def use_draft(self, key: str, path: str) -> bool:
        """Have this draft model in memory; False if another one is in use, so that there will be no guesses for now.

        Raises ``ModelLoadFailed``, or ``InvalidRequest`` with the reason if its vocabulary is another one.
        """

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. It is admitted, perhaps after others, in one of the next steps.

        Raises ``InvalidRequest`` with the reason if it asks for what this engine cannot do.
        """

    def remove(self, sequence_id: str) -> None:
        """Take a sequence out, finished or not; its slot is free at once. Unknown ids are ignored."""

    def queue(self) -> list[Sequence]:
        """Return the waiting sequences in the order of their turns."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def step(self, take: TokenTaker) -> StepResult:
        """Admit what fits, compute one batch and sample; every token is handed to ``take`` at once.

        Sequences that ``take`` ended stay in until ``remove``, which must not be called from within.
        """

    def close(self) -> None:
        """Free everything."""


#: Loads a model by its first file; reports the fraction that is read. Raises ``lmweb.errors.ModelLoadFailed``.
Factory = Callable[[str, LoadConfig, Callable[[float], None]], Engine]
