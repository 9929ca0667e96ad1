"""``POST /v1/chat/completions`` through the whole ASGI application, with the worker's part played by hand."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from lmweb.db import run_db
from lmweb.models import ApiToken, User
from models_app.models import Generation, InstalledModel, ModelInstance
from tests.api.client import Call, call
from tests.api.hand import Hand, hand, status_becomes_cancelled
from workers.events import (
    Error,
    ErrorInfo,
    MessageDelta,
    ModelLoadProgress,
    OutputItem,
    QueueUpdate,
    ReasoningDelta,
    ReasoningStart,
    Snapshot,
)
from workers.models import WorkerNode

pytestmark = [pytest.mark.usefixtures("model"), pytest.mark.asyncio(loop_scope="session")]

URL = "/v1/chat/completions"
BODY = {"model": "acme/tiny", "messages": [{"role": "user", "content": "Hi"}]}


def begin(token: str, **more: object) -> Call:
    import json

    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    return Call("POST", URL, headers=headers, body=json.dumps(BODY | more).encode())


async def test_answers_at_once(token: str) -> None:
    request = begin(token, max_tokens=5, stop="END")
    worker = await hand()
    await run_db(worker.say, "Hel", "lo")
    output = [OutputItem(type="reasoning", content="hm"), OutputItem(type="message", content="Hello")]
    await run_db(worker.end, output=output, reasoning_output_tokens=1, cached_input_tokens=2)
    answer = await request.done()
    assert answer.status == 200
    body = answer.json()
    assert body["id"] == f"chatcmpl-{worker.id.replace('-', '')}"
    assert (body["object"], body["model"]) == ("chat.completion", "acme/tiny")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "reasoning_content": "hm", "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    row = await run_db(Generation.objects.get, pk=worker.id)
    assert row.source == "openai"
    assert row.request["sampling"] == {"max_tokens": 5, "stop": ["END"]}


async def test_streams_in_openai_order(token: str) -> None:
    request = begin(token, stream=True, stream_options={"include_usage": True})
    worker = await hand()
    await run_db(worker.say, "Hel")
    await request.until("Hel")
    assert request.answer.headers["content-type"].startswith("text/event-stream")
    assert request.answer.headers["cache-control"] == "no-cache"
    assert request.answer.headers["x-accel-buffering"] == "no"
    await run_db(worker.say, "lo")
    await run_db(worker.end, stop_reason="maxPredictedTokensReached")
    *chunks, done = (await request.done()).chunks()
    assert done == "[DONE]"
    assert [c["choices"][0]["delta"] for c in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None, None, None, "length"]
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 10
    assert {(c["id"], c["object"], c["model"]) for c in chunks} == {
        (f"chatcmpl-{worker.id.replace('-', '')}", "chat.completion.chunk", "acme/tiny")
    }


async def test_no_usage_unless_asked(token: str) -> None:
    request = begin(token, stream=True)
    worker = await hand()
    await run_db(worker.say, "x")
    await run_db(worker.end)
    answer = await request.done()
    assert b"usage" not in answer.body


async def test_reasoning_comes_before_the_answer(token: str) -> None:
    request = begin(token, stream=True)
    worker = await hand()
    await run_db(worker.write, ReasoningStart(), ReasoningDelta(content="hm"))
    await run_db(worker.write, MessageDelta(content="Yes"))
    await run_db(worker.end)
    deltas = [c["choices"][0]["delta"] for c in (await request.done()).chunks() if c != "[DONE]"]
    assert deltas == [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "Yes"}, {}]


async def test_an_early_failure_is_an_http_error_in_both_modes(token: str) -> None:
    for number, mode in enumerate((True, False), 1):
        request = begin(token, stream=mode)
        worker = await hand(number)
        info = ErrorInfo(code="context_length_exceeded", message="The prompt has 300 tokens; the context holds 256.", param="messages")
        await run_db(worker.end, Error(error=info), status="failed", stop_reason="failed")
        answer = await request.done()
        assert answer.status == 400
        assert answer.error() == {
            "message": info.message,
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
        }


async def test_too_many_requests_are_told_when_to_come_back(token: str) -> None:
    from lmweb.models import User

    await run_db(User.objects.update, running_limit=1, waiting_limit=1)
    waiting = [begin(token), begin(token, stream=True)]
    await hand(2)
    refused = await begin(token, stream=True).done()
    assert refused.status == 429
    assert refused.headers["retry-after"] == "5"
    assert (refused.error()["type"], refused.error()["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    await run_db(Generation.objects.update, status="completed")
    begin(token)
    await hand(3)
    assert len(waiting) == 2


async def test_a_late_failure_keeps_the_text_and_ends_with_an_error_event(token: str) -> None:
    request = begin(token, stream=True)
    worker = await hand()
    await run_db(worker.say, "part")
    await request.until("part")
    await run_db(
        worker.end, MessageDelta(content="ial"), Error(error=ErrorInfo(code="generation_interrupted", message="Lost.")), status="failed"
    )
    answer = await request.done()
    assert answer.status == 200
    *chunks, last = answer.chunks()
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "partial"
    assert last == {"error": {"message": "Lost.", "type": "server_error", "param": None, "code": "generation_interrupted"}}


async def test_waiting_is_visible_as_comments(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.openai.routes.HEADER_WAIT_SECONDS", 0.1)
    monkeypatch.setattr("api.openai.routes.KEEP_ALIVE_SECONDS", 0.2)
    request = begin(token, stream=True)
    worker = await hand()
    await run_db(worker.write, QueueUpdate(position=2, reason="Busy.", eta_seconds=8.4))
    await request.until(": queue position 2, about 8 s: Busy.\n\n")
    await run_db(worker.write, ModelLoadProgress(model_instance_id="acme/tiny", progress=0.43))
    await request.until(": loading the model 43%\n\n")
    await request.until(": keep-alive\n\n")
    await run_db(worker.end, Error(error=ErrorInfo(code="model_load_failed", message="No memory.")), status="failed")
    answer = await request.done()
    assert answer.status == 200
    assert answer.chunks() == [{"error": {"message": "No memory.", "type": "server_error", "param": None, "code": "model_load_failed"}}]


@pytest.mark.parametrize(("content", "continues"), [("Hello", True), ("Hell", True), ("Help", False)])
async def test_a_snapshot_continues_what_was_sent(token: str, content: str, continues: bool) -> None:
    request = begin(token, stream=True)
    worker = await hand()
    await run_db(worker.say, "Hel", "l")
    await request.until('"l"')
    await run_db(worker.write, Snapshot(content=content))
    await run_db(worker.end)
    chunks = (await request.done()).chunks()
    if continues:
        assert request.answer.text() == content
        assert chunks[-1] == "[DONE]"
    else:
        assert chunks[-1]["error"]["code"] == "generation_interrupted"


async def test_several_choices_are_one_answer(token: str) -> None:
    for mode in (True, False):
        request = begin(token, n=2, seed=7, stream=mode, stream_options={"include_usage": True})
        await hand(2 if mode else 4)
        newest = await run_db(list, Generation.objects.order_by("-created_at")[:2])
        assert sorted(row.request["sampling"]["seed"] for row in newest) == [7, 8]
        workers = [Hand(row) for row in sorted(newest, key=lambda row: row.request["sampling"]["seed"])]
        for worker, text in zip(workers, ("one", "two"), strict=True):
            await run_db(worker.say, text)
            await run_db(worker.end)
        answer = await request.done()
        if mode:
            *chunks, done = answer.chunks()
            assert done == "[DONE]"
            texts = ["", ""]
            for chunk in chunks[:-1]:
                choice = chunk["choices"][0]
                texts[choice["index"]] += choice["delta"].get("content", "")
            assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{workers[0].id.replace('-', '')}"}
            usage = chunks[-1]["usage"]
        else:
            texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
            usage = answer.json()["usage"]
        assert texts == ["one", "two"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 6)


@pytest.mark.parametrize("mode", [True, False])
async def test_a_closed_connection_cancels_every_choice(token: str, mode: bool) -> None:
    request = begin(token, n=3, stream=mode)
    await hand(3)
    await request.leave()
    for row in await run_db(list, Generation.objects.all()):
        assert await status_becomes_cancelled(str(row.pk))


async def test_one_choice_that_fails_ends_the_others(token: str) -> None:
    request = begin(token, n=2, stream=True)
    worker = await hand(2)
    await run_db(worker.say, "x")
    await request.until('"x"')
    await run_db(worker.end, Error(error=ErrorInfo(code="generation_interrupted", message="Lost.")), status="failed")
    answer = await request.done()
    assert answer.chunks()[-1]["error"]["code"] == "generation_interrupted"
    other = await run_db(Generation.objects.exclude(pk=worker.id).get)
    assert await status_becomes_cancelled(str(other.pk))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("begun", [True, False])
async def test_a_closed_connection_cancels(token: str, mode: bool, begun: bool) -> None:
    request = begin(token, stream=mode)
    worker = await hand()
    if begun:
        await run_db(worker.say, "Hel")
        if mode:
            await request.until("Hel")
    await request.leave()
    assert await status_becomes_cancelled(worker.id)


async def test_a_client_that_leaves_during_the_start_leaves_nothing_running(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from models_app import generations

    def slow(*args: object, **options: object) -> Generation:
        import time

        time.sleep(0.3)
        return generations.start_generation(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("api.openai.routes.start_generation", slow)
    request = begin(token)
    await asyncio.sleep(0.15)
    await request.leave()
    worker = await hand()
    assert await status_becomes_cancelled(worker.id)


async def test_a_finished_answer_is_not_cancelled(token: str) -> None:
    for number, mode in enumerate((True, False), 1):
        request = begin(token, stream=mode)
        worker = await hand(number)
        await run_db(worker.say, "x")
        await run_db(worker.end)
        await request.done()
        await asyncio.sleep(0.2)
        row = await run_db(Generation.objects.get, pk=worker.id)
        assert (row.status, row.cancel_requested) == ("completed", False)


async def test_cancelled_from_elsewhere_ends_properly(token: str) -> None:
    request = begin(token, stream=True)
    worker = await hand()
    await run_db(worker.say, "par")
    await run_db(worker.end, status="cancelled", stop_reason="userStopped")
    chunks = (await request.done()).chunks()
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1] == "[DONE]"


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

BAD = [
    ({"model": "acme/none"}, 404, "model", "model_not_found"),
    ({"model": ""}, 400, "model", "invalid_request"),
    ({"model": "a\x00b"}, 404, "model", "model_not_found"),
    ({"model": "x" * 600}, 400, "model", "invalid_request"),
    ({"model": 7}, 400, "model", "invalid_request"),
    ({"model": None}, 400, "model", "invalid_request"),
    ({"messages": []}, 400, "messages", "invalid_request"),
    ({"messages": "Hi"}, 400, "messages", "invalid_request"),
    ({"messages": [None]}, 400, "messages[0]", "invalid_request"),
    ({"messages": [{"content": "x"}]}, 400, "messages[0].role", "invalid_request"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "invalid_request"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "invalid_request"),
    ({"messages": [{"role": "user", "content": "a\x00b"}]}, 400, "messages[0].content", "invalid_request"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]", "invalid_request"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0].text", "invalid_request"),
    ({"messages": [{"role": "tool", "content": "4"}]}, 400, "messages[0].tool_call_id", "invalid_request"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, 400, "messages[0].tool_calls", "invalid_request"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, 400, "messages[0].tool_calls[0]", "invalid_request"),
    ({"messages": [{"role": "assistant", "function_call": {}}]}, 400, "messages[0].content", "invalid_request"),
    ({"temperature": "hot"}, 400, "temperature", "invalid_request"),
    ({"temperature": 9}, 400, "temperature", "invalid_request"),
    ({"temperature": True}, 400, "temperature", "invalid_request"),
    ({"top_p": -1}, 400, "top_p", "invalid_request"),
    ({"max_tokens": 0}, 400, "max_tokens", "invalid_request"),
    ({"max_tokens": 10**30}, 400, "max_tokens", "invalid_request"),
    ({"max_completion_tokens": -5}, 400, "max_completion_tokens", "invalid_request"),
    ({"seed": 2**64}, 400, "seed", "invalid_request"),
    ({"stop": ["x"] * 17}, 400, "stop", "invalid_request"),
    ({"stop": [""]}, 400, "stop[0]", "invalid_request"),
    ({"stop": ["a\x00"]}, 400, "stop", "invalid_request"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias", "invalid_request"),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias", "invalid_request"),
    ({"stream": "yes"}, 400, "stream", "invalid_request"),
    ({"stream_options": []}, 400, "stream_options", "invalid_request"),
    ({"reasoning_effort": "enormous"}, 400, "reasoning_effort", "invalid_request"),
    ({"chat_template_kwargs": {"messages": "x"}}, 400, "chat_template_kwargs", "invalid_request"),
    ({"chat_template_kwargs": {"x": [1]}}, 400, "chat_template_kwargs", "invalid_request"),
    ({"n": 0}, 400, "n", "invalid_request"),
    ({"n": 9}, 400, "n", "invalid_request"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0]", "invalid_request"),
    ({"tools": [{"type": "web_search"}]}, 400, "tools[0]", "invalid_request"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, 400, "tools[0].function.name", "invalid_request"),
    ({"tool_choice": "required"}, 400, "tool_choice", "invalid_request"),
    ({"tool_choice": "maybe"}, 400, "tool_choice", "invalid_request"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, 400, "tool_choice", "invalid_request"),
    ({"functions": [{"name": "x"}]}, 400, "functions", "invalid_request"),
    ({"response_format": {"type": "xml"}}, 400, "response_format", "invalid_request"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format", "invalid_request"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, 400, "guided_regex", "invalid_request"),
    ({"top_logprobs": 3}, 400, "top_logprobs", "invalid_request"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_request"),
    ({"service_tier": "gold"}, 400, "service_tier", "invalid_request"),
    ({"modalities": ["audio"]}, 400, "modalities", "invalid_request"),
]


@pytest.mark.parametrize(("change", "status", "param", "code"), BAD, ids=[str(case[0])[:50] for case in BAD])
async def test_bad_values_are_named(token: str, change: dict[str, object], status: int, param: str, code: str) -> None:
    answer = await call("POST", URL, token=token, json_body=BODY | change)
    assert answer.status == status, answer.body
    error = answer.error()
    assert (error["param"], error["code"]) == (param, code)
    assert not await run_db(Generation.objects.exists)


RAW = {
    "empty": b"",
    "not JSON": b"{",
    "array": b"[]",
    "null": b"null",
    "NaN": b'{"model":"acme/tiny","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
    "infinity": b'{"model":"acme/tiny","messages":[{"role":"user","content":"x"}],"temperature":1e999}',
    "lone surrogate": b'{"model":"acme/tiny","messages":[{"role":"user","content":"\\ud800 x"}]}',
    "no UTF-8": b'{"model":"acme/tiny","messages":[{"role":"user","content":"\xff"}]}',
    "deep": b'{"tools":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep and unknown": b'{"zzz":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "huge number": b'{"seed":' + b"9" * 100_000 + b"}",
}


@pytest.mark.parametrize("name", RAW)
async def test_bad_bodies_are_refused(token: str, name: str) -> None:
    answer = await call("POST", URL, token=token, body=RAW[name], headers={"Content-Type": "application/json"})
    assert answer.status == 400
    assert answer.error()["type"] == "invalid_request_error"
    assert not await run_db(Generation.objects.exists)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
async def test_other_content_types_are_refused(token: str, kind: str) -> None:
    answer = await call("POST", URL, token=token, json_body=BODY, headers={"Content-Type": kind})
    assert answer.status == 400
    assert "application/json" in answer.error()["message"]


async def test_too_large_a_body_is_413(token: str) -> None:
    headers = {"Content-Type": "application/json"}
    declared = await call("POST", URL, token=token, headers=headers | {"Content-Length": str(21 * 1024 * 1024)})
    counted = await call("POST", URL, token=token, headers=headers, body=[b"x" * 1024 * 1024] * 21)
    for answer in (declared, counted):
        assert answer.status == 413
        assert answer.error()["code"] == "payload_too_large"


async def test_unknown_fields_and_harmless_values_are_accepted(token: str) -> None:
    harmless = {
        "n": 1, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logprobs": False, "user": "u", "store": False,
        "metadata": {"a": "b"}, "parallel_tool_calls": True, "service_tier": "auto", "cache_prompt": True, "max_tokens": -1,
    }  # fmt: skip
    request = begin(token, **harmless)
    worker = await hand()
    await run_db(worker.end)
    assert (await request.done()).status == 200


async def test_a_viewer_and_a_narrow_token_may_not_generate(stranger: User, owner: User) -> None:
    narrow = await run_db(ApiToken.issue, user=owner, name="n", scopes=["models:read"])
    viewer = await run_db(ApiToken.issue, user=stranger, name="v")
    for _, secret in (narrow, viewer):
        answer = await call("POST", URL, token=secret, json_body=BODY)
        assert answer.status == 403
        assert answer.error()["type"] == "permission_error"
    assert not await run_db(Generation.objects.exists)


def _load(model: InstalledModel, identifier: str) -> None:
    node = WorkerNode.objects.create(name="box", incarnation=uuid.uuid4())
    for name in (identifier, model.key):
        ModelInstance.objects.create(identifier=name, model=model, node=node, status="ready")


async def test_lists_and_describes_models(token: str, model: InstalledModel) -> None:
    entry = {"id": "acme/tiny", "object": "model", "created": int(model.created_at.timestamp()), "owned_by": "acme"}
    assert (await call("GET", "/v1/models", token=token)).json() == {"object": "list", "data": [entry]}
    assert (await call("GET", "/v1/models/acme/tiny", token=token)).json() == entry
    assert (await call("GET", "/v1/models/ACME%2FTiny", token=token)).json() == entry
    await run_db(_load, model, "my-name")
    named = entry | {"id": "my-name"}
    assert (await call("GET", "/v1/models", token=token)).json()["data"] == [entry, named]
    assert (await call("GET", "/v1/models/my-name", token=token)).json() == named
    missing = await call("GET", "/v1/models/acme/none", token=token)
    assert (missing.status, missing.error()["code"]) == (404, "model_not_found")


async def test_wrong_methods_and_unknown_routes(token: str) -> None:
    for method, path, status in [
        ("GET", URL, 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/models/acme/tiny", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/v1/", 404),
        ("OPTIONS", URL, 405),
        ("GET", "/v1", 404),
        ("GET", "/api/v0/models", 404),
        ("POST", "/api", 404),
    ]:
        answer = await call(method, path, token=token)
        assert (answer.status, method, path) == (status, method, path)
        answer.error()


async def test_head_is_answered_where_get_is(token: str, model: InstalledModel) -> None:
    for path in ("/v1/models", f"/v1/models/{model.key}", "/api/v1/models"):
        assert (await call("HEAD", path, token=token)).status == 200


async def test_a_draft_model_is_passed_on_and_its_counts_come_back(token: str) -> None:
    counts = {"total_draft_tokens_count": 3, "accepted_draft_tokens_count": 2, "rejected_draft_tokens_count": 1}
    request = begin(token, max_tokens=5, draft_model="")
    worker = await hand()
    await run_db(worker.say, "Hello")
    await run_db(
        worker.end, output=[OutputItem(type="message", content="Hello")], draft_model="acme/small", ignored_draft_tokens_count=0, **counts
    )
    body = (await request.done()).json()
    assert body["stats"] == {"tokens_per_second": 0.0, "draft_model": "acme/small", "ignored_draft_tokens_count": 0, **counts}
    refused = await begin(token, draft_model="acme/nothing").done()
    assert refused.status == 404
    assert refused.json()["error"]["param"] == "draft_model"


async def test_a_stream_ends_with_the_counts_of_the_draft_model(token: str) -> None:
    request = begin(token, stream=True)
    worker = await hand()
    await run_db(worker.say, "Hello")
    await run_db(worker.end, total_draft_tokens_count=3, accepted_draft_tokens_count=3)
    chunks = [chunk for chunk in (await request.done()).chunks() if isinstance(chunk, dict)]
    assert [chunk["stats"]["accepted_draft_tokens_count"] for chunk in chunks if "stats" in chunk] == [3]
