"""The llama.cpp engine alone: batching must not change results, caches must not leak, a full cache must not lose anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.micro_models import make_micro
from workers.engines import registry
from workers.engines.base import Sequence, StepResult
from workers.engines.llama_cpp import LlamaEngine
from workers.scheduler import Scheduler
from workers.schemas import LoadConfig, SamplingParams

#: Without rounding to 16 bits, batched results differ from single ones so little that sampled outputs of any length agree.
EXACT = {"k_cache_type": "f32", "v_cache_type": "f32", "flash_attention": False}
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


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an F32 micro model, whose results do not depend on the batch's shape."""
    return make_micro(tmp_path_factory.mktemp("engine") / "micro.gguf")


def open_engine(path: Path, **config: object) -> LlamaEngine:
    engine = registry.factory("llama.cpp")(str(path), LoadConfig(cpu_threads=1, **config), lambda _fraction: None)
    assert isinstance(engine, LlamaEngine)
    return engine


@pytest.fixture
def engine(micro: Path) -> Iterator[LlamaEngine]:
    engine = open_engine(micro, context_length=1024, parallel=8)
    yield engine
    engine.close()


def sequence(
    engine: LlamaEngine, name: str, text: str, *, limit: int = 24, owner: str = "a", sampling: SamplingParams = GREEDY, shared: int = 0
) -> Sequence:
    return Sequence(id=name, owner=owner, prompt=engine.tokenize(text, add_bos=True), shared_prefix=shared, sampling=sampling, limit=limit)


def step(engine: LlamaEngine) -> StepResult:
    """Take one step; sequences that are at their limit then leave."""
    ended = []

    def take(item: Sequence, _token: int, _logprob: object) -> bool:
        if len(item.output) >= item.limit:
            ended.append(item.id)
        return len(item.output) < item.limit

    result = engine.step(take)
    for name in ended:
        engine.remove(name)
    return result


def finish(engine: LlamaEngine, *sequences: Sequence) -> list[list[int]]:
    """Run until all are at their limit; returns their outputs."""
    for item in sequences:
        engine.add(item)
    for _ in range(5000):
        if not engine.has_work:
            return [item.output for item in sequences]
        step(engine)
    raise AssertionError("the engine does not come to an end")


def alone(path: Path, text: str, **options: object) -> list[int]:
    """Return what a fresh engine says to this alone."""
    engine = open_engine(path, context_length=1024, parallel=1)
    try:
        return finish(engine, sequence(engine, "x", text, **options))[0]  # type: ignore[arg-type]
    finally:
        engine.close()


def test_a_batch_says_what_each_says_alone(engine: LlamaEngine, micro: Path) -> None:
    texts = [f"{word} " * (3 + i) for i, word in enumerate(WORDS[:8])]
    together = finish(engine, *(sequence(engine, str(i), text, limit=6) for i, text in enumerate(texts)))
    assert together == [alone(micro, text, limit=6) for text in texts]


def test_seeds_and_penalties_hold_in_a_batch(engine: LlamaEngine, micro: Path) -> None:
    samplings = [SamplingParams(temperature=0.9, seed=i, repeat_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2) for i in range(6)]
    together = finish(engine, *(sequence(engine, str(i), "time year", sampling=sampling) for i, sampling in enumerate(samplings)))
    assert together == [alone(micro, "time year", sampling=sampling) for sampling in samplings]
    assert len({tuple(output) for output in together}) > 3


def test_more_sequences_than_slots_all_finish(engine: LlamaEngine) -> None:
    outputs = finish(engine, *(sequence(engine, str(i), WORDS[i % 20], limit=5 + i) for i in range(30)))
    assert [len(output) for output in outputs] == [5 + i for i in range(30)]


def test_a_second_turn_takes_its_prefix_from_the_park(engine: LlamaEngine, micro: Path) -> None:
    text = " ".join(WORDS * 4)
    first = sequence(engine, "1", text)
    finish(engine, first)
    second = sequence(engine, "2", text + " and so on")
    output = finish(engine, second)[0]
    assert second.cached >= len(first.prompt) - 1
    assert output == alone(micro, text + " and so on")


def test_nobody_profits_from_what_another_person_wrote(engine: LlamaEngine) -> None:
    text = " ".join(WORDS * 4)
    finish(engine, sequence(engine, "1", text, owner="a"))
    other = sequence(engine, "2", text, owner="b")
    finish(engine, other)
    assert other.cached == 0


def test_the_system_prompt_is_shared_between_people_and_nothing_else(engine: LlamaEngine) -> None:
    text = " ".join(WORDS * 6)
    n = len(engine.tokenize(" ".join(WORDS * 4), add_bos=True))
    finish(engine, sequence(engine, "1", text, owner="a", shared=n))
    other = sequence(engine, "2", text, owner="b", shared=n)
    finish(engine, other)
    assert 32 <= other.cached <= n


