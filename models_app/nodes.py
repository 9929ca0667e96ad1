"""The machines that run models, as admins see and manage them: join tokens, states, removal. Pages and commands call these.

A state is a wish: the node itself reads it with its next heartbeat and acts (``workers.host``). What waits for a draining node is
sent elsewhere at once; what runs there ends there.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import Count, Prefetch, Q, QuerySet
from django.utils import timezone

from lmweb import tokens
from lmweb.access import Action, Principal, require
from lmweb.errors import Conflict, InvalidRequest, NotFound
from models_app.models import Generation, ModelInstance
from workers.membership import MAX_CLOCK_OFFSET_SECONDS, clock_words
from workers.models import JoinRefusal, NodeToken, RemovedNode, WorkerNode

State = WorkerNode.State

#: A join token is made for a machine that is about to join.
JOIN_LIFETIME = timedelta(days=1)
MIN_SECRET_CHARACTERS = 24


@dataclass(frozen=True, slots=True)
class Node:
    """A node with what it has and does. ``running`` and ``queued`` count requests."""

    row: WorkerNode
    is_alive: bool
    running: int
    queued: int
    instances: list[ModelInstance]

    @property
    def status(self) -> str:
        """Return ``active``, ``cordoned``, ``draining``, ``drained``, ``stopped`` (it said good-bye) or ``lost`` (it did not)."""
        if self.is_alive:
            return "drained" if self.is_drained else self.row.state
        return "stopped" if self.row.heartbeat_at < self.row.started_at else "lost"

    @property
    def is_drained(self) -> bool:
        """Whether a draining node has nothing left: it may be switched off."""
        return self.row.state == State.DRAINING and not self.running and not self.instances

    @property
    def used_bytes(self) -> int:
        """Return what its models take in memory."""
        return sum(instance.memory_bytes or 0 for instance in self.instances)

    @property
    def other_bytes(self) -> int:
        """Return what everything else on the machine takes."""
        return max(0, self.row.total_memory_bytes - self.row.free_memory_bytes - self.used_bytes)

    @property
    def clock_warning(self) -> str:
        """Return what is wrong with its clock, in words; empty if nothing is."""
        offset = self.row.clock_offset_seconds
        return f"Its clock is {clock_words(offset)}." if abs(offset) > MAX_CLOCK_OFFSET_SECONDS else ""


# --- looking ----------------------------------------------------------------------------------------------------------


def overview(principal: Principal | None) -> list[Node]:
    """Return all nodes with their models and work. Raises ``PermissionDenied``."""
    _require(principal)
    alive = set(WorkerNode.objects.alive().values_list("pk", flat=True))
    work = _work()
    models = Prefetch("instances", ModelInstance.objects.exclude(status="failed").select_related("model").order_by("-memory_bytes", "pk"))
    nodes = WorkerNode.objects.prefetch_related(models).order_by("name")
    return [Node(row, row.pk in alive, *work.get(row.pk, (0, 0)), list(row.instances.all())) for row in nodes]


def _work() -> dict[str, tuple[int, int]]:
    """Return how many requests run and wait on each node."""
    counts = Generation.objects.unfinished().exclude(node="").order_by().values("node")
    counted = counts.annotate(
        running=Count("pk", filter=Q(status=Generation.Status.RUNNING)), queued=Count("pk", filter=Q(status=Generation.Status.QUEUED))
    )
    return {entry["node"]: (entry["running"], entry["queued"]) for entry in counted}


def get(principal: Principal | None, name: str) -> Node:
    """Return one node. Raises ``NotFound`` and ``PermissionDenied``."""
    found = next((node for node in overview(principal) if node.row.name == name), None)
    if found is None:
        raise NotFound(f"There is no node '{name[:100]}'.")
    return found


def waiting_without_node(principal: Principal | None) -> int:
    """Return how many requests wait because no node can take them. Raises ``PermissionDenied``."""
    _require(principal)
    return Generation.objects.filter(status=Generation.Status.QUEUED, node="").count()


def refusals(principal: Principal | None) -> QuerySet[JoinRefusal]:
    """Return the machines that were not let in lately, the last first. Raises ``PermissionDenied``."""
    _require(principal)
    return JoinRefusal.objects.filter(refused_at__gt=timezone.now() - timedelta(days=7)).order_by("-refused_at")


# --- states -----------------------------------------------------------------------------------------------------------


def cordon(*, principal: Principal | None, node: Node) -> None:
    """Let a node load nothing new; it goes on serving what it has in memory. Raises ``PermissionDenied``."""
    _set_state(principal, node, State.CORDONED)


def uncordon(*, principal: Principal | None, node: Node) -> None:
    """Let a node do everything again, also after it was drained. Raises ``PermissionDenied``."""
    _set_state(principal, node, State.ACTIVE)


def drain(*, principal: Principal | None, node: Node) -> None:
    """Let a node finish its answers, take no new ones, and unload its models. Raises ``PermissionDenied``.

    What waits for it in the queue goes elsewhere, or waits until a node can take it.
    """
    with transaction.atomic():
        _set_state(principal, node, State.DRAINING)
        waiting = Generation.objects.filter(node=node.row.name, status=Generation.Status.QUEUED)
        waiting.update(node="", lease_until=None)


def _set_state(principal: Principal | None, node: Node, state: str) -> None:
    _require(principal)
    WorkerNode.objects.filter(pk=node.row.pk).update(state=state)


def remove(*, principal: Principal | None, node: Node) -> None:
    """Take a node out of the installation: its worker ends, and the machine needs a new join token to come back.

    Raises ``PermissionDenied``, or ``Conflict`` while it answers (drain it first) and for the server's own machine while that runs.
    """
    _require(principal)
    name = node.row.name
    if node.is_alive and node.row.is_local:
        raise Conflict(f"'{name}' is the server's own machine. It leaves when the server is stopped; cordon or drain it instead.")
    if node.is_alive and node.running:
        what = "an answer" if node.running == 1 else f"{node.running} answers"
        raise Conflict(f"{name} is giving {what} right now. Drain it first; it can be removed when they have ended.")
    with transaction.atomic():
        if not node.row.is_local:
            facts = {"key_digest": node.row.key_digest, "removed_at": timezone.now()}
            RemovedNode.objects.update_or_create(name=name, defaults=facts)
        WorkerNode.objects.filter(pk=node.row.pk).delete()
        Generation.objects.filter(node=name, status=Generation.Status.QUEUED).update(node="", lease_until=None)


def forget_refusal(*, principal: Principal | None, name: str) -> None:
    """Put the word about a refused machine away. Raises ``PermissionDenied``."""
    _require(principal)
    JoinRefusal.objects.filter(pk=name).delete()


# --- join tokens ------------------------------------------------------------------------------------------------------


def join_tokens(principal: Principal | None) -> QuerySet[NodeToken]:
    """Return all join tokens, the newest first. Raises ``PermissionDenied``."""
    _require(principal)
    return NodeToken.objects.annotate(node_count=Count("nodes"))


def create_join_token(*, principal: Principal | None, name: str, lifetime: timedelta | None = JOIN_LIFETIME) -> tuple[NodeToken, str]:
    """Make a join token and return it with its secret, which cannot be shown again. ``lifetime`` None: it does not expire.

    Raises ``PermissionDenied`` and ``InvalidRequest``.
    """
    _require(principal)
    return NodeToken.issue(name=tokens.check_name(name), expires_at=tokens.expiry(lifetime))


def revoke_join_token(*, principal: Principal | None, token_id: str | uuid.UUID) -> NodeToken:
    """Let nobody join with this token any more; who came in with it stays. Raises ``PermissionDenied`` and ``NotFound``."""
    _require(principal)
    return tokens.revoke(NodeToken.objects.all(), token_id)


def accept_token_of_environment() -> None:
    """Accept the join token that the server's own environment names, once: containers that are made together share it.

    Raises ``InvalidRequest`` if it could be guessed.
    """
    secret = settings.NODE_TOKEN
    if not secret:
        return
    if len(secret) < MIN_SECRET_CHARACTERS:
        raise InvalidRequest(f"LMWEB_NODE_TOKEN has {len(secret)} characters; at least {MIN_SECRET_CHARACTERS} are needed.")
    facts = {"name": "From the server's environment", "hint": secret[:4]}
    NodeToken.objects.get_or_create(digest=NodeToken.hash(secret), defaults=facts)


def expires_words(moment: datetime | None) -> str:
    """Return when a token expires, for a table."""
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment else "never"


def _require(principal: Principal | None) -> None:
    """Raise ``PermissionDenied``; None is the administrator at the command line."""
    if principal is not None:
        require(principal, Action.MANAGE_WORKERS)
