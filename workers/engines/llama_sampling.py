"""Choosing the next token from a row of logits.

Bias and penalties touch few tokens, so they are applied to the row in place with numpy (microseconds, where llama.cpp's own
penalties visit the whole vocabulary). Greedy is then an argmax; otherwise a C chain does the rest, always with a top-k in
front: top-p alone sorts all of a 150,000-token vocabulary at 25 ms a token.
"""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from typing import Any

import llama_cpp.llama_cpp as C
import numpy as np
from numpy.typing import NDArray

from workers.constraints import Constraint
from workers.schemas import SamplingParams

#: How many last tokens the penalties look at, as in llama.cpp and LM Studio.
PENALTY_WINDOW = 64
#: Stands in for "no top-k".
WIDE_TOP_K = 1024
_RANDOM_SEED = 0xFFFFFFFF  # llama.cpp draws a seed of its own for this one


class TokenSampler:
    """The sampling state of one sequence.

    ``history`` are the prompt's tokens; ``drawn`` how many tokens an interrupted run sampled already, whose random numbers
    are skipped so that a resumed run goes on exactly where it stopped.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, history: list[int], *, drawn: int = 0) -> None:
        self._params = params
        self._recent: deque[int] = deque(history[-PENALTY_WINDOW:], maxlen=PENALTY_WINDOW)
        self._penalises = params.repeat_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        valid = {token: bias for token, bias in params.logit_bias.items() if 0 <= token < vocab_size}
        self._bias_tokens = np.fromiter(valid.keys(), np.int64, len(valid))
        self._bias = np.fromiter(valid.values(), np.float32, len(valid))
        self._chain: Any = None if params.temperature <= 0 else self._make_chain(drawn)

    def sample(self, logits: NDArray[np.float32], context: Any, index: int, constraint: Constraint | None = None) -> int:
        """Return the next token of batch entry ``index``, whose logits are given (and changed)."""
        if self._bias_tokens.size:
            logits[self._bias_tokens] += self._bias
        if self._penalises and self._recent:
            self._apply_penalties(logits)
        limited = constraint is not None and constraint.active
        if limited and constraint is not None and (self._chain is not None or not constraint.allows(int(logits.argmax()))):
            constraint.mask(logits)
        token = int(logits.argmax()) if self._chain is None else int(C.llama_sampler_sample(self._chain, context, index))
        if limited and constraint is not None:
            constraint.accept(token)
        self._recent.append(token)
        return token

    def _apply_penalties(self, logits: NDArray[np.float32]) -> None:
        """Penalise recent tokens. Formula: llama.cpp's ``llama_sampler_penalties_apply``."""
        counts = Counter(self._recent)
        tokens = np.fromiter(counts.keys(), np.int64, len(counts))
        seen = np.fromiter(counts.values(), np.float32, len(counts))
        row = logits[tokens]
        repeat = np.float32(self._params.repeat_penalty)
        row = np.where(row <= 0, row * repeat, row / repeat)
        logits[tokens] = row - seen * np.float32(self._params.frequency_penalty) - np.float32(self._params.presence_penalty)

    def _make_chain(self, drawn: int) -> Any:
        params = self._params
        settings = C.llama_sampler_chain_default_params()
        settings.no_perf = True
        chain = C.llama_sampler_chain_init(settings)
        C.llama_sampler_chain_add(chain, C.llama_sampler_init_top_k(min(params.top_k, WIDE_TOP_K) or WIDE_TOP_K))
        if params.top_p < 1.0:
            C.llama_sampler_chain_add(chain, C.llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0.0:
            C.llama_sampler_chain_add(chain, C.llama_sampler_init_min_p(params.min_p, 1))
        C.llama_sampler_chain_add(chain, C.llama_sampler_init_temp(params.temperature))
        seed = (params.seed or 0) & 0xFFFFFFFF
        dist = C.llama_sampler_init_dist(seed if seed != _RANDOM_SEED else seed - 1)
        _skip_draws(dist, drawn)
        C.llama_sampler_chain_add(chain, dist)
        return chain

    def close(self) -> None:
        """Free the chain."""
        if self._chain is not None:
            C.llama_sampler_free(self._chain)
            self._chain = None


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the log-softmax of a row."""
    shifted: NDArray[np.float32] = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def likeliest(logprobs: NDArray[np.float32], n: int) -> list[tuple[int, float]]:
    """Return the ``n`` likeliest tokens with their log-probabilities, best first."""
    if not n:
        return []
    best = np.argpartition(logprobs, -n)[-n:]
    return [(int(token), float(logprobs[token])) for token in best[np.argsort(-logprobs[best])]]


def _skip_draws(dist: Any, n: int) -> None:
    """Advance the generator of a ``dist`` sampler by ``n`` tokens: each application draws once."""
    data = (C.llama_token_data * 2)()
    for _ in range(n):
        data[0], data[1] = C.llama_token_data(0, 0.0, 0.5), C.llama_token_data(1, 0.0, 0.5)
        candidates = C.llama_token_data_array(data, 2, -1, False)
        C.llama_sampler_apply(dist, ctypes.byref(candidates))
