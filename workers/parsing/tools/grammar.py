"""The grammar of a call, so that one that was started always parses: a known name, then arguments that fit its schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from lmweb.errors import InvalidRequest
from workers.parsing.tools.families import Form, Notation, Parameters, Syntax
from workers.parsing.tools.notation import NotationGrammar
from workers.parsing.tools.patterns import to_lark
from workers.parsing.tools.texts import text_rules
from workers.parsing.tools.values import kind, properties, required, resolve, rooted
from workers.schemas import OutputFormat, Tool

Literal = Callable[[str], str]

#: White space between the parts of a call is bounded, or a weak model might write nothing else.
_COMMON = (
    "%llguidance {}\nws: WS?\nWS: /[ \\t\\r\\n]{1,24}/\nid: ID?\nID: /[A-Za-z0-9_.-]{1,40}/\nkey: KEY\nKEY: /[A-Za-z0-9_.-]{1,64}/\n"
    "REST: /(.|\\n)+/\n"
)


def unit_grammar(syntax: Syntax, tools: Sequence[Tool], literal: Literal) -> str:
    """Return the grammar of a unit after its marker, and of what a token that ends it may contain beyond."""
    return f"{_COMMON}start: unit rest\n{_unit(syntax, tools, literal)}"


def forced_grammar(syntax: Syntax, tools: Sequence[Tool], literal: Literal, *, instead: OutputFormat | None = None) -> str:
    """Return the grammar of an answer that begins with a call, or is a JSON text of the format ``instead``."""
    opening = " ".join(literal(text) for text in (syntax.section, "" if syntax.bare else syntax.marker) if text)
    other = ""
    start = f"start: ws {opening} unit rest"
    if instead is not None:
        start += " | answer"
        other = f"answer: %json {instead.value if instead.kind == 'json_schema' else json.dumps({'type': 'object'})}\n"
    return f"{_COMMON}{start}\n{other}{_unit(syntax, tools, literal)}"


def _unit(syntax: Syntax, tools: Sequence[Tool], literal: Literal) -> str:
    unit = "call"
    if syntax.listed:
        opening, separator, closing = (to_lark(pattern, literal) for pattern in syntax.listed)
        unit = f"{opening} call ({separator} call)* {closing}"
    between = " | ".join(to_lark(pattern, literal) for pattern in syntax.between)
    tail = " | ".join(to_lark(pattern, literal) or '""' for pattern in syntax.tail)
    after = " | ".join(literal(text) for text in (*syntax.markers, *syntax.ignored, ";" if syntax.bare else "") if text)
    lines = [
        f"rest: ws (({after}) REST?)?",
        f"unit: {unit}",
        f"call: {to_lark(syntax.head, literal)} called ({tail})" if tail != '""' else f"call: {to_lark(syntax.head, literal)} called",
        f"between: {between}",
        "called: " + " | ".join(f"tool{i}" for i in range(len(tools))),
    ]
    for i, tool in enumerate(tools):
        schema = argument_schema(tool, i)
        if isinstance(syntax.arguments, Parameters):
            lines.append(f"tool{i}: {literal(tool.name)} between args{i}")
            lines += _parameters(syntax.arguments, schema, f"args{i}", literal, strict=tool.strict)
        elif isinstance(syntax.arguments, Notation):
            lines.append(f"tool{i}: {literal(tool.name)} between ws args{i}")
            lines += NotationGrammar(syntax.arguments, schema, f"args{i}", literal, strict=tool.strict).lines()
        else:
            lines.append(f"tool{i}: {literal(tool.name)} between ws args{i}")
            lines.append(f"args{i}: %json {json.dumps(schema)}")
    return "\n".join(lines) + "\n"


def _parameters(syntax: Parameters, schema: dict[str, Any], name: str, literal: Literal, *, strict: bool) -> list[str]:
    """Return the rules of arguments that are written one by one, in the order of the schema's properties."""
    schema = dict(resolve(schema, schema)) or schema
    known, needed = properties(schema), required(schema)
    opening = to_lark(syntax.opening, literal)
    if not known:
        anything = [_value(form, {}, schema, f"{name}_any{i}", literal, strict=strict) for i, form in enumerate(syntax.forms)]
        free = schema.get("additionalProperties") is not False
        repeated = f"({opening} key ({' | '.join(rule for rule, _ in anything if rule)}))*" if free else '""'
        return [f"{name}: {repeated}", *(line for _, lines in anything for line in lines)]
    parts, lines = [], []
    for i, (key, part) in enumerate(known.items()):
        values = [_value(form, part, schema, f"{name}_{i}_{j}", literal, strict=strict) for j, form in enumerate(syntax.forms)]
        lines.append(f"{name}_{i}: {opening} {literal(key)} ({' | '.join(rule for rule, _ in values if rule)})")
        lines += [line for _, rules in values for line in rules]
        parts.append(f"{name}_{i}{'' if key in needed else '?'}")
    return [f"{name}: {' '.join(parts)}", *lines]


def _value(form: Form, part: Any, root: dict[str, Any], name: str, literal: Literal, *, strict: bool) -> tuple[str, list[str]]:
    """Return how a value is written in this form, and the rules that this needs; nothing if the schema has no such values."""
    wanted = kind(part, root)
    if form.kind != "schema" and wanted not in ("either", form.kind):
        return "", []
    middle = to_lark(form.middle, literal)
    if form.kind == "json" or wanted == "json":
        schema = rooted(part, root)
        options = {} if strict else {"x-guidance": {"lenient": True}}
        return f"{middle} {name} {literal(form.close)}", [f"{name}: %json {json.dumps({**schema, **options})}"]
    return f"{middle} {name}", text_rules(name, resolve(part, root), literal, close=form.close, strict=strict)


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
