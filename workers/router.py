"""Which node takes a request: pure functions of what is known about the nodes. Knows neither the database nor the engines.

In this order: a node that has the model ready, the least busy one, or the one that holds this chat's prefix unless it is clearly
busier; a node that is loading it; then the node where a load can begin soonest: at once rather than after answers or other loads,
without unloading anything rather than in place of idle models.

The node has the last word about its own memory (``workers.runners``): what is known here is up to two seconds old.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from workers.memory import AutoEvict, Resident, leavers_for_request

#: A heartbeat that is older than this says that the node has died.
DEAD_SECONDS = 8.0
#: The node that holds a chat's prefix counts as clearly busier when it has so many of its slots more in use than the least busy one.
CLEARLY_BUSIER_SLOTS = 0.25
CLEARLY_BUSIER_REQUESTS = 2

ReplicaStatus = Literal["waiting", "loading", "ready", "unloading", "failed"]


@dataclass(frozen=True, slots=True)
class Replica:
    """A model in the memory of a node, on its way there, waiting for memory, or one that could not be loaded there lately.

    ``slots`` are the answers that it gives at once. ``is_movable``: it may leave for another one that a request needs.
    """

    id: int
    model: int
    identifier: str
    status: ReplicaStatus
    memory_bytes: int = 0
    slots: int = 16
    is_movable: bool = True
    unused_seconds: float = 0.0
    is_embedding: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A machine that runs models. ``free_bytes`` are those that models may still take, the reserve of the guardrail taken off.

    ``formats`` are those of its engines, empty where that is not known. ``work`` is the number of requests that run or wait there,
    by model.
    """

    name: str
    free_bytes: int
    state: str = "active"
    heartbeat_age_seconds: float = 0.0
    formats: frozenset[str] = frozenset()
    replicas: tuple[Replica, ...] = ()
    work: dict[int, int] = field(default_factory=dict)

    @property
    def is_alive(self) -> bool:
        """Whether its heartbeat is recent."""
        return self.heartbeat_age_seconds <= DEAD_SECONDS

    @property
    def may_serve(self) -> bool:
        """Whether it takes requests for what it has in memory."""
        return self.is_alive and self.state in {"active", "cordoned"}

    @property
    def may_load(self) -> bool:
        """Whether it loads models."""
        return self.is_alive and self.state == "active"

    def waiting_loads(self, besides: int) -> int:
        """Return how many other models are not in memory here although somebody waits for them."""
        here = {replica.model for replica in self.replicas if replica.status in {"ready", "loading"}}
        wanted = {model for model, requests in self.work.items() if requests}
        wanted |= {replica.model for replica in self.replicas if replica.status == "waiting"}
        return len(wanted - here - {besides})

    def replicas_of(self, model: int, *statuses: ReplicaStatus) -> list[Replica]:
        """Return those of a model in one of these states."""
        return [replica for replica in self.replicas if replica.model == model and replica.status in statuses]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request needs: a model (``is_embedding``: one that turns texts into vectors), or the instance of this ``identifier``.

    ``chat`` names the conversation and ``home`` the node that served it last (both empty: none). ``excluded`` are nodes that have
    said that they cannot.
    """

    model: int
    name: str
    format: str = "gguf"
    identifier: str = ""
    chat: str = ""
    home: str = ""
    excluded: frozenset[str] = frozenset()
    is_embedding: bool = False


@dataclass(frozen=True, slots=True)
class Serve:
    """A node has the model in memory or is loading it."""

    node: str


@dataclass(frozen=True, slots=True)
class Load:
    """A node is to load it, and to unload the replicas ``evicting``, which are idle."""

    node: str
    evicting: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """A node is to load it once the replicas ``evicting`` have finished their answers."""

    node: str
    evicting: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """No node can. ``node`` came closest and can say more about its memory; empty: there is none to ask."""

    reason: str
    node: str = ""


Placement = Serve | Load | Wait | Refuse


def place(nodes: Sequence[Node], wanted: Wanted, needed_bytes: Callable[[], int], auto_evict: AutoEvict = AutoEvict.NEEDED) -> Placement:
    """Return where a request goes. ``needed_bytes`` is what a load takes, asked only if there is a choice that depends on it."""
    return serve(nodes, wanted) or load(nodes, wanted, needed_bytes, auto_evict)


# --- in memory ----------------------------------------------------------------------------------------------------------


def serve(nodes: Iterable[Node], wanted: Wanted) -> Serve | None:
    """Return the node that has the model ready, or else one that is loading it; None if no node may be asked."""
    usable = [node for node in nodes if node.may_serve and node.name not in wanted.excluded]
    ready = [node for node in usable if node.replicas_of(wanted.model, "ready")]
    named = [node for node in ready if any(r.identifier == wanted.identifier for r in node.replicas_of(wanted.model, "ready"))]
    loading = [node for node in usable if node.replicas_of(wanted.model, "loading")]
    candidates = named or ready or loading
    return Serve(_least_busy(candidates, wanted).name) if candidates else None


def _least_busy(candidates: list[Node], wanted: Wanted) -> Node:
    if len(candidates) == 1:
        return candidates[0]

    def rank(node: Node) -> tuple[float, int, bytes]:
        return _slots_in_use(node, wanted.model), sum(node.work.values()), _preference(wanted.chat, node.name)

    best = min(candidates, key=rank)
    home = next((node for node in candidates if node.name == wanted.home), None)
    return best if home is None or _is_clearly_busier(home, best, wanted.model) else home


def _slots(node: Node, model: int) -> int:
    return max(1, sum(replica.slots for replica in node.replicas_of(model, "ready", "loading")))


def _slots_in_use(node: Node, model: int) -> float:
    return node.work.get(model, 0) / _slots(node, model)


def _is_clearly_busier(home: Node, best: Node, model: int) -> bool:
    allowed = max(CLEARLY_BUSIER_REQUESTS, CLEARLY_BUSIER_SLOTS * _slots(home, model))
    return home.work.get(model, 0) > _slots_in_use(best, model) * _slots(home, model) + allowed


def _preference(chat: str, node: str) -> bytes:
    """Return where a chat ranks a node, so that several web servers agree without a word (rendezvous hashing, Thaler and Ravishankar 1998)."""
    return hashlib.blake2b(f"{chat}\0{node}".encode(), digest_size=8).digest()


# --- loading ------------------------------------------------------------------------------------------------------------


def load(nodes: Sequence[Node], wanted: Wanted, needed_bytes: Callable[[], int], auto_evict: AutoEvict = AutoEvict.NEEDED) -> Placement:
    """Return the node that loads a model for a request, and which others have to leave it.

    Nodes without an engine for it, or where it failed lately, are asked only if all are like that: they say why. Where nobody has to
    leave, the node with the most free memory takes it, and among equals the least busy one.
    """
    candidates = [node for node in nodes if node.may_load and node.name not in wanted.excluded]
    if not candidates:
        return _refusal(nodes, wanted)
    candidates = [node for node in candidates if _can_run(node, wanted.format)] or candidates
    candidates = [node for node in candidates if not node.replicas_of(wanted.model, "failed")] or candidates
    if len(candidates) == 1:
        return Load(candidates[0].name)
    needed = needed_bytes()
    options = [(option, node) for node in candidates if (option := _option(node, wanted, needed, auto_evict))]
    if not options:
        return _too_large(candidates, wanted, needed)
    return min(options, key=lambda each: _rank(each[0], each[1], wanted))[0]


def load_further(nodes: Sequence[Node], wanted: Wanted, needed_bytes: int) -> Placement:
    """Return where a person's load goes if the person names no node: beside the replicas that are there, if it fits there as it is."""
    has_it = {node.name for node in nodes if node.replicas_of(wanted.model, "ready", "loading")}
    beside = replace(wanted, excluded=wanted.excluded | has_it)
    roomy = [node for node in nodes if node.free_bytes >= needed_bytes]
    placement = load(roomy, beside, lambda: needed_bytes, AutoEvict.OFF)
    if isinstance(placement, Refuse):
        placement = load(nodes, wanted, lambda: needed_bytes, AutoEvict.OFF)
    return placement


