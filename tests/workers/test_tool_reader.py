"""Calls in the ways of each family of models, cut anywhere, and the prompts that tell models of tools."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from workers.events import MessageDelta, ReasoningDelta, ToolCallArguments, ToolCallStart
from workers.parsing.output import OutputParser
from workers.parsing.tools import families
from workers.parsing.tools.families import Syntax, native_syntax, written
from workers.parsing.tools.prompts import ToolPrompt
from workers.parsing.tools.reader import CallReader, call_id
from workers.schemas import ChatMessage, Tool, ToolCall
from workers.templates import ChatTemplate

SCHEMA = {"properties": {"city": {"type": "string"}, "days": {"type": "array"}}}
TOOLS = {"get": {}, "get_weather": SCHEMA}
ROME = '{"city": "Rom\\"}é", "days": [1, {"a": "]"}]}'
CITY, DAYS = 'Rom"}é', '[1, {"a": "]"}]'
TWO = [("get_weather", {"city": CITY, "days": [1, {"a": "]"}]}), ("get", {})]

#: What models of each family write for ``TWO``.
SAMPLES: list[tuple[Syntax, str]] = [
    (
        families.HERMES,
        (
            f'<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'
        ),
    ),
    (families.LLAMA_3, f'{{"name": "get_weather", "parameters": {ROME}}}; {{"name": "get", "parameters": {{}}}}'),
    (families.LLAMA_3, f'<|python_tag|>{{"name":"get_weather","arguments":{ROME}}}\n{{"name": "get", "parameters": {{}}}}<|eom_id|>'),
    (
        families.MISTRAL_LIST,
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ROME}, "id": "abc123XYZ"}}, {{"name": "get", "arguments": {{}}}}]',
    ),
    (families.MISTRAL_ARGS, f"[TOOL_CALLS]get_weather[ARGS]{ROME}[TOOL_CALLS]get[CALL_ID]abc123XYZ[ARGS]{{}}"),
    (
        families.DEEPSEEK_R1,
        (
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{ROME}\n```<｜tool▁call▁end｜>\n"
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
    ),
    (
        families.DEEPSEEK_V3_1,
        (
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{ROME}<｜tool▁call▁end｜>"
            "<｜tool▁call▁begin｜>get<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
    ),
    (families.TAGGED_LIST, f'<|tool_call|>[{{"name": "get_weather", "arguments": {ROME}}}, {{"name": "get", "arguments": {{}}}}]'),
    (
        families.DEFAULT,
        (
            f'[TOOL_REQUEST]{{"name": "get_weather", "arguments": {ROME}}}[END_TOOL_REQUEST]\n'
            '[TOOL_REQUEST]{"name": "get", "arguments": {}}[END_TOOL_REQUEST]'
        ),
    ),
    (families.FUNCTOOLS, f'functools[{{"name": "get_weather", "arguments": {ROME}}}, {{"name": "get", "arguments": {{}}}}]'),
    (
        families.FUNCTOOLS,
        f'<|tool_call|>[{{"name": "get_weather", "arguments": {ROME}}},{{"name": "get", "arguments": {{}}}}]<|/tool_call|>',
    ),
    (
        families.MINIMAX_M1,
        f'<tool_calls>\n{{"name": "get_weather", "arguments": {ROME}}}\n{{"name": "get", "arguments": {{}}}}\n</tool_calls>',
    ),
    (
        families.KIMI_K2,
        (
            f"<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{ROME}<|tool_call_end|>"
            "<|tool_call_begin|>functions.get:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
        ),
    ),
    (
        families.COHERE,
        (
            f'<|START_ACTION|>[\n  {{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {ROME}}},\n'
            '  {"tool_call_id": "1", "tool_name": "get", "parameters": {}}\n]<|END_ACTION|>'
        ),
    ),
    (families.APERTUS, f'<|tools_prefix|>[{{"get_weather": {ROME}}}, {{"get": {{}}}}]<|tools_suffix|>'),
    (
        families.SOLAR,
        (
            f"<|tool_calls|><|tool_call:begin|>a1b2<|tool_call:name|>get_weather<|tool_call:args|>{ROME}<|tool_call:end|>"
            "<|tool_call:begin|>c3<|tool_call:name|>get<|tool_call:args|>{}<|tool_call:end|><|calls|>"
        ),
    ),
    (
        families.QWEN_XML,
        (
            f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{CITY}\n</parameter>\n<parameter=days>\n{DAYS}\n</parameter>\n"
            "</function>\n</tool_call>\n<tool_call>\n<function=get>\n</function>\n</tool_call>"
        ),
    ),
    (
        families.SEED,
        (
            f"<seed:tool_call>\n<function=get_weather>\n<parameter=city>{CITY}</parameter>\n<parameter=days>{DAYS}</parameter>\n"
            "</function>\n</seed:tool_call><seed:tool_call><function=get></function></seed:tool_call>"
        ),
    ),
    (
        families.GLM,
        (
            f"<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>{CITY}</arg_value>\n<arg_key>days</arg_key>\n"
            f"<arg_value>{DAYS}</arg_value>\n</tool_call>\n<tool_call>get\n</tool_call>"
        ),
    ),
    (
        families.GLM,
        (
            f"<tool_call>get_weather<arg_key>city</arg_key><arg_value>{CITY}</arg_value><arg_key>days</arg_key>"
            f"<arg_value>{DAYS}</arg_value></tool_call><tool_call>get</tool_call>"
        ),
    ),
    (
        families.MINIMAX_M2,
        (
            f'<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">{CITY}</parameter>\n'
            f'<parameter name="days">{DAYS}</parameter>\n</invoke>\n<invoke name="get">\n</invoke>\n</minimax:tool_call>'
        ),
    ),
    (
        families.DEEPSEEK_V3_2,
        (
            '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
            f'<｜DSML｜parameter name="city" string="true">{CITY}</｜DSML｜parameter>\n'
            f'<｜DSML｜parameter name="days" string="false">{DAYS}</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
            '<｜DSML｜invoke name="get">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
        ),
    ),
    (
        families.MINICPM,
        (
            f'<function name="get_weather"><param name="city"><![CDATA[{CITY}]]></param><param name="days">{DAYS}</param></function>\n'
            '<function name="get"></function>'
        ),
    ),
    (
        families.GEMMA_4,
        (
            f'<|tool_call>call:get_weather{{city:<|"|>{CITY}<|"|>,days:[1,{{a:<|"|>]<|"|>}}]}}<tool_call|>'
            "<|tool_call>call:get{}<tool_call|>"
        ),
    ),
    (families.PYTHON_CALLS, f"<|tool_call_start|>[get_weather(city='{CITY}', days=[1, {{'a': \"]\"}}]), get()]<|tool_call_end|>"),
]


def read(syntax: Syntax, pieces: list[str], stops: list[str] | None = None) -> tuple[str, list[tuple[str, str]], OutputParser]:
    """Return the text and the calls of an answer that comes in pieces."""
    parser = OutputParser(stops or [], starts_reasoning=False, calls=CallReader(syntax, TOOLS, "g"))
    events = [event for piece in pieces for event in parser.feed(piece.encode())] + parser.finish()
    text, calls = "", []
    for event in events:
        if isinstance(event, MessageDelta):
            text += event.content
        elif isinstance(event, ToolCallStart):
            assert event.id == call_id("g", len(calls))
            calls.append((event.tool, ""))
        elif isinstance(event, ToolCallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.content)
    return text, calls, parser


def parsed(calls: list[tuple[str, str]]) -> list[tuple[str, object]]:
    return [(name, json.loads(arguments)) for name, arguments in calls]


@given(st.sampled_from(SAMPLES), st.lists(st.integers(0, 400), max_size=12))
def test_calls_of_every_family_cut_anywhere(sample: tuple[Syntax, str], cuts: list[int]) -> None:
    syntax, answer = sample
    edges = sorted({0, len(answer), *(min(cut, len(answer)) for cut in cuts)})
    text, calls, parser = read(syntax, [answer[a:b] for a, b in pairwise(edges)])
    assert (text, parsed(calls), parser.completed_calls) == ("", TWO, 2)


@pytest.mark.parametrize(("syntax", "answer"), SAMPLES)
def test_calls_come_character_by_character(syntax: Syntax, answer: str) -> None:
    text, calls, _ = read(syntax, list(answer))
    assert (text, parsed(calls)) == ("", TWO)
    text, calls, _ = read(syntax, ["Let me see.\n", *answer])
    if not answer.startswith("{"):  # without a marker a call is one at the beginning of an answer only
        assert (text, parsed(calls)) == ("Let me see.\n", TWO)


def test_arguments_are_streamed() -> None:
    parser = OutputParser([], starts_reasoning=False, calls=CallReader(families.HERMES, TOOLS, "g"))
    assert parser.feed(b"<tool_call>") == []
    assert parser.feed(b'{"name": "get", "arguments"') == []
    assert parser.feed(b': {"a":') == [ToolCallStart(tool="get", id=call_id("g", 0)), ToolCallArguments(content='{"a":')]
    assert parser.feed(b' "x') == [ToolCallArguments(content=' "x')]
    assert parser.feed(b'"}}') == [ToolCallArguments(content='"}')]
    assert parser.open_unit is None


@pytest.mark.parametrize("syntax", {id(syntax): syntax for syntax, _ in SAMPLES}.values())
@pytest.mark.parametrize("answer", ["", "Hello.", " x < y ", '{"answer": [1, 2]}', '{"name": "Bob"}', "[1] and [TOOL", "a\n\nb;"])
def test_text_stays_text(syntax: Syntax, answer: str) -> None:
    assert read(syntax, list(answer))[:2] == (answer, [])
    assert read(syntax, [answer])[:2] == (answer, [])


def test_what_is_no_call_after_a_marker_is_text() -> None:
    assert read(families.HERMES, ["<tool_call>", "none of them</tool_call> x"])[:2] == ("none of them x", [])
    assert read(families.HERMES, ['<tool_call>{"name": "unknown", "arguments": {}}'])[1] == []


def test_a_call_that_is_cut_keeps_what_was_streamed() -> None:
    text, calls, parser = read(families.HERMES, ['<tool_call>{"name": "get", "arguments": {"a": "b'])
    assert (text, calls, parser.completed_calls) == ("", [("get", '{"a": "b')], 0)
    assert read(families.HERMES, ['Hm. <tool_call>{"na'])[:2] == ("Hm. ", [])


def test_stop_strings_do_not_count_inside_calls() -> None:
    call = written(families.HERMES, [("get", '{"a": "END"}')])
    text, calls, parser = read(families.HERMES, [*call, " more E", "ND x"], stops=["END", "\n"])
    assert (text, calls, parser.stopped) == (" more ", [("get", '{"a": "END"}')], True)


def test_calls_come_after_reasoning() -> None:
    parser = OutputParser([], starts_reasoning=True, calls=CallReader(families.HERMES, TOOLS, "g"))
    events = parser.feed(b'<tool_call> perhaps</think>\n\n<tool_call>{"name": "get", "arguments": {}}</tool_call>') + parser.finish()
    assert [event.content for event in events if isinstance(event, ReasoningDelta)] == ["<tool_call> perhaps"]
    assert [event.tool for event in events if isinstance(event, ToolCallStart)] == ["get"]
    assert not any(isinstance(event, MessageDelta) for event in events)


TOOL = Tool(
    name="get_weather", description="Weather of a city", parameters='{"type": "object", "properties": {"city": {"type": "string"}}}'
)
TALK = [
    ChatMessage(role="system", content="Be brief."),
    ChatMessage(role="user", content="Rome?"),
    ChatMessage(role="assistant", content="", tool_calls=(ToolCall(id="call_1", name="get_weather", arguments='{"city": "Rome"}'),)),
    ChatMessage(role="tool", content="sunny", tool_call_id="call_1"),
]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN


def prompt(template: str) -> ToolPrompt:
    return ToolPrompt(ChatTemplate(template, bos_token="<s>", eos_token="</s>"), template)


def test_models_that_know_no_tools_are_told_in_lm_studios_way() -> None:
    text = prompt(PLAIN).render(TALK, [TOOL])
    assert prompt(PLAIN).syntax is families.DEFAULT
    assert text.startswith("<system>Be brief.\n\nYou are a tool-calling AI.")
    assert '"name": "get_weather"' in text
    assert '<assistant>[TOOL_REQUEST]{"name": "get_weather", "arguments": {"city": "Rome"}}[END_TOOL_REQUEST]' in text
    assert "<user>[TOOL_RESULT]sunny[END_TOOL_RESULT]" in text


def test_without_a_system_role_the_first_message_tells_of_the_tools() -> None:
    text = prompt(NO_SYSTEM).render(TALK, [TOOL])
    assert text.startswith("<user>Be brief.\n\nYou are a tool-calling AI.")
    assert "\n\nRome?<assistant>" in text


#: Phi-4-mini's, in essence: tools are a text in the system message, and calls have no place.
PHI = (
    "{% for m in messages %}{% if m.role == 'system' and 'tools' in m and m.tools is not none %}"
    "<|{{ m.role }}|>{{ m.content }}<|tool|>{{ m['tools'] }}<|/tool|><|end|>{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}"
)


def test_tools_in_the_system_message() -> None:
    made = prompt(PHI)
    assert made.syntax is families.FUNCTOOLS
    text = made.render(TALK, [TOOL])
    assert text.startswith('<|system|>Be brief.<|tool|>[{"name": "get_weather"')
    assert '<|assistant|>functools[{"name": "get_weather", "arguments": {"city": "Rome"}}]' in text
    assert "<|tool|>sunny<|end|>" in text
    assert made.render(TALK[1:2], [TOOL]).startswith("<|system|><|tool|>[{")


TYPES = {
    "properties": {
        "text": {"type": "string"}, "count": {"type": "integer"}, "maybe": {"type": ["string", "null"]}, "any": {},
        "list": {"type": "array"}, "ref": {"$ref": "#/$defs/word"}, "either": {"anyOf": [{"type": "number"}, {"type": "string"}]},
    },
    "$defs": {"word": {"enum": ["1", "true"]}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "written_value", "value"),
    [
        ("text", "12", "12"),
        ("text", 'a "b"\n</x>', 'a "b"\n</x>'),
        ("text", "", ""),
        ("count", "12", 12),
        ("maybe", "null", None),
        ("maybe", "nothing", "nothing"),
        ("any", '{"a": [1]}', {"a": [1]}),
        ("any", "words", "words"),
        ("any", "NaN", "NaN"),
        ("ref", "true", "true"),
        ("either", "1.5", 1.5),
        ("either", "1.5.2", "1.5.2"),
        ("unknown", "false", False),
        ("list", '["</arg_value>", "\\\\\\"</arg_value>", 1]', ["</arg_value>", '\\"</arg_value>', 1]),
        ("list", " [ ] ", []),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_values_without_quotes_have_the_type_of_their_schema(name: str, written_value: str, value: object, size: int) -> None:
    answer = f"<tool_call>get<arg_key>{name}</arg_key><arg_value>{written_value}</arg_value></tool_call>"
    reader = CallReader(families.GLM, {"get": TYPES}, "g")
    pieces = [piece for i in range(0, len(answer), size) for piece in reader.feed(answer[i : i + size])]
    arguments = "".join(piece.content for piece in pieces if isinstance(piece, ToolCallArguments))
    assert json.loads(arguments) == {name: value}


@pytest.mark.parametrize(
    ("arguments", "shown"), [("{{ c.function.arguments | tojson }}", True), ("{{ '' + c.function.arguments }}", True), ("", True)]
)
def test_a_template_gets_calls_as_it_wants_them(arguments: str, shown: bool) -> None:
    template = (
        "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}"
        + arguments
        + "{% endfor %}{% endif %}{{ m.content if m.content else '' }}{% endfor %}"
    )
    made = prompt(template)
    assert made.syntax is families.HERMES
    assert ('{"city": "Rome"}' in made.render(TALK, [TOOL])) == shown


def test_arguments_that_are_no_json_do_not_break_a_prompt() -> None:
    call = ToolCall(id="1", name="get_weather", arguments="not json")
    talk = [*TALK[:2], ChatMessage(role="assistant", content="x", tool_calls=(call,))]
    assert json.dumps({"arguments": "not json"}) in prompt(PLAIN).render(talk, [TOOL])


@pytest.mark.parametrize(
    ("text", "syntax"),
    [
        ("<tool_call></tool_call>", families.HERMES),
        ("<tool_call><function=x>", families.QWEN_XML),
        ("]<]minimax[>[<tool_call>", None),
        ("<|tool|>x<|/tool|>", families.FUNCTOOLS),
        ("[TOOL_CALLS][", families.MISTRAL_LIST),
        ("[TOOL_CALLS]x[ARGS]", families.MISTRAL_ARGS),
        ('<|start_header_id|>"parameters": ', families.LLAMA_3),
        ("<|tool_call|>", families.TAGGED_LIST),
        ("", None),
    ],
)
def test_families_are_told_by_their_templates(text: str, syntax: Syntax | None) -> None:
    assert native_syntax(text) is syntax


THOUGHT = "<|channel|>analysis<|message|>Think <hard><|end|><|start|>assistant"
BODY = '<|constrain|>json<|message|>{"a": 1}'


@pytest.mark.parametrize(
    ("answer", "reasoning", "text", "calls"),
    [
        (f"{THOUGHT}<|channel|>final<|message|>Hi <b>!", "Think <hard>", "Hi <b>!", []),
        (f"{THOUGHT}<|channel|>commentary to=functions.get {BODY}<|call|>", "Think <hard>", "", [("get", '{"a": 1}')]),
        (f"{THOUGHT} to=functions.get<|channel|>commentary {BODY}", "Think <hard>", "", [("get", '{"a": 1}')]),
        (
            f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get {BODY}",
            "",
            "I look.",
            [("get", '{"a": 1}')],
        ),
        ('{"constrained": 1}', "", '{"constrained": 1}', []),
        ("Hello", "", "Hello", []),
        (f"{THOUGHT}<|chan", "Think <hard>", "", []),
        ("<|channel|>ana", "", "", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_channels_of_gpt_oss(answer: str, reasoning: str, text: str, calls: list[tuple[str, str]], size: int) -> None:
    parser = OutputParser([], starts_reasoning=False, calls=CallReader(families.HARMONY, TOOLS, "g"), tags=None)
    events = [event for i in range(0, len(answer), size) for event in parser.feed(answer[i : i + size].encode())] + parser.finish()
    assert "".join(event.content for event in events if isinstance(event, ReasoningDelta)) == reasoning
    assert "".join(event.content for event in events if isinstance(event, MessageDelta)) == text
    names = [event.tool for event in events if isinstance(event, ToolCallStart)]
    arguments = "".join(event.content for event in events if isinstance(event, ToolCallArguments))
    assert (names, arguments) == ([name for name, _ in calls], "".join(body for _, body in calls))
