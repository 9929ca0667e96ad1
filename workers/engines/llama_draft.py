"""A small model that guesses what a large one is going to write: its context follows the large one's sequences."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import llama_cpp.llama_cpp as C
import numpy as np

from lmweb.errors import InvalidRequest, LmwebError
from workers.engines.llama_context import Context, ContextSize, Model

#: How many sequences are followed at once.
SEATS = 4
BATCH_TOKENS = 128
#: A guess that the draft model itself holds less probable than this ends the guessing.
MIN_PROBABILITY = 0.3
#: Vocabularies of one family differ in unused tokens at their end, and in the first, special ones (llama.cpp's tolerance).
MAX_SIZE_DIFFERENCE = 128
FIRST_COMPARED_TOKEN = 5


def vocabulary_mismatch(target: Model, draft: Model) -> str:
    """Return why the draft model's tokens are not those of the target, empty if they are. The rules are llama.cpp's."""
    if C.llama_vocab_type(target.vocab) != C.llama_vocab_type(draft.vocab):
        return "its tokenizer is of another kind"
    if abs(target.vocab_size - draft.vocab_size) > MAX_SIZE_DIFFERENCE:
        return f"it knows {draft.vocab_size} tokens, the model {target.vocab_size}"
    for name, find in (("BOS", C.llama_vocab_bos), ("EOS", C.llama_vocab_eos)):
        if find(target.vocab) != find(draft.vocab):
            return f"its {name} token is another one"
    for token in range(FIRST_COMPARED_TOKEN, min(target.vocab_size, draft.vocab_size)):
        mine, theirs = target.token_text(token), draft.token_text(token)
        if mine != theirs:
            return f"token {token} is {theirs!r}, in the model {mine!r}"
    return ""


@dataclass(slots=True)
class _Seat:
    """A sequence of the draft's context: ``tokens`` are computed, the first ``agreed`` of them are the target's text for sure."""

    id: int
    owner: str = ""
    tokens: list[int] = field(default_factory=list)
    agreed: int = 0
    used_at: float = 0.0


class DraftModel:
    """A loaded draft model. ``round_seconds`` is what one guess for each sequence takes, measured."""

    def __init__(self, key: str, model: Model, context: Context, target: Model) -> None:
        self.key = key
        self.round_seconds = 0.0
        self._model, self._context = model, context
        self._vocab_size = min(model.vocab_size, target.vocab_size)
        self._seats = [_Seat(i) for i in range(SEATS)]

    def guess(self, wanted: list[tuple[str, list[int]]], n: int) -> dict[str, list[int]]:
        """Return up to ``n`` guesses for each sequence (an id and its tokens so far), at most ``SEATS`` of them.

        One whose text is not known yet is read first, a part in each call, and has no guesses until then.
        """
        started, rounds = time.perf_counter(), 0
        guesses: dict[str, list[int]] = {}
        pending: list[tuple[_Seat, list[int]]] = []
        for owner, tokens in wanted:
            seat = self._follow(owner, tokens)
            rest = tokens[len(seat.tokens) :]
            if len(rest) > BATCH_TOKENS // len(wanted):
                self._compute([(seat, rest[: BATCH_TOKENS // len(wanted)])])
                started = time.perf_counter()  # reading is no part of a round's cost
                continue
            guesses[owner] = []
            pending.append((seat, rest))
        while pending and rounds < n and (chosen := self._compute(pending)):
            rounds += 1
            pending = []
            for seat, token in chosen:
                guesses[seat.owner].append(token)
                pending.append((seat, [token]))
        if rounds:
            seconds = (time.perf_counter() - started) / rounds
            self.round_seconds = seconds if not self.round_seconds else 0.8 * self.round_seconds + 0.2 * seconds
        return {owner: found for owner, found in guesses.items() if found}

    def forget(self, owner: str) -> None:
        """Free the seat of a sequence that has ended, or whose text was changed."""
        for seat in self._seats:
            if seat.owner == owner:
                self._empty(seat)

    def close(self) -> None:
        """Free the model."""
        self._context.close()
        self._model.close()

    def _follow(self, owner: str, tokens: list[int]) -> _Seat:
        """Return the sequence's seat, with nothing in it but a beginning of these tokens."""
        seat = next((seat for seat in self._seats if seat.owner == owner), None)
        if seat is None:
            seat = min(self._seats, key=lambda other: (other.owner != "", other.used_at))
            self._empty(seat)
            seat.owner = owner
        seat.used_at = time.perf_counter()
        last = min(len(seat.tokens), len(tokens) - 1)  # at least one token is to be computed, for its logits
        while seat.agreed < last and seat.tokens[seat.agreed] == tokens[seat.agreed]:
            seat.agreed += 1
        if seat.agreed < len(seat.tokens):
            self._context.cut(seat.id, seat.agreed)
            del seat.tokens[seat.agreed :]
        return seat

    def _compute(self, entries: list[tuple[_Seat, list[int]]]) -> list[tuple[_Seat, int]]:
        """Compute these tokens; returns the likeliest next one of each sequence that is sure enough of it."""
        context, n, outputs = self._context, 0, []
        context.outputs[:] = 0
        for seat, tokens in entries:
            size = len(tokens)
            context.tokens[n : n + size] = tokens
            context.positions[n : n + size] = range(len(seat.tokens), len(seat.tokens) + size)
            context.sequence_ids[n : n + size] = seat.id
            n += size
            context.outputs[n - 1] = 1
            outputs.append((seat, n - 1))
        if context.decode(n) == 1:  # no room: the next call begins anew, with fewer sequences
            for seat in self._seats:
                self._empty(seat)
            return []
        for seat, tokens in entries:
            seat.tokens += tokens
        chosen = []
        for seat, index in outputs:
            logits = context.logits(index)[: self._vocab_size]
            token = int(logits.argmax())
            if np.exp(logits - logits[token]).sum() * MIN_PROBABILITY <= 1.0 and len(seat.tokens) < self._model.trained_context:
                chosen.append((seat, token))
        return chosen

    def _empty(self, seat: _Seat) -> None:
        self._context.clear(seat.id)
        seat.owner, seat.tokens, seat.agreed = "", [], 0


def load_draft(
    key: str, path: str, target: Model, *, cells: int, threads: int, gpu_layers: int, flash_attention: bool | None
) -> DraftModel:
    """Load a draft model for ``target``. Raises ``ModelLoadFailed``, or ``InvalidRequest`` if its vocabulary is another one."""
    model = Model(path, gpu_layers=gpu_layers, on_progress=lambda _fraction: None)
    try:
        reason = vocabulary_mismatch(target, model) if model.can_cut else "its kind of memory cannot take back a wrong guess"
        if reason:
            raise InvalidRequest(f"'{key}' cannot be the draft model of this model: {reason}.", param="draft_model")
        context = Context(
            model, size=ContextSize(cells, SEATS, BATCH_TOKENS, outputs=SEATS), threads=threads, flash_attention=flash_attention
        )
    except LmwebError:
        model.close()
        raise
    return DraftModel(key, model, context, target)
