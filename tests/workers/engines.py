"""What the tests of all engines share: micro models with the same weights in every format, and loops that drive an engine by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.micro_models import make_micro, make_micro_mlx
from workers.engines import registry
from workers.engines.base import Engine, Logprob, Sequence, StepResult
from workers.schemas import LoadConfig, SamplingParams

GREEDY = SamplingParams(temperature=0.0, repeat_penalty=1.0, seed=1)
WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
]
#: An engine that reads another format adds the same model in that format here.
MICRO: dict[str, Callable[[Path], Path]] = {
    "gguf": lambda folder: make_micro(folder / "micro.gguf"),
    "mlx": lambda folder: make_micro_mlx(folder / "micro"),
}


def micro_for(engine: str, folder: Path) -> Path:
    """Return an F32 micro model for this engine, whose results hardly depend on the batch's shape."""
    return MICRO[registry.CARDS[engine].formats[0]](folder)


def open_engine(name: str, path: Path, **config: object) -> Engine:
    return registry.factory(name)(str(path), LoadConfig(cpu_threads=1, **config), lambda _fraction: None)  # type: ignore[arg-type]


def sequence(
    engine: Engine, name: str, text: str, *, limit: int = 24, owner: str = "a", sampling: SamplingParams = GREEDY, shared: int = 0
) -> Sequence:
    return Sequence(id=name, owner=owner, prompt=engine.tokenize(text, add_bos=True), shared_prefix=shared, sampling=sampling, limit=limit)


def step(engine: Engine, report: Callable[[Sequence, Logprob | None], None] | None = None) -> StepResult:
    """Take one step; sequences that are at their limit then leave."""
    ended = []

    def take(item: Sequence, _token: int, logprob: Logprob | None) -> bool:
        if report:
            report(item, logprob)
        if len(item.output) >= item.limit:
            ended.append(item.id)
        return len(item.output) < item.limit

    result = engine.step(take)
    for name in ended:
        engine.remove(name)
    return result


def finish(engine: Engine, *sequences: Sequence, report: Callable[[Sequence, Logprob | None], None] | None = None) -> list[list[int]]:
    """Run until all are at their limit; returns their outputs."""
    for item in sequences:
        engine.add(item)
    for _ in range(5000):
        if not engine.has_work:
            return [item.output for item in sequences]
        step(engine, report)
    raise AssertionError("the engine does not come to an end")


def alone(name: str, path: Path, text: str, **options: object) -> list[int]:
    """Return what a fresh engine says to this alone."""
    engine = open_engine(name, path, context_length=1024, parallel=1)
    try:
        return finish(engine, sequence(engine, "x", text, **options))[0]  # type: ignore[arg-type]
    finally:
        engine.close()


def sliding(engine: Engine, name: str, *, limit: int = 100, keep: int = 10, sampling: SamplingParams = GREEDY) -> Sequence:
    item = sequence(engine, name, " ".join(WORDS[:12]), limit=limit, sampling=sampling)
    item.window, item.keep = 64, keep
    return item
