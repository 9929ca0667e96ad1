"""The simulated team: a short run of it, for what must hold whatever the figures are."""

from __future__ import annotations

import pytest

from bench import fleet
from bench.fleet import Day, simulate
from bench.simulation import Fleet, Machine, Result, percentile

BUSY_MORNING = Day(users=300, hours=1.5, begins_at=9)


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    return {policy: simulate(BUSY_MORNING, policy) for policy in fleet.POLICIES}


def test_every_request_is_answered_whatever_the_policy(results: dict[str, Result]) -> None:
    assert {result.left for result in results.values()} == {0}
    answered = {len(result.waits) + len(result.program_waits) for result in results.values()}
    assert len(answered) == 1
    assert answered.pop() > 1000


def test_the_router_swaps_less_waits_less_and_is_fairer(results: dict[str, Result]) -> None:
    routed = results["router"]
    for name in ("shortest queue", "first fit"):
        naive = results[name]
        assert percentile(routed.waits, 0.95) < percentile(naive.waits, 0.95), name
        assert routed.fairness() > naive.fairness(), name
    assert routed.swaps < results["shortest queue"].swaps / 2


def test_the_same_seed_is_the_same_day(results: dict[str, Result]) -> None:
    again = simulate(BUSY_MORNING, "router")
    assert (again.waits, again.loads, again.took) == (results["router"].waits, results["router"].loads, results["router"].took)


def test_no_machine_holds_more_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    load, least = Fleet._load, []

    def checked(self: Fleet, machine: Machine, *args: object, **fields: object) -> None:
        load(self, machine, *args, **fields)  # type: ignore[arg-type]
        least.append(machine.free)

    monkeypatch.setattr(Fleet, "_load", checked)
    simulate(BUSY_MORNING, "router")
    assert min(least) >= 0
