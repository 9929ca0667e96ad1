"""Simulates a day of a team with many models on many machines: the router against placement on the machine with the shortest queue.

    .venv/bin/python bench/fleet.py [--hours 24] [--write]

Discrete events, no clock: arrivals are drawn from a seed, and the same ones meet every policy. The router is the product's
(``workers.router``), with the second that a look at the nodes holds; so are the choice of who leaves memory
(``workers.memory.leavers_for_request``), the turns (``workers.policy.Policy``) and the order of people (``workers.fairness``).
What is simulated is what the product would wait for: loads, prompts, tokens. ``--write`` replaces the section in bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.startup import write  # noqa: E402
from workers import router  # noqa: E402
from workers.fairness import FairShare  # noqa: E402
from workers.loader import GRACE_SECONDS, MOVE_SECONDS  # noqa: E402
from workers.memory import AutoEvict, Resident, leavers_for_request  # noqa: E402
from workers.policy import Policy  # noqa: E402

HEADING = "## A simulated day: 1,000 users, 20 nodes, 30 models"
GB = 1000**3
SLOTS = 16
#: Bytes per second that a model is read with; a load also takes the time to start a process.
DISK_BYTES_PER_SECOND, START_SECONDS = 2 * GB, 2.0
#: Each further answer of a batch slows all of them by this part.
BATCH_COST = 0.06
#: Prompt tokens are computed so many times as fast as answers are written.
PREFILL_FACTOR = 25
#: Conversations whose prefix a replica keeps.
PREFIXES = 200
#: As ``models_app.routing.LOOK_SECONDS``.
LOOK_SECONDS = 1.0
END_OF_DAY = 1e6
PROGRAMS = 10


@dataclass(frozen=True)
class Model:
    """A model: what it takes, how many tokens per second one answer has on a machine of speed 1, how often it is chosen."""

    id: int
    bytes: int
    tokens_per_second: float
    weight: float

    @property
    def load_seconds(self) -> float:
        """Return how long a load takes."""
        return START_SECONDS + self.bytes / DISK_BYTES_PER_SECOND


@dataclass(eq=False)
class Request:
    """One turn of a conversation. ``prefix`` prompt tokens are those of the turns before; ``later`` are the turns to come."""

    owner: str
    model: Model
    chat: str
    submitted_at: float
    prefix: int
    prompt: int
    answer: int
    lane: int
    later: list[tuple[float, int, int]] = field(default_factory=list)
    place: Replica | None = None
    due: float = 0.0
    first_at: float = 0.0


@dataclass(eq=False)
class Replica:
    """A model on a machine. ``progress`` are the tokens that each running answer would have if it had been there from the beginning."""

    id: int
    model: Model
    pinned: bool
    ready: bool = False
    running: list[Request] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    fair: FairShare = field(default_factory=FairShare)
    prefixes: OrderedDict[str, None] = field(default_factory=OrderedDict)
    progress: float = 0.0
    last_used: float = 0.0
    turn_until: float = 0.0
    draining: bool = False


@dataclass(eq=False)
class Machine:
    """A node: what ``workers.host`` and ``workers.loader`` would do, on simulated time."""

    name: str
    memory: int
    speed: float
    replicas: list[Replica] = field(default_factory=list)
    wishes: OrderedDict[int, list[Request]] = field(default_factory=OrderedDict)
    updated: float = 0.0
    disk_free_at: float = 0.0
    version: int = 0
    described: tuple[int, router.Node] | None = None

    @property
    def free(self) -> int:
        """Return the free memory in bytes."""
        return self.memory - sum(replica.model.bytes for replica in self.replicas)

    def work(self) -> Counter[int]:
        """Return the requests here, by model."""
        counts = Counter({replica.model.id: len(replica.running) + len(replica.waiting) for replica in self.replicas})
        counts.update({model: len(requests) for model, requests in self.wishes.items()})
        return counts

    def rate(self, replica: Replica) -> float:
        """Return the tokens per second of each answer of a replica: its batch and the other busy replicas share the machine."""
        busy = sum(bool(other.running) for other in self.replicas)
        return self.speed * replica.model.tokens_per_second / (1 + BATCH_COST * (len(replica.running) - 1)) / busy

    def advance(self, now: float) -> None:
        """Let everything that runs go on until now."""
        for replica in self.replicas:
            if replica.running:
                replica.progress += (now - self.updated) * self.rate(replica)
        self.updated = now

    def seen(self) -> router.Node:
        """Return the node as the database would describe it; times since the last use count from the end of the day."""
        if self.described is None or self.described[0] != self.version:
            replicas = tuple(
                router.Replica(
                    replica.id,
                    replica.model.id,
                    str(replica.model.id),
                    "ready" if replica.ready else "loading",
                    memory_bytes=replica.model.bytes,
                    slots=SLOTS,
                    is_movable=not replica.pinned,
                    unused_seconds=END_OF_DAY - replica.last_used,
                )
                for replica in self.replicas
            )
            self.described = self.version, router.Node(self.name, self.free, replicas=replicas, work=dict(self.work()))
        return self.described[1]


@dataclass
class Result:
    """What came of a run. Waits are seconds to the first token, of people and programs.

    ``alone`` and ``took`` are the seconds of whole answers by person, as they would be alone and as they were.
    """

    waits: list[float] = field(default_factory=list)
    program_waits: list[float] = field(default_factory=list)
    loads: int = 0
    swaps: int = 0
    alone: Counter[str] = field(default_factory=Counter)
    took: Counter[str] = field(default_factory=Counter)
    left: int = 0
    decisions: int = 0
    decision_seconds: float = 0.0

    def fairness(self) -> float:
        """Return Jain's index of the people's speeds, each relative to having the machines alone (Jain, Chiu, Hawe 1984): 1 is equal."""
        speeds = [self.alone[owner] / self.took[owner] for owner in self.took]
        return sum(speeds) ** 2 / (len(speeds) * sum(speed**2 for speed in speeds))


def percentile(waits: list[float], share: float) -> float:
    """Return the wait that this share of them stays below, in seconds."""
    ordered = sorted(waits)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


Place = Callable[["Fleet", Request], str]
Move = Callable[["Fleet", str, list[Request]], str]


class Fleet:
    """The machines, the events to come, and one policy: ``place`` chooses the machine, ``fair`` orders the people."""

    def __init__(
        self, machines: list[Machine], arrivals: list[Request], place: Place, move: Move, *, fair: bool, turn_seconds: float
    ) -> None:
        self.move = move
        self.machines = {machine.name: machine for machine in machines}
        self.place = place
        self.fair = fair
        self.policy = Policy(turn_seconds=turn_seconds)
        self.now = 0.0
        self.result = Result()
        self.nodes: dict[str, router.Node] = {}
        self.looked_at = -math.inf
        self.homes: dict[str, str] = {}
        self._number = 0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        for request in arrivals:
            self.at(request.submitted_at, self._arrive, request)

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        """Have something happen."""
        self._number += 1
        heapq.heappush(self._events, (when, self._number, what, args))

    def put(self, machine: str, model: Model) -> None:
        """Have a model in memory from the beginning, as a person would who pins it."""
        self._number += 1
        self.machines[machine].replicas.append(Replica(self._number, model, pinned=True, ready=True))

    def run(self) -> Result:
        """Let it all happen."""
        while self._events:
            self.now, _, what, args = heapq.heappop(self._events)
            what(*args)
        self.result.left = sum(sum(machine.work().values()) for machine in self.machines.values())
        return self.result

    # --- requests ------------------------------------------------------------------------------------------------------

    def _arrive(self, request: Request) -> None:
        began = time.perf_counter()
        name = self.place(self, request)
        self.result.decision_seconds += time.perf_counter() - began
        self.result.decisions += 1
        machine = self.machines[name]
        machine.advance(self.now)
        self._give(machine, request)
        self._settle(machine)

    def _give(self, machine: Machine, request: Request) -> None:
        """Hand a request to the model on its machine, or let it wait for the load."""
        replica = next((r for r in machine.replicas if r.model is request.model and not r.draining), None)
        if replica is None:
            machine.wishes.setdefault(request.model.id, []).append(request)
        else:
            replica.fair.arrive(request.owner, {other.owner for other in replica.running + replica.waiting})
            replica.waiting.append(request)

    def _settle(self, machine: Machine) -> None:
        """Fill free slots, fulfil wishes, and note when the next answer ends."""
        for replica in machine.replicas:
            while replica.ready and replica.waiting and len(replica.running) < SLOTS:
                self._admit(machine, replica)
        self._fulfil(machine)
        machine.version += 1
        ends = [
            self.now + (min(request.due for request in replica.running) - replica.progress) / machine.rate(replica)
            for replica in machine.replicas
            if replica.running
        ]
        if ends:
            self.at(max(self.now, min(ends)), self._end, machine, machine.version)

    def _admit(self, machine: Machine, replica: Replica) -> None:
        ordered = replica.fair.order(replica.waiting, replica.running, self.now) if self.fair else replica.waiting  # type: ignore[arg-type]
        request: Request = ordered[0]  # type: ignore[assignment]
        replica.waiting.remove(request)
        known = request.chat in replica.prefixes
        tokens = (request.prompt + (0 if known else request.prefix)) / PREFILL_FACTOR
        replica.prefixes[request.chat] = None
        replica.prefixes.move_to_end(request.chat)
        if len(replica.prefixes) > PREFIXES:
            replica.prefixes.popitem(last=False)
        replica.running.append(request)
        replica.last_used = self.now
        request.due = replica.progress + tokens + request.answer
        request.first_at = self.now + tokens / machine.rate(replica)
        request.place = replica

    def _end(self, machine: Machine, version: int) -> None:
        if version != machine.version:
            return
        machine.advance(self.now)
        for replica in machine.replicas:
            for request in [r for r in replica.running if r.due <= replica.progress + 1e-6]:
                replica.running.remove(request)
                replica.last_used = self.now
                self._note(machine, replica, request)
        self._settle(machine)

    def _note(self, machine: Machine, replica: Replica, request: Request) -> None:
        seconds = self.now - request.first_at
        replica.fair.charge(request.owner, seconds / max(1, len(replica.running)))
        wait = request.first_at - request.submitted_at
        if request.lane:
            self.result.program_waits.append(wait)
            return
        self.result.waits.append(wait)
        alone = (request.prompt / PREFILL_FACTOR + request.answer) / request.model.tokens_per_second
        self.result.alone[request.owner] += alone  # type: ignore[assignment]
        self.result.took[request.owner] += self.now - request.submitted_at  # type: ignore[assignment]
        if request.later:
            (think, prompt, answer), *later = request.later
            prefix = request.prefix + request.prompt + request.answer
            turn = Request(request.owner, request.model, request.chat, self.now + think, prefix, prompt, answer, request.lane, later)
            self.at(turn.submitted_at, self._arrive, turn)

    # --- memory --------------------------------------------------------------------------------------------------------

    def _fulfil(self, machine: Machine) -> None:
        """Load what is waited for, in the order of arrival, up to the first that has to wait itself."""
        for replica in machine.replicas:
            replica.draining = False
        while machine.wishes:
            model_id, requests = next(iter(machine.wishes.items()))
            if not requests:
                del machine.wishes[model_id]
                continue
            model = requests[0].model
            leaving = self._leavers(machine, model)
            staying = [r for r in leaving if r.running or r.waiting or self.now < min(r.turn_until, r.last_used + GRACE_SECONDS)]
            if staying:
                for replica in staying:
                    replica.draining = self.now >= replica.turn_until
                    if not replica.running and not replica.waiting:
                        self.at(self.now + GRACE_SECONDS, self._look, machine)
                    elif not replica.draining:
                        self.at(replica.turn_until, self._look, machine)
                self.at(self.now + MOVE_SECONDS, self._move, machine)
                return
            machine.replicas = [replica for replica in machine.replicas if replica not in leaving]
            self._load(machine, model, machine.wishes.pop(model_id), swap=bool(leaving))

    def _move(self, machine: Machine) -> None:
        """Send what waits for memory to where it can be had by now."""
        for model_id, requests in list(machine.wishes.items()):
            if target := self.move(self, machine.name, requests):
                requests[:], moved = [], list(requests)
                other = self.machines[target]
                other.advance(self.now)
                for request in moved:
                    self._give(other, request)
                self._settle(other)
            if not requests:
                machine.wishes.pop(model_id, None)
                machine.described = None

    def _look(self, machine: Machine) -> None:
        machine.advance(self.now)
        self._settle(machine)

    def _leavers(self, machine: Machine, model: Model) -> list[Replica]:
        movable = {r.id: r for r in machine.replicas if not r.pinned and r.ready}
        residents = [Resident(pk, r.model.bytes, bool(r.running or r.waiting), self.now - r.last_used) for pk, r in movable.items()]
        chosen = leavers_for_request(model.bytes - machine.free, residents, AutoEvict.NEEDED)
        if chosen is None:  # loads are under way: what they bring can leave when it has answered
            return [replica for replica in machine.replicas if not replica.pinned]
        return [movable[resident.id] for resident in chosen]

    def _load(self, machine: Machine, model: Model, requests: list[Request], *, swap: bool) -> None:
        self._number += 1
        replica = Replica(self._number, model, pinned=False, waiting=requests, last_used=self.now, turn_until=math.inf)
        for request in requests:
            replica.fair.arrive(request.owner, {other.owner for other in requests})
        machine.replicas.append(replica)
        machine.disk_free_at = max(self.now, machine.disk_free_at) + model.load_seconds
        self.result.loads += 1
        self.result.swaps += swap
        self.at(machine.disk_free_at, self._loaded, machine, replica)

    def _loaded(self, machine: Machine, replica: Replica) -> None:
        machine.advance(self.now)
        replica.ready = True
        replica.last_used = self.now
        replica.turn_until = self.now + self.policy.turn(replica.model.load_seconds)
        self._settle(machine)


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
