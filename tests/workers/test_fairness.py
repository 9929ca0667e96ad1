"""Who is next: tables of who waits and who runs in, order out; then the same through a real engine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.micro_models import make_micro
from workers.engines import registry
from workers.engines.base import Sequence
from workers.fairness import AGEING_SECONDS, FairShare, PersonalLimits
from workers.schemas import Lane, LoadConfig, SamplingParams

GREEDY = SamplingParams(temperature=0.0, repeat_penalty=1.0, seed=1)


def item(name: str, owner: str, *, lane: Lane = Lane.API, at: float = 0.0) -> Sequence:
    return Sequence(id=name, owner=owner, prompt=[1], shared_prefix=0, sampling=GREEDY, limit=1, lane=lane, submitted_at=at)


def names(sequences: list[Sequence]) -> str:
    return " ".join(sequence.id for sequence in sequences)


def test_people_take_turns_whatever_one_of_them_queues() -> None:
    waiting = [item(f"a{i}", "a", at=i) for i in range(4)] + [item("b0", "b", at=10), item("c0", "c", at=11)]
    assert names(FairShare().order(waiting, [], now=12)) == "a0 b0 c0 a1 a2 a3"


def test_who_runs_already_comes_after_who_does_not() -> None:
    waiting = [item("a1", "a", at=1), item("b1", "b", at=2)]
    assert names(FairShare().order(waiting, [item("a0", "a")], now=3)) == "b1 a1"


def test_who_used_less_comes_first() -> None:
    fair = FairShare()
    fair.charge("a", 5.0)
    fair.charge("b", 1.0)
    assert names(fair.order([item("a0", "a", at=1), item("b0", "b", at=2)], [], now=3)) == "b0 a0"


def test_time_away_is_no_credit() -> None:
    fair = FairShare()
    fair.arrive("a", [])
    fair.charge("a", 100.0)
    fair.arrive("late", ["a"])
    fair.charge("a", 1.0)
    fair.charge("late", 2.0)
    assert names(fair.order([item("late1", "late", at=1), item("a1", "a", at=2)], [], now=3)) == "a1 late1"


def test_what_else_somebody_wants_does_not_age_past_who_has_nothing() -> None:
    now = 1000.0
    waiting = [item("eighth", "many", at=now - 5 * AGEING_SECONDS), item("only", "one", at=now)]
    running = [item(f"{number}", "many") for number in range(7)]
    assert names(FairShare().order(waiting, running, now=now)) == "only eighth"
    assert names(FairShare().order(waiting, [], now=now)) == "eighth only"


def test_lanes_and_ageing() -> None:
    now = 1000.0
    waiting = [item("batch", "x", lane=Lane.BATCH, at=now), item("api", "y", at=now), item("chat", "z", lane=Lane.INTERACTIVE, at=now)]
    assert names(FairShare().order(waiting, [], now=now)) == "chat api batch"
    old = item("old", "w", lane=Lane.BATCH, at=now - 2 * AGEING_SECONDS - 1)
    assert names(FairShare().order([*waiting, old], [], now=now)) == "old chat api batch"


def test_the_greedy_make_room_and_others_do_not() -> None:
    many = [item(f"a{i}", "a", at=i) for i in range(3)]
    newcomer = item("b", "b", at=9)
    assert FairShare.victim(newcomer, many, now=9) is many[2]
    assert FairShare.victim(newcomer, many[:1], now=9) is None
    assert FairShare.victim(item("a9", "a", at=9), many, now=9) is None
    watched = [item(f"a{i}", "a", lane=Lane.INTERACTIVE, at=i) for i in range(3)]
    assert FairShare.victim(newcomer, watched, now=9) is None, "a program does not interrupt somebody's chat"


def test_a_person_has_only_so_many_at_once() -> None:
    limits = PersonalLimits()
    assert [limits.enter("a", f"a{i}", lane=Lane.API, limit=2) for i in range(4)] == [True, True, False, False]
    assert not limits.enter("a", "chat", lane=Lane.INTERACTIVE, limit=2)
    assert limits.enter("b", "b0", lane=Lane.API, limit=2), "others are not concerned"
    assert {name: hold.position for name, hold in limits.holds().items()} == {"chat": 0, "a2": 1, "a3": 2}
    assert limits.holds()["a2"].eta_seconds is None
    assert limits.leave("a", "a1", seconds=4.0) == ["chat"]
    hold = limits.holds()["a3"]
    assert (hold.position, hold.eta_seconds) == (1, 4.0)
    assert hold.reason == "You have 2 answers running, as many as you may have at once."
    assert limits.leave("a", "a3") == [], "one that is held back may leave too"
    assert limits.leave("a", "chat") == ["a2"]
    assert limits.leave("a", "unknown") == []
    assert limits.leave("a", "a0") == limits.leave("a", "a2") == limits.leave("b", "b0") == []
    assert limits.holds() == limits._people == {}


def test_a_limit_that_is_raised_lets_more_in() -> None:
    limits = PersonalLimits()
    assert [limits.enter("a", f"a{i}", lane=Lane.API, limit=1) for i in range(3)] == [True, False, False]
    assert limits.enter("a", "a3", lane=Lane.API, limit=0)
    assert limits.leave("a", "a3") == ["a1", "a2"]


@pytest.mark.parametrize("slots", [2, 4])
def test_a_newcomer_does_not_wait_for_somebody_elses_long_streams(tmp_path: Path, slots: int) -> None:
    engine = registry.factory("llama.cpp")(
        str(make_micro(tmp_path / "m.gguf")), LoadConfig(cpu_threads=1, context_length=2048, parallel=slots), lambda _f: None
    )
    prompt = engine.tokenize("time year people", add_bos=True)
    long = [Sequence(f"long{i}", "a", list(prompt), 0, GREEDY, limit=300, lane=Lane.API) for i in range(slots + 2)]
    short = Sequence("short", "b", list(prompt), 0, GREEDY, limit=3, lane=Lane.INTERACTIVE, submitted_at=time.perf_counter())

    def take(sequence: Sequence, _token: int, _logprob: object) -> bool:
        return len(sequence.output) < sequence.limit

    for sequence in long:
        engine.add(sequence)
    for _ in range(20):
        engine.step(take)
    engine.add(short)
    for _ in range(6):
        engine.step(take)
    assert len(short.output) >= 3
    engine.remove("short")
    while engine.has_work:
        engine.step(take)
        for sequence in long:
            if len(sequence.output) >= sequence.limit:
                engine.remove(sequence.id)
    assert [len(sequence.output) for sequence in long] == [300] * len(long), "who was interrupted still gets everything"
    assert len({tuple(sequence.output[:20]) for sequence in long}) == 1
    engine.close()
