"""Random mixes of requests through a runner, with everything that can happen to them: each must say what it says alone.

A story is a runner with few slots and cells, a seed, and a number of steps. Between the steps requests from a pool come in, are
cancelled, and now and then the runner crashes: a new one gets what the host has of each answer, with or without the last step.
``PROPERTY_STEPS`` in the environment makes longer stories.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import llama_cpp.llama_cpp as C
import msgspec
import pytest

from tests.micro_models import make_micro
from tests.workers.engines import WORDS
from tests.workers.test_llama_engine import EXACT, open_engine
from workers.engines.llama_context import Context
from workers.engines.llama_cpp import LlamaEngine
from workers.engines.speculation import StepTimes
from workers.events import (
    AnyEvent,
    ContextOverflow,
    PromptProcessingEnd,
    PromptProcessingProgress,
    PromptProcessingStart,
    QueueUpdate,
    Stats,
)
from workers.protocol import Cancel, Output, Submit
from workers.relay import _merged
from workers.reports import StepLog
from workers.runner import Runner
from workers.schemas import ChatMessage, GenerationRequest, Lane, OutputFormat, SamplingParams, Tool

STORY_STEPS = int(os.environ.get("PROPERTY_STEPS", "300"))
STORIES = range(10)
CONTEXT = 192
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool.function.name }}{% endfor %}</tools>"
    '<tool_call>{"name": "", "arguments": {}}</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCHEMA = OutputFormat(
    kind="json_schema",
    value=json.dumps(
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"enum": ["time", "year"]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        }
    ),
)
TOOL = Tool(name="find", parameters=json.dumps({"type": "object", "properties": {"q": {"enum": ["x", "y"]}}, "required": ["q"]}))
FEW = dict.fromkeys(range(70, 74), 30.0)  # a text of few different tokens repeats itself, so that guesses are right
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0, "repeat_penalty": 1.0},
    {"temperature": 0.0, "repeat_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0.9},
    {"temperature": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 0.6, "frequency_penalty": 0.4},
    {"temperature": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.02},
    {"temperature": 0.7, "dry_multiplier": 2.0, "logit_bias": FEW},
    {"temperature": 0.5, "logit_bias": FEW},
    {"temperature": 0.0, "logit_bias": FEW},
]
FEATURES: list[dict[str, Any]] = [
    {},
    {},
    {"top_logprobs": 2},
    {"output_format": SCHEMA},
    {"output_format": OutputFormat(kind="regex", value="(ab|cd){2,6}")},
    {"tools": (TOOL,), "tool_choice": "required"},
    {"context_overflow": "rollingWindow"},
    {"draft_model": "test/draft"},
]


def make_pool(random: Random) -> list[GenerationRequest]:
    """Return requests: every sampling and every feature several times, in random company."""
    pool = []
    for i in range(48):
        features = dict(FEATURES[i % len(FEATURES)])
        sampling = dict(random.choice(SAMPLINGS), seed=i, max_tokens=random.randint(1, 30))
        if "context_overflow" in features:
            sampling["max_tokens"] = CONTEXT + random.randint(0, 60)
        if random.random() < 0.3:
            sampling["stop"] = random.choice([["e"], ["on", "zz"], ["s t"]])
        if random.random() < 0.2:
            sampling["ignore_eos"] = True
        system = random.choice(["", " ".join(WORDS), " ".join(WORDS[:8])])
        text = " ".join(random.choices(WORDS, k=random.randint(1, 20)))
        messages = [ChatMessage(role="user", content=text)]
        if system:
            messages.insert(0, ChatMessage(role="system", content=system))
        lane = random.choice(list(Lane))
        pool.append(GenerationRequest(model="m", messages=messages, sampling=SamplingParams(**sampling), lane=lane, **features))
    return pool


POOL = make_pool(Random(0))


@dataclass
class Answer:
    """What a host knows of a generation."""

    number: int
    owner: str
    events: list[AnyEvent] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stats: Stats | None = None

    def add(self, output: Output) -> None:
        assert output.error is None, output.error
        assert self.stats is None, "something came after the end"
        self.events += [event for event in output.events if not isinstance(event, PROGRESS)]
        self.tokens += output.tokens
        self.stats = output.stats

    def said(self) -> list[AnyEvent]:
        """Return the events with neighbouring deltas joined, without the log-probabilities."""
        joined = _merged([event for event in self.events if not isinstance(event, ContextOverflow)])
        return [msgspec.structs.replace(event, logprobs=[]) if hasattr(event, "logprobs") else event for event in joined]

    def logprobs(self) -> list[tuple[str, float]]:
        return [(each.token, each.logprob) for event in self.events for each in getattr(event, "logprobs", [])]

    def forgotten(self) -> list[int]:
        return [event.dropped_tokens for event in self.events if isinstance(event, ContextOverflow)]


PROGRESS = (QueueUpdate, PromptProcessingStart, PromptProcessingProgress, PromptProcessingEnd)


class Story:
    """A runner and its host."""

    pool = POOL

    def __init__(self, files: tuple[Path, Path], seed: int) -> None:
        self.files = files
        self.random = Random(seed)
        self.lookup = seed % 2 == 1
        self.unified = seed % 3 != 0
        self.answers: dict[str, Answer] = {}
        self.steps = self.crashes = self.cancelled = 0
        self.start()

    def start(self) -> None:
        options = {"prompt_lookup": self.lookup, "unified_kv_cache": self.unified, **EXACT}
        engine = open_engine(self.files[0], context_length=CONTEXT, parallel=5, eval_batch_size=64, **options)
        self.engine, self.runner = engine, Runner(engine, StepLog(""))

    def running(self) -> list[str]:
        return [key for key, answer in self.answers.items() if answer.stats is None]

    def submit(self, key: str) -> None:
        answer = self.answers[key]
        request = self.pool[answer.number]
        path = str(self.files[1]) if request.draft_model else ""
        self.take(
            self.runner.submit(Submit(generation_id=key, owner=answer.owner, request=request, output_tokens=answer.tokens, draft_path=path))
        )

    def take(self, output: Output | None) -> None:
        if output is not None:
            self.answers[output.generation_id].add(output)

    def begin(self) -> None:
        key = f"g{len(self.answers)}"
        self.answers[key] = Answer(self.random.randrange(len(self.pool)), self.random.choice("ab"))
        self.submit(key)

    def cancel(self) -> None:
        if running := self.running():
            self.cancelled += 1
            self.take(self.runner.cancel(Cancel(generation_id=self.random.choice(running))))

    def crash(self) -> None:
        if self.random.random() < 0.5 and self.engine.has_work:
            self.runner.step()  # what it brought reaches nobody
        self.crashes += 1
        self.engine.close()
        self.start()
        for key in self.running():
            self.submit(key)

    def step(self) -> None:
        for output in self.runner.step().outputs:
            self.take(output)
        self.steps += 1

    def tell(self, steps: int) -> None:
        """Run so many steps with all kinds of events in between, then let everything end."""
        while self.steps < steps:
            chance = self.random.random()
            if chance < 0.2 and len(self.running()) < 12:
                self.begin()
            elif chance < 0.22:
                self.cancel()
            elif chance < 0.224:
                self.crash()
            self.step()
        for _ in range(20_000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("it does not come to an end")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the files of the model and of a draft model that is right now and then."""
    folder = tmp_path_factory.mktemp("properties")
    return make_micro(folder / "micro.gguf", chat_template=TEMPLATE), make_micro(folder / "draft.gguf", layers=1)


