"""Grammar rules of arguments in a notation of their own, made from a tool's JSON schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from workers.parsing.tools.families import Notation
from workers.parsing.tools.texts import bounds, text_rules
from workers.parsing.tools.values import Schema, properties, required, resolve

#: A list without a limit of its own is bounded, or a weak model might never end it.
_MOST_ITEMS = 256
_DEPTH = 12
_ESCAPED = "([^\\x00-\\x1f\\\\{quote}]|\\\\[nt\\\\{quote}])"
_NUMBERS = {"integer": "/-?(0|[1-9][0-9]{0,17})/", "number": "/-?(0|[1-9][0-9]{0,17})(\\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?/"}


class NotationGrammar:
    """The rules of one tool's arguments after their opening; the first rule is ``name``."""

    def __init__(self, notation: Notation, schema: Schema, name: str, literal: Callable[[str], str], *, strict: bool) -> None:
        self._notation, self._root, self._name, self._literal, self._strict = notation, schema, name, literal, strict
        self._rules: list[str] = []
        self._count = 0
        self._references: dict[str, str] = {}

    def lines(self) -> list[str]:
        """Return the rules."""
        members = self._members(resolve(self._root, self._root), self._notation.equals, quoted=False)
        self._rules.insert(0, f"{self._name}: {members} ws {self._literal(self._notation.end)}")
        return self._rules

    def _rule(self, body: str) -> str:
        name = self._new()
        self._rules.append(f"{name}: {body}")
        return name

    def _new(self) -> str:
        self._count += 1
        return f"{self._name}_{self._count}"

    def _members(self, schema: Schema, equals: str, *, quoted: bool) -> str:
        """Return names with values, separated by commas, in the order of the schema; those that need not be there may be left out."""
        known, needed = list(properties(schema).items()), required(schema)
        quote = self._literal(self._notation.quotes[0]) if quoted else ""
        first = later = '""'
        if not known and schema.get("additionalProperties") is not False:
            member = self._rule(f"ws {quote} key {quote} ws {self._literal(equals)} ws {self._anything()}")
            return f"({member} (ws {self._literal(',')} {member}){{0,{_MOST_ITEMS}}})?"
        for key, part in reversed(known):
            member = f"ws {quote} {self._literal(key)} {quote} ws {self._literal(equals)} ws {self._value(part)}"
            with_member = self._rule(f"{member} {later}")
            with_comma = self._rule(f"ws {self._literal(',')} {member} {later}")
            first = with_member if key in needed else self._rule(f"{with_member} | {first}")
            later = with_comma if key in needed else self._rule(f"{with_comma} | {later}")
        return first

    def _value(self, schema: Any, depth: int = 0) -> str:
        if isinstance(schema, dict) and isinstance(reference := schema.get("$ref"), str):
            if reference not in self._references:
                name = self._references[reference] = self._new()
                self._rules.append(f"{name}: {self._value(resolve(schema, self._root), depth + 1)}")
            return self._references[reference]
        schema = resolve(schema, self._root)
        for word in ("anyOf", "oneOf"):
            if isinstance(options := schema.get(word), list) and options and depth < _DEPTH:
                return self._rule(" | ".join(self._value(option, depth + 1) for option in options))
        options = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
        if isinstance(options, list) and options:
            return self._rule(" | ".join(self._constant(option) for option in options))
        types = schema.get("type") or ("object" if "properties" in schema else "array" if "items" in schema else "")
        names = [name for name in (types if isinstance(types, list) else [types]) if isinstance(name, str)]
        return self._rule(" | ".join(self._typed(name, schema, depth) for name in names) or self._anything())

    def _typed(self, name: str, schema: Schema, depth: int) -> str:
        true, false, null = (self._literal(word) for word in self._notation.words)
        match name:
            case "string":
                return self._string(schema)
            case "boolean":
                return f"{true} | {false}"
            case "null":
                return null
            case "integer" | "number":
                return _NUMBERS[name]
            case "array" if depth < _DEPTH:
                return self._array(schema, depth)
            case "object" if depth < _DEPTH:
                members = self._members(schema, ":", quoted=not self._notation.bare_names)
                return f"{self._literal('{')} {members} ws {self._literal('}')}"
        return self._anything()

    def _array(self, schema: Schema, depth: int) -> str:
        low, high = schema.get("minItems", 0), schema.get("maxItems", _MOST_ITEMS)
        high = min(high, _MOST_ITEMS) if isinstance(high, int) and high >= 0 else _MOST_ITEMS
        low = min(low, high) if isinstance(low, int) and low > 0 else 0
        if not high:
            return f"{self._literal('[')} ws {self._literal(']')}"
        item = self._value(schema.get("items", {}), depth + 1)
        items = f"ws {item} (ws {self._literal(',')} ws {item}){{{max(low - 1, 0)},{high - 1}}}"
        return f"{self._literal('[')} {items if low else f'({items})?'} ws {self._literal(']')}"

    def _string(self, schema: Schema) -> str:
        return " | ".join(self._quoted(schema, quote) for quote in self._notation.quotes)

    def _quoted(self, schema: Schema, quote: str) -> str:
        shown = self._literal(quote)
        if self._notation.escapes:
            return f"{shown} {self._rule(f'/{_ESCAPED.format(quote=quote)}{bounds(schema)}/')} {shown}"
        name = self._new()
        self._rules += text_rules(name, schema, self._literal, close=quote, strict=self._strict)
        return f"{shown} {name}"

    def _constant(self, value: Any) -> str:
        if isinstance(value, bool) or value is None:
            return self._literal(self._notation.words[0 if value is True else 1 if value is False else 2])
        if not isinstance(value, str):
            return self._literal(json.dumps(value))
        choices = []
        for quote in self._notation.quotes:
            shown = value.replace("\\", "\\\\").replace(quote, f"\\{quote}").replace("\n", "\\n") if self._notation.escapes else value
            choices.append(" ".join(self._literal(text) for text in (quote, shown, quote) if text))
        return " | ".join(choices)

    def _anything(self) -> str:
        """Return the rule of a value about which nothing is known."""
        if "" not in self._references:
            name = self._references[""] = self._new()
            simple = [self._typed(kind, {}, _DEPTH) for kind in ("string", "boolean", "null", "number")]
            lists = f"{self._literal('[')} (ws {name} (ws {self._literal(',')} ws {name}){{0,{_MOST_ITEMS}}})? ws {self._literal(']')}"
            self._rules.append(f"{name}: {' | '.join(simple)} | {lists}")
        return self._references[""]
