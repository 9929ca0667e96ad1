"""Which node a request goes to: what the database knows about the nodes, for the rules in ``workers.router``.

One statement describes all nodes, and holds for a second: requests come in bursts, and each query delays a first token. What is
sent out meanwhile is counted here, so that a burst spreads as well.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

from django.conf import settings
from django.db import connection

from lmweb.errors import InvalidModelFile
from models_app.defaults import load_config
from models_app.memory import estimate_model
from models_app.models import InstalledModel
from workers import router
from workers.memory import AutoEvict, Guardrail, reserve
from workers.router import DEAD_SECONDS, Node, Placement, Replica, Wanted
from workers.schemas import AnyRequest, GenerationRequest, LoadConfig

#: How long a node may take to claim what was sent to it before the reaper sends it again.
DISPATCH_SECONDS = 5
#: How long a look at the nodes holds. Heartbeats are older than this, and a node that has died is found out anyway.
LOOK_SECONDS = 1.0
#: A load that failed keeps further requests for this model away from its node for so long.
FAILED_SECONDS = 60
#: Chats whose last node is remembered; a chat that was forgotten goes to the least busy node.
HOMES = 20_000
UNLIMITED_BYTES = 1 << 60

_NODES = """
SELECT n.name, n.state, n.free_memory_bytes, n.total_memory_bytes, n.hardware, n.engines,
       EXTRACT(EPOCH FROM statement_timestamp() - n.heartbeat_at)::float,
       (SELECT json_agg(json_build_object(
            'id', i.id, 'model', i.model_id, 'identifier', i.identifier,
            'status', CASE WHEN i.status = 'loading' AND i.note <> '' THEN 'waiting' ELSE i.status END, 'slots', i.config -> 'parallel',
            'memory_bytes', i.memory_bytes, 'size_bytes', m.size_bytes, 'is_movable', i.jit AND NOT i.pinned,
            'is_embedding', m.type = 'embedding',
            'unused_seconds', EXTRACT(EPOCH FROM statement_timestamp() - i.last_used_at)))
        FROM models_app_modelinstance i JOIN models_app_installedmodel m ON m.id = i.model_id WHERE i.node_id = n.name
        AND NOT (i.status = 'failed' AND i.last_used_at < statement_timestamp() - make_interval(secs => %s))),
       (SELECT json_object_agg(w.model, w.requests) FROM work w WHERE w.node = n.name)
