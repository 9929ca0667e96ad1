"""OpenAI's format into ours and back, as tables."""

from __future__ import annotations

import json
import uuid
from typing import Any

import msgspec
import pytest

from api.openai.translate import UNSUPPORTED, ChunkTranslator, error_response, finish_reason, parse_request, to_generation_request
from lmweb import errors
from workers.events import ChatEnd, Error, ErrorInfo, MessageDelta, Result, Snapshot, Stats, ToolCallArguments, ToolCallStart
from workers.schemas import GenerationRequest, ToolCall, request_to_builtins

HI = [{"role": "user", "content": "Hi"}]


def translated(**body: Any) -> dict[str, Any]:
    request = to_generation_request(parse_request(json.dumps({"model": "m", "messages": HI} | body).encode()))
    stored = request_to_builtins(request)
    assert msgspec.convert(stored, GenerationRequest, strict=False) == request  # what the row keeps is what was asked
    as_json: dict[str, Any] = json.loads(json.dumps(stored))
    return as_json


@pytest.mark.parametrize(
    ("body", "sampling"),
    [
        ({}, {}),
        ({"temperature": None, "stop": None, "max_tokens": None}, {}),
        ({"temperature": 0, "top_p": 1}, {"temperature": 0.0, "top_p": 1.0}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"max_tokens": -1}, {}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop": []}, {}),
        ({"logit_bias": {"12": -100, "3": 1.5}}, {"logit_bias": {"12": -100.0, "3": 1.5}}),
        ({"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.5}, {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.5}),
        ({"presence_penalty": -2, "frequency_penalty": 2, "seed": -1}, {"presence_penalty": -2.0, "frequency_penalty": 2.0, "seed": -1}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
    ],
)
def test_sampling(body: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert translated(**body).get("sampling", {}) == sampling


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "system", "content": "x"}, {"role": "system", "content": "x"}),
        ({"role": "developer", "content": "x"}, {"role": "developer", "content": "x"}),
        ({"role": "assistant", "content": "x", "tool_calls": None, "refusal": None}, {"role": "assistant", "content": "x"}),
        ({"role": "assistant", "content": None, "refusal": "no"}, {"role": "assistant", "content": "no"}),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, {"role": "assistant", "content": "no"}),
        ({"role": "user", "content": "", "name": "ada"}, {"role": "user", "content": ""}),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"role": "user", "content": "a\nb"}),
        ({"role": "user", "content": "\U0001f600 \u05d0"}, {"role": "user", "content": "\U0001f600 \u05d0"}),
    ],
)
def test_messages(message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert translated(messages=[message])["messages"] == [expected]


FUNCTION = {"type": "function", "function": {"name": "f", "description": None, "parameters": {"type": "object"}, "strict": True}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"tools": []}, {}),
        ({"tools": [FUNCTION]}, {"tools": [{"name": "f", "parameters": '{"type":"object"}', "strict": True}]}),
        (
            {"tools": [{"type": "function", "function": {"name": "g"}}]},
            {"tools": [{"name": "g", "parameters": '{"type":"object","properties":{}}'}]},
        ),
        ({"tool_choice": "none"}, {"tool_choice": "none"}),
        ({"tool_choice": "auto", "parallel_tool_calls": True}, {}),
        ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"output_format": {"kind": "json_object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}},
            {"output_format": {"kind": "json_schema", "value": '{"type":"array"}'}},
        ),
        ({"guided_regex": "a+"}, {"output_format": {"kind": "regex", "value": "a+"}}),
        ({"grammar": 'root ::= "a"'}, {"output_format": {"kind": "grammar", "value": 'root ::= "a"'}}),
        ({"guided_grammar": 'start: "a"'}, {"output_format": {"kind": "grammar", "value": 'start: "a"'}}),
        ({"logprobs": True}, {"top_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 4}, {"top_logprobs": 4}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"service_tier": "flex"}, {"lane": 2}),
        ({"service_tier": "auto"}, {}),
        ({"n": 3}, {}),
    ],
)
def test_tools_and_formats(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: value for name, value in translated(**body).items() if name not in {"model", "messages", "sampling", "given"}} == expected


def test_a_tool_whose_name_cannot_be_used_is_named_as_the_client_wrote_it() -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        translated(tools=[FUNCTION, {"type": "function", "function": {"name": "a b"}}])
    assert caught.value.param == "tools[1].function.name"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logit_bias": {str(10**40): 1}}, "logit_bias"),
        ({"chat_template_kwargs": {"x": 10**40}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": 1e308}}, "chat_template_kwargs"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_numbers_that_no_runner_can_hold_are_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        translated(**body)
    assert caught.value.param == param


def test_a_schema_that_is_too_large_is_called_by_the_client_s_name() -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        translated(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["x" * 300_000]}}})
    assert caught.value.param == "response_format"


