"""Calls by a model that writes whatever its grammar allows: in every family they parse, and their arguments fit the schema."""

from __future__ import annotations

import codecs
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLTokenizer

from lmweb.errors import InvalidRequest
from tests.micro_models import make_micro, starter_vocabulary
from workers.constraints import ConstraintFactory
from workers.engines import registry
from workers.events import ToolCallArguments, ToolCallStart
from workers.parsing.tools import families
from workers.parsing.tools.families import Form, Notation, Parameters, Syntax
from workers.parsing.tools.reader import CallReader
from workers.parsing.tools.requests import grammars
from workers.schemas import ChatMessage, GenerationRequest, LoadConfig, Tool

SYNTAXES = {name: value for name, value in vars(families).items() if isinstance(value, Syntax)}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "where": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["c", "f"]},
        "day": {"type": "integer"},
        "maybe": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "at": {"$ref": "#/$defs/point"},
    },
    "required": ["unit", "at"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"const": 1}, "y": {"type": "boolean"}},
            "required": ["y"],
            "additionalProperties": False,
        }
    },
}
TOOLS = (
    Tool(name="find", parameters=json.dumps(SCHEMA)),
    Tool(name="find_all", parameters='{"type": "object", "additionalProperties": false}'),
)


def check(arguments: dict[str, Any]) -> None:
    assert {"unit", "at"} <= set(arguments) <= set(SCHEMA["properties"])
    assert arguments["unit"] in {"c", "f"}
    assert isinstance(arguments.get("day", 1), int)
    assert arguments.get("maybe") in {True, False, None}
    assert len(arguments.get("where", "")) <= 6
    assert all(isinstance(tag, str) and len(tag) <= 3 for tag in arguments.get("tags", []))
    assert len(arguments.get("tags", [])) <= 2
    assert isinstance(arguments["at"].pop("y"), bool)
    assert arguments["at"] in ({}, {"x": 1})


#: GLM's way with tags that are control tokens of the micro model's vocabulary, as GLM's are of its own.
WITH_CONTROL_TOKENS = replace(
    families.GLM,
    marker="<tool_call>",
    tail=(" </tool_call>",),
    arguments=Parameters(" <|im_start|>", (Form("<think>", "</think>"),)),
)


def test_control_tokens_end_texts(tmp_path: Path) -> None:
    """Texts, which anything may follow but control tokens, end with the control token that closes them."""
    engine = registry.factory("llama.cpp")(
        str(make_micro(tmp_path / "m.gguf")), LoadConfig(cpu_threads=1, context_length=64), lambda _f: None
    )
    request = GenerationRequest(model="m", messages=[ChatMessage(role="user", content="x")], tools=TOOLS)
    specials = {token: text for token, text in enumerate(starter_vocabulary().tokens) if text.startswith("<") and text.endswith(">")}
    for seed in range(8):
        dice = random.Random(seed)
        constraint = engine.constraints().make_calls(lambda literal: grammars(request, WITH_CONTROL_TOKENS, literal))
        reader = CallReader(WITH_CONTROL_TOKENS, {tool.name: json.loads(tool.parameters) for tool in TOOLS}, "g")
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces: list[Any] = reader.feed(WITH_CONTROL_TOKENS.marker)
        for _ in range(4000):
            logits = np.zeros(engine.info.vocab_size, np.float32)
            constraint.mask(logits)
            token = int(dice.choice(np.flatnonzero(np.isfinite(logits))))
            constraint.accept(token)
            pieces += reader.feed(specials.get(token) or decoder.decode(engine.piece(token)))
            if reader.completed:
                break
        assert reader.completed == 1
        arguments = json.loads("".join(piece.content for piece in pieces if isinstance(piece, ToolCallArguments)))
        if pieces[0].tool == "find":
            check(arguments)
    engine.close()


@pytest.mark.parametrize("name", SYNTAXES)
def test_whatever_the_grammar_allows_is_a_call_that_fits(name: str) -> None:
    syntax, tokenizer = SYNTAXES[name], LLTokenizer("byte")
    factory = ConstraintFactory(tokenizer)
    request = GenerationRequest(model="m", messages=[ChatMessage(role="user", content="x")], tools=TOOLS, tool_choice="required")
    called = set()
    for seed in range(6):
        dice = random.Random(seed)
        constraint = factory.make_calls(lambda literal: grammars(request, syntax, literal))
        reader = CallReader(syntax, {tool.name: json.loads(tool.parameters) for tool in TOOLS}, "g")
        pieces: list[Any] = []
        held = b""
        for _ in range(4000):
            logits = np.zeros(tokenizer.vocab_size, np.float32)
            constraint.mask(logits)
            allowed = np.flatnonzero(np.isfinite(logits[:256]))
            plain = [int(byte) for byte in allowed if 32 <= byte < 127 or byte == 10]
            byte = dice.choice(plain or [int(byte) for byte in allowed])
            constraint.accept(byte)
            held += bytes([byte])
            try:
                text = held.decode()
            except UnicodeDecodeError:
                continue
            held = b""
            pieces += reader.feed(text)
            if reader.completed:
                break
        assert reader.completed == 1
        if syntax is not families.HARMONY:  # whose channels are taken out before
            assert [piece for piece in pieces if isinstance(piece, str)] == []
        tool = next(piece.tool for piece in pieces if isinstance(piece, ToolCallStart))
        arguments = json.loads("".join(piece.content for piece in pieces if isinstance(piece, ToolCallArguments)))
        called.add(tool)
        if tool == "find":
            check(arguments)
        else:
            assert arguments == {}
    assert "find" in called


@pytest.mark.parametrize("name", [name for name, syntax in SYNTAXES.items() if isinstance(syntax.arguments, Parameters | Notation)])
def test_schemas_of_which_little_is_known_can_be_used(name: str) -> None:
    factory = ConstraintFactory(LLTokenizer("byte"))
    for parameters in (
        '{"type": "object"}',
        '{"properties": {"a": {}, "b": {"type": "array"}, "c": {"type": "object"}}}',
    ):
        tools = (Tool(name="f", parameters=parameters),)
        request = GenerationRequest(model="m", messages=[ChatMessage(role="user", content="x")], tools=tools)
        factory.make_calls(lambda literal, request=request: grammars(request, SYNTAXES[name], literal))


def test_what_cannot_be_enforced_is_an_error_if_it_is_strict() -> None:
    factory = ConstraintFactory(LLTokenizer("byte"))
    parameters = '{"properties": {"a": {"type": "string", "pattern": "^x$"}}}'
    for strict in (False, True):
        tools = (Tool(name="f", parameters=parameters, strict=strict),)
        request = GenerationRequest(model="m", messages=[ChatMessage(role="user", content="x")], tools=tools)
        factory.make_calls(lambda literal, request=request: grammars(request, families.HERMES, literal))
        if strict:
            with pytest.raises(InvalidRequest, match="pattern"):
                factory.make_calls(lambda literal, request=request: grammars(request, families.GLM, literal))
        else:
            factory.make_calls(lambda literal, request=request: grammars(request, families.GLM, literal))
