"""Finds calls in an answer as it is written: text stays text, markers are taken out, arguments are passed on as they come."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from workers.events import ToolCallArguments, ToolCallStart
from workers.parsing.stops import partial_suffix
from workers.parsing.tools.arguments import Arguments, reader_of
from workers.parsing.tools.families import Syntax
from workers.parsing.tools.patterns import Miss, match, match_any
from workers.parsing.tools.values import Schema

Piece = str | ToolCallStart | ToolCallArguments

#: What Llama writes between two calls.
_BETWEEN_CALLS = " \t\r\n;"
_NAME_CHARACTER = re.compile(r"[A-Za-z0-9_.-]")


def call_id(generation_id: str, index: int) -> str:
    """Return the id of a generation's call: the same after a resume, and of a length that every chat template takes."""
    return hashlib.blake2b(f"{generation_id}:{index}".encode(), digest_size=8).hexdigest()[:9]


class CallReader:
    """Reads the answer of a model that may call ``tools``: their names, with the schemas of their arguments.

    Its state depends on the text alone.

    A unit is a call, or a list of calls. ``in_unit`` tells that one is being written, ``unit_text`` is its text after the
    marker, ``units`` counts those that began, ``started`` and ``completed`` the calls.
    """

    def __init__(self, syntax: Syntax, tools: Mapping[str, Schema], generation_id: str) -> None:
        self._syntax, self._tools, self._generation_id = syntax, tools, generation_id
        self._markers = tuple(text for text in (*syntax.markers, *syntax.ignored) if text)
        self._before = syntax.between if syntax.arguments else tuple(pattern + " {" for pattern in syntax.between)
        self._bare = tuple(f'{syntax.head}{name}"' for name in tools) if syntax.bare else ()
        self._steps = {
            "text": self._text,
            "list": self._list,
            "head": self._head,
            "name": self._name,
            "arguments": self._arguments,
            "tail": self._tail,
            "next": self._next,
        }
        self._state = "text"
        self._held = ""
        self._gap = True  # nothing but white space since the beginning or the last unit
        self._reader: Arguments = reader_of(syntax, {})
        self.unit_text = ""
        self.units = self.started = self.completed = 0

    @property
    def in_unit(self) -> bool:
        """Whether a unit is being written."""
        return self._state != "text"

    def feed(self, text: str) -> list[Piece]:
        """Take more text; return what is certain by now."""
        self._held += text
        if self.in_unit:
            self.unit_text += text
        pieces: list[Piece] = []
        while self._steps[self._state](pieces):
            pass
        return pieces

    def finish(self) -> str:
        """Return the text that was held back at the end. The beginning of a call that was cut before its arguments is dropped."""
        rest, self._held = self._held, ""
        is_marker = self.units and any(marker.startswith(rest.strip()) for marker in self._markers)
        return "" if self.in_unit or is_marker else rest

    # Each step takes what it can from the held text, and returns whether the next one has something to do.

    def _text(self, pieces: list[Piece]) -> bool:
        if self._gap and self._bare:
            begun = self._held.lstrip(_BETWEEN_CALLS) if self.units else self._held
            end = match_any(self._bare, begun)
            if end >= 0:
                self._held = begun
                return self._begin_unit(begun)
            if end == Miss.NOT_YET:
                return False
        places = [(place, marker) for marker in self._markers if (place := self._held.find(marker)) >= 0]
        if not places:
            keep = max((partial_suffix(self._held, marker) for marker in self._markers), default=0)
            self._pass(pieces, len(self._held) - keep)
            return False
        place, marker = min(places, key=lambda found: (found[0], -len(found[1])))
        self._pass(pieces, place)
        self._held = self._held[self._held.find(marker) + len(marker) :]
        self._gap = True
        return self._begin_unit(self._held) if marker in self._syntax.markers else True

    def _pass(self, pieces: list[Piece], n: int) -> None:
        """Pass on the first ``n`` characters, unless they may be the white space around a call."""
        text = self._held[:n]
        if self._gap and not text.strip():
            return
        self._gap = False
        self._held = self._held[n:]
        pieces.append(text)

    def _begin_unit(self, text: str) -> bool:
        self.units += 1
        self.unit_text = text
        self._gap = False
        self._state = "list" if self._syntax.listed else "head"
        return True

    def _end_unit(self) -> bool:
        self._state, self._gap = "text", True
        return True

    def _advance(self, end: int, state: str) -> bool:
        """Go on to a state after a pattern that ended there; a text that cannot be a call becomes plain text again."""
        if end == Miss.NOT_YET:
            return False
        if end == Miss.NEVER:
            self._state, self._gap = "text", False
            return True
        self._held, self._state = self._held[end:], state
        return True

    def _list(self, _pieces: list[Piece]) -> bool:
        assert self._syntax.listed
        return self._advance(match(self._syntax.listed[0], self._held), "head")

    def _head(self, _pieces: list[Piece]) -> bool:
        return self._advance(match(self._syntax.head, self._held), "name")

    def _name(self, pieces: list[Piece]) -> bool:
        """Read the name and what comes between it and the arguments. One name may be the beginning of another."""
        if self._syntax.head.endswith(" "):
            self._held = self._held.lstrip()
        if any(len(name) > len(self._held) and name.startswith(self._held) for name in self._tools):
            return False
        ends: list[tuple[int, str]] = []
        for name in self._tools:
            after = self._held.removeprefix(name)
            if after == self._held or _NAME_CHARACTER.match(after):
                continue
            end = match_any(self._before, after) if after else Miss.NOT_YET
            if end == Miss.NOT_YET:
                return False
            if end >= 0:
                ends.append((len(name) + end, name))
        end, tool = max(ends, default=(Miss.NEVER, ""))
        self._advance(end if end < 0 or self._syntax.arguments else end - 1, "arguments")  # the brace belongs to the JSON
        if tool:
            pieces.append(ToolCallStart(tool=tool, id=call_id(self._generation_id, self.started)))
            self.started += 1
            self._reader = reader_of(self._syntax, self._tools[tool])
        return True

    def _arguments(self, pieces: list[Piece]) -> bool:
        if not self._held:
            return False
        fragment, used = self._reader.feed(self._held)
        self._held = self._held[used:]
        if fragment:
            pieces.append(ToolCallArguments(content=fragment))
        if not self._reader.done:
            return False
        self._state = "tail"
        return True

    def _tail(self, _pieces: list[Piece]) -> bool:
        end = match_any(self._syntax.tail, self._held)
        if end == Miss.NOT_YET:
            return False
        self._held = self._held[max(end, 0) :]  # without its tail the call is complete all the same
        self.completed += 1
        self._state = "next"
        return True

    def _next(self, _pieces: list[Piece]) -> bool:
        if not self._syntax.listed:
            return self._end_unit()
        _, separator, closing = self._syntax.listed
        end = match(closing, self._held)
        if end == Miss.NOT_YET:
            return False
        if end == Miss.NEVER and match(separator, self._held) >= 0:
            return self._advance(match(separator, self._held), "head")
        self._held = self._held[max(end, 0) :]
        return self._end_unit()
