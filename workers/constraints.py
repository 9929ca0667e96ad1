"""Structured output: only tokens that keep the answer inside a JSON schema, a regular expression or a grammar.

llguidance does the parsing (a mask costs microseconds, where a full-vocabulary GBNF mask of llama.cpp takes tens of
milliseconds) and is shared by all engines. Schemas come from strangers: their size and the parser's fuel are bounded.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from lmweb.errors import InvalidRequest
from workers.schemas import OutputFormat

CACHED_GRAMMARS = 64


class Constraint:
    """The state of one constrained answer. While ``active`` is False (the model is thinking) everything is allowed."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self.active = True
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bits = np.zeros((vocab_size + 31) // 32, np.int32)

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    def allows(self, token: int) -> bool:
        """Return whether the token may come next."""
        return self._matcher.validate_tokens([token]) == 1

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Rule out all tokens that may not come next, in place."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        allowed = np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        logits[: self._vocab_size][allowed == 0] = -np.inf

    def accept(self, token: int) -> None:
        """Note the token that came."""
        self._matcher.consume_token(token)


class ConstraintFactory:
    """Makes constraints over one vocabulary; compiled grammars are kept for the next request with the same one."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiled: OrderedDict[OutputFormat, LLMatcher] = OrderedDict()

    def make(self, wanted: OutputFormat) -> Constraint:
        """Return a new constraint. Raises ``InvalidRequest`` for a schema, expression or grammar that cannot be used."""
        matcher = self._compiled.get(wanted)
        if matcher is None:
            matcher = LLMatcher(self._tokenizer, _grammar(wanted), log_level=0)
            if matcher.is_error():
                raise InvalidRequest(f"The response format cannot be used: {_first_line(matcher.get_error())}", param="response_format")
            self._compiled[wanted] = matcher
            if len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(wanted)
        return Constraint(matcher.deep_copy(), self._tokenizer.vocab_size)


def _grammar(wanted: OutputFormat) -> str:
    try:
        if wanted.kind == "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}')
        if wanted.kind == "json_schema":
            return LLMatcher.grammar_from_json_schema(wanted.value)
        if wanted.kind == "regex":
            return LLMatcher.grammar_from_regex(wanted.value)
        return LLMatcher.grammar_from_lark(_lark(wanted.value))
    except ValueError as error:
        raise InvalidRequest(f"The response format cannot be used: {_first_line(str(error))}", param="response_format") from error


def _lark(grammar: str) -> str:
    """Return a GBNF grammar as Lark; Lark stays as it is. Raises ``ValueError``."""
    try:
        converted: str = any_to_lark(grammar)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(str(error)) from error
    return converted


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["unknown reason"])[0][:300]
