"""Calls of tools through real runners: the starter model calls of its own accord, one with random weights has to."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from models_app.models import Generation, InstalledModel
from tests.micro_models import make_micro, starter_vocabulary
from tests.workers.support import GREEDY, Bench, wait_for
from workers.events import ChatEnd, ToolCallArguments, ToolCallStart
from workers.schemas import ChatMessage, NamedTool, OutputFormat, SamplingParams, Tool, ToolCall

CITY = (
    '{"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"], "additionalProperties": false}'
)
WEATHER = Tool(name="get_weather", description="Get the current weather in a given location", parameters=CITY)
PICK = Tool(
    name="pick",
    parameters='{"properties": {"n": {"enum": [1, 2, 3]}, "deep": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},'
    ' "required": ["n", "deep"], "additionalProperties": false}',
)
NOISE = SamplingParams(temperature=1.0, seed=4, max_tokens=300)
TELLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}\n{% endfor %}assistant: "
)

#: The beginning of a template is enough to tell its family.
FAMILIES = {
    "hermes": "<tool_call>",
    "llama 3": '<|start_header_id|>"parameters": ',
    "mistral list": "[TOOL_CALLS][",
    "mistral": "[TOOL_CALLS][ARGS]",
    "deepseek r1": "<｜tool▁call▁begin｜>```json",
    "deepseek": "<｜tool▁call▁begin｜>",
    "granite": "<|tool_call|>",
    "gpt-oss": "<|channel|><|message|>functions.",
    "default": "",
    "functools": "functools[",
    "kimi": "<|tool_call_argument_begin|>",
    "cohere": "<|START_ACTION|>",
    "minimax m1": "<tool_calls>",
    "qwen3-coder": "<tool_call><function=",
    "seed": "<seed:tool_call>",
    "glm": "<arg_key>",
    "minimax m2": "<minimax:tool_call>",
    "deepseek v3.2": "｜DSML｜function_calls>",
    "minicpm": '<function name="',
    "gemma 4": "<|tool_call>call:",
    "lfm": "<|tool_call_start|>",
}


def start(bench: Bench, model: InstalledModel, text: str, sampling: SamplingParams, **fields: object) -> Generation:
    generation = bench.create(model, text, sampling=sampling, **{"tools": (WEATHER, PICK), **fields})
    bench.host.generate(str(generation.pk))
    return generation


@pytest.fixture
def noise(bench: Bench, tmp_path: Path) -> InstalledModel:
    """Return a model with random weights and the starter's template, whose only special tokens of calls are Qwen's."""
    template = (Path(__file__).parents[2] / "models_app" / "starter" / "chat_template.jinja").read_text()
    return bench.install(make_micro(tmp_path / "noise.gguf", chat_template=template), "test/noise", architecture="qwen2")


@pytest.fixture
def slow_noise(bench: Bench, tmp_path: Path) -> InstalledModel:
    """Return one with so many layers that an answer takes seconds."""
    template = (Path(__file__).parents[2] / "models_app" / "starter" / "chat_template.jinja").read_text()
    return bench.install(make_micro(tmp_path / "slow.gguf", layers=8, chat_template=template), "test/slow", architecture="qwen2")


def check(generation: Generation, *, names: set[str]) -> None:
    """See that every call has a known name and arguments that fit its schema."""
    for call in generation.tool_calls:
        assert call["name"] in names
        arguments = json.loads(call["arguments"])
        if call["name"] == "get_weather":
            assert list(arguments) == ["city"]
        else:
            assert arguments["n"] in {1, 2, 3}
            assert all(isinstance(value, bool) for value in arguments["deep"])


def test_the_starter_calls_a_tool_and_answers_with_its_result(bench: Bench, starter: InstalledModel) -> None:
    asked = start(bench, starter, "What is the weather in Rome?", GREEDY, tools=(WEATHER,))
    assert bench.finished(asked).stats["stop_reason"] == "toolCalls"
    assert [(call["name"], json.loads(call["arguments"])) for call in asked.tool_calls] == [("get_weather", {"city": "Rome"})]
    assert asked.content == ""
    events = bench.events(asked)
    begun = next(event for event in events if isinstance(event, ToolCallStart))
    assert begun.id == asked.tool_calls[0]["id"]
    assert "".join(event.content for event in events if isinstance(event, ToolCallArguments)) == asked.tool_calls[0]["arguments"]
    assert isinstance(events[-1], ChatEnd)
    assert [item.type for item in events[-1].result.output] == ["tool_call"]

    call = ToolCall(**asked.tool_calls[0])
    talk = [
        ChatMessage(role="user", content="What is the weather in Rome?"),
        ChatMessage(role="assistant", content="", tool_calls=(call,)),
        ChatMessage(role="tool", content='{"temperature": 21, "condition": "sunny"}', tool_call_id=call.id),
    ]
    answered = bench.finished(start(bench, starter, "", GREEDY, tools=(WEATHER,), messages=talk))
    assert "21" in answered.content
    assert answered.tool_calls == []
    assert answered.stats["stop_reason"] == "eosFound"


def test_no_tools_are_offered_with_none(bench: Bench, starter: InstalledModel) -> None:
    question = "What is the weather in Rome?"
    hidden = bench.finished(start(bench, starter, question, GREEDY, tool_choice="none"))
    without = bench.finished(start(bench, starter, question, GREEDY, tools=()))
    assert (hidden.tool_calls, hidden.content, hidden.stats["input_tokens"]) == ([], without.content, without.stats["input_tokens"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_required_call_parses_in_every_family(bench: Bench, tmp_path: Path, family: str) -> None:
    file = make_micro(tmp_path / "m.gguf", chat_template="{# " + FAMILIES[family] + " #}" + TELLS)
    model = bench.install(file, "test/family", architecture="qwen2")
    for seed in range(3):
        sampling = SamplingParams(temperature=1.0, seed=seed, max_tokens=300)
        generation = bench.finished(start(bench, model, "x", sampling, tool_choice="required", parallel_tool_calls=False))
        assert generation.stats["stop_reason"] == "toolCalls"
        assert generation.content == ""
        assert len(generation.tool_calls) == 1
        check(generation, names={"get_weather", "pick"})


def test_a_named_tool_is_the_one_that_is_called(bench: Bench, noise: InstalledModel) -> None:
    for name in ("pick", "get_weather"):
        generation = bench.finished(start(bench, noise, "x", NOISE, tool_choice=NamedTool(name)))
        assert [call["name"] for call in generation.tool_calls] == [name]
        check(generation, names={name})


def test_a_call_that_was_begun_is_finished_in_a_batch(bench: Bench, noise: InstalledModel) -> None:
    """The bias makes the marker the likeliest token wherever text is free, so that call follows call."""
    marker = starter_vocabulary().tokens.index("<tool_call>")
    generations = [
        start(bench, noise, f"x{i}", SamplingParams(temperature=t, seed=i, max_tokens=250, logit_bias={marker: 100.0}))
        for i, t in enumerate((0.0, 1.0, 1.0, 1.5))
    ]
    free = start(bench, noise, "x", SamplingParams(temperature=1.0, seed=9, max_tokens=30), tools=())
    for generation in generations:
        *whole, last = bench.finished(generation).tool_calls
        assert len(whole) > 2
        generation.tool_calls = whole
        check(generation, names={"get_weather", "pick"})
        assert "<tool_call>" not in generation.content
        assert generation.stats["stop_reason"] == "maxPredictedTokensReached"
        assert len({call["id"] for call in [*whole, last]}) == len(whole) + 1
    assert bench.finished(free).tool_calls == []


def test_json_or_a_call(bench: Bench, noise: InstalledModel) -> None:
    wanted = OutputFormat(kind="json_schema", value='{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}')
    for seed in range(4):
        sampling = SamplingParams(temperature=1.0, seed=seed, max_tokens=400)
        generation = start(bench, noise, "x", sampling, output_format=wanted, parallel_tool_calls=False)
        bench.finished(generation)
        check(generation, names={"get_weather", "pick"})
        assert generation.tool_calls or json.loads(generation.content)["a"] in {1, 2}


def test_calls_survive_a_crash(bench: Bench, slow_noise: InstalledModel) -> None:
    marker = starter_vocabulary().tokens.index("<tool_call>")
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=1800, logit_bias={marker: 100.0})
    undisturbed = bench.finished(start(bench, slow_noise, "x", sampling))
    generation = start(bench, slow_noise, "x", sampling)
    wait_for(lambda: bench.entries(generation), every=0.001)
    os.kill(next(iter(bench.host.runners.by_id.values())).process.pid, signal.SIGKILL)
    bench.finished(generation)
    assert generation.resumes == 1
    calls, expected = ([(call["name"], call["arguments"]) for call in g.tool_calls] for g in (generation, undisturbed))
    assert calls[:2] == expected[:2]
    generation.tool_calls.pop()  # the limit cuts the last one
    check(generation, names={"get_weather", "pick"})
    assert len({call["id"] for call in generation.tool_calls}) == len(generation.tool_calls)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": (Tool(name="bad", parameters='{"type": "array"}'),)},
        {"tools": (Tool(name="bad", parameters="no json"),)},
        {"tools": (Tool(name="bad", parameters='{"properties": {"a": {"$ref": "#/nowhere"}}}'),)},
        {"tools": (Tool(name="bad", strict=True, parameters='{"properties": {"a": {"format": "zork", "type": "string"}}}'),)},
        {"tools": (WEATHER, WEATHER)},
        {"tool_choice": NamedTool("other")},
        {"tools": (), "tool_choice": "required"},
        {"output_format": OutputFormat(kind="regex", value="x")},
    ],
)
def test_what_cannot_be_honoured_is_refused_in_words(bench: Bench, noise: InstalledModel, fields: dict[str, object]) -> None:
    generation = bench.finished(start(bench, noise, "x", SamplingParams(max_tokens=5), **fields))
    assert generation.error_code == "invalid_request"
    assert bench.run(noise, "still there", sampling=SamplingParams(max_tokens=3)).status == "completed"
    assert generation.tool_calls == []
