"""The unmodified ``openai`` client against a whole installation."""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.micro_models import make_micro

if TYPE_CHECKING:
    from tests.live import Live

MICRO = "tests/api-micro"


@pytest.fixture(scope="module")
def token(live: Live, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make a token, and see that there is the starter and a model that never ends by itself."""
    live.create_user("api-person")
    if not live.rows("SELECT 1 FROM models_app_installedmodel WHERE key = %s", MICRO):
        file = make_micro(tmp_path_factory.mktemp("models") / "api-micro.gguf", name="api-micro", context=8192)
        live.python(
            "from pathlib import Path\nfrom models_app import services\n"
            f"services.import_file(principal=None, source=Path({str(file)!r}), user_repo={MICRO!r})\nservices.ensure_starter()"
        )
    return live.create_token("api-person")


@pytest.fixture
def client(live: Live, token: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.base_url}/v1", api_key=token, max_retries=0, timeout=60)


def ask(text: str) -> Any:
    return [{"role": "user", "content": text}]


def wait_for(condition: Any, seconds: float = 15) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.05)
    return found


def steps(live: Live) -> list[dict[str, Any]]:
    """Return the lines of the engines' step logs."""
    found = []
    for file in sorted((live.data_dir / "logs").glob("steps-*.jsonl")):
        for line in file.read_text().splitlines():
            found.append(json.loads(line))
    return found


def test_lists_models(client: openai.OpenAI) -> None:
    names = {model.id for model in client.models.list()}
    assert {"lmweb/starter", MICRO} <= names
    assert client.models.retrieve("lmweb/starter").owned_by == "lmweb"


def test_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="lmweb/starter", messages=ask("How do I create an API token?"), temperature=0)
    expected = "Open Developer, then API tokens, and press Create token. Copy it at once, it is shown only one time."
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streams_the_same_text(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="lmweb/starter", messages=ask("Tell me a joke"), temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = client.chat.completions.create(model="lmweb/starter", messages=ask("Tell me a joke"), temperature=0)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].usage
    assert whole.usage
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_limits_and_stop_strings(client: openai.OpenAI) -> None:
    cut = client.chat.completions.create(model=MICRO, messages=ask("Hi"), max_tokens=5, temperature=0)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage
    assert cut.usage.completion_tokens == 5
    joke = client.chat.completions.create(model="lmweb/starter", messages=ask("Tell me a joke"), temperature=0, stop=" context")
    text = joke.choices[0].message.content
    assert text
    assert text.startswith("Why did the token cross the")
    assert "context" not in text
    assert joke.choices[0].finish_reason == "stop"


