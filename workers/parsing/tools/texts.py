"""Grammar rules of strings that stand as they are up to a closing text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from lmweb.errors import InvalidRequest

#: Longer bounds cost more than they are worth.
_LONGEST = 4096
_UNENFORCED = ("pattern", "format")


def text_rules(name: str, schema: Mapping[str, Any], literal: Callable[[str], str], *, close: str, strict: bool) -> list[str]:
    """Return the rules of a string of this schema with the text that ends it.

    Raises ``InvalidRequest`` if it is to be ``strict`` and has keywords that cannot be enforced where strings are not quoted.
    """
    ending = literal(close)
    options = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if isinstance(options, list) and options:
        shown = [option if isinstance(option, str) else json.dumps(option) for option in options]
        choices = " | ".join(literal(option) if option else '""' for option in shown)
        return [f"{name}: ({choices}) {ending}"]
    if strict and (found := next((keyword for keyword in _UNENFORCED if keyword in schema), None)):
        raise InvalidRequest(f"The parameters of the tools cannot be used: '{found}' cannot be enforced for this model.", param="tools")
    text = f"/(?s:.{bounds(schema)})/"
    if not ending.startswith('"'):  # a special token cannot be part of a text, and so ends it
        return [f"{name}: {name}_text {ending}", f"{name}_text: {name.upper()}_TEXT?", f"{name.upper()}_TEXT: {text}"]
    first, length = json.JSONDecoder().raw_decode(ending)
    return [f"{name}: {name}_text {ending[length:].strip()}", f"{name}_text[suffix={json.dumps(first)}]: {text}"]


def bounds(schema: Mapping[str, Any]) -> str:
    """Return the repetition that holds a string to its schema's lengths."""
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    low = low if isinstance(low, int) and 0 <= low <= _LONGEST else 0
    high = high if isinstance(high, int) and low <= high <= _LONGEST else ""
    return f"{{{low},{high}}}"
