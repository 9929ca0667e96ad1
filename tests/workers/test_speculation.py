"""Guessing ahead: it must not change a token, must know when it pays, and must refuse a draft model that speaks otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.make_gguf import PRESETS, Vocabulary, write_model
from lmweb.errors import InvalidRequest
from models_app.models import InstalledModel, ModelInstance
from tests.micro_models import make_micro, starter_vocabulary
from tests.workers.engines import WORDS, finish, sequence
from tests.workers.support import Bench, wait_for
from tests.workers.test_llama_engine import alone, open_engine
from workers.engines.base import Sequence
from workers.engines.llama_cpp import LlamaEngine
from workers.engines.speculation import Chance, Lookup, Speculation, StepTimes, best_length
from workers.schemas import SamplingParams

FEW = dict.fromkeys(range(70, 74), 30.0)  # a text of few different tokens repeats itself
GREEDY = SamplingParams(temperature=0.0, repeat_penalty=1.0, seed=1)
RANDOM = SamplingParams(temperature=0.6, seed=5, logit_bias=FEW)
TEXTS = [" ".join(WORDS[i : i + 6] * 4) for i in range(4)]


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_micro(tmp_path_factory.mktemp("speculation") / "micro.gguf")


@pytest.fixture
def engine(micro: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LlamaEngine]:
    """Return an engine that guesses at every opportunity, whatever it measures."""
    monkeypatch.setattr(StepTimes, "expect", lambda _times, tokens: 1.0 + 0.001 * tokens)
    monkeypatch.setattr(Chance, "value", 0.9)
    engine = open_engine(micro, context_length=1024, parallel=4, prompt_lookup=True)
    yield engine
    engine.close()


def counts(item: Sequence) -> tuple[int, int, int]:
    return item.drafts.accepted, item.drafts.rejected, item.drafts.ignored


# --- whether it pays ----------------------------------------------------------------------------------------------------


def times(**seconds: float) -> StepTimes:
    found = StepTimes()
    for name, value in seconds.items():
        found.note(int(name.removeprefix("t")), value)
    return found


def test_guesses_pay_while_a_step_costs_the_same_for_more_tokens() -> None:
    assert best_length(times(t1=1.0, t9=1.1), 1, [(0.8, 8)], room=8) >= 4


def test_guesses_that_are_mostly_wrong_do_not_pay() -> None:
    assert best_length(times(t1=1.0, t2=1.2, t9=2.6), 1, [(0.1, 8)], room=8) == 0


def test_guesses_do_not_pay_where_every_token_costs_the_same() -> None:
    assert best_length(times(t4=4.0, t8=8.0, t12=12.0), 4, [(0.7, 8)] * 4, room=12) == 0


def test_a_slow_draft_model_does_not_pay() -> None:
    cheap = times(t1=1.0, t9=1.1)
    assert best_length(cheap, 1, [(0.7, 8)], room=8, guess_seconds=0.1) > 0
    assert best_length(cheap, 1, [(0.7, 8)], room=8, guess_seconds=0.9) == 0


def test_nothing_is_guessed_before_a_plain_step_was_measured_and_more_than_fits_never() -> None:
    assert best_length(StepTimes(), 1, [(1.0, 8)], room=8) == 0
    assert best_length(times(t2=1.0), 2, [(1.0, 8)] * 2, room=5) == 2


def test_a_slow_step_now_and_then_does_not_count() -> None:
    found = times(t1=1.0, t2=9.0, t3=9.0, t5=1.2)
    assert [found.expect(n) for n in (1, 2, 3, 4, 5, 9)] == [1.0, 1.2, 1.2, 1.2, 1.2, 1.2]
    found.note(1, 50.0)
    assert found.expect(1) == 1.2
    assert times(t1=1.0, t5=2.0).expect(3) == 1.5
    assert StepTimes().expect(3) == 0.0


def test_chances_follow_what_was_seen() -> None:
    chance = Chance()
    for _ in range(100):
        chance.note(right=0, wrong=1)
    assert chance.value < 0.05
    for _ in range(100):
        chance.note(right=4, wrong=0)
    assert chance.value > 0.9


def test_a_lookup_finds_what_followed_last_time() -> None:
    lookup = Lookup()
    assert lookup.guess([1, 2, 3], 4) == []
    assert lookup.guess([1, 2, 3, 9, 8, 1, 2, 3], 4) == [9, 8, 1, 2]
    assert lookup.guess([1, 2, 3, 9, 8, 1, 2, 3, 7, 1, 2, 3], 2) == [7, 1]


# --- that it changes nothing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0, seed=1, logit_bias=FEW), RANDOM])
def test_lookups_change_no_token(engine: LlamaEngine, micro: Path, sampling: SamplingParams) -> None:
    items = [sequence(engine, str(i), text, limit=60, sampling=sampling) for i, text in enumerate(TEXTS)]
    assert finish(engine, *items) == [alone(micro, text, limit=60, sampling=sampling) for text in TEXTS]
    assert sum(item.drafts.accepted for item in items) > 0
    assert sum(item.drafts.rejected for item in items) > 0
    assert not any(item.drafts.by_draft for item in items)


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM])
@pytest.mark.parametrize("same", [True, False])
def test_a_draft_model_changes_no_token(engine: LlamaEngine, micro: Path, tmp_path: Path, sampling: SamplingParams, same: bool) -> None:
    draft = micro if same else make_micro(tmp_path / "draft.gguf", seed=3, layers=1)
    engine.speculation.lookup = False
    assert engine.use_draft("test/draft", str(draft))
    items = [sequence(engine, str(i), text, limit=40, sampling=sampling) for i, text in enumerate(TEXTS[:3])]
    for item in items:
        item.draft = "test/draft"
    assert finish(engine, *items) == [alone(micro, text, limit=40, sampling=sampling) for text in TEXTS[:3]]
    total = [sum(each) for each in zip(*map(counts, items), strict=True)]
    assert total[0] + total[1] > 0
    if same and sampling is GREEDY:
        assert total[0] > 30
        assert total[1] == 0
        assert all(item.drafts.by_draft for item in items)


def test_a_long_prompt_reaches_the_draft_in_parts(engine: LlamaEngine, micro: Path) -> None:
    engine.speculation.lookup = False
    engine.use_draft("test/draft", str(micro))
    text = " ".join(WORDS * 20)
    item = sequence(engine, "long", text, limit=30)
    item.draft = "test/draft"
    assert len(item.prompt) > 300
    assert finish(engine, item)[0] == alone(micro, text, limit=30)
    assert item.drafts.accepted > 5


def test_a_preempted_sequence_goes_on_with_guesses(micro: Path, monkeypatch: pytest.MonkeyPatch, engine: LlamaEngine) -> None:
    monkeypatch.setattr("workers.memory.EXTRA_CELLS_BYTES", 0)
    monkeypatch.setattr("workers.scheduler.RESERVED_OUTPUT", 0)
    small = open_engine(micro, context_length=256, parallel=4, prompt_lookup=True, unified_kv_cache=True)
    items = [sequence(small, str(i), f"{word} " * 40, limit=60, sampling=RANDOM) for i, word in enumerate(WORDS[:4])]
    assert finish(small, *items) == [alone(micro, f"{word} " * 40, limit=60, sampling=RANDOM) for word in WORDS[:4]]
    assert sum(item.drafts.accepted for item in items) > 0
    small.close()


def test_nothing_is_kept_of_what_has_ended(engine: LlamaEngine, micro: Path) -> None:
    engine.use_draft("test/draft", str(micro))
    items = [sequence(engine, str(i), TEXTS[i % 4], limit=20) for i in range(9)]
    for item in items:
        item.draft = "test/draft"
    finish(engine, *items)
    assert engine.speculation._guessers == {}
    draft = engine.speculation.draft
    assert draft is not None
    assert [seat.owner for seat in draft._seats] == [""] * 4  # type: ignore[attr-defined]


# --- draft models ------------------------------------------------------------------------------------------------------------


def test_a_draft_with_another_vocabulary_is_refused_with_the_reason(engine: LlamaEngine, micro: Path, tmp_path: Path) -> None:
    words = starter_vocabulary()
    other = Vocabulary([*words.tokens[:100], "changed", *words.tokens[101:]], words.types, words.merges, words.fields)
    path = write_model(tmp_path / "other.gguf", PRESETS["micro"], other, name="other", context=512, seed=0)
    with pytest.raises(InvalidRequest, match="token 100 is 'changed'") as refused:
        engine.use_draft("test/other", str(path))
    assert refused.value.param == "draft_model"
    assert engine.speculation.draft is None


def test_a_draft_in_use_is_not_taken_away(engine: LlamaEngine, micro: Path) -> None:
    assert engine.use_draft("test/draft", str(micro))
    item = sequence(engine, "x", "time", limit=4)
    item.draft = "test/draft"
    engine.add(item)
    assert not engine.use_draft("test/another", str(micro))
    finish(engine)
    assert engine.use_draft("test/another", str(micro))


def test_a_draft_switches_itself_off_when_it_is_always_wrong(micro: Path, tmp_path: Path) -> None:
    engine = open_engine(micro, context_length=1024, parallel=1)
    engine.use_draft("test/draft", str(make_micro(tmp_path / "draft.gguf", seed=3, layers=2)))
    item = sequence(engine, "x", "time year", limit=600, sampling=SamplingParams(temperature=1.5, top_k=0, seed=2))
    item.draft = "test/draft"
    finish(engine, item)
    assert sum(counts(item)) < 150
    engine.close()


def test_speculation_is_off_by_default() -> None:
    assert not Speculation(lookup=False).is_on


# --- through a runner process --------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(bench: Bench, tmp_path: Path) -> InstalledModel:
    """Return a model whose draft ``test/draft`` is installed; both have the same weights, so every greedy guess is right."""
    bench.install(make_micro(tmp_path / "draft.gguf"), "test/draft", architecture="qwen2")
    return bench.install(make_micro(tmp_path / "model.gguf"), "test/model", architecture="qwen2")


def test_a_request_may_name_a_draft_model_and_is_told_how_it_did(bench: Bench, pair: InstalledModel) -> None:
    sampling = SamplingParams(temperature=0.0, repeat_penalty=1.0, max_tokens=60)
    plain = bench.run(pair, "time", sampling=sampling)
    assert "total_draft_tokens_count" not in plain.stats
    generation = bench.create(pair, "time", sampling=sampling, draft_model="test/draft")
    bench.host.generate(str(generation.pk))
    drafted = bench.finished(generation)
    assert drafted.content == plain.content
    stats = drafted.stats
    assert stats["draft_model"] == "test/draft"
    assert stats["total_draft_tokens_count"] == sum(stats[f"{name}_draft_tokens_count"] for name in ("accepted", "rejected", "ignored"))


def test_a_model_may_be_loaded_with_a_draft_model(bench: Bench, pair: InstalledModel) -> None:
    config = {"draft_model": "test/draft", "context_length": 512}
    instance = ModelInstance.objects.create(identifier="test/model", model=pair, node_id="test-node", config=config)
    bench.host.load(instance.pk)
    wait_for(lambda: ModelInstance.objects.get(pk=instance.pk).status == "ready")
    assert bench.run(pair, "time", sampling=SamplingParams(max_tokens=4)).stats["draft_model"] == "test/draft"


def test_a_load_whose_draft_does_not_match_fails_with_the_reason(bench: Bench, pair: InstalledModel, tmp_path: Path) -> None:
    words = starter_vocabulary()
    other = Vocabulary([*words.tokens[:100], "changed", *words.tokens[101:]], words.types, words.merges, words.fields)
    path = write_model(tmp_path / "other.gguf", PRESETS["micro"], other, name="other", context=512, seed=0)
    bench.install(path, "test/other", architecture="qwen2")
    instance = ModelInstance.objects.create(
        identifier="test/model", model=pair, node_id="test-node", config={"draft_model": "test/other", "context_length": 512}
    )
    bench.host.load(instance.pk)
    wait_for(lambda: ModelInstance.objects.get(pk=instance.pk).status == "failed")
    assert "token 100 is 'changed'" in ModelInstance.objects.get(pk=instance.pk).error