@pytest.fixture(scope="module")
def alone(files: tuple[Path, Path]) -> Iterator[Any]:
    """Return what a request of the pool brings in a runner that has nothing else to do."""
    engine = open_engine(files[0], context_length=CONTEXT, parallel=1, **EXACT)
    runner = Runner(engine, StepLog(""))

    @cache
    def say(number: int) -> Answer:
        answer = Answer(number, "a")
        request = msgspec.structs.replace(POOL[number], draft_model="")
        first = runner.submit(Submit(generation_id="x", owner=f"nobody {number}", request=request))
        assert first is None
        while runner.has_work:
            for output in runner.step().outputs:
                answer.add(output)
        return answer

    yield say
    engine.close()


def check(answer: Answer, expected: Answer) -> None:
    """Compare an answer with what the request says alone; a cancelled one with its beginning."""
    assert answer.stats is not None
    assert expected.stats is not None
    if answer.stats.stop_reason == "userStopped":
        assert answer.tokens == expected.tokens[: len(answer.tokens)]
        return
    assert answer.tokens == expected.tokens
    assert renamed(answer.said()) == renamed(expected.said())
    assert answer.stats.stop_reason == expected.stats.stop_reason
    assert answer.stats.input_tokens == expected.stats.input_tokens
    assert answer.stats.total_output_tokens == expected.stats.total_output_tokens == len(answer.tokens)
    assert answer.forgotten() == expected.forgotten()
    assert [token for token, _ in answer.logprobs()] == [token for token, _ in expected.logprobs()]
    assert [value for _, value in answer.logprobs()] == pytest.approx([value for _, value in expected.logprobs()], abs=2e-3)