def test_newcomers_wait_for_a_prefix_that_is_being_computed(micro: Path) -> None:
    engine = open_engine(micro, context_length=2048, parallel=8, eval_batch_size=64)
    prefix = " ".join(WORDS * 20)
    items = [sequence(engine, str(i), f"{prefix} {word}", limit=4) for i, word in enumerate(WORDS[:6])]
    prompt_tokens = 0
    for item in items:
        engine.add(item)
    while engine.has_work:
        prompt_tokens += step(engine).prefill_tokens
    assert prompt_tokens < 2 * len(items[0].prompt), "the common prefix is computed once"
    assert [item.output for item in items[1:]] == [alone(micro, f"{prefix} {word}", limit=4) for word in WORDS[1:6]]
    engine.close()


def test_on_a_cpu_prompts_and_answers_take_turns(engine: LlamaEngine, micro: Path) -> None:
    first = sequence(engine, "first", "time", limit=40)
    engine.add(first)
    step(engine)
    long = sequence(engine, "long", " ".join(WORDS * 10), limit=4)
    engine.add(long)
    mixed, turns = 0, []
    while not long.output:
        result = step(engine)
        mixed += bool(result.decode_sequences and result.prefill_tokens)
        turns.append("p" if result.prefill_tokens else "d")
    assert not mixed
    assert "pp" not in "".join(turns)
    assert finish(engine) == []
    assert first.output == alone(micro, "time", limit=40)


def test_a_short_prompt_overtakes_a_long_one(micro: Path) -> None:
    engine = open_engine(micro, context_length=2048, parallel=4, eval_batch_size=64)
    book = sequence(engine, "book", " ".join(WORDS * 40), limit=4)
    engine.add(book)
    step(engine)
    chat = sequence(engine, "chat", "people", limit=4)
    engine.add(chat)
    step(engine)
    assert chat.output
    assert not book.output
    finish(engine)
    assert len(book.output) == 4
    engine.close()


def test_whoever_had_to_go_comes_back_when_those_who_stayed_are_cancelled(micro: Path) -> None:
    engine = open_engine(micro, context_length=1024, parallel=4)
    stays, goes = (sequence(engine, name, f"{name} time", limit=8) for name in ("stays", "goes"))
    engine.add(stays)
    engine.add(goes)
    step(engine)
    engine._make_room(guessed=False)
    engine.remove("stays")
    assert len(finish(engine) or goes.output) == 8
    engine.close()


