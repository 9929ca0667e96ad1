"""The real chat templates of the families: conversations come out whole, tools are told of, and calls as they write them are read back."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from llguidance import LLTokenizer

from bench.engine_source import SourceUnavailable
from lmweb.errors import InvalidRequest, TemplateError
from tests.chat_templates import fetch
from workers.constraints import ConstraintFactory
from workers.events import MessageDelta, ReasoningDelta, ToolCallArguments, ToolCallStart
from workers.parsing.output import OutputParser
from workers.parsing.tools import families
from workers.parsing.tools.families import Syntax
from workers.parsing.tools.reader import CallReader
from workers.parsing.tools.requests import grammars
from workers.prompting import Prompter
from workers.schemas import ChatMessage, GenerationRequest, Tool, ToolCall

#: All of them. What tells of no tools, or in a way that nobody needs, gets LM Studio's format.
TEMPLATES = {
    "Apertus-8B-Instruct": families.APERTUS,
    "Apriel-1.6-15b-Thinker-fixed": families.APRIEL,
    "Bielik-11B-v3.0-Instruct": families.HERMES,
    "ByteDance-Seed-OSS": families.SEED,
    "Cohere2MoE": families.COHERE,
    "CohereForAI-c4ai-command-r-plus-tool_use": families.COMMAND_R,
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": families.COHERE,
    "GLM-4.6": families.GLM,
    "GLM-4.7-Flash": families.GLM,
    "GigaChat3-10B-A1.8B": families.GIGACHAT_3,
    "GigaChat3.1-10B-A1.8B": families.GIGACHAT_3_1,
    "HuggingFaceTB-SmolLM3-3B": families.DEFAULT,
    "Kimi-K2-Instruct": families.KIMI_K2,
    "Kimi-K2-Thinking": families.KIMI_K2,
    "Kimi-K3": families.DEFAULT,
    "LFM2-8B-A1B": families.PYTHON_CALLS,
    "LFM2.5-8B-A1B": families.PYTHON_CALLS,
    "LFM2.5-Instruct": families.PYTHON_CALLS,
    "MiMo-VL": families.HERMES,
    "MiniMax-M1": families.MINIMAX_M1,
    "MiniMax-M2": families.MINIMAX_M2,
    "MiniMax-M3": families.DEFAULT,
    "Mistral-Small-3.2-24B-Instruct-2506": families.MISTRAL_ARGS,
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": families.QWEN_XML,
    "NVIDIA-Nemotron-Nano-v2": families.NEMOTRON,
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": families.HERMES,
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": families.HERMES,
    "Qwen-QwQ-32B": families.HERMES,
    "Qwen-Qwen2.5-7B-Instruct": families.HERMES,
    "Qwen-Qwen3-0.6B": families.HERMES,
    "Qwen3-Coder": families.QWEN_XML,
    "Qwen3.5-4B": families.QWEN_XML,
    "Reka-Edge": families.HERMES,
    "Spark2.5": families.GLM,
    "StepFun3.5-Flash": families.QWEN_XML,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": families.DEFAULT,
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": families.DEFAULT,
    "deepseek-ai-DeepSeek-V3.1": families.DEFAULT,
    "deepseek-ai-DeepSeek-V3.2": families.DEEPSEEK_V3_2,
    "deepseek-ai-DeepSeek-V4": families.DEEPSEEK_V4,
    "deepseek-ai-DeepSeek-V4-Flash-0731": families.DEEPSEEK_V4,
    "fireworks-ai-llama-3-firefunction-v2": families.FUNCTOOLS,
    "google-gemma-2-2b-it": families.DEFAULT,
    "google-gemma-4-31B-it": families.GEMMA_4,
    "google-gemma-4-31B-it-interleaved": families.GEMMA_4,
    "ibm-granite-granite-3.3-2B-Instruct": families.TAGGED_LIST,
    "ibm-granite-granite-4.0": families.HERMES,
    "ibm-granite-granite-4.1": families.HERMES,
    "inclusionai-ling-3.0-flash": families.GLM,
    "llama-cpp-deepseek-r1": families.DEEPSEEK_R1,
    "llama-cpp-rwkv-world": families.DEFAULT,
    "meetkai-functionary-medium-v3.1": families.FUNCTION_TAG,
    "meetkai-functionary-medium-v3.2": families.DEFAULT,
    "meta-llama-Llama-3.1-8B-Instruct": families.LLAMA_3,
    "meta-llama-Llama-3.2-3B-Instruct": families.LLAMA_3,
    "meta-llama-Llama-3.3-70B-Instruct": families.LLAMA_3,
    "microsoft-Phi-3.5-mini-instruct": families.DEFAULT,
    "mistralai-Ministral-3-14B-Reasoning-2512": families.MISTRAL_ARGS,
    "mistralai-Mistral-Nemo-Instruct-2407": families.MISTRAL_LIST,
    "moonshotai-Kimi-K2": families.KIMI_K2,
    "muse-glimmer": families.DEFAULT,
    "openai-gpt-oss-120b": families.HARMONY,
    "openbmb-MiniCPM5-1B": families.MINICPM,
    "poolside-Laguna-S-2.1": families.GLM,
    "poolside-Laguna-XS-2.1": families.GLM,
    "poolside-Laguna-XS.2": families.GLM,
    "tencent-Hy3": families.HUNYUAN,
    "unsloth-Apriel-1.5": families.APRIEL,
    "unsloth-mistral-Devstral-Small-2507": families.MISTRAL_ARGS,
    "upstage-Solar-Open-100B": families.SOLAR,
}
#: Templates that refuse a system message, in their own words.
NO_SYSTEM = {"google-gemma-2-2b-it": "System role not supported"}
CITY = '{"type": "string", "description": "Which"}'
TOOL = Tool(
    name="get_weather",
    description="Weather of a city",
    parameters=f'{{"type": "object", "properties": {{"city": {CITY}, "days": {{"type": "integer", "description": "n"}}}}, "required": ["city"]}}',
)
ARGUMENTS = {"city": 'Rome, <b>"eternal"</b>', "days": 3}
SYSTEM = ChatMessage(role="system", content="Talk like Cicero.")
TALK = [
    ChatMessage(role="user", content="Rome?"),
    ChatMessage(role="assistant", content="", tool_calls=(ToolCall(id="call_1", name="get_weather", arguments=json.dumps(ARGUMENTS)),)),
    ChatMessage(role="tool", content="sunny", tool_call_id="call_1"),
    ChatMessage(role="assistant", content="It is sunny."),
    ChatMessage(role="user", content="And Bonn?"),
]
NATIVE = {name: syntax for name, syntax in TEMPLATES.items() if syntax is not families.DEFAULT}


@pytest.fixture(scope="session")
def folder() -> Path:
    try:
        return fetch()
    except SourceUnavailable as error:
        pytest.skip(str(error))


def prompter(folder: Path, name: str) -> Prompter:
    return Prompter((folder / f"{name}.jinja").read_text(), bos_token="<s>", eos_token="</s>")


def rendered(made: Prompter, messages: list[ChatMessage], *tools: Tool) -> str:
    return made.render(GenerationRequest(model="m", messages=messages, tools=tools), messages)


def test_every_template_is_known(folder: Path) -> None:
    assert {file.stem for file in folder.glob("*.jinja")} == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_come_out_whole(folder: Path, name: str) -> None:
    made = prompter(folder, name)
    plain = [TALK[0], TALK[3], TALK[4]]
    for part in ("Rome?", "It is sunny.", "And Bonn?"):
        assert part in rendered(made, plain)
    if name in NO_SYSTEM:
        with pytest.raises(TemplateError, match=NO_SYSTEM[name]):
            rendered(made, [SYSTEM, *plain])
    else:
        assert SYSTEM.content in rendered(made, [SYSTEM, *plain])
        assert SYSTEM.content in rendered(made, [SYSTEM, *TALK], TOOL)


@pytest.mark.parametrize(("name", "syntax"), TEMPLATES.items())
def test_tools_calls_and_results_are_in_the_prompt(folder: Path, name: str, syntax: Syntax) -> None:
    made = prompter(folder, name)
    assert made.syntax is syntax
    text = rendered(made, TALK[:3], TOOL)
    for part in ("get_weather", "Weather of a city", "Which", "eternal", "sunny"):
        assert part in text
    assert "get_weather" not in rendered(made, TALK[:1])


def call_text(folder: Path, name: str, syntax: Syntax) -> str:
    """Return how the template writes a call."""
    before, after = (rendered(prompter(folder, name), TALK[:n], TOOL) for n in (1, 3))
    starts = ['{"name": "get_weather"'] if syntax.bare else syntax.markers
    start = max(after.rfind(text) for text in starts)
    assert start >= 0, after
    assert before.count("eternal") == 0
    return after[start : after.rfind("sunny")]


@pytest.mark.parametrize(("name", "syntax"), NATIVE.items())
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_call_as_the_template_writes_it_is_read_back(folder: Path, name: str, syntax: Syntax, size: int) -> None:
    shown = call_text(folder, name, syntax)
    reader = CallReader(syntax, {"get_weather": json.loads(TOOL.parameters)}, "g")
    pieces = [piece for i in range(0, len(shown), size) for piece in reader.feed(shown[i : i + size])]
    assert [piece.tool for piece in pieces if isinstance(piece, ToolCallStart)] == ["get_weather"]
    assert json.loads("".join(piece.content for piece in pieces if isinstance(piece, ToolCallArguments))) == ARGUMENTS
    assert reader.completed == 1


@pytest.mark.parametrize(("name", "syntax"), NATIVE.items())
def test_a_call_as_the_template_writes_it_is_allowed(folder: Path, name: str, syntax: Syntax) -> None:
    shown = call_text(folder, name, syntax)
    marker = next((text for text in syntax.markers if shown.startswith(text)), "")
    factory = ConstraintFactory(LLTokenizer("byte"))
    request = GenerationRequest(model="m", messages=TALK[:1], tools=(TOOL,))
    constraint = factory.make_calls(lambda literal: grammars(request, syntax, literal))
    reader = CallReader(syntax, {"get_weather": json.loads(TOOL.parameters)}, "g")
    reader.feed(marker)
    for character in shown.removeprefix(marker):
        for byte in character.encode():
            assert constraint.allows(byte), shown
            constraint.accept(byte)
        reader.feed(character)
        if reader.completed:
            break
    assert reader.completed == 1


REASONING = {
    "Qwen-Qwen3-0.6B": "<think>\nhm\n</think>\n\n",
    "mistralai-Ministral-3-14B-Reasoning-2512": "[THINK]hm[/THINK]",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|START_THINKING|>hm<|END_THINKING|>",
    "google-gemma-4-31B-it": "<|channel>thought\nhm<channel|>",
    "ByteDance-Seed-OSS": "<seed:think>hm</seed:think>",
    "MiniMax-M3": "<mm:think>hm</mm:think>",
    "tencent-Hy3": "<think:opensource>hm</think:opensource>",
    "Apertus-8B-Instruct": "<|inner_prefix|>hm<|inner_suffix|>",
    "Apriel-1.6-15b-Thinker-fixed": "Here are my reasoning steps:\nhm[BEGIN FINAL RESPONSE]",
    "upstage-Solar-Open-100B": "<|think|>hm<|end|><|begin|>assistant",
    "openai-gpt-oss-120b": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>",
    "GLM-4.6": "<think>hm</think>\n",
    "deepseek-ai-DeepSeek-V3.2": "<think>hm</think>",
    "Kimi-K2-Thinking": "<think>hm</think>",
}


@pytest.mark.parametrize(("name", "thought"), REASONING.items())
@pytest.mark.parametrize("size", [1, 1000])
def test_thoughts_are_told_from_the_answer(folder: Path, name: str, thought: str, size: int) -> None:
    made = prompter(folder, name)
    answer = f"{thought}Yes <b>."
    parser = OutputParser([], starts_reasoning=False, tags=made.tags)
    events = [event for i in range(0, len(answer), size) for event in parser.feed(answer[i : i + size].encode())] + parser.finish()
    assert "".join(event.content for event in events if isinstance(event, ReasoningDelta)).strip() == "hm"
    assert "".join(event.content for event in events if isinstance(event, MessageDelta)) == "Yes <b>."


@pytest.mark.parametrize(
    ("name", "variables", "thinks"),
    [
        ("Apriel-1.6-15b-Thinker-fixed", {}, True),
        ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", {}, False),
        ("GLM-4.7-Flash", {}, True),
        ("GLM-4.7-Flash", {"enable_thinking": False}, False),
        ("Cohere2MoE", {}, True),
        ("google-gemma-4-31B-it", {}, False),
        ("tencent-Hy3", {}, False),
        ("Qwen3-Coder", {}, False),
    ],
)
def test_a_prompt_may_begin_the_thoughts(folder: Path, name: str, variables: dict[str, object], thinks: bool) -> None:
    made = prompter(folder, name)
    request = GenerationRequest(model="m", messages=TALK[:1], template_kwargs=variables)
    assert made.starts_reasoning(made.render(request, request.messages)) is thinks


@pytest.mark.parametrize(
    ("name", "wanted", "shown"),
    [
        ("openai-gpt-oss-120b", "high", "Reasoning: high"),
        ("openai-gpt-oss-120b", "on", "Reasoning: medium"),
        ("openai-gpt-oss-120b", "off", None),
        ("Qwen-Qwen3-0.6B", "off", "<think>\n\n</think>"),
        ("Qwen-Qwen3-0.6B", "high", "assistant\n"),
        ("GLM-4.7-Flash", "off", "</think>"),
        ("GLM-4.7-Flash", "low", "<think>"),
        ("ibm-granite-granite-3.3-2B-Instruct", "on", "<think></think>"),
        ("Qwen-Qwen2.5-7B-Instruct", "off", None),
        ("Qwen-Qwen2.5-7B-Instruct", "low", None),
        ("unsloth-Apriel-1.5", "on", None),
    ],
)
def test_how_much_a_model_thinks_is_set_as_its_template_knows(folder: Path, name: str, wanted: str, shown: str | None) -> None:
    made = prompter(folder, name)
    request = msgspec.convert({"model": "m", "messages": [{"role": "user", "content": "x"}], "reasoning": wanted}, GenerationRequest)
    if shown is None:
        with pytest.raises(InvalidRequest, match=wanted):
            made.render(request, request.messages)
    else:
        assert shown in made.render(request, request.messages)
