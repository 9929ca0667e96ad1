"""Simulates a day of a team with many models on many machines: the router against placement on the machine with the shortest queue.

    .venv/bin/python bench/fleet.py [--hours 24] [--write]

Discrete events, no clock: arrivals are drawn from a seed, and the same ones meet every policy. The router is the product's
(``workers.router``), with the second that a look at the nodes holds. What the machines do is in ``bench/simulation.py``.
``--write`` replaces the section in bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.simulation import GB, Fleet, Machine, Model, Move, Place, Request, Result, percentile  # noqa: E402
from bench.startup import write  # noqa: E402
from workers import router  # noqa: E402
from workers.memory import AutoEvict  # noqa: E402

HEADING = "## A simulated day: 1,000 users, 20 nodes, 30 models"
#: As ``models_app.routing.LOOK_SECONDS``.
LOOK_SECONDS = 1.0
PROGRAMS = 10


# --- policies -----------------------------------------------------------------------------------------------------------


def routed(fleet: Fleet, request: Request) -> str:
    """Place by the product's router, which looks once a second and counts in between."""
    if fleet.now - fleet.looked_at > LOOK_SECONDS:
        _look_again(fleet)
    wanted = router.Wanted(request.model.id, str(request.model.id), chat=request.chat, home=fleet.homes.get(request.chat, ""))
    placement = _route(fleet, request.model, wanted)
    fleet.homes[request.chat] = placement.node
    return placement.node


def rerouted(fleet: Fleet, name: str, requests: list[Request]) -> str:
    """Return where requests that wait for memory on a machine can have it now; empty: nowhere."""
    _look_again(fleet)
    model = requests[0].model
    wanted = router.Wanted(model.id, str(model.id), excluded=frozenset({name}))
    placement = router.place(list(fleet.nodes.values()), wanted, lambda: model.bytes, AutoEvict.NEEDED)
    return "" if isinstance(placement, router.Wait | router.Refuse) else placement.node


def _look_again(fleet: Fleet) -> None:
    fleet.nodes = {name: machine.seen() for name, machine in fleet.machines.items()}
    fleet.looked_at = fleet.now


def _route(fleet: Fleet, model: Model, wanted: router.Wanted) -> router.Placement:
    placement = router.place(list(fleet.nodes.values()), wanted, lambda: model.bytes, AutoEvict.NEEDED)
    fleet.nodes[placement.node] = router.with_request(fleet.nodes[placement.node], placement, wanted, model.bytes)
    return placement


def stay(_fleet: Fleet, _name: str, _requests: list[Request]) -> str:
    """Never send anything elsewhere."""
    return ""


def shortest_queue(fleet: Fleet, request: Request) -> str:
    """Place as requests come, on the machine with the fewest of them among those that are large enough, whatever is in memory."""
    able = [
        machine for machine in fleet.machines.values() if machine.memory - _pinned(machine) >= request.model.bytes or _has(machine, request)
    ]
    return min(able, key=lambda machine: (sum(machine.work().values()), machine.name)).name


def first_fit(fleet: Fleet, request: Request) -> str:
    """Place on the first machine that has the model, else on the first with room for it, else on the first that is large enough."""
    able = [
        machine for machine in fleet.machines.values() if machine.memory - _pinned(machine) >= request.model.bytes or _has(machine, request)
    ]
    having = [machine for machine in able if _has(machine, request) or request.model.id in machine.wishes]
    roomy = [machine for machine in able if machine.free >= request.model.bytes and not machine.wishes]
    return (having or roomy or able)[0].name


def _pinned(machine: Machine) -> int:
    return sum(replica.model.bytes for replica in machine.replicas if replica.pinned)


def _has(machine: Machine, request: Request) -> bool:
    return any(replica.model is request.model for replica in machine.replicas)


