"""Choosing the next token from a row of logits, for every engine: the same seed then means the same everywhere.

Bias and penalties touch few tokens, so they are applied to the row in place with numpy (microseconds, where llama.cpp's own
penalties visit the whole vocabulary). Greedy is then an argmax; otherwise a C chain does the rest, always with a top-k in
front: top-p alone sorts all of a 150,000-token vocabulary at 25 ms a token.
"""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import llama_cpp.llama_cpp as C
import numpy as np
from numpy.typing import NDArray

from workers.constraints import Constraint
from workers.schemas import SamplingParams

#: How many last tokens the penalties look at, as in llama.cpp and LM Studio.
PENALTY_WINDOW = 64
#: Stands in for "no top-k".
WIDE_TOP_K = 1024
#: What DRY looks back on, and what ends a passage for it (llama.cpp's defaults).
DRY_WINDOW = 1024
DRY_BREAKERS = (b"\n", b":", b'"', b"*")
_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_RANDOM_SEED = 0xFFFFFFFF  # llama.cpp draws a seed of its own for this one


class Row(NamedTuple):
    """Where llama.cpp holds the row: with this its samplers need no copy. ``context`` is a pointer, ``entry`` that of the batch."""

    context: Any
    entry: int


class TokenSampler:
    """The sampling state of one sequence.

    ``history`` are the prompt's tokens; ``drawn`` how many tokens an interrupted run sampled already, whose random numbers
    are skipped so that a resumed run goes on exactly where it stopped. ``dry`` is the sampler of ``make_dry``, if there is one.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, history: list[int], *, drawn: int = 0, dry: Any = None) -> None:
        self._params = params
        self._recent: deque[int] = deque(history[-PENALTY_WINDOW:], maxlen=PENALTY_WINDOW)
        self._penalises = params.repeat_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._bias_tokens = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
        self._bias = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
        self._dry = dry
        self._drawn = drawn
        self._chain: Any = None if params.temperature <= 0 else self._make_chain(vocab_size, drawn)

    def sample(self, logits: NDArray[np.float32], constraint: Constraint | None = None, *, row: Row | None = None) -> int:
        """Return the next token. ``logits`` are changed; they are those of ``row`` if that is given."""
        if self._bias_tokens.size:
            logits[self._bias_tokens] += self._bias
        if self._penalises and self._recent:
            self._apply_penalties(logits)
        if self._dry is not None:
            _apply_in_place(self._dry, logits)
        limited = constraint is not None and constraint.active
        if limited and constraint is not None and (self._chain is not None or not constraint.allows(int(logits.argmax()))):
            constraint.mask(logits)
        if self._has_xtc:
            self._renew_xtc()
        token = int(logits.argmax()) if self._chain is None else self._draw(logits, row)
        self._drawn += 1
        if limited and constraint is not None:
            constraint.accept(token)
        if self._dry is not None:
            C.llama_sampler_accept(self._dry, token)
        self._recent.append(token)
        return token

    def _draw(self, logits: NDArray[np.float32], row: Row | None) -> int:
        if row is not None:
            return int(C.llama_sampler_sample(self._chain, row.context, row.entry))
        candidates, _data = _candidates(logits)  # samplers may move the pointer in the one; the other has to stay alive
        C.llama_sampler_apply(self._chain, ctypes.byref(candidates))
        token = int(candidates.data[candidates.selected].id)
        C.llama_sampler_accept(self._chain, token)
        return token

    @property
    def _has_xtc(self) -> bool:
        params = self._params
        return params.xtc_probability > 0.0 and params.temperature > 0.0 and not params.mirostat

    def _renew_xtc(self) -> None:
        """Put a new XTC sampler, with a seed for this token, in the place of the old one.

        How many random numbers an old one has drawn depends on the logits, so a resumed run could not skip them.
        """
        params, chain = self._params, self._chain
        dist, temperature, old = (C.llama_sampler_chain_remove(chain, C.llama_sampler_chain_n(chain) - 1) for _ in range(3))
        C.llama_sampler_free(old)
        seed = ((params.seed or 0) + 0x9E3779B1 * (self._drawn + 1)) & 0xFFFFFFFF
        C.llama_sampler_chain_add(chain, C.llama_sampler_init_xtc(params.xtc_probability, params.xtc_threshold, 1, seed))
        C.llama_sampler_chain_add(chain, temperature)
        C.llama_sampler_chain_add(chain, dist)

    def _apply_penalties(self, logits: NDArray[np.float32]) -> None:
        """Penalise recent tokens. Formula: llama.cpp's ``llama_sampler_penalties_apply``."""
        counts = Counter(self._recent)
        tokens = np.fromiter(counts.keys(), np.int64, len(counts))
        seen = np.fromiter(counts.values(), np.float32, len(counts))
        row = logits[tokens]
        repeat = np.float32(self._params.repeat_penalty)
        row = np.where(row <= 0, row * repeat, row / repeat)
        logits[tokens] = row - seen * np.float32(self._params.frequency_penalty) - np.float32(self._params.presence_penalty)

    def _make_chain(self, vocab_size: int, drawn: int) -> Any:
        params = self._params
        seed = (params.seed or 0) & 0xFFFFFFFF
        seed -= seed == _RANDOM_SEED
        settings = C.llama_sampler_chain_default_params()
        settings.no_perf = True
        chain = C.llama_sampler_chain_init(settings)
        for sampler in self._mirostat(vocab_size, seed) if params.mirostat else self._truncation(seed, drawn):
            C.llama_sampler_chain_add(chain, sampler)
        return chain

    def _truncation(self, seed: int, drawn: int) -> Iterator[Any]:
        """Yield the usual chain, in llama.cpp's order."""
        params = self._params
        yield C.llama_sampler_init_top_k(min(params.top_k, WIDE_TOP_K) or WIDE_TOP_K)
        if params.typical_p < 1.0:
            yield C.llama_sampler_init_typical(params.typical_p, 1)
        if params.top_p < 1.0:
            yield C.llama_sampler_init_top_p(params.top_p, 1)
        if params.min_p > 0.0:
            yield C.llama_sampler_init_min_p(params.min_p, 1)
        if params.xtc_probability > 0.0:
            yield C.llama_sampler_init_xtc(params.xtc_probability, params.xtc_threshold, 1, seed)
        yield C.llama_sampler_init_temp(params.temperature)
        dist = C.llama_sampler_init_dist(seed)
        _skip_draws(dist, drawn)
        yield dist

    def _mirostat(self, vocab_size: int, seed: int) -> Iterator[Any]:
        params = self._params
        yield C.llama_sampler_init_temp(params.temperature)
        if params.mirostat == 1:
            yield C.llama_sampler_init_mirostat(vocab_size, seed, params.mirostat_tau, params.mirostat_eta, 100)
        else:
            yield C.llama_sampler_init_mirostat_v2(seed, params.mirostat_tau, params.mirostat_eta)

    def close(self) -> None:
        """Free the samplers."""
        for sampler in (self._chain, self._dry):
            if sampler is not None:
                C.llama_sampler_free(sampler)
        self._chain = self._dry = None