def renamed(events: list[AnyEvent]) -> list[AnyEvent]:
    """Return the events with the same ids of calls: these are made of the generation's."""
    return [msgspec.structs.replace(event, id="") if hasattr(event, "id") else event for event in events]


def check_nothing_is_left(engine: LlamaEngine, runner: Runner) -> None:
    assert runner.jobs == {}
    assert not engine.has_work
    assert engine._samplers == {}
    assert engine.speculation._guessers == {}
    for slot in engine.scheduler.slots:
        assert (slot.sequence, slot.tokens, slot.n_kv) == (None, [], 0)
        assert C.llama_memory_seq_pos_max(engine.context._memory, slot.id) == -1
    assert engine.park.used_bytes == sum(len(parked.data) for parked in engine.park._entries.values())


@pytest.fixture(scope="module")
def happened() -> Iterator[Counter[str]]:
    """Count what happens inside the engine, so that stories in which nothing happens are noticed."""
    counts: Counter[str] = Counter()

    def counted(name: str, method: Any) -> Any:
        def call(*args: Any) -> Any:
            found = method(*args)
            counts[name] += found is not False and found != 0
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_preempt", "_slide", "_restore", "_check", "_move"):
            patch.setattr(LlamaEngine, name, counted(name, getattr(LlamaEngine, name)))
        patch.setattr(Context, "copy", counted("copy", Context.copy))
        yield counts


@pytest.mark.parametrize("seed", STORIES)
def test_everything_says_what_it_says_alone(
    files: tuple[Path, Path], alone: Any, happened: Counter[str], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.memory.EXTRA_CELLS_BYTES", 0)
    monkeypatch.setattr("workers.scheduler.RESERVED_OUTPUT", (0, 8, 512)[seed % 3])  # admit too many: they will be preempted
    monkeypatch.setattr("workers.engines.llama_cpp.park_bytes", lambda: (200_000, 50_000_000)[seed % 2])
    if seed % 4:
        monkeypatch.setattr(StepTimes, "expect", lambda _times, tokens: 1.0 + 0.001 * tokens)  # guess whenever one can
    story = Story(files, seed)
    story.tell(STORY_STEPS)
    happened.update(crashes=story.crashes, cancelled=story.cancelled, stories=1)
    for key, answer in story.answers.items():
        try:
            check(answer, alone(answer.number))
        except AssertionError as error:
            raise AssertionError(f"{key} of story {seed}, request {answer.number}: {POOL[answer.number]}") from error
    check_nothing_is_left(story.engine, story.runner)
    story.engine.close()


def test_the_stories_were_not_dull(happened: Counter[str]) -> None:
    if happened["stories"] == len(STORIES):  # not if somebody runs one of them alone
        assert min(happened[name] for name in ("_preempt", "_slide", "_restore", "_check", "_move", "copy", "crashes", "cancelled")) > 5, (
            happened
        )
