"""Patterns of the fixed parts of a call: literal text in which a space stands for any white space and ``~`` for an id."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import IntEnum

_PARTS = re.compile(r"[ ~]|[^ ~]+")
_ID = re.compile(r"[A-Za-z0-9_.-]*")


class Miss(IntEnum):
    """Why a pattern did not match: it never will, or the text is too short to tell."""

    NEVER = -1
    NOT_YET = -2


def match(pattern: str, text: str) -> int:
    """Return where the text goes on after the pattern, or a ``Miss``."""
    position = 0
    for part in _PARTS.findall(pattern):
        if part == " ":
            while position < len(text) and text[position].isspace():
                position += 1
        elif part == "~":
            found = _ID.match(text, position)
            position = found.end() if found else position
            if position == len(text):
                return Miss.NOT_YET
        elif text.startswith(part, position):
            position += len(part)
        else:
            return Miss.NOT_YET if part.startswith(text[position:]) else Miss.NEVER
    return position


def match_any(patterns: tuple[str, ...], text: str) -> int:
    """Return the first match of several patterns; ``NOT_YET`` as long as one of them may still match."""
    ends = [match(pattern, text) for pattern in patterns]
    return next((end for end in ends if end >= 0), Miss.NOT_YET if Miss.NOT_YET in ends else Miss.NEVER)


def to_lark(pattern: str, literal: Callable[[str], str]) -> str:
    """Return the pattern as a Lark expression; ``literal`` translates plain text. The rules ``ws`` and ``id`` must exist."""
    names = {" ": "ws", "~": "id"}
    return " ".join(names.get(part) or literal(part) for part in _PARTS.findall(pattern))
