"""``POST /v1/embeddings``: the format as tables, and the unmodified ``openai`` client against a whole installation."""

from __future__ import annotations

import array
import base64
import json
import math
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import openai
import pytest

from api.openai.embeddings import Collector, parse_request, to_embedding_request
from lmweb.errors import GenerationInterrupted, InvalidRequest
from tests.micro_models import make_micro_bert
from workers.events import EmbeddingVectors, Stats
from workers.schemas import request_from_json, request_to_builtins

if TYPE_CHECKING:
    from tests.live import Live

BERT = "tests/api-bert"


def translated(**body: Any) -> dict[str, Any]:
    request = to_embedding_request(parse_request(json.dumps({"model": "m"} | body).encode()))
    stored = request_to_builtins(request)
    assert request_from_json(json.dumps(stored)) == request  # what the row keeps is what was asked
    return stored


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([["1"], "a"], None),
        ([1, "a"], None),
        ([[1], 2], None),
        ([True], None),
        ([1.5], None),
        ("", None),
        ([], None),
        (["a", ""], None),
        ([[]], None),
        ("a\x00", None),
        (["x"] * 2049, None),
        (None, None),
        ({"a": 1}, None),
    ],
)
def test_inputs(given: Any, inputs: list[Any] | None) -> None:
    if inputs is not None:
        assert translated(input=given)["inputs"] == inputs
        return
    with pytest.raises(InvalidRequest) as refusal:
        translated(input=given)
    assert refusal.value.param
    assert refusal.value.param.startswith("input")


@pytest.mark.parametrize(
    ("body", "param"),
    [({"dimensions": 0}, "dimensions"), ({"encoding_format": "hex"}, "encoding_format"), ({"truncate": "yes"}, "truncate")],
)
def test_values_out_of_range_are_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        translated(input="a", **body)
    assert refusal.value.param == param


def test_vectors_are_collected_in_any_order_and_a_missing_one_is_an_error() -> None:
    collector = Collector(3, as_base64=False)
    rows = [array.array("f", [float(i), -1.0]).tobytes() for i in range(3)]
    collector.take([EmbeddingVectors(start=2, width=2, data=rows[2])])
    with pytest.raises(GenerationInterrupted):
        collector.answer("m", Stats())
    collector.take([EmbeddingVectors(start=0, width=2, data=rows[0] + rows[1]), EmbeddingVectors(start=2, width=2, data=rows[2])])
    answer = collector.answer("m", Stats(input_tokens=7))
    assert [item.embedding for item in answer.data] == [[0.0, -1.0], [1.0, -1.0], [2.0, -1.0]]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (7, 7)


# --- a whole installation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def token(live: Live, tmp_path_factory: pytest.TempPathFactory) -> str:
    live.create_user("embedding-person")
    file = make_micro_bert(tmp_path_factory.mktemp("models") / "api-bert.gguf", name="api-bert")
    live.python(
        "from pathlib import Path\nfrom models_app import services\n"
        f"services.import_file(principal=None, source=Path({str(file)!r}), user_repo={BERT!r})\nservices.ensure_starter()"
    )
    return live.create_token("embedding-person")


@pytest.fixture
def client(live: Live, token: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.base_url}/v1", api_key=token, max_retries=0, timeout=60)


def test_the_client_gets_the_same_vectors_in_both_encodings_one_by_one_and_together(client: openai.OpenAI) -> None:
    inputs = [f"to be or not {chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200)]
    answer = client.embeddings.create(model=BERT, input=inputs)  # the client asks for base64 by itself
    assert [item.index for item in answer.data] == list(range(200))
    assert answer.model == BERT
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 200 * 4
    floats = client.embeddings.create(model=BERT, input=inputs[:3], encoding_format="float")
    for one, other in zip(answer.data, floats.data, strict=False):
        assert len(one.embedding) == 64
        assert math.isclose(sum(x * x for x in one.embedding), 1.0, abs_tol=1e-4)
        assert one.embedding == pytest.approx(other.embedding, abs=2e-3)
    single = client.embeddings.create(model=BERT, input=inputs[150])
    assert single.data[0].embedding == pytest.approx(answer.data[150].embedding, abs=2e-3)
    assert answer.data[0].embedding != pytest.approx(answer.data[150].embedding, abs=1e-2)


def test_base64_is_little_endian_floats(client: openai.OpenAI) -> None:
    text: Any = client.embeddings.create(model=BERT, input="to be", encoding_format="base64").data[0].embedding
    numbers = client.embeddings.create(model=BERT, input="to be", encoding_format="float").data[0].embedding
    assert list(struct.unpack("<64f", base64.b64decode(text))) == pytest.approx(numbers, abs=1e-6)


def test_a_language_model_gives_vectors_and_an_embedding_model_no_chat(client: openai.OpenAI) -> None:
    assert len(client.embeddings.create(model="lmweb/starter", input="to be").data[0].embedding) > 64
    with pytest.raises(openai.BadRequestError, match="cannot chat") as refusal:
        client.chat.completions.create(model=BERT, messages=[{"role": "user", "content": "hi"}])
    assert refusal.value.param == "model"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the model takes 512") as refusal:
        client.embeddings.create(model=BERT, input=["to " * 700])
    assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "input")
    cut = client.embeddings.create(model=BERT, input=["to " * 700], extra_body={"truncate": True})
    assert cut.usage.prompt_tokens == 512
    with pytest.raises(openai.BadRequestError, match="not trained to be shortened"):
        client.embeddings.create(model=BERT, input="to be", dimensions=8)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nobody/nothing", input="to be")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=client.base_url, api_key="sk-lm-wrong", max_retries=0).embeddings.create(model=BERT, input="x")


def test_requests_side_by_side_are_told_apart(client: openai.OpenAI) -> None:
    answers: dict[str, list[float]] = {}

    def ask(text: str) -> None:
        answers[text] = client.embeddings.create(model=BERT, input=[text] * 8).data[7].embedding

    inputs = [f"we be {chr(97 + i)}" for i in range(8)]
    threads = [threading.Thread(target=ask, args=(text,)) for text in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = client.embeddings.create(model=BERT, input=inputs)
    for text, item in zip(inputs, alone.data, strict=True):
        assert answers[text] == pytest.approx(item.embedding, abs=2e-3)


def test_a_closed_connection_cancels_the_rest(live: Live, token: str) -> None:
    impatient = openai.OpenAI(base_url=f"{live.base_url}/v1", api_key=token, max_retries=0, timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.embeddings.create(model=BERT, input=["to be " * 200] * 2048)
    impatient.close()
    deadline = time.monotonic() + 15
    latest = "SELECT status FROM models_app_generation WHERE model_key = %s ORDER BY created_at DESC LIMIT 1"
    while live.rows(latest, BERT)[0][0] != "cancelled":
        assert time.monotonic() < deadline, live.rows(latest, BERT)
        time.sleep(0.05)
