"""What only the llama.cpp engine does; what all engines do is in ``test_engines``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.micro_models import make_micro
from tests.workers import engines
from tests.workers.engines import GREEDY, WORDS, finish, sequence, sliding, step
from workers.engines.base import Sequence
from workers.engines.llama_context import Context, ContextSize, Model
from workers.engines.llama_cpp import LlamaEngine
from workers.scheduler import Scheduler
from workers.schemas import SamplingParams

#: Without rounding to 16 bits, batched results differ from single ones so little that sampled outputs of any length agree.
EXACT = {"k_cache_type": "f32", "v_cache_type": "f32", "flash_attention": False}


def open_engine(path: Path, **config: object) -> LlamaEngine:
    engine = engines.open_engine("llama.cpp", path, **config)
    assert isinstance(engine, LlamaEngine)
    return engine


def alone(path: Path, text: str, **options: object) -> list[int]:
    return engines.alone("llama.cpp", path, text, **options)


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an F32 micro model, whose results do not depend on the batch's shape."""
    return make_micro(tmp_path_factory.mktemp("engine") / "micro.gguf")


@pytest.fixture
def engine(micro: Path) -> Iterator[LlamaEngine]:
    engine = open_engine(micro, context_length=1024, parallel=8)
    yield engine
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


def test_with_caches_of_their_own_no_free_slot_lies_between_busy_ones(micro: Path) -> None:
    """llama.cpp computes neighbours in one go, and whatever comes after a gap in another one."""
    engine = open_engine(micro, context_length=1024, parallel=8)
    items = [sequence(engine, str(i), f"{word} " * 40, limit=30) for i, word in enumerate(WORDS[:6])]
    for item in items:
        engine.add(item)
    while not items[-1].output:
        step(engine)
    for name in "024":
        engine.remove(name)
    step(engine)
    assert [slot.id for slot in engine.scheduler.running] == [0, 1, 2]
    finish(engine)
    assert [item.output for item in items[1::2]] == [alone(micro, f"{word} " * 40, limit=30) for word in WORDS[1:6:2]]
    engine.close()


def test_who_takes_over_a_neighbours_prefix_has_cells_of_its_own(micro: Path) -> None:
    engine = open_engine(micro, context_length=1024, parallel=4)
    text = " ".join(WORDS * 4)
    first = sequence(engine, "first", f"{text} time", limit=200)
    engine.add(first)
    while not first.output:
        step(engine)
    second = sequence(engine, "second", f"{text} year", limit=20)
    engine.add(second)
    step(engine)
    assert second.cached >= len(second.prompt) - 8
    engine.remove("first")
    finish(engine)
    assert second.output == alone(micro, f"{text} year", limit=20)
    engine.close()


def test_a_short_prefix_of_a_long_neighbour_is_taken_over_too(micro: Path) -> None:
    """The same instructions before somebody's book and somebody's question."""
    engine = open_engine(micro, context_length=2048, parallel=2)
    opening = " ".join(WORDS * 2)
    n = len(engine.tokenize(opening, add_bos=True))
    book = sequence(engine, "book", f"{opening} {' '.join(WORDS[::-1] * 20)}", limit=50, owner="a", shared=n)
    assert 8 * n < len(book.prompt) < 2000
    engine.add(book)
    while not book.output:
        step(engine)
    question = sequence(engine, "question", f"{opening} child", limit=8, owner="b", shared=n)
    engine.add(question)
    step(engine)
    assert question.cached >= n - 1
    finish(engine)
    assert question.output == alone(micro, f"{opening} child", limit=8)
    engine.close()


def test_dry_breaks_a_repeated_passage(engine: LlamaEngine) -> None:
    outputs = []
    for multiplier in (0.0, 80.0):
        sampling = SamplingParams(temperature=0.0, repeat_penalty=1.0, seed=1, logit_bias={77: 40.0}, dry_multiplier=multiplier)
        outputs.append(finish(engine, sequence(engine, f"d{multiplier}", "time year", sampling=sampling, limit=12))[0])
    assert set(outputs[0]) == {77}
    assert len(set(outputs[1])) > 1


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


def test_short_prompts_take_one_turn_but_a_step_each_and_long_ones_are_cut() -> None:
    scheduler = Scheduler(slots=6, cells=20_000, batch_tokens=512, can_share=True, on_cpu=True)
    lengths = {"stream": 50, "long": 1000, "b": 110, "a": 100, "tiny": 20, "tinier": 10}
    for slot, (name, length) in zip(scheduler.slots, lengths.items(), strict=True):
        item = Sequence(name, "someone", [*range(length)], 0, GREEDY, limit=50)
        if name == "stream":
            item.output = [1]
        scheduler.occupy(slot, item, length if name == "stream" else 0)
    steps = []
    for _ in range(6):
        decoding, chunks = scheduler.plan(256)
        steps.append([(chunk.slot.sequence.id, chunk.end - chunk.start) for chunk in chunks] or len(decoding))
        for chunk in chunks:
            chunk.slot.n_kv = chunk.end
            if chunk.slot.is_decoding or not chunk.slot.remaining:
                chunk.slot.sequence.output.append(1)
                chunk.slot.tokens.append(1)
    assert steps == [[("tinier", 10), ("tiny", 20)], [("a", 100)], [("b", 110)], 5, [("long", 256)], 5]


