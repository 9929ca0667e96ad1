"""What every engine has to do, on the same model in its own format: batching must not change results, caches must not leak, a full
cache must not lose anything. In what engines differ is in docs/engines.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmweb.errors import InvalidRequest, ModelLoadFailed
from tests.workers.engines import GREEDY, WORDS, alone, finish, micro_for, open_engine, sequence, sliding, step
from workers.engines import registry
from workers.engines.base import Engine, Logprob, Sequence
from workers.engines.card import Feature
from workers.schemas import OutputFormat, SamplingParams


@pytest.fixture(scope="module", params=list(registry.CARDS))
def kind(request: pytest.FixtureRequest) -> str:
    """Return the name of an engine."""
    return str(request.param)


@pytest.fixture(scope="module")
def micro(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_for(kind, tmp_path_factory.mktemp("engine"))


@pytest.fixture(params=[None, True], ids=["", "unified"])
def engine(kind: str, micro: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Return an engine whose sequences have caches of their own where it can, and one whose sequences share."""
    engine = open_engine(kind, micro, context_length=1024, parallel=8, unified_kv_cache=request.param)
    yield engine
    engine.close()


def test_a_batch_says_what_each_says_alone(engine: Engine, kind: str, micro: Path) -> None:
    texts = [f"{word} " * (3 + i) for i, word in enumerate(WORDS[:8])]
    together = finish(engine, *(sequence(engine, str(i), text, limit=6) for i, text in enumerate(texts)))
    assert together == [alone(kind, micro, text, limit=6) for text in texts]


def test_seeds_and_penalties_hold_in_a_batch(engine: Engine, kind: str, micro: Path) -> None:
    samplings = [SamplingParams(temperature=0.9, seed=i, repeat_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2) for i in range(6)]
    together = finish(engine, *(sequence(engine, str(i), "time year", sampling=sampling) for i, sampling in enumerate(samplings)))
    assert together == [alone(kind, micro, "time year", sampling=sampling) for sampling in samplings]
    assert len({tuple(output) for output in together}) > 3


def test_more_sequences_than_slots_all_finish(engine: Engine) -> None:
    outputs = finish(engine, *(sequence(engine, str(i), WORDS[i % 20], limit=5 + i) for i in range(30)))
    assert [len(output) for output in outputs] == [5 + i for i in range(30)]


def test_a_second_turn_takes_its_prefix_from_the_park(engine: Engine, kind: str, micro: Path) -> None:
    text = " ".join(WORDS * 4)
    first = sequence(engine, "1", text)
    finish(engine, first)
    second = sequence(engine, "2", text + " and so on")
    output = finish(engine, second)[0]
    assert second.cached >= len(first.prompt) - 1
    assert output == alone(kind, micro, text + " and so on")


def test_nobody_profits_from_what_another_person_wrote(engine: Engine) -> None:
    text = " ".join(WORDS * 4)
    finish(engine, sequence(engine, "1", text, owner="a"))
    other = sequence(engine, "2", text, owner="b")
    finish(engine, other)
    assert other.cached == 0


def test_the_system_prompt_is_shared_between_people_and_nothing_else(engine: Engine) -> None:
    text = " ".join(WORDS * 6)
    n = len(engine.tokenize(" ".join(WORDS * 4), add_bos=True))
    finish(engine, sequence(engine, "1", text, owner="a", shared=n))
    other = sequence(engine, "2", text, owner="b", shared=n)
    finish(engine, other)
    assert 32 <= other.cached <= n


def test_newcomers_wait_for_a_prefix_that_is_being_computed(kind: str, micro: Path) -> None:
    engine = open_engine(kind, micro, context_length=2048, parallel=8, eval_batch_size=64)
    prefix = " ".join(WORDS * 20)
    items = [sequence(engine, str(i), f"{prefix} {word}", limit=4) for i, word in enumerate(WORDS[:6])]
    prompt_tokens = 0
    for item in items:
        engine.add(item)
    while engine.has_work:
        prompt_tokens += step(engine).prefill_tokens
    assert prompt_tokens < 2 * len(items[0].prompt), "the common prefix is computed once"
    assert [item.output for item in items[1:]] == [alone(kind, micro, f"{prefix} {word}", limit=4) for word in WORDS[1:6]]
    engine.close()


def test_a_short_prompt_overtakes_a_long_one(kind: str, micro: Path) -> None:
    engine = open_engine(kind, micro, context_length=2048, parallel=4, eval_batch_size=64)
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


