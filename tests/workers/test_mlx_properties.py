"""The stories of ``test_properties`` on the MLX engine: a batch that is a rectangle, prefixes in mlx-lm's cache, windows that move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.micro_models import make_micro_mlx
from tests.workers.engines import open_engine
from tests.workers.test_properties import CONTEXT, POOL, TEMPLATE, Answer, Story, check
from workers.engines.mlx_engine import MlxEngine
from workers.engines.mlx_prefixes import Prefixes
from workers.protocol import Submit
from workers.reports import StepLog
from workers.runner import Runner
from workers.schemas import GenerationRequest

STORIES = range(3)
STEPS = 200


def without_what_mlx_lacks(request: GenerationRequest) -> GenerationRequest:
    sampling = msgspec.structs.replace(request.sampling, dry_multiplier=0.0)
    return msgspec.structs.replace(request, sampling=sampling, draft_model=None)


MLX_POOL = [without_what_mlx_lacks(request) for request in POOL]


class MlxStory(Story):
    """A runner with an MLX model."""

    pool = MLX_POOL

    def start(self) -> None:
        self.engine: Any = open_mlx(self.files[0], parallel=5)
        self.runner = Runner(self.engine, StepLog(""))


def open_mlx(file: Path, *, parallel: int) -> MlxEngine:
    engine = open_engine("mlx-lm", file, context_length=CONTEXT, parallel=parallel, eval_batch_size=64)
    assert isinstance(engine, MlxEngine)
    return engine


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_micro_mlx(tmp_path_factory.mktemp("properties") / "micro", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def alone(file: Path) -> Iterator[Callable[[int], Answer]]:
    """Return what a request of the pool brings in a runner that has nothing else to do."""
    engine = open_mlx(file, parallel=1)
    runner = Runner(engine, StepLog(""))

    @cache
    def say(number: int) -> Answer:
        answer = Answer(number, "a")
        assert runner.submit(Submit(generation_id="x", owner=f"nobody {number}", request=MlxStory.pool[number])) is None
        while runner.has_work:
            for output in runner.step().outputs:
                answer.add(output)
        return answer

    yield say
    engine.close()


@pytest.fixture(scope="module")
def happened() -> Iterator[Counter[str]]:
    """Count what happens inside the engine, so that stories in which nothing happens are noticed."""
    counts: Counter[str] = Counter()

    def counted(name: str, method: Any) -> Any:
        def call(*args: Any) -> Any:
            found = method(*args)
            counts[name] += found != (None, 0)
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((MlxEngine, "_preempt"), (MlxEngine, "_slide"), (Prefixes, "find"), (Prefixes, "keep_shared")):
            patch.setattr(owner, name, counted(name, getattr(owner, name)))
        yield counts


@pytest.mark.parametrize("seed", STORIES)
def test_everything_says_what_it_says_alone(
    file: Path, alone: Callable[[int], Answer], happened: Counter[str], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.memory.EXTRA_CELLS_BYTES", 1_000_000)
    monkeypatch.setattr("workers.scheduler.RESERVED_OUTPUT", (0, 8, 512)[seed % 3])  # admit too many: they will be preempted
    monkeypatch.setattr("workers.engines.mlx_engine.park_bytes", lambda: (50_000_000, 400_000)[seed % 2])
    story = MlxStory((file, file), seed)
    story.tell(STEPS)
    happened.update(crashes=story.crashes, cancelled=story.cancelled, stories=1)
    for key, answer in story.answers.items():
        try:
            check(answer, alone(answer.number))
        except AssertionError as error:
            raise AssertionError(f"{key} of story {seed}, request {answer.number}: {MlxStory.pool[answer.number]}") from error
    assert story.runner.jobs == {}
    assert story.engine._streams == story.engine._samplers == {}
    assert all((slot.sequence, slot.tokens, slot.n_kv) == (None, [], 0) for slot in story.engine.scheduler.slots)
    assert len(story.engine.generator._generation_batch) == len(story.engine.generator._prompt_batch) == 0
    story.engine.close()


def test_the_stories_were_not_dull(happened: Counter[str]) -> None:
    if happened["stories"] == len(STORIES):  # not if somebody runs one of them alone
        assert min(happened[name] for name in ("_preempt", "_slide", "find", "keep_shared", "cancelled")) > 3, happened
