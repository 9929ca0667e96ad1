"""Simulated machines for ``bench/fleet.py``: what nodes would do with requests and models, as discrete events without a clock.

How requests are placed, and moved when they wait, is given to a ``Fleet``. The product's own are the choice of who leaves memory
(``workers.memory.leavers_for_request``), the turns (``workers.policy.Policy``) and the order of people (``workers.fairness``). What
is simulated is what the product would wait for: loads, prompts, tokens.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workers import router
from workers.fairness import FairShare
from workers.loader import GRACE_SECONDS, MOVE_SECONDS
from workers.memory import AutoEvict, Resident, leavers_for_request
from workers.policy import Policy

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
END_OF_DAY = 1e6


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
    """Return the wait that this share of them stays below, in seconds; not a number if nobody waited for anything."""
    ordered = sorted(waits) or [math.nan]
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