def test_only_the_assistant_refuses() -> None:
    with pytest.raises(errors.InvalidRequest):
        translated(messages=[{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}])


def test_calls_in_messages() -> None:
    talk = [*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "4"}]
    assert translated(messages=talk, tools=[FUNCTION], tool_choice={"type": "function", "function": {"name": "f"}})["messages"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "name": "f", "arguments": "{}"}]},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
    ]


def test_template_variables() -> None:
    assert translated(reasoning_effort="none")["reasoning"] == "off"
    assert translated(reasoning_effort="minimal")["reasoning"] == "low"
    assert translated(chat_template_kwargs={"enable_thinking": True})["template_kwargs"] == {"enable_thinking": True}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("value", [7, "x", {"type": "x"}, ["x"], True])
def test_what_is_not_supported_is_never_ignored(name: str, value: Any) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        translated(**{name: value})
    assert caught.value.param == name
    assert f"'{name}'" in caught.value.message


@pytest.mark.parametrize(
    ("stop_reason", "expected"),
    [
        ("eosFound", "stop"),
        ("stopStringFound", "stop"),
        ("userStopped", "stop"),
        ("toolCalls", "tool_calls"),
        ("maxPredictedTokensReached", "length"),
        ("contextLengthReached", "length"),
    ],
)
def test_finish_reasons(stop_reason: str, expected: str) -> None:
    assert finish_reason(Stats(stop_reason=stop_reason)) == expected


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.InvalidRequest("x"), "invalid_request_error"),
        (errors.PayloadTooLarge("x"), "invalid_request_error"),
        (errors.NotAuthenticated("x"), "authentication_error"),
        (errors.PermissionDenied("x"), "permission_error"),
        (errors.ModelNotFound("x"), "not_found_error"),
        (errors.ServiceUnavailable("x"), "server_error"),
        (errors.LmwebError("x"), "server_error"),
    ],
)
def test_error_types(error: errors.LmwebError, kind: str) -> None:
    assert error_response(error).error.type == kind


def deltas(*events: Any) -> list[Any]:
    translator = ChunkTranslator(uuid.uuid4(), "m", include_usage=False)
    chunks = [chunk for event in events for chunk in translator.chunks(event)]
    return [msgspec.to_builtins(chunk.choices[0].delta) for chunk in chunks]


def begun(index: int, call_id: str, arguments: str = "") -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}]}


def more(index: int, arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


def call(call_id: str) -> ToolCall:
    return ToolCall(id=call_id, name="f", arguments="{}")


ROLE = {"role": "assistant", "content": ""}
END = ChatEnd(result=Result(model_instance_id="m", output=[], stats=Stats()))


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([END], [ROLE, {}]),
        ([MessageDelta(content="")], []),
        ([MessageDelta(content="a"), Snapshot(content="a")], [ROLE, {"content": "a"}]),
        ([MessageDelta(content="a"), Snapshot(content="ab")], [ROLE, {"content": "a"}, {"content": "b"}]),
        ([Snapshot(content="ab", reasoning="r"), END], [ROLE, {"reasoning_content": "r"}, {"content": "ab"}, {}]),
        (
            [ToolCallStart(tool="f", id="1"), ToolCallArguments(content="{"), ToolCallArguments(content="}"), END],
            [ROLE, begun(0, "1"), more(0, "{"), more(0, "}"), {}],
        ),
        (
            [ToolCallStart(tool="f", id="1"), ToolCallArguments(content="{"), Snapshot(content="", tool_calls=[call("1"), call("2")])],
            [ROLE, begun(0, "1"), more(0, "{"), more(0, "}"), begun(1, "2", "{}")],
        ),
        ([MessageDelta(content="a"), Error(error=ErrorInfo(code="x", message="y")), END], [ROLE, {"content": "a"}]),
    ],
)
def test_chunks(events: list[Any], expected: list[Any]) -> None:
    assert deltas(*events) == expected


@pytest.mark.parametrize("snapshot", [Snapshot(content="b"), Snapshot(content="")])
def test_text_that_was_sent_cannot_be_taken_back(snapshot: Snapshot) -> None:
    with pytest.raises(errors.GenerationInterrupted):
        deltas(MessageDelta(content="a"), snapshot)