def _can_run(node: Node, format_: str) -> bool:
    return not node.formats or format_ in node.formats


def _option(node: Node, wanted: Wanted, needed: int, auto_evict: AutoEvict) -> Load | Wait | None:
    residents = [
        Resident(r.id, r.memory_bytes, bool(node.work.get(r.model)), r.unused_seconds, r.is_embedding)
        for r in node.replicas
        if r.is_movable and r.status == "ready"
    ]
    leavers = leavers_for_request(needed - node.free_bytes, residents, auto_evict, is_embedding=wanted.is_embedding)
    if leavers is None:
        return None
    ids = tuple(resident.id for resident in leavers)
    if not any(resident.is_busy for resident in leavers):
        return Load(node.name, ids)
    busy = {resident.id for resident in leavers if resident.is_busy}
    names = " and ".join(replica.identifier for replica in node.replicas if replica.id in busy)
    return Wait(node.name, ids, f"{wanted.name} is loaded on {node.name} when {names} has finished.")


def _rank(option: Load | Wait, node: Node, wanted: Wanted) -> tuple[float, ...]:
    """Return what to compare options by: the smaller, the better. First comes what has to happen before the load can begin."""
    leaving = [replica for replica in node.replicas if replica.id in option.evicting]
    answers = sum(node.work.get(replica.model, 0) for replica in leaving)
    shortest_rest = min((replica.unused_seconds for replica in leaving), default=0.0)
    return (
        node.waiting_loads(wanted.model) + (answers > 0),
        not node.work.get(wanted.model),  # requests that wait for it here already need no second load elsewhere
        len(leaving) > 0,
        answers,
        -shortest_rest,
        -node.free_bytes,
        sum(node.work.values()),
        int.from_bytes(_preference(wanted.name, node.name)),
    )


