"""The grammar of a call, so that one that was started always parses: a known name, then arguments that fit its schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from lmweb.errors import InvalidRequest
from workers.parsing.tools.families import Syntax
from workers.parsing.tools.patterns import to_lark
from workers.schemas import OutputFormat, Tool

#: White space between the parts of a call is bounded, or a weak model might write nothing else.
_COMMON = "%llguidance {}\nws: WS?\nWS: /[ \\t\\r\\n]{1,8}/\nid: ID?\nID: /[A-Za-z0-9_.-]{1,40}/\nREST: /(.|\\n)+/\n"


def unit_grammar(syntax: Syntax, tools: Sequence[Tool], literal: Callable[[str], str]) -> str:
    """Return the grammar of a unit after its marker, and of what a token that ends it may contain beyond."""
    return f"{_COMMON}start: unit rest\n{_unit(syntax, tools, literal)}"


def forced_grammar(syntax: Syntax, tools: Sequence[Tool], literal: Callable[[str], str], *, instead: OutputFormat | None = None) -> str:
    """Return the grammar of an answer that begins with a call, or is a JSON text of the format ``instead``."""
    opening = " ".join(literal(text) for text in (syntax.section, "" if syntax.bare else syntax.marker) if text)
    other = ""
    start = f"start: ws {opening} unit rest"
    if instead is not None:
        start += " | answer"
        other = f"answer: %json {instead.value if instead.kind == 'json_schema' else json.dumps({'type': 'object'})}\n"
    return f"{_COMMON}{start}\n{other}{_unit(syntax, tools, literal)}"


def _unit(syntax: Syntax, tools: Sequence[Tool], literal: Callable[[str], str]) -> str:
    unit = f"ws {literal('[')} call (ws {literal(',')} call)* ws {literal(']')}" if syntax.listed else "call"
    between = " | ".join(to_lark(pattern, literal) for pattern in syntax.between)
    tail = " | ".join(to_lark(pattern, literal) or '""' for pattern in syntax.tail)
    after = " | ".join(literal(text) for text in (syntax.marker, *syntax.ignored, ";" if syntax.bare else "") if text)
    lines = [
        f"rest: ws (({after}) REST?)?",
        f"unit: {unit}",
        f"call: {to_lark(syntax.head, literal)} called ({tail})" if tail != '""' else f"call: {to_lark(syntax.head, literal)} called",
        f"between: {between}",
        "called: " + " | ".join(f"tool{i}" for i in range(len(tools))),
    ]
    for i, tool in enumerate(tools):
        lines.append(f"tool{i}: {literal(tool.name)} between ws args{i}")
        lines.append(f"args{i}: %json {json.dumps(argument_schema(tool, i))}")
    return "\n".join(lines) + "\n"


def argument_schema(tool: Tool, index: int) -> dict[str, Any]:
    """Return a tool's schema as one of an object. Raises ``InvalidRequest`` if it is not."""
    where = f"tools[{index}].function.parameters"
    try:
        schema = json.loads(tool.parameters)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"'{where}' is not valid JSON.", param=where) from error
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise InvalidRequest(f"'{where}' must be a JSON schema of type object.", param=where)
    options = {} if tool.strict else {"x-guidance": {**_options(schema), "lenient": True}}
    return {**schema, "type": "object", **options}


def _options(schema: dict[str, Any]) -> dict[str, Any]:
    given = schema.get("x-guidance")
    return given if isinstance(given, dict) else {}