def make_dry(params: SamplingParams, vocab: Any, history: list[int]) -> Any:
    """Return the DRY sampler with its memory of the prompt, or None if it is off. ``vocab`` is a pointer to llama.cpp's vocabulary."""
    if params.dry_multiplier <= 0.0:
        return None
    breakers = (ctypes.c_char_p * len(DRY_BREAKERS))(*DRY_BREAKERS)
    dry = C.llama_sampler_init_dry(
        vocab, params.dry_multiplier, params.dry_base, params.dry_allowed_length, DRY_WINDOW, breakers, len(DRY_BREAKERS)
    )
    for token in history[-DRY_WINDOW:]:
        C.llama_sampler_accept(dry, token)
    return dry


def _apply_in_place(sampler: Any, logits: NDArray[np.float32]) -> None:
    """Let a sampler that changes logits work on a row."""
    candidates, data = _candidates(logits)
    C.llama_sampler_apply(sampler, ctypes.byref(candidates))
    logits[data["id"]] = data["logit"]


def _candidates(logits: NDArray[np.float32]) -> tuple[Any, NDArray[Any]]:
    """Return a row as llama.cpp's samplers take it, with the array that it points into."""
    data = np.zeros(logits.size, dtype=_TOKEN_DATA)
    data["id"] = np.arange(logits.size)
    data["logit"] = logits
    return C.llama_token_data_array(data.ctypes.data_as(ctypes.POINTER(C.llama_token_data)), logits.size, -1, False), data


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the log-softmax of a row."""
    shifted: NDArray[np.float32] = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def likeliest(logprobs: NDArray[np.float32], n: int) -> list[tuple[int, float]]:
    """Return the ``n`` likeliest tokens (all, if there are not so many) with their log-probabilities, best first."""
    if not n:
        return []
    n = min(n, logprobs.size)
    best = np.argpartition(logprobs, -n)[-n:]
    return [(int(token), float(logprobs[token])) for token in best[np.argsort(-logprobs[best])]]


def _skip_draws(dist: Any, n: int) -> None:
    """Advance the generator of a ``dist`` sampler by ``n`` tokens: each application draws once."""
    data = (C.llama_token_data * 2)()
    for _ in range(n):
        data[0], data[1] = C.llama_token_data(0, 0.0, 0.5), C.llama_token_data(1, 0.0, 0.5)
        candidates = C.llama_token_data_array(data, 2, -1, False)
        C.llama_sampler_apply(dist, ctypes.byref(candidates))