def _refusal(nodes: Iterable[Node], wanted: Wanted) -> Refuse:
    """Return why no node can be asked."""
    alive = [node for node in nodes if node.is_alive]
    if not alive:
        return Refuse("No worker is running. Ask an admin to start one.")
    if not any(node.may_load for node in alive):
        return Refuse(f"No worker has {wanted.name} in memory, and all of them are being taken out of service. Ask an admin.")
    return Refuse(f"None of the workers could load {wanted.name}.")


def _too_large(candidates: list[Node], wanted: Wanted, needed: int) -> Refuse:
    roomiest = max(candidates, key=lambda node: (node.free_bytes + _movable_bytes(node), node.name))
    return Refuse(
        f"{wanted.name} needs about {needed / 1e9:.2f} GB of memory, more than any worker can free: "
        f"{roomiest.name} comes closest, with {max(0, roomiest.free_bytes) / 1e9:.2f} GB free.",
        node=roomiest.name,
    )


def _movable_bytes(node: Node) -> int:
    return sum(replica.memory_bytes for replica in node.replicas if replica.is_movable and replica.status == "ready")


# --- between two looks ---------------------------------------------------------------------------------------------------


def with_request(node: Node, placement: Placement, wanted: Wanted, needed_bytes: int) -> Node:
    """Return the node as it is to be seen once it has this request, until its own word of that arrives."""
    work = {**node.work, wanted.model: node.work.get(wanted.model, 0) + 1}
    if isinstance(placement, Serve):
        return replace(node, work=work)
    evicting = () if isinstance(placement, Refuse) else placement.evicting
    freed = sum(replica.memory_bytes for replica in node.replicas if replica.id in evicting)
    staying = tuple(replica for replica in node.replicas if replica.id not in evicting)
    if isinstance(placement, Load):
        staying += (Replica(0, wanted.model, wanted.name, "loading", needed_bytes),)
    return replace(node, work=work, replicas=staying, free_bytes=node.free_bytes + freed - needed_bytes)
