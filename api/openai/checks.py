"""Checks that several parts of OpenAI's dialect share."""

from __future__ import annotations

from lmweb.errors import InvalidRequest


def without_nul(text: str, where: str) -> str:
    """Return the text. Raises ``InvalidRequest`` for NUL characters, which neither the database nor a tokenizer takes."""
    if "\x00" in text:
        raise InvalidRequest(f"'{where}' contains a NUL character.", param=where)
    return text