def a_scheduler(lengths: dict[str, int], *, answering: int) -> Scheduler:
    """Return one on a CPU with caches apart, whose first sequences answer and whose others have prompts of these lengths to compute."""
    scheduler = Scheduler(slots=len(lengths), cells=20_000, batch_tokens=512, can_share=True, on_cpu=True, is_unified=False)
    for index, (slot, (name, length)) in enumerate(zip(scheduler.slots, lengths.items(), strict=True)):
        item = Sequence(name, name, [index, *range(length - 1)], 0, GREEDY, limit=50)
        if index < answering:
            item.output = [1]
        scheduler.occupy(slot, item, length if index < answering else 0)
    return scheduler


def planned(scheduler: Scheduler, budget: int, steps: int) -> list[tuple[str, int] | int]:
    """Compute these steps; returns the prompt and its tokens, or how many answered."""
    done: list[tuple[str, int] | int] = []
    for _ in range(steps):
        decoding, chunks = scheduler.plan(budget)
        done.append((chunks[0].slot.sequence.id, chunks[0].end - chunks[0].start) if chunks else len(decoding))
        for chunk in chunks:
            chunk.slot.n_kv = chunk.end
            if not chunk.slot.remaining:
                chunk.slot.sequence.output.append(1)
                chunk.slot.tokens.append(1)
    return done


def test_while_more_people_wait_for_the_first_token_whole_prompts_go_before_the_next_one() -> None:
    """Few who answer leave a CPU half idle; nobody's answer waits for somebody's book, or once as many answer as wait."""
    scheduler = a_scheduler({"one": 20} | dict.fromkeys("abcdef", 150), answering=1)
    turns = [("a", 64), ("a", 86), 2, ("b", 64), ("b", 86), 3, ("c", 64), ("c", 86), 4, ("d", 64), 4, ("d", 86), 5]
    assert planned(scheduler, 64, len(turns)) == turns
    scheduler = a_scheduler({"one": 20, "book": 2_000, "another": 2_100}, answering=1)
    assert planned(scheduler, 64, 4) == [("book", 64), 1, ("book", 64), 1]


@pytest.mark.parametrize("batch", [32, 64])
def test_a_prompt_goes_on_beside_answers_also_where_a_batch_holds_less_than_a_tile(batch: int) -> None:
    scheduler = a_scheduler({"one": 20, "a": 100}, answering=1)
    scheduler.batch_tokens = batch
    assert planned(scheduler, 64, 3) == [("a", batch), 1, ("a", min(batch, 100 - batch))]


def test_whoever_would_be_computed_later_waits_for_the_rest_of_a_neighbours_prefix() -> None:
    """On a CPU prompts are computed one by one: to begin without its last tokens would compute them twice."""
    scheduler = Scheduler(slots=3, cells=20_000, batch_tokens=512, can_share=True, on_cpu=True, is_unified=False)
    system = [*range(2_000)]
    first, second, brief = (
        Sequence(name, name, system[:shared] + tail, shared, GREEDY, limit=8)
        for name, shared, tail in (("first", 2_000, [7] * 52), ("second", 2_000, [8] * 52), ("brief", 30, [9] * 10))
    )
    scheduler.occupy(scheduler.slots[0], first, 1_984)
    scheduler.enqueue(second)
    assert scheduler.next_admission() is None
    scheduler.slots[0].n_kv = 2_048
    admission = scheduler.next_admission()
    assert admission is not None
    assert admission.n_shared == 2_000
    scheduler.occupy(admission.slot, second, 0)
    scheduler.slots[0].n_kv = 20
    scheduler.enqueue(brief)  # goes before the long ones, so it need not wait for ten more tokens of theirs
    admission = scheduler.next_admission()
    assert admission is not None
    assert admission.n_shared == 20


@pytest.mark.parametrize("is_unified", [True, False])
def test_attention_over_a_prompt_in_tiles_is_that_of_a_few_tokens_at_a_time(micro: Path, is_unified: bool) -> None:
    """From 64 tokens on, llama.cpp has another attention for CPUs, parts of which are ours (``requirements/attention.h``)."""
    model = Model(str(micro), gpu_layers=0, on_progress=lambda _fraction: None)
    context = Context(model, size=ContextSize(1024, 2, 512, 203, is_unified), threads=1, flash_attention=True)
    rng = np.random.default_rng(1)
    tokens = rng.integers(10, model.vocab_size, 203)

    def read(sequence_id: int, chunk: int) -> list[np.ndarray]:
        logits = []
        for start in range(0, len(tokens), chunk):
            n = min(chunk, len(tokens) - start)
            context.tokens[:n] = tokens[start : start + n]
            context.positions[:n] = range(start, start + n)
            context.sequence_ids[:n] = sequence_id
            context.outputs[:n] = 1
            context.decode(n)
            logits += [np.array(context.logits(i)) for i in range(n)]
        return logits

    few, tiles = np.array(read(0, 7)), np.array(read(1, 203))
    assert np.abs(tiles - few).max() < 0.05 * few.std()  # halves are rounded: 0.03
    context.close()
    model.close()