def test_a_full_cache_preempts_and_loses_nothing(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.memory.EXTRA_CELLS_BYTES", 0)
    monkeypatch.setattr("workers.scheduler.RESERVED_OUTPUT", 0)  # admit too many on purpose
    engine = open_engine(micro, context_length=256, parallel=4)
    texts = [f"{word} " * 40 for word in WORDS[:4]]
    items = [sequence(engine, str(i), text, limit=60) for i, text in enumerate(texts)]
    outputs = finish(engine, *items)
    assert outputs == [alone(micro, text, limit=60) for text in texts]
    engine.close()


def test_a_neighbour_that_is_cancelled_changes_nothing(engine: LlamaEngine, micro: Path) -> None:
    keep, drop = sequence(engine, "keep", "time year people"), sequence(engine, "drop", "way day man", limit=500)
    engine.add(keep)
    engine.add(drop)
    for _ in range(6):
        step(engine)
    engine.remove("drop")
    assert finish(engine)[:0] == []
    assert keep.output[: keep.limit] == alone(micro, "time year people")[: len(keep.output)]


def test_a_resumed_sequence_goes_on_where_it_was(engine: LlamaEngine, micro: Path) -> None:
    sampling = SamplingParams(temperature=0.8, seed=3)
    whole = alone(micro, "time year", sampling=sampling, limit=40)
    resumed = sequence(engine, "r", "time year", sampling=sampling, limit=40)
    resumed.output = whole[:15]
    assert finish(engine, resumed)[0] == whole


def test_logit_bias_forbids_and_forces(engine: LlamaEngine, micro: Path) -> None:
    first = alone(micro, "time year", limit=1)[0]
    banned = SamplingParams(temperature=0.0, repeat_penalty=1.0, seed=1, logit_bias={first: -100.0})
    forced = SamplingParams(temperature=0.0, repeat_penalty=1.0, seed=1, logit_bias={77: 100.0})
    outputs = finish(
        engine, sequence(engine, "b", "time year", sampling=banned, limit=3), sequence(engine, "f", "time year", sampling=forced, limit=3)
    )
    assert first not in outputs[0]
    assert outputs[1] == [77, 77, 77]


@pytest.mark.parametrize(
    "extra", [{"typical_p": 0.5}, {"xtc_probability": 1.0, "xtc_threshold": 0.01}, {"mirostat": 1}, {"mirostat": 2, "mirostat_tau": 2.0}]
)
def test_further_samplers_are_reproducible_and_do_something(engine: LlamaEngine, micro: Path, extra: dict[str, float]) -> None:
    sampling = SamplingParams(temperature=0.9, seed=4, repeat_penalty=1.0, **extra)
    output = finish(engine, sequence(engine, "x", "time year", sampling=sampling))[0]
    assert output == alone(micro, "time year", sampling=sampling)
    assert output != alone(micro, "time year", sampling=SamplingParams(temperature=0.9, seed=4, repeat_penalty=1.0))


def test_dry_breaks_a_repeated_passage(engine: LlamaEngine) -> None:
    outputs = []
    for multiplier in (0.0, 80.0):
        sampling = SamplingParams(temperature=0.0, repeat_penalty=1.0, seed=1, logit_bias={77: 40.0}, dry_multiplier=multiplier)
        outputs.append(finish(engine, sequence(engine, f"d{multiplier}", "time year", sampling=sampling, limit=12))[0])
    assert set(outputs[0]) == {77}
    assert len(set(outputs[1])) > 1


def sliding(engine: LlamaEngine, name: str, *, limit: int = 100, keep: int = 10, sampling: SamplingParams = GREEDY) -> Sequence:
    item = sequence(engine, name, " ".join(WORDS[:12]), limit=limit, sampling=sampling)
    item.window, item.keep = 64, keep
    return item


@pytest.mark.parametrize("keep", [1, 10, 32])
def test_a_window_that_moves_on_shows_the_model_what_it_should(engine: LlamaEngine, micro: Path, keep: int) -> None:
    item = sliding(engine, "w", keep=keep)
    visible, expected = list(item.prompt), []
    while len(expected) < item.limit:  # what plain sequences say that begin with what is in sight
        part = Sequence("p", "b", list(visible), 0, GREEDY, limit=min(65 - len(visible), item.limit - len(expected)))
        expected += finish(engine, part)[0]
        visible += part.output
        del visible[keep : keep + (65 - keep) // 2]
    seen = []
    engine.add(item)
    while engine.has_work:
        seen += [sequence.dropped for sequence in step(engine).slid]
    assert item.output == expected
    assert seen == [(65 - keep) // 2 * (i + 1) for i in range(len(seen))]
    assert len(seen) >= 2


def test_moving_windows_hold_in_a_batch_and_after_an_interruption(micro: Path) -> None:
    engine = open_engine(micro, context_length=1024, parallel=4, **EXACT)
    samplings = [SamplingParams(temperature=0.8, seed=i, repeat_penalty=1.2) for i in range(4)]
    alone_outputs = [finish(engine, sliding(engine, "a", sampling=sampling))[0] for sampling in samplings]
    assert finish(engine, *(sliding(engine, str(i), sampling=sampling) for i, sampling in enumerate(samplings))) == alone_outputs
    for done in (1, 52, 53, 54, 80, 99):
        resumed = sliding(engine, f"r{done}", sampling=samplings[0])
        resumed.output = alone_outputs[0][:done]
        assert finish(engine, resumed)[0] == alone_outputs[0], done
    engine.close()
    engine = open_engine(micro, context_length=1024, parallel=4, prompt_lookup=True, **EXACT)
    assert finish(engine, *(sliding(engine, str(i), sampling=sampling) for i, sampling in enumerate(samplings))) == alone_outputs
    engine.close()


def test_borrowed_cells_stay_in_use_when_their_lender_has_gone() -> None:
    scheduler = Scheduler(slots=4, cells=400, batch_tokens=512, can_share=True, on_cpu=True)
    items = [Sequence(str(i), "a", [*range(100), 1000 + i], 0, GREEDY, limit=1) for i in range(4)]
    lender, first, second, _ = scheduler.slots
    scheduler.occupy(lender, items[0], 101)
    scheduler.occupy(first, items[1], 100, lender=lender)
    scheduler.occupy(second, items[2], 60, lender=lender)
    scheduler.release(lender)
    assert (first.lender, first.borrowed) == (None, 0)
    assert (second.lender, second.borrowed) == (first, 60)
    scheduler.release(first)
    assert (second.lender, second.borrowed) == (None, 0)


def test_who_had_to_go_comes_back_when_the_others_are_cancelled(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.memory.EXTRA_CELLS_BYTES", 0)
    monkeypatch.setattr("workers.scheduler.RESERVED_OUTPUT", 0)
    engine = open_engine(micro, context_length=256, parallel=2)
    first, second = (sequence(engine, str(i), " ".join(WORDS[i : i + 12]), limit=150) for i in range(2))
    engine.add(first)
    engine.add(second)
    while not engine.scheduler.waiting or not second.output:
        step(engine)
    engine.remove("0")
    assert len(finish(engine)) == 0
    assert len(second.output) == 150
    engine.close()


def test_a_sequence_that_just_had_to_go_does_not_come_back_before_others_got_further(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.memory.EXTRA_CELLS_BYTES", 0)
    monkeypatch.setattr("workers.scheduler.RESERVED_OUTPUT", 0)
    engine = open_engine(micro, context_length=256, parallel=4)
    items = [sequence(engine, str(i), " ".join(WORDS[i : i + 12]), limit=100) for i in range(4)]
    for item in items:
        engine.add(item)
    for _ in range(3000):
        if not engine.has_work:
            break
        step(engine)
    assert [len(item.output) for item in items] == [100] * 4
    engine.close()