FROM workers_workernode n WHERE n.heartbeat_at > statement_timestamp() - make_interval(secs => %s)
"""
_WORK = """
WITH work AS (
    SELECT g.node, COALESCE(m.base_id, m.id) AS model, count(*) AS requests
    FROM models_app_generation g JOIN models_app_installedmodel m ON m.id = g.model_id
    WHERE g.status IN ('queued', 'running') GROUP BY 1, 2
)
"""

_lock = threading.Lock()
_looked_at = float("-inf")
_nodes: dict[str, Node] = {}
_homes: OrderedDict[bytes, str] = OrderedDict()


def look() -> dict[str, Node]:
    """Return the nodes that live, as the database knows them now."""
    with connection.cursor() as cursor:
        cursor.execute(_WORK + _NODES, [FAILED_SECONDS, DEAD_SECONDS])
        return {row[0]: _node(row) for row in cursor.fetchall()}


def forget() -> None:
    """Look again for the next request: what is known is not true any more."""
    global _looked_at
    with _lock:
        _looked_at = float("-inf")


def route(model: InstalledModel, request: AnyRequest, *, owner: int) -> Placement:
    """Return where a request for this model goes, and count it there."""
    chat = _chat(request, owner)
    with _lock:
        wanted = _wanted(model, request.model, chat=chat.hex(), home=_homes.get(chat, "") if chat else "")
        placement = _place(wanted, model)
        if chat and placement.node:
            _homes[chat] = placement.node
            _homes.move_to_end(chat)
            if len(_homes) > HOMES:
                _homes.popitem(last=False)
        return placement


def reroute(model: InstalledModel, identifier: str, *, excluded: Collection[str] = ()) -> Placement:
    """Return where a request goes whose node is gone, or has said that it cannot (it is ``excluded``), and count it there.

    Nodes where a load of this model has failed lately are left out if any node is, so that no request goes round in circles.
    """
    if excluded:
        forget()  # whoever has failed at this moment counts
    with _lock:
        nodes = _current()
        weights = model.base_id or model.pk
        tried = {node.name for node in nodes.values() if node.replicas_of(weights, "failed")} if excluded else set()
        return _place(_wanted(model, identifier, excluded=frozenset({*excluded, *tried})), model)


def _place(wanted: Wanted, model: InstalledModel) -> Placement:
    """Apply the rules and note what follows from them. Called under the lock."""
    nodes = _current()
    needed = cache(lambda: needed_bytes(model))
    placement = router.place(list(nodes.values()), wanted, needed, AutoEvict(settings.AUTO_EVICT))
    if placement.node:
        nodes[placement.node] = router.with_request(nodes[placement.node], placement, wanted, _known(needed))
    return placement


def _known(needed: Callable[[], int]) -> int:
    """Return what a load takes if that was asked for; where it made no difference it makes none now."""
    return needed() if needed.cache_info().currsize else 0  # type: ignore[attr-defined]


def _current() -> dict[str, Node]:
    global _looked_at, _nodes
    now = time.monotonic()
    if now - _looked_at > LOOK_SECONDS or not _nodes:
        _nodes, _looked_at = look(), now
    return _nodes


def _wanted(model: InstalledModel, identifier: str, **fields: Any) -> Wanted:
    return Wanted(
        model=model.base_id or model.pk,
        name=model.key,
        format=model.format,
        identifier=identifier,
        is_embedding=model.type == InstalledModel.Type.EMBEDDING,
        **fields,
    )


def _chat(request: AnyRequest, owner: int) -> bytes:
    """Return what all requests of a conversation have in common, whichever door they use: who asks, and how it began."""
    if not isinstance(request, GenerationRequest):
        return b""
    digest = hashlib.blake2b(f"{owner}".encode(), digest_size=8)
    for message in request.messages:
        digest.update(f"\0{message.role}\0{message.content}".encode())
        if message.role == "user":
            break
    return digest.digest()


def needed_bytes(model: InstalledModel, config: LoadConfig | None = None) -> int:
    """Return what loading a model takes, with its defaults unless told otherwise; of a file that cannot be read, its size."""
    weights = model.base or model
    try:
        return estimate_model(weights, config or load_config(model)).needed_bytes
    except InvalidModelFile:
        return weights.size_bytes


# --- from rows to the router's nodes -----------------------------------------------------------------------------------------


def _node(row: tuple[Any, ...]) -> Node:
    """Return a row of ``_NODES`` as the router knows it."""
    name, state, free, total, *documents, age, instances, work = row
    hardware, engines, instances, work = map(_json, (*documents, instances, work))
    gpu = hardware.get("gpu_memory_bytes") or 0
    replicas = tuple(_replica(facts, on_gpu=bool(gpu)) for facts in instances or [])
    held = sum(replica.memory_bytes for replica in replicas if replica.status != "failed")
    free, total = (gpu - held, gpu) if gpu else (free, total)
    return Node(
        name=name,
        free_bytes=_available(free, total, held),
        state=state,
        heartbeat_age_seconds=age,
        formats=frozenset(format_ for engine in engines if engine.get("is_installed") for format_ in engine["formats"]),
        replicas=replicas,
        work={int(model): requests for model, requests in (work or {}).items()},
    )


def _replica(facts: dict[str, Any], *, on_gpu: bool) -> Replica:
    """Return one of a node's instances. What it takes of a GPU, or will take, nobody has measured: its weights are the best guess."""
    measured, size = facts.pop("memory_bytes") or 0, facts.pop("size_bytes")
    taken = max(measured, size) if on_gpu or facts["status"] == "loading" else measured
    return Replica(**{**facts, "slots": facts["slots"] or 16}, memory_bytes=taken)


def within_limit(free: int, total: int, held: int) -> tuple[int, int]:
    """Return the free and all memory for models in bytes, where they may take LMWEB_MODEL_MEMORY_MB and have ``held`` of it."""
    limit = settings.MODEL_MEMORY_BYTES
    return (min(free, limit - held), min(total, limit)) if limit else (free, total)


def _available(free: int, total: int, held: int) -> int:
    """Return what models may still take: what the guardrail wants to stay free is taken off."""
    level = Guardrail(settings.MODEL_LOADING_GUARDRAILS)
    if level is Guardrail.OFF and not settings.MODEL_MEMORY_BYTES:
        return UNLIMITED_BYTES
    free, total = within_limit(free, total, held)
    return free - reserve(level, total)


def _json(value: Any) -> Any:
    """Return a JSON column's value; raw cursors give those of the type ``jsonb`` as text."""
    return json.loads(value) if isinstance(value, str) else value
