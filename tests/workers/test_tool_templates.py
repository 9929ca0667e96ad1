"""The real chat templates of the families: how they tell of tools, and that calls as they write them are read back.

They come with llama.cpp, in ``models/templates`` of its source (``vendor/llama.cpp`` in llama-cpp-python's source distribution), and
are not ours to pass on: set ``LMWEB_TEST_TEMPLATES`` to that folder to run these tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from workers.events import ToolCallArguments, ToolCallStart
from workers.parsing.tools import families
from workers.parsing.tools.families import Syntax
from workers.parsing.tools.prompts import ToolPrompt
from workers.parsing.tools.reader import CallReader
from workers.schemas import ChatMessage, Tool, ToolCall
from workers.templates import ChatTemplate

FOLDER = Path(os.environ.get("LMWEB_TEST_TEMPLATES", "/nonexistent"))

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="LMWEB_TEST_TEMPLATES names no folder of chat templates")

TEMPLATES = {
    "Qwen-Qwen2.5-7B-Instruct": families.HERMES,
    "Qwen-Qwen3-0.6B": families.HERMES,
    "Qwen-QwQ-32B": families.HERMES,
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": families.HERMES,
    "ibm-granite-granite-4.0": families.HERMES,
    "ibm-granite-granite-3.3-2B-Instruct": families.TAGGED_LIST,
    "meta-llama-Llama-3.1-8B-Instruct": families.LLAMA_3,
    "meta-llama-Llama-3.2-3B-Instruct": families.LLAMA_3,
    "meta-llama-Llama-3.3-70B-Instruct": families.LLAMA_3,
    "mistralai-Mistral-Nemo-Instruct-2407": families.MISTRAL_LIST,
    "Mistral-Small-3.2-24B-Instruct-2506": families.MISTRAL_ARGS,
    "mistralai-Ministral-3-14B-Reasoning-2512": families.MISTRAL_ARGS,
    "unsloth-mistral-Devstral-Small-2507": families.MISTRAL_ARGS,
    "llama-cpp-deepseek-r1": families.DEEPSEEK_R1,
    "openai-gpt-oss-120b": families.HARMONY,
    "deepseek-ai-DeepSeek-V3.1": families.DEFAULT,  # its template tells of no tools
    "google-gemma-2-2b-it": families.DEFAULT,
    "microsoft-Phi-3.5-mini-instruct": families.DEFAULT,
}
TOOL = Tool(
    name="get_weather",
    description="Weather of a city",
    parameters='{"type": "object", "properties": {"city": {"type": "string", "description": "Which"}}, "required": ["city"]}',
)
TALK = [
    ChatMessage(role="user", content="Rome?"),
    ChatMessage(role="assistant", content="", tool_calls=(ToolCall(id="call_1", name="get_weather", arguments='{"city": "Rome"}'),)),
    ChatMessage(role="tool", content="sunny", tool_call_id="call_1"),
]


def prompt(name: str) -> ToolPrompt:
    source = (FOLDER / f"{name}.jinja").read_text()
    return ToolPrompt(ChatTemplate(source, bos_token="<s>", eos_token="</s>"), source)


@pytest.mark.parametrize(("name", "syntax"), TEMPLATES.items())
def test_tools_calls_and_results_are_in_the_prompt(name: str, syntax: Syntax) -> None:
    made = prompt(name)
    assert made.syntax is syntax
    text = made.render(TALK, [TOOL])
    for part in ("get_weather", "Weather of a city", "Which", '"Rome"', "sunny"):
        assert part in text
    assert "get_weather" not in made.render(TALK[:1], [])


@pytest.mark.parametrize(("name", "syntax"), TEMPLATES.items())
def test_a_call_as_the_template_writes_it_is_read_back(name: str, syntax: Syntax) -> None:
    made = prompt(name)
    shown = made.render(TALK[:2], [TOOL], add_generation_prompt=False)
    start = shown.rfind(
        '{"name": "get_weather"' if syntax.bare else syntax.marker if syntax is families.HARMONY else syntax.section or syntax.marker
    )
    assert start >= 0, shown
    pieces = CallReader(syntax, frozenset({"get_weather"}), "g").feed(shown[start:])
    assert [piece.tool for piece in pieces if isinstance(piece, ToolCallStart)] == ["get_weather"]
    assert json.loads("".join(piece.content for piece in pieces if isinstance(piece, ToolCallArguments))) == {"city": "Rome"}