# --- the day ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Day:
    """What is simulated. ``busy`` is the number of conversations that a person begins per hour at the busiest time."""

    users: int = 1000
    nodes: int = 20
    models: int = 30
    hours: float = 24.0
    busy: float = 1.5
    seed: int = 1
    begins_at: float = 0.0

    def fleet(self) -> list[Machine]:
        """Return the machines, of different sizes and speeds; the models do not all fit in at once."""
        kinds = [(24, 1.0), (16, 0.8), (16, 1.2), (48, 1.4), (12, 0.6), (24, 1.0), (64, 1.4), (16, 1.2), (12, 0.6), (96, 1.6)]
        chosen = [kinds[number % len(kinds)] for number in range(self.nodes)]
        return [Machine(f"node-{number:02}", gb * GB, speed) for number, (gb, speed) in enumerate(chosen)]

    def catalog(self) -> list[Model]:
        """Return the models: from 1 to 120 GB, the popular ones of the middle; chosen by Zipf's law."""
        sizes = [9, 5, 18, 34, 2, 9, 43, 5, 20, 70, 1, 9, 16, 5, 34, 90, 2, 9, 43, 18, 5, 24, 64, 3, 9, 34, 14, 5, 75, 40]
        chosen = [sizes[number % len(sizes)] for number in range(self.models)]
        return [Model(n, gb * GB, min(110.0, max(9.0, 480 / gb)), 1 / (n + 1)) for n, gb in enumerate(chosen)]

    def arrivals(self, catalog: list[Model]) -> list[Request]:
        """Return the first turns of all conversations: people's by the time of day, and bursts of a few programs."""
        chance = random.Random(self.seed)
        weights = [model.weight for model in catalog]
        found = []
        for number in range(self.users):
            favourites = chance.choices(catalog, weights, k=3)
            activity = chance.lognormvariate(0.0, 0.6)
            for when in self._times(chance, activity * self.busy):
                model = chance.choice(favourites) if chance.random() < 0.7 else chance.choices(catalog, weights)[0]
                found.append(self._conversation(chance, f"person {number}", model, when))
        for number in range(PROGRAMS * self.users // 1000):
            for when in self._times(chance, 0.5):
                model = chance.choices(catalog, weights)[0]
                found += [Request(f"program {number}", model, "", when, 0, 400, chance.randint(50, 200), 1) for _ in range(60)]
        return found

    def _times(self, chance: random.Random, per_hour: float) -> list[float]:
        """Return the seconds at which somebody begins something: a Poisson process, thinned to the shape of a working day."""
        times, now = [], 0.0
        while (now := now + chance.expovariate(per_hour) * 3600) < self.hours * 3600:
            if chance.random() < activity_at(now / 3600 + self.begins_at):
                times.append(now)
        return times

    @staticmethod
    def _conversation(chance: random.Random, owner: str, model: Model, when: float) -> Request:
        turns = [
            (5 + chance.expovariate(1 / 40), chance.randint(10, 300), int(min(2000, chance.lognormvariate(5.5, 0.8))))
            for _ in range(1 + int(chance.expovariate(1 / 3)))
        ]
        (_, prompt, answer), *later = turns
        return Request(owner, model, f"{owner} {when}", when, 0, prompt + chance.choice([0, 0, 200, 2000]), answer, 0, later)


def activity_at(hour: float) -> float:
    """Return how busy people are at an hour of the day, from 0 to 1: two humps around ten and three, little at night."""
    hour %= 24
    return min(1.0, 0.04 + math.exp(-((hour - 10.2) ** 2) / 5) + 0.85 * math.exp(-((hour - 15) ** 2) / 6))


#: name: (place, what waits, fair order of people, longest turn in seconds)
POLICIES: dict[str, tuple[Place, Move, bool, float]] = {
    "shortest queue": (shortest_queue, stay, False, 0.0),
    "first fit": (first_fit, stay, False, 0.0),
    "router": (routed, rerouted, True, 30.0),
}


def simulate(day: Day, policy: str) -> Result:
    """Run a day under a policy. People have loaded the three most popular models on two to four machines each, and pinned them."""
    place, move, fair, turn_seconds = POLICIES[policy]
    catalog = day.catalog()
    fleet = Fleet(day.fleet(), day.arrivals(catalog), place, move, fair=fair, turn_seconds=turn_seconds)
    names = list(fleet.machines)
    for model, count in zip(catalog, (4, 3, 2), strict=False):
        for number in range(count):
            fleet.put(names[(3 * model.id + 4 * number + 1) % len(names)], model)
    return fleet.run()


def table(results: dict[str, Result]) -> list[str]:
    """Return the results as Markdown."""

    def row(name: str, value: Callable[[Result], str]) -> str:
        return f"| {name} | " + " | ".join(value(result) for result in results.values()) + " |"

    return [
        "| | " + " | ".join(results) + " |",
        "|---" * (len(results) + 1) + "|",
        row("answers; never answered", lambda r: f"{len(r.waits) + len(r.program_waits):,}; {r.left}"),
        row("loads; of these swaps (something had to leave)", lambda r: f"{r.loads:,}; {r.swaps:,}"),
        row("people wait for the first token: median", lambda r: f"{percentile(r.waits, 0.5):.2f} s"),
        row("p95; p99; longest", lambda r: "; ".join(f"{percentile(r.waits, share):.1f} s" for share in (0.95, 0.99, 1.0))),
        row("programs: median; longest", lambda r: "; ".join(f"{percentile(r.program_waits, share):.0f} s" for share in (0.5, 1.0))),
        row("fairness", lambda r: f"{r.fairness():.3f}"),
    ]


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="replace the section in RESULTS.md")
    options = parser.parse_args()
    day = Day(hours=options.hours, seed=options.seed)
    began = time.perf_counter()
    results = {name: simulate(day, name) for name in POLICIES}
    took = time.perf_counter() - began
    memory, bytes_ = [machine.memory // GB for machine in day.fleet()], [model.bytes // GB for model in day.catalog()]
    lines = [
        f"A simulation: seed {options.seed}, {options.hours:.0f} h of arrivals in the shape of a working day, popularity of models by Zipf's law.",
        f"{day.users} people, {PROGRAMS} programs that send 60 requests at once, {day.nodes} machines of {min(memory)} to {max(memory)} GB",
        f"({sum(memory)} GB in all), {day.models} models of {min(bytes_)} to {max(bytes_)} GB ({sum(bytes_)} GB in all).",
        "*Shortest queue* takes requests as they come and ignores what is in memory; *first fit* takes the first machine that has the",
        "model, else the first with room. Both serve in the order of arrival. *Router* is the product's code. Fairness is Jain's index of",
        "people's speeds, each relative to having everything to themselves.",
        "",
        *table(results),
    ]
    decision = results["router"].decision_seconds / results["router"].decisions * 1e6
    print("\n".join([*lines, f"({took:.1f} s, {decision:.0f} µs per decision of the router, the description of all nodes included)"]))
    if options.write:
        write(lines, HEADING, "bench/fleet.py")


if __name__ == "__main__":
    main()