def test_a_full_cache_preempts_and_loses_nothing(kind: str, micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.memory.EXTRA_CELLS_BYTES", 0)
    monkeypatch.setattr("workers.scheduler.RESERVED_OUTPUT", 0)  # admit too many on purpose
    engine = open_engine(kind, micro, context_length=256, parallel=4, unified_kv_cache=True)
    texts = [f"{word} " * 40 for word in WORDS[:4]]
    items = [sequence(engine, str(i), text, limit=60) for i, text in enumerate(texts)]
    outputs = finish(engine, *items)
    assert outputs == [alone(kind, micro, text, limit=60) for text in texts]
    engine.close()


def test_a_neighbour_that_is_cancelled_changes_nothing(engine: Engine, kind: str, micro: Path) -> None:
    keep, drop = sequence(engine, "keep", "time year people"), sequence(engine, "drop", "way day man", limit=500)
    engine.add(keep)
    engine.add(drop)
    for _ in range(6):
        step(engine)
    engine.remove("drop")
    assert finish(engine)[:0] == []
    assert keep.output[: keep.limit] == alone(kind, micro, "time year people")[: len(keep.output)]


def test_a_resumed_sequence_goes_on_where_it_was(engine: Engine, kind: str, micro: Path) -> None:
    sampling = SamplingParams(temperature=0.8, seed=3)
    whole = alone(kind, micro, "time year", sampling=sampling, limit=40)
    resumed = sequence(engine, "r", "time year", sampling=sampling, limit=40)
    resumed.output = whole[:15]
    assert finish(engine, resumed)[0] == whole


def test_logit_bias_forbids_and_forces(engine: Engine, kind: str, micro: Path) -> None:
    first = alone(kind, micro, "time year", limit=1)[0]
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
def test_further_samplers_are_reproducible_and_do_something(engine: Engine, kind: str, micro: Path, extra: dict[str, float]) -> None:
    sampling = SamplingParams(temperature=0.9, seed=4, repeat_penalty=1.0, **extra)
    output = finish(engine, sequence(engine, "x", "time year", sampling=sampling))[0]
    assert output == alone(kind, micro, "time year", sampling=sampling)
    assert output != alone(kind, micro, "time year", sampling=SamplingParams(temperature=0.9, seed=4, repeat_penalty=1.0))


@pytest.mark.parametrize("keep", [1, 10, 32])
def test_a_window_that_moves_on_shows_the_model_what_it_should(engine: Engine, kind: str, micro: Path, keep: int) -> None:
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


def test_who_had_to_go_comes_back_when_the_others_are_cancelled(kind: str, micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.memory.EXTRA_CELLS_BYTES", 0)
    monkeypatch.setattr("workers.scheduler.RESERVED_OUTPUT", 0)
    engine = open_engine(kind, micro, context_length=256, parallel=2, unified_kv_cache=True)
    first, second = (sequence(engine, str(i), " ".join(WORDS[i : i + 12]), limit=150) for i in range(2))
    engine.add(first)
    engine.add(second)
    while not engine.scheduler.waiting or not second.output:
        step(engine)
    engine.remove("0")
    assert len(finish(engine)) == 0
    assert len(second.output) == 150
    engine.close()


def test_a_sequence_that_just_had_to_go_does_not_come_back_before_others_got_further(
    kind: str, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.memory.EXTRA_CELLS_BYTES", 0)
    monkeypatch.setattr("workers.scheduler.RESERVED_OUTPUT", 0)
    engine = open_engine(kind, micro, context_length=256, parallel=4, unified_kv_cache=True)
    items = [sequence(engine, str(i), " ".join(WORDS[i : i + 12]), limit=100) for i in range(4)]
    for item in items:
        engine.add(item)
    for _ in range(3000):
        if not engine.has_work:
            break
        step(engine)
    assert [len(item.output) for item in items] == [100] * 4
    engine.close()


def test_log_probabilities_are_those_of_the_model(engine: Engine) -> None:
    seen: list[Logprob] = []
    item = sequence(engine, "l", "time year", sampling=SamplingParams(temperature=0.9, seed=2), limit=5)
    item.top_logprobs = 3
    finish(engine, item, report=lambda _item, logprob: seen.append(logprob))
    assert [entry.token for entry in seen] == item.output
    for entry in seen:
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= values[0] <= 0.0
        assert math.fsum(math.exp(value) for value in values) <= 1.0 + 1e-6


def test_constraints_hold_for_some_sequences_of_a_batch(engine: Engine) -> None:
    wanted = OutputFormat(kind="regex", value="(ja|nein)!{4,8}")
    bound = [sequence(engine, str(i), WORDS[i], sampling=SamplingParams(temperature=1.0, seed=i), limit=40) for i in range(3)]
    for item in bound:
        item.constraint = engine.constraints().make(wanted)
    free = sequence(engine, "free", "time", limit=8)
    ended = []

    def take(item: Sequence, _token: int, _logprob: Logprob | None) -> bool:
        done = item.constraint.is_complete if item.constraint else len(item.output) >= item.limit
        if done:
            ended.append(item.id)
        return not done

    for item in (*bound, free):
        engine.add(item)
    while engine.has_work:
        engine.step(take)
        while ended:
            engine.remove(ended.pop())
    for item in bound:
        text = b"".join(engine.piece(token) for token in item.output if not engine.is_end(token)).decode()
        assert text.startswith(("ja!!!!", "nein!!!!"))
    assert not b"".join(map(engine.piece, free.output)).startswith((b"ja!", b"nein!"))


def test_both_prompts_and_answers_get_on(engine: Engine) -> None:
    first = sequence(engine, "first", "time", limit=200)
    engine.add(first)
    step(engine)
    long = sequence(engine, "long", " ".join(WORDS * 15), limit=4)
    engine.add(long)
    told = []
    while not long.output:
        before = len(first.output)
        told += [done for item, done in step(engine).prefilled if item is long]
        told += [-1] if len(first.output) > before else []
    assert -1 in told, "the answer goes on while the prompt comes in"
    done = [value for value in told if value >= 0]
    assert done == sorted(done)
    assert done[-1] == len(long.prompt)
    finish(engine)


def test_what_an_engine_lacks_it_refuses_with_the_reason(kind: str, micro: Path, engine: Engine) -> None:
    lacks = registry.CARDS[kind].lacks
    options = {
        Feature.DRAFT_MODEL: {"draft_model": "a/b"},
        Feature.PROMPT_LOOKUP: {"prompt_lookup": True},
        Feature.KV_CACHE_TYPES: {"k_cache_type": "q8_0"},
        Feature.OWN_KV_CACHES: {"unified_kv_cache": False},
        Feature.NUM_EXPERTS: {"num_experts": 2},
        Feature.GPU_LAYERS: {"gpu_layers": 3},
        Feature.FLASH_ATTENTION: {"flash_attention": False},
    }
    for feature in lacks.keys() & options.keys():
        with pytest.raises(ModelLoadFailed) as refused:
            open_engine(kind, micro, **options[feature])
        assert refused.value.message.startswith(lacks[feature])
    if Feature.DRAFT_MODEL in lacks:
        with pytest.raises(InvalidRequest, match="guesses"):
            engine.use_draft("a/b", "/nowhere")
    if Feature.EMBEDDINGS in lacks:
        with pytest.raises(InvalidRequest, match="embedding"):
            engine.embedder()
    if Feature.DRY in lacks:
        with pytest.raises(InvalidRequest, match="DRY"):
            engine.add(sequence(engine, "d", "time", sampling=SamplingParams(dry_multiplier=1.0)))
        assert not engine.has_work


def test_the_same_weights_say_the_same_everywhere(tmp_path: Path) -> None:
    """Greedy and drawn, where the engines compute with the same precision."""
    said: dict[str, list[list[int]]] = {}
    further: tuple[dict[str, float], ...] = ({}, {"xtc_probability": 0.5}, {"typical_p": 0.7}, {"mirostat": 1}, {"mirostat": 2})
    for name, card in registry.CARDS.items():
        exact = {} if Feature.KV_CACHE_TYPES in card.lacks else {"k_cache_type": "f32", "v_cache_type": "f32", "flash_attention": False}
        engine = open_engine(name, micro_for(name, tmp_path), context_length=1024, parallel=1, **exact)
        samplings = [GREEDY, *(SamplingParams(temperature=0.8, seed=5, **extra) for extra in further)]  # type: ignore[arg-type]
        said[name] = [finish(engine, sequence(engine, "x", "time year people", sampling=sampling))[0] for sampling in samplings]
        engine.close()
    first, *others = said.values()
    assert all(other == first for other in others)
