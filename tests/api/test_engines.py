"""Two engines behind one API: the same weights in two formats answer the same requests at the same time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.api.client import Answer, Call
from tests.micro_models import STARTER_GGUF, STARTER_MLX

if TYPE_CHECKING:
    from lmweb.models import User
    from tests.workers.support import Bench

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTIONS = [
    "What is MLX?",
    "How do I load a model?",
    "What is temperature?",
    "What is GGUF?",
    "What is a seed?",
    "How do I delete a model?",
]
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "warm": {"type": "boolean"}}, "required": ["city", "warm"]}
NAMES = {"gguf": "starter/gguf", "mlx": "starter/mlx"}


@pytest.fixture
def both(transactional_db: None, owner: User, tmp_path: Path) -> Iterator[Bench]:
    """Return a bench with the starter model in both formats, which may be in memory together."""
    from tests.workers.support import Bench, make_host
    from workers.memory import AutoEvict
    from workers.policy import Policy

    bench = Bench(make_host(tmp_path / "logs", Policy(auto_evict=AutoEvict.OFF)), owner)
    for format_, file in (("gguf", STARTER_GGUF), ("mlx", STARTER_MLX / "config.json")):
        bench.install(file, NAMES[format_], format=format_)
    bench.host.start()
    yield bench
    bench.host.stop()


async def ask(token: str, model: str, text: str, **fields: Any) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 80, **fields}
    call = Call("POST", "/v1/chat/completions", headers={"Authorization": f"Bearer {token}"}, body=json.dumps(body).encode())
    await asyncio.wait_for(call.task, 120)
    assert call.answer.status == 200, call.answer.body
    return call.answer


async def test_both_formats_answer_the_same_under_load(both: Bench, token: str) -> None:
    whole = [ask(token, name, question) for question in QUESTIONS for name in NAMES.values()]
    streamed = [ask(token, name, question, stream=True) for question in QUESTIONS for name in NAMES.values()]
    answers = await asyncio.gather(*whole, *streamed)
    bodies = [answer.json() for answer in answers[: len(whole)]]
    texts = [body["choices"][0]["message"]["content"] for body in bodies]
    assert texts[0::2] == texts[1::2]
    assert [body["usage"] for body in bodies[0::2]] == [body["usage"] for body in bodies[1::2]]
    assert [body["choices"][0]["finish_reason"] for body in bodies[0::2]] == [body["choices"][0]["finish_reason"] for body in bodies[1::2]]
    assert [answer.text() for answer in answers[len(whole) :]] == texts
    assert "Apple" in texts[1]


async def test_both_formats_stop_call_and_keep_to_a_schema(both: Bench, token: str) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA, "strict": True}}
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("What is the weather in Rome?", {"tools": [WEATHER]}),
        ("What is MLX?", {"stop": [" learning"]}),
        ("Where is it warm?", {"response_format": format_, "max_tokens": 200}),
        ("What is a seed?", {"logprobs": True, "top_logprobs": 2, "max_tokens": 6}),
    ]
    answers = await asyncio.gather(*(ask(token, name, text, **fields) for text, fields in wanted for name in NAMES.values()))
    called, stopped, bound, scored = (answers[i : i + 2] for i in range(0, 8, 2))
    for answer in called:
        (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "Rome"})
    assert {answer.json()["choices"][0]["message"]["content"] for answer in stopped} == {"MLX is Apple's machine"}
    for answer in bound:
        written = json.loads(answer.json()["choices"][0]["message"]["content"])
        assert isinstance(written["city"], str)
        assert isinstance(written["warm"], bool)
    rows = [answer.json()["choices"][0]["logprobs"]["content"] for answer in scored]
    assert [entry["token"] for entry in rows[0]] == [entry["token"] for entry in rows[1]]
    for here, there in zip(*rows):
        assert here["logprob"] == pytest.approx(there["logprob"], abs=0.1)  # 8 bits per weight against 16


async def test_what_a_format_cannot_do_is_said_through_the_api(both: Bench, token: str) -> None:
    body = {"model": NAMES["mlx"], "input": "x"}
    call = Call("POST", "/v1/embeddings", headers={"Authorization": f"Bearer {token}"}, body=json.dumps(body).encode())
    await asyncio.wait_for(call.task, 60)
    assert call.answer.status == 400
    assert "GGUF" in call.answer.error()["message"]
