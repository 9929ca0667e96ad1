"""Reads the arguments of a call as they are written, in each family's way, and passes them on as JSON."""

from __future__ import annotations

import json
import re
from typing import Protocol

from workers.parsing.stops import partial_suffix
from workers.parsing.tools.families import Form, Notation, Parameters, Syntax
from workers.parsing.tools.patterns import Miss, match, match_any
from workers.parsing.tools.values import Kind, Schema, escaped, json_value, kind, properties


class Arguments(Protocol):
    """A reader of one call's arguments. ``done`` tells that they have ended."""

    done: bool

    def feed(self, text: str) -> tuple[str, int]:
        """Take text; return the JSON that is certain by now, and how many characters need not be given again."""


def reader_of(syntax: Syntax, schema: Schema) -> Arguments:
    """Return what reads the arguments of a call of the tool with this schema."""
    if isinstance(syntax.arguments, Parameters):
        return _ParameterReader(syntax.arguments, syntax.tail, schema)
    return _NotationReader(syntax.arguments) if isinstance(syntax.arguments, Notation) else _JsonReader()


class _JsonReader:
    """Finds the end of a JSON object that comes in pieces."""

    _INTERESTING = re.compile(r'[{}\[\]"]')
    _IN_STRING = re.compile(r'["\\]')

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> tuple[str, int]:
        """Pass on what belongs to the object."""
        position = 0
        while position < len(text) and not self.done:
            if self._escaped:
                self._escaped = False
                position += 1
                continue
            found = (self._IN_STRING if self._in_string else self._INTERESTING).search(text, position)
            position = found.end() if found else len(text)
            self.done = bool(found) and self._note(text[position - 1])
        return text[:position], position

    def _note(self, character: str) -> bool:
        """Note a character of structure; return whether the object ends with it."""
        if character == '"':
            self._in_string = not self._in_string
        elif character == "\\":
            self._escaped = True
        elif character in "{[":
            self._depth += 1
        else:
            self._depth -= 1
        return self._depth == 0 and not self._in_string


class _ParameterReader:
    """Reads parameter by parameter. Text and JSON are passed on as they come; a value that may be either waits for its end."""

    def __init__(self, syntax: Parameters, tail: tuple[str, ...], schema: Schema) -> None:
        self.done = False
        self._syntax, self._tail, self._schema = syntax, tail, schema
        self._known = properties(schema)
        self._steps = {"next": self._next, "name": self._name, "value": self._value}
        self._state = "next"
        self._written = 0
        self._form = syntax.forms[0]
        self._kind: Kind = "either"
        self._in_string = self._escaped = False

    def feed(self, text: str) -> tuple[str, int]:
        """Read as far as the text goes."""
        parts: list[str] = []
        used = 0
        while not self.done and (step := self._steps[self._state](text[used:], parts)) is not None:
            used += step
        return "".join(parts), used

    # Each step returns how many characters it took, or None if it needs more.

    def _next(self, text: str, parts: list[str]) -> int | None:
        end = match(self._syntax.opening, text)
        if end >= 0:
            self._state = "name"
            return end
        if end == Miss.NOT_YET or match_any(self._tail, text) == Miss.NOT_YET:
            return None
        parts.append("}" if self._written else "{}")
        self.done = True
        return 0

    def _name(self, text: str, parts: list[str]) -> int | None:
        start = self._syntax.forms[0].middle[0]
        end = text.find(start)
        if end < 0:
            return None
        for form in self._syntax.forms:
            length = match(form.middle, text[end:])
            if length == Miss.NOT_YET:
                return None
            if length >= 0:
                self._begin_value(form, text[:end], parts)
                return end + length
        self.done = True
        parts.append("}" if self._written else "{}")
        return 0

    def _begin_value(self, form: Form, name: str, parts: list[str]) -> None:
        self._form, self._state = form, "value"
        wanted = kind(self._known.get(name, {}), self._schema)
        self._kind = wanted if form.kind == "schema" else form.kind
        self._in_string = self._escaped = False
        parts.append(f"{', ' if self._written else '{'}{json.dumps(name, ensure_ascii=False)}: ")
        if self._kind == "text":
            parts.append('"')
        self._written += 1

    def _value(self, text: str, parts: list[str]) -> int | None:
        close = self._form.close
        if self._kind == "json":
            return self._json_value(text, parts)
        end = text.find(close)
        if end >= 0:
            parts.append(escaped(text[:end]) + '"' if self._kind == "text" else json_value(text[:end]))
            self._state = "next"
            return end + len(close)
        taken = len(text) - partial_suffix(text, close) if self._kind == "text" else 0
        if not taken:
            return None
        parts.append(escaped(text[:taken]))
        return taken

    def _json_value(self, text: str, parts: list[str]) -> int | None:
        """Pass JSON on up to the closing text, which does not count inside of strings."""
        if self._in_string:
            taken = 0
            while taken < len(text) and self._in_string:
                character = text[taken]
                self._in_string = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
                taken += 1
        else:
            close, quote = self._form.close, text.find('"')
            end = text.find(close, 0, quote if quote >= 0 else None)
            if end >= 0:
                parts.append(text[:end])
                self._state = "next"
                return end + len(close)
            self._in_string = quote >= 0
            taken = quote + 1 if quote >= 0 else len(text) - partial_suffix(text, close)
        parts.append(text[:taken])
        return taken or None