async def test_eight_at_once_share_the_engine(live: Live, token: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{live.base_url}/v1", api_key=token, max_retries=0, timeout=120) as client:

        async def one(number: int) -> str:
            answer = await client.chat.completions.create(
                model=MICRO, messages=ask(f"Number {number}"), max_tokens=900, temperature=0, extra_body={"ignore_eos": True}
            )
            assert answer.usage
            assert answer.usage.completion_tokens == 900
            return answer.choices[0].message.content or ""

        await one(0)  # the model is in memory now
        before = len(steps(live))
        await asyncio.gather(*(one(number) for number in range(8)))
    decoding = [step["decode"] for step in steps(live)[before:]]
    assert max(decoding) == 8, decoding


@pytest.mark.parametrize("stream", [True, False])
def test_closing_the_connection_frees_the_slot(live: Live, token: str, stream: bool) -> None:
    def request() -> None:
        with (
            openai.OpenAI(base_url=f"{live.base_url}/v1", api_key=token, max_retries=0, timeout=60 if stream else 0.5) as client,
        ):
            try:
                answer: Any = client.chat.completions.create(
                    model=MICRO, messages=ask("Go on"), max_tokens=7900, stream=stream, temperature=0.5, extra_body={"ignore_eos": True}
                )
            except openai.APITimeoutError:
                return
            next(iter(answer))
            next(iter(answer))
            answer.close()

    thread = threading.Thread(target=request)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    newest = "SELECT status, stats, cancel_requested FROM models_app_generation ORDER BY created_at DESC LIMIT 1"
    status, stats, requested = wait_for(lambda: (row := live.rows(newest)[0])[0] not in {"queued", "running"} and row)
    assert (status, requested) == ("cancelled", True)
    assert stats["stop_reason"] == "userStopped"
    assert 0 < stats["total_output_tokens"] < 7900


@pytest.mark.parametrize(
    ("more", "error", "param"),
    [
        ({"model": "nobody/nothing"}, openai.NotFoundError, "model"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"n": 9}, openai.BadRequestError, "n"),
        ({"messages": [{"role": "user", "content": "word " * 20000}]}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 20000}], "stream": True}, openai.BadRequestError, "messages"),
    ],
)
def test_errors_are_what_the_client_knows(
    client: openai.OpenAI, more: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**({"model": MICRO, "messages": ask("Hi")} | more))
    assert caught.value.param == param
    assert caught.value.type in {"invalid_request_error", "not_found_error"}


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_tools_are_called_and_their_results_used(client: openai.OpenAI) -> None:
    talk: list[Any] = ask("What is the weather in Rome?")
    first = client.chat.completions.create(model="lmweb/starter", messages=talk, temperature=0, tools=[WEATHER]).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.content is None
    assert first.message.tool_calls
    (call,) = first.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Rome"})
    talk += [first.message, {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21, "condition": "sunny"}'}]
    second = client.chat.completions.create(model="lmweb/starter", messages=talk, temperature=0, tools=[WEATHER]).choices[0]
    assert second.finish_reason == "stop"
    assert "21" in (second.message.content or "")


def test_calls_are_streamed_as_openai_does(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="lmweb/starter", messages=ask("What is the weather in Rome?"), temperature=0, tools=[WEATHER]
    ) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        final = stream.get_final_completion().choices[0]
    pieces = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert pieces[0].id
    assert (pieces[0].index, pieces[0].type) == (0, "function")
    assert pieces[0].function
    assert (pieces[0].function.name, pieces[0].function.arguments) == ("get_weather", "")
    assert all(piece.id is None and piece.function and piece.function.name is None for piece in pieces[1:])
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls
    assert json.loads(final.message.tool_calls[0].function.arguments) == {"city": "Rome"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_model_that_has_to_calls(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model=MICRO, messages=ask("x"), tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_tokens=500, seed=1
    ).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.tool_calls
    assert isinstance(json.loads(answer.message.tool_calls[0].function.arguments)["city"], str)


def test_structured_answers(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
    formats: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}},
        {"extra_body": {"guided_regex": "[a-c]{5}"}},
        {"extra_body": {"grammar": 'root ::= "yes" | "no"'}},
    ]
    texts = [
        client.chat.completions.create(model=MICRO, messages=ask("x"), max_tokens=200, seed=2, **more).choices[0].message.content
        for more in formats
    ]
    assert json.loads(texts[0] or "")["a"] in {"x", "y"}
    assert re.fullmatch("[a-c]{5}", texts[1] or "")
    assert texts[2] in {"yes", "no"}


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities(client: openai.OpenAI, stream: bool) -> None:
    question: Any = {"model": "lmweb/starter", "messages": ask("Tell me a joke"), "temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer: Any = client.chat.completions.create(**question, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    text = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
    items = [item for choice in choices if choice.logprobs for item in choice.logprobs.content]
    assert "".join(item.token for item in items) == text
    assert all(len(item.top_logprobs) == 2 and item.logprob <= 0 for item in items)


def test_several_answers_to_one_question(client: openai.OpenAI) -> None:
    def choices(**more: Any) -> list[str | None]:
        answer = client.chat.completions.create(model=MICRO, messages=ask("x"), max_tokens=8, temperature=1, seed=5, **more)
        return [choice.message.content for choice in answer.choices]

    both = choices(n=2)
    assert len(set(both)) == 2
    assert both == choices(n=2)
    assert both[:1] == choices()


def test_flexible_requests_let_others_go_first(client: openai.OpenAI, live: Live) -> None:
    client.chat.completions.create(model=MICRO, messages=ask("x"), max_tokens=2, service_tier="flex")
    assert live.rows("SELECT request FROM models_app_generation ORDER BY created_at DESC LIMIT 1")[0][0]["lane"] == 2


def test_wrong_tokens(live: Live, token: str) -> None:
    for wrong in ("sk-lm-wrong", token + "x"):
        with pytest.raises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=f"{live.base_url}/v1", api_key=wrong, max_retries=0).models.list()
        assert caught.value.code == "invalid_api_key"


def test_a_token_of_the_command_line_works_until_it_is_revoked(live: Live) -> None:
    live.create_user("api-person")
    made = json.loads(live.manage("token", "create", "--user", "api-person", "--name", "cli", "--json").stdout)
    client = openai.OpenAI(base_url=f"{live.base_url}/v1", api_key=made["token"], max_retries=0)
    client.models.list()
    live.manage("token", "revoke", made["id"])
    with pytest.raises(openai.AuthenticationError, match="revoked"):
        client.models.list()


@pytest.mark.parametrize("language", ["curl", "python"])
def test_the_examples_of_the_developer_page_run(live: Live, token: str, language: str, tmp_path: Path) -> None:
    page = live.python(
        "from django.test import Client\nfrom lmweb.models import User\nclient = Client()\n"
        "client.force_login(User.objects.get(username='api-person'))\n"
        f"result = client.get('/developer/snippets?model=lmweb/starter', headers={{'host': {live.base_url.removeprefix('http://')!r}}}).content.decode()"
    )
    found = re.search(rf'id="snippet-{language}">(.*?)</code>', page, re.DOTALL)
    assert found
    code = html.unescape(found[1]).replace("your token", token)
    command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | {"LMWEB_TOKEN": token}, capture_output=True, text=True, timeout=60, check=True)
    assert "Hello" in done.stdout or "Hi" in done.stdout
