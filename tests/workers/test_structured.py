"""Structured output and log-probabilities through real runners, alone and in a batch."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from pathlib import Path

import pytest

from lmweb.errors import InvalidRequest
from models_app.models import Generation, InstalledModel
from tests.micro_models import make_micro
from tests.workers.support import Bench, wait_for
from workers.constraints import ConstraintFactory
from workers.engines.llama_context import Model
from workers.events import MessageDelta
from workers.schemas import OutputFormat, SamplingParams

BOOK = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 30},
        "year": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 4},
    },
    "required": ["title", "year", "tags"],
    "additionalProperties": False,
}
SCHEMA = OutputFormat(kind="json_schema", value=json.dumps(BOOK))


@pytest.fixture
def noise(bench: Bench, tmp_path: Path) -> InstalledModel:
    """Return a model with random weights, which would never write JSON of its own accord."""
    return bench.install(make_micro(tmp_path / "noise.gguf"), "test/noise", architecture="qwen2")


@pytest.fixture
def slow_noise(bench: Bench, tmp_path: Path) -> InstalledModel:
    """Return one with so many layers that an answer takes seconds."""
    return bench.install(make_micro(tmp_path / "slow.gguf", layers=32), "test/slow", architecture="qwen2")


def start(bench: Bench, model: InstalledModel, text: str, sampling: SamplingParams, **fields: object) -> Generation:
    generation = bench.create(model, text, sampling=sampling, **fields)
    bench.host.generate(str(generation.pk))
    return generation


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_holds_for_every_sequence_of_a_batch(bench: Bench, noise: InstalledModel, temperature: float) -> None:
    generations = [
        start(bench, noise, f"book {i}", SamplingParams(temperature=temperature, seed=i, max_tokens=400), output_format=SCHEMA)
        for i in range(4)
    ]
    free = start(bench, noise, "book", SamplingParams(temperature=temperature, seed=9, max_tokens=40))
    for generation in generations:
        assert bench.finished(generation).status == "completed"
        book = json.loads(generation.content)
        assert set(book) == {"title", "year", "tags"}
        assert isinstance(book["year"], int)
        assert generation.stats["stop_reason"] == "eosFound"
    assert not bench.finished(free).content.startswith("{")


def test_json_objects_regular_expressions_and_grammars(bench: Bench, noise: InstalledModel) -> None:
    sampling = SamplingParams(temperature=1.0, seed=5, max_tokens=60)
    regex = start(bench, noise, "x", sampling, output_format=OutputFormat(kind="regex", value=r"[A-F]{3}-\d{4}"))
    gbnf = start(bench, noise, "x", sampling, output_format=OutputFormat(kind="grammar", value='root ::= "yes" | "no"'))
    anything = start(bench, noise, "x", sampling, output_format=OutputFormat(kind="json_object"))
    assert re.fullmatch(r"[A-F]{3}-\d{4}", bench.finished(regex).content)
    assert bench.finished(gbnf).content in {"yes", "no"}
    assert bench.finished(anything).content.startswith("{")


@pytest.mark.parametrize(
    "wanted",
    [
        OutputFormat(kind="json_schema", value="{not json"),
        OutputFormat(kind="json_schema", value='{"type": "no such type"}'),
        OutputFormat(kind="json_schema", value='{"$ref": "#/nowhere"}'),
        OutputFormat(kind="regex", value="(unclosed"),
        OutputFormat(kind="grammar", value="root ::= nothing"),
        OutputFormat(kind="json_schema", value='{"type":"array","items":' * 2000 + "{}" + "}" * 2000),
    ],
)
def test_a_format_that_cannot_be_used_is_refused_in_words(bench: Bench, noise: InstalledModel, wanted: OutputFormat) -> None:
    generation = start(bench, noise, "x", SamplingParams(max_tokens=5), output_format=wanted)
    assert bench.finished(generation).error_code == "invalid_request"
    assert "response format" in generation.error_message
    assert bench.run(noise, "still there", sampling=SamplingParams(max_tokens=3)).status == "completed"


def test_a_constrained_answer_survives_a_crash(bench: Bench, slow_noise: InstalledModel) -> None:
    letters = OutputFormat(kind="regex", value="[a-z ]{1500}")
    generation = start(bench, slow_noise, "x", SamplingParams(temperature=1.0, seed=3, max_tokens=1500), output_format=letters)
    wait_for(lambda: bench.text(generation), every=0.001)
    os.kill(next(iter(bench.host.runners.by_id.values())).process.pid, signal.SIGKILL)
    bench.finished(generation)
    assert generation.resumes == 1
    assert re.fullmatch("[a-z ]{1500}", generation.content)


def test_log_probabilities_belong_to_the_tokens_of_the_answer(bench: Bench, starter: InstalledModel) -> None:
    generation = start(
        bench, starter, "Which port does the server use?", SamplingParams(temperature=0.0, repeat_penalty=1.0), top_logprobs=3
    )
    bench.finished(generation)
    reported = [item for event in bench.events(generation) if isinstance(event, MessageDelta) for item in event.logprobs]
    assert "".join(item.token for item in reported) == generation.content
    assert len(reported) == len(generation.output_tokens)
    for item in reported:
        assert item.logprob <= 0
        assert [top.logprob for top in item.top_logprobs] == sorted((top.logprob for top in item.top_logprobs), reverse=True)
        assert item.top_logprobs[0].token == item.token, "greedy takes the likeliest"
        assert sum(math.exp(top.logprob) for top in item.top_logprobs) <= 1.0001
        assert bytes(item.bytes).decode() == item.token


def schema_of(properties: int) -> str:
    return json.dumps({"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(properties)}})


def test_a_schema_may_be_large(starter_gguf: Path) -> None:
    model = Model(str(starter_gguf), gpu_layers=0, on_progress=lambda _fraction: None)
    factory = ConstraintFactory(model.grammar_tokenizer())
    assert factory.make(OutputFormat(kind="json_schema", value=schema_of(1000)))
    assert factory.make(OutputFormat(kind="json_schema", value='{"type": "number", "multipleOf": 0.01, "maximum": 1000000}'))
    model.close()


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("json_schema", '{"type": "string", "pattern": "((("}', "unclosed group"),
        ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ("regex", "(((", "unclosed group"),
        ("json_schema", schema_of(8000), "too big"),
        ("json_schema", '{"type": "integer", "multipleOf": 2147483648}', "multipleOf"),
        ("json_schema", '{"allOf": [{"type": "number", "multipleOf": 997}, {"multipleOf": 99.1}]}', "multipleOf"),
        ("grammar", 'start: %json {"type": "integer", "\\u006dultipleOf": 16777216}', "multipleOf"),
    ],
)
def test_a_format_that_cannot_be_used_says_what_is_wrong_with_it(starter_gguf: Path, kind: str, value: str, reason: str) -> None:
    model = Model(str(starter_gguf), gpu_layers=0, on_progress=lambda _fraction: None)
    with pytest.raises(InvalidRequest, match=reason):
        ConstraintFactory(model.grammar_tokenizer()).make(OutputFormat(kind=kind, value=value))
    model.close()


def test_blanks_between_the_parts_of_json_are_bounded(starter_gguf: Path) -> None:
    model = Model(str(starter_gguf), gpu_layers=0, on_progress=lambda _fraction: None)
    constraint = ConstraintFactory(model.grammar_tokenizer()).make(SCHEMA)
    (brace,), (newline,), (blank,) = (model.tokenize(text, add_bos=False) for text in ("{", "\n", "\t"))
    constraint.accept(brace)
    constraint.accept(newline)
    blanks = 0
    while constraint.allows(blank):
        constraint.accept(blank)
        blanks += 1
    assert blanks == 20
    assert not constraint.allows(newline)
    model.close()