class _NotationReader:
    """Translates a notation to JSON: names get quotes, strings JSON's, true, false and null JSON's words."""

    _WORD = re.compile(r"[^\s,:=(){}\[\]'\"<]+")
    _ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}  # noqa: RUF012

    def __init__(self, notation: Notation) -> None:
        self.done = False
        self._notation = notation
        self._words = dict(zip(notation.words, ("true", "false", "null"), strict=True))
        self._depth = 1
        self._started = False
        self._quote = ""  # that of the string that is being read

    def feed(self, text: str) -> tuple[str, int]:
        """Read as far as the text goes."""
        parts = [] if self._started else ["{"]
        self._started = True
        used = 0
        while used < len(text) and not self.done:
            step = (self._string if self._quote else self._structure)(text[used:], parts)
            if not step:
                break
            used += step
        return "".join(parts), used

    def _string(self, text: str, parts: list[str]) -> int:
        """Read inside of a string; returns how many characters were taken, 0 if more are needed."""
        quote = self._quote
        if text.startswith(quote):
            parts.append('"')
            self._quote = ""
            return len(quote)
        if self._notation.escapes and text.startswith("\\"):
            if len(text) < 2:
                return 0
            parts.append(escaped(self._ESCAPES.get(text[1], text[1])))
            return 2
        places = [place for stop in (quote, "\\" if self._notation.escapes else quote) if (place := text.find(stop)) >= 0]
        taken = min(places) if places else len(text) - partial_suffix(text, quote)
        parts.append(escaped(text[:taken]))
        return taken

    def _structure(self, text: str, parts: list[str]) -> int:
        first = text[0]
        self._quote = next((quote for quote in self._notation.quotes if text.startswith(quote)), "")
        if self._quote:
            parts.append('"')
            return len(self._quote)
        if any(quote.startswith(text) for quote in self._notation.quotes):
            return 0
        found = self._WORD.match(text)
        if found is not None:
            return self._word(found[0], text[found.end() :], parts)
        if first == self._notation.end and self._depth == 1:
            self.done = True
        self._depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(first, 0)
        parts.append("}" if self.done else ": " if first in (":", self._notation.equals) else first)
        return 1

    def _word(self, word: str, rest: str, parts: list[str]) -> int:
        """Read a name or a value. What comes after it tells which."""
        after = rest.lstrip()
        if not after:
            return 0
        is_name = after[0] in (":", self._notation.equals)
        parts.append(json.dumps(word, ensure_ascii=False) if is_name else self._words.get(word) or json_value(word))
        return len(word)
