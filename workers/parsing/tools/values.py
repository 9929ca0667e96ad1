"""What a tool's JSON schema says of a value, as far as it matters for ways of writing in which text is not quoted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["text", "json", "either"]
Schema = Mapping[str, Any]

_DEPTH = 16


def resolve(schema: Any, root: Schema) -> Schema:
    """Follow the local references of a schema; one that leads nowhere allows anything."""
    for _ in range(_DEPTH):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str):
            break
        found: Any = root
        for part in reference.removeprefix("#/").split("/"):
            found = found.get(part) if isinstance(found, dict) else None
        schema = found
    return schema if isinstance(schema, dict) and "$ref" not in schema else {}


def kind(schema: Any, root: Schema, depth: int = 0) -> Kind:
    """Return whether a value of the schema is always a string, never one, or either."""
    schema = resolve(schema, root)
    options = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if isinstance(options, list) and options:
        return _together({"text" if isinstance(option, str) else "json" for option in options})
    types = schema.get("type")
    if isinstance(types, str):
        return "text" if types == "string" else "json"
    if isinstance(types, list) and types:
        return _together({"text" if name == "string" else "json" for name in types})
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list) and depth < _DEPTH:
            return _together({kind(option, root, depth + 1) for option in schema[name]})
    return "json" if "properties" in schema or "items" in schema else "either"


def _together(kinds: set[Any]) -> Kind:
    return kinds.pop() if len(kinds) == 1 else "either"


def properties(schema: Schema) -> dict[str, Any]:
    """Return the properties of an object's schema."""
    found = schema.get("properties")
    return dict(found) if isinstance(found, dict) else {}


def required(schema: Schema) -> frozenset[str]:
    """Return the names of the properties that must be there."""
    found = schema.get("required")
    return frozenset(name for name in found if isinstance(name, str)) if isinstance(found, list) else frozenset()


def rooted(schema: Any, root: Schema) -> dict[str, Any]:
    """Return a part of a schema so that it can stand alone: with the definitions that it may refer to."""
    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    return {**definitions, **schema} if isinstance(schema, dict) else definitions


def json_value(text: str) -> str:
    """Return a value that may be a string without quotes, or JSON, as JSON."""
    try:
        is_text = isinstance(json.loads(text, parse_constant=_refuse), str)
    except (ValueError, RecursionError):
        is_text = True
    return json.dumps(text, ensure_ascii=False) if is_text else text.strip()


def _refuse(word: str) -> None:
    """Raise ``ValueError`` for NaN and Infinity, which Python reads and JSON does not know."""
    raise ValueError(word)


def escaped(text: str) -> str:
    """Return a text as the inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
