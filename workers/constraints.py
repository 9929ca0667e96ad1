"""Structured output: only tokens that keep the answer inside a JSON schema, a regular expression or a grammar.

llguidance does the parsing (a mask costs microseconds, where a full-vocabulary GBNF mask of llama.cpp takes tens of
milliseconds) and is shared by all engines. Schemas come from strangers: their size and the parser's fuel are bounded.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from lmweb.errors import InvalidRequest
from workers.schemas import OutputFormat

CACHED_GRAMMARS = 64
#: In symbols, up to ten for each property of a schema. Compiling takes time with the square of it, and nobody's answer goes on meanwhile:
#: one second at this size, seven for the largest schema that a request may bring.
MAX_GRAMMAR_SIZE = 30_000
#: The same for ``multipleOf``: an automaton with so many states as the product of such numbers in a schema, their trailing zeros aside.
#: The library would build one with two billion.
MAX_MULTIPLES = 100_000
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([-+.0-9]+)')
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
#: What may stand between the parts of JSON: enough for any layout, too little for a weak model to write blanks for ever.
JSON_WHITESPACE = r" |\n[ \t]{0,20}"


class Answer(Protocol):
    """What a constraint needs to know of the text so far (``workers.parsing.output.OutputParser``)."""

    @property
    def is_reasoning(self) -> bool:
        """Whether the model is thinking at the moment."""

    @property
    def units(self) -> int:
        """How many calls, or lists of calls, of tools have begun."""

    @property
    def open_unit(self) -> str | None:
        """The text after the marker of the unit that is being written; None outside of one."""


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

    def follow(self, answer: Answer) -> None:
        """Learn how the text stands after each token."""
        self.active = not answer.is_reasoning


class CallConstraint(Constraint):
    """Holds calls of tools to their grammar from their marker to their end; other text is free.

    With ``forced`` the answer as a whole has to fit that grammar until its first unit (a call, or a list of calls) ends. The
    matcher for later units comes from ``unit``, with a function that turns text into tokens.
    """

    def __init__(self, unit: LLMatcher, forced: LLMatcher | None, tokens: Callable[[str], list[int]], vocab_size: int) -> None:
        super().__init__(forced or unit, vocab_size)
        self._unit, self._tokens = unit, tokens
        self._forced = forced is not None
        self._units = 0
        self.active = self._forced

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow: an answer instead of a call is complete."""
        return self.active and self._matcher.is_stopped()

    def follow(self, answer: Answer) -> None:
        """Take hold when a unit begins, let go when it ends."""
        if self._forced and not answer.units:
            self.active = not answer.is_reasoning
        elif answer.open_unit is None:
            self.active = self._forced = False
        elif answer.units != self._units and not self._forced:
            self._matcher = self._unit.deep_copy()
            # What came in one token with the marker. If no call can begin like that, the text shows it: see CallReader.
            self.active = self._matcher.consume_tokens(self._tokens(answer.open_unit))
        self._units = answer.units


_LIMITS = LLParserLimits(max_grammar_size=MAX_GRAMMAR_SIZE)


class ConstraintFactory:
    """Makes constraints over one vocabulary; compiled grammars are kept for the next request with the same one."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiled: OrderedDict[OutputFormat, LLMatcher] = OrderedDict()

    def make(self, wanted: OutputFormat) -> Constraint:
        """Return a new constraint. Raises ``InvalidRequest`` for a schema, expression or grammar that cannot be used."""
        return Constraint(self._matcher(wanted), self._tokenizer.vocab_size)

    def make_calls(self, grammars: Callable[[Callable[[str], str]], tuple[str, str]]) -> CallConstraint:
        """Return the constraint of an answer with calls.

        ``grammars`` makes two Lark grammars: that of a unit, and that of a forced answer (empty: nothing is forced). It is given
        a function that translates text into Lark. Raises ``InvalidRequest`` if a tool's schema cannot be used.
        """
        unit, forced = grammars(self.literal)
        try:
            matchers = [self._matcher(OutputFormat(kind="grammar", value=text)) if text else None for text in (unit, forced)]
        except InvalidRequest as error:
            raise InvalidRequest(error.message.replace("response format", "parameters of the tools", 1), param="tools") from error
        assert matchers[0] is not None
        return CallConstraint(matchers[0], matchers[1], self._tokenizer.greedy_tokenize, self._tokenizer.vocab_size)

    def _matcher(self, wanted: OutputFormat) -> LLMatcher:
        matcher = self._compiled.get(wanted)
        if matcher is None:
            _check_multiples(wanted.value)
            matcher = LLMatcher(self._tokenizer, _grammar(wanted), log_level=0, limits=_LIMITS)
            if matcher.is_error():
                raise InvalidRequest(f"The response format cannot be used: {_reason(matcher.get_error())}", param="response_format")
            self._compiled[wanted] = matcher
            if len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(wanted)
        return matcher.deep_copy()

    def literal(self, text: str) -> str:
        """Return a text as a Lark expression, in which the vocabulary's special tokens are such."""
        parts: list[str] = []
        plain: list[int] = []
        for token in [*self._tokenizer.tokenize_str(text, parse_special=True), None]:
            if token is not None and not self._tokenizer.is_special_token(token):
                plain.append(token)
                continue
            if plain:
                parts.append(json.dumps(self._tokenizer.decode_str(plain), ensure_ascii=False))
                plain = []
            if token is not None:
                parts.append(f"<[{token}]>")
        return " ".join(parts)


def _grammar(wanted: OutputFormat) -> str:
    try:
        if wanted.kind in {"json_object", "json_schema"}:
            schema = wanted.value if wanted.kind == "json_schema" else '{"type": "object"}'
            return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": JSON_WHITESPACE})
        if wanted.kind == "regex":
            return LLMatcher.grammar_from_regex(wanted.value)
        return LLMatcher.grammar_from_lark(_lark(wanted.value))
    except ValueError as error:
        raise InvalidRequest(f"The response format cannot be used: {_reason(str(error))}", param="response_format") from error


def _check_multiples(text: str) -> None:
    """Raise ``InvalidRequest`` if the ``multipleOf`` of a schema, or of those in a grammar, would take too long to compile."""
    plain = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)
    digits = {number.replace(".", "").strip("+-0") for number in _MULTIPLE.findall(plain)}
    if math.prod(int(each[:7]) for each in digits if each.isdecimal()) > MAX_MULTIPLES:
        words = f"The response format cannot be used: its numbers for 'multipleOf' are too large, together {MAX_MULTIPLES:,} at most"
        raise InvalidRequest(words, param="response_format")


def _lark(grammar: str) -> str:
    """Return a GBNF grammar as Lark; Lark stays as it is. Raises ``ValueError``."""
    try:
        converted: str = any_to_lark(grammar)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(str(error)) from error
    return converted


def _reason(text: str) -> str:
    """Return the library's reason in one line: its first, and what it says at the end of a picture of the place."""
    first, *rest = text.strip().splitlines() or ["unknown reason"]
    found = [line.removeprefix("error: ") for line in rest if line.startswith("error: ")]
    return " ".join([first, *found[:1]])[:300].replace("\x00", "\ufffd")
