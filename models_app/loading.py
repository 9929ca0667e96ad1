"""The writers of models in memory: what a load would take and displace, loading, unloading, pinning.

Rows first, then the message to the node; how the node goes on is in ``workers.loader``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import Count, Q
from django.db.models.functions import Coalesce
from django.utils import timezone

from lmweb.access import Action, Principal, require
from lmweb.errors import Conflict, InvalidRequest, ModelLoadFailed, ServiceUnavailable, error_class
from models_app import naming, routing
from models_app.defaults import check_against_file, load_config, set_load_defaults
from models_app.drafts import check_draft, draft_file
from models_app.memory import estimate_model
from models_app.models import Generation, InstalledModel, ModelInstance
from workers import dispatch, router
from workers.memory import Guardrail, MemoryEstimate, Resident, choose_leavers, reserve
from workers.models import WorkerNode
from workers.router import Node, Refuse, Wanted
from workers.schemas import LoadConfig

logger = logging.getLogger(__name__)

S = ModelInstance.Status


@dataclass(frozen=True, slots=True)
class Leaver:
    """A model that would be unloaded for another one: what that frees, and who waits meanwhile."""

    instance: ModelInstance
    memory_bytes: int
    running: int
    queued: int


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load would take on which node. ``available_bytes`` is what the guardrail leaves of ``free_bytes``, of ``total_bytes``.

    ``fits``: it can be loaded now. ``swap``: after ``leavers`` were unloaded. ``too_large``: not even then. ``unknown``: memory of a
    GPU, which only the engine knows.
    """

    node: WorkerNode
    estimate: MemoryEstimate
    total_bytes: int
    free_bytes: int
    available_bytes: int
    verdict: Literal["fits", "swap", "too_large", "unknown"]
    leavers: list[Leaver]


def plan_load(*, principal: Principal | None, model: InstalledModel, config: LoadConfig, node: str | None = None) -> LoadPlan:
    """Return what loading would take, against the memory that is free now, and who would have to leave for it.

    ``node`` None takes the one that suits it best. Raises ``PermissionDenied``, ``InvalidRequest``, ``InvalidModelFile`` for a file
    that is gone or broken, ``Conflict`` for a node that loads nothing, and ``ServiceUnavailable`` when none does.
    """
    if principal:
        require(principal, Action.LOAD_MODELS)
    config = check_against_file(model, config)
    weights = model.base or model
    row = _node_for(model, _estimate(weights, config, on_gpu=False).needed_bytes, node)
    found = _estimate(weights, config, on_gpu=row.has_gpu)
    instances = list(row.instances.select_related("model").exclude(status=S.FAILED))
    held = sum(instance.memory_bytes or 0 for instance in instances)
    free, total = routing.within_limit(row.free_memory_bytes, row.total_memory_bytes, held)
    level = Guardrail(settings.MODEL_LOADING_GUARDRAILS)
    unlimited = level is Guardrail.OFF and not settings.MODEL_MEMORY_BYTES
    available = max(0, free - reserve(level, total))
    if found.gpu_bytes:
        return LoadPlan(row, found, total, free, available, "unknown", [])
    missing = found.needed_bytes - available
    if unlimited or missing <= 0:
        return LoadPlan(row, found, total, free, available, "fits", [])
    leavers = _leavers(instances, missing)
    return LoadPlan(row, found, total, free, available, "swap" if leavers else "too_large", leavers)


def _estimate(weights: InstalledModel, config: LoadConfig, *, on_gpu: bool) -> MemoryEstimate:
    """Return what a load takes, with its draft model."""
    found = estimate_model(weights, config, on_gpu=on_gpu)
    draft = draft_file(config.draft_model)
    return replace(found, draft_bytes=draft.needed_bytes) if draft else found


def _node_for(model: InstalledModel, needed_bytes: int, name: str | None) -> WorkerNode:
    """Return the node of this name, or else the one that suits a load best; see ``plan_load`` for the errors."""
    nodes = routing.look()
    if name is not None:
        _check_node(nodes, name)
        return WorkerNode.objects.get(pk=name)
    wanted = Wanted(model=model.base_id or model.pk, name=model.key, format=model.format)
    chosen = router.load_further(list(nodes.values()), wanted, needed_bytes)
    if isinstance(chosen, Refuse) and not chosen.node:
        raise ServiceUnavailable(chosen.reason)
    return WorkerNode.objects.get(pk=chosen.node)


def _check_node(nodes: Mapping[str, Node], name: str) -> None:
    """Raise ``Conflict`` unless a person can have something loaded on the node of this name."""
    loading = sorted(node.name for node in nodes.values() if node.may_load)
    if name in loading:
        return
    others = f" These do: {', '.join(loading)}." if loading else ""
    if name in nodes:
        raise Conflict(f"The worker '{name}' is being taken out of service and loads nothing new.{others}", param="node")
    raise Conflict(f"No worker of the name '{name[:100]}' is running.{others}", param="node")


def loading_nodes() -> list[str]:
    """Return the names of the nodes that load models at present."""
    return sorted(node.name for node in routing.look().values() if node.may_load)


def _leavers(instances: list[ModelInstance], missing_bytes: int) -> list[Leaver]:
    """Return whom to unload for so many bytes; nobody if that would not do. What is pinned or not ready stays."""
    movable = {instance.pk: instance for instance in instances if instance.status == S.READY and not instance.pinned}
    work = work_of(movable.values())
    now = timezone.now()
    residents = [
        Resident(pk, instance.memory_bytes or 0, any(work[pk]), (now - instance.last_used_at).total_seconds())
        for pk, instance in movable.items()
    ]
    chosen = choose_leavers(missing_bytes, residents) or []
    return [Leaver(movable[each.id], each.memory_bytes, *work[each.id]) for each in chosen]


def work_of(instances: Iterable[ModelInstance]) -> dict[int, tuple[int, int]]:
    """Return how many requests run on each instance, and how many wait for it; those of one model on one node share them."""
    instances = list(instances)
    weights = Coalesce("model__base", "model")
    counts = Generation.objects.unfinished().annotate(weights=weights).filter(weights__in={i.model_id for i in instances})
    running = Count("pk", filter=Q(status=Generation.Status.RUNNING))
    queued = Count("pk", filter=Q(status=Generation.Status.QUEUED))
    counted = counts.values_list("weights", "node").annotate(running=running, queued=queued)
    work = {(model_id, node): (running, queued) for model_id, node, running, queued in counted}
    return {instance.pk: work.get((instance.model_id, instance.node_id), (0, 0)) for instance in instances}


def request_load(
    *,
    principal: Principal | None,
    model: InstalledModel,
    config: LoadConfig | None = None,
    identifier: str | None = None,
    ttl_seconds: int | None = None,
    make_room: bool = False,
    remember: bool = False,
    node: str | None = None,
) -> ModelInstance:
    """Have a model loaded. On a further node it has the same name there, and requests spread over both. Returns the row at once; its status tells how it goes on.

    Args:
        principal: who asks; None for the administrator at the command line.
        model: what to load.
        config: how; None takes the model's defaults.
        identifier: the name for requests; None takes the model's key, for a further instance on the same node with a number.
        ttl_seconds: it leaves memory after so long without use; None: never.
        make_room: have models unloaded for it, as ``plan_load`` shows, once they have finished their answers. If the load fails,
            they come back.
        remember: make ``config`` the model's default.
        node: where; None takes the node that suits it best.

    Raises:
        PermissionDenied, InvalidRequest, Conflict: for an identifier in use, a file that is missing, or a node that loads nothing.
        ServiceUnavailable: no worker loads anything.
    """
    if principal:
        require(principal, Action.LOAD_MODELS)
    config = check_against_file(model, config or load_config(model))
    if config.draft_model:
        config = msgspec.structs.replace(config, draft_model=check_draft(principal, model, config.draft_model).key)
    if not model.file.is_file():
        raise Conflict(f"The file of {model.key} is missing on the server ({model.path}). Import it again.")
    if ttl_seconds is not None and ttl_seconds < 1:
        raise InvalidRequest("The time to live is at least one second.", param="ttl")
    name = naming.check_identifier(identifier) if identifier else None
    if remember:
        set_load_defaults(principal=principal, model=model, config=config)
    weights = model.base or model  # a virtual model shares those of its base
    if make_room:
        plan = plan_load(principal=principal, model=model, config=config, node=node)
        chosen, replaces = plan.node, [leaver.instance.pk for leaver in plan.leavers]
    else:
        chosen, replaces = _node_for(model, routing.needed_bytes(model, config), node), []
    try:
        with transaction.atomic():
            instance = ModelInstance.objects.create(
                identifier=_take_identifier(name, model, chosen),
                model=weights,
                node=chosen,
                config=msgspec.to_builtins(config),
                ttl_seconds=ttl_seconds,
                replaces=replaces,
            )
            transaction.on_commit(lambda: _send(dispatch.LOAD, instance))
    except IntegrityError:
        raise Conflict(f"'{name or model.key}' was loaded by somebody else at this moment. Try again.", param="identifier") from None
    routing.forget()
    return instance


def loading_state(instance: ModelInstance) -> ModelInstance:
    """Return the row of a load as it is now. Raises the error that the load ended with: a ``ModelLoadFailed`` or one of its kind."""
    now = ModelInstance.objects.select_related("model").filter(pk=instance.pk).first()
    if now is None or now.status == S.UNLOADING:
        raise ModelLoadFailed(f"{instance.identifier} was unloaded while it was being loaded.")
    if now.status == S.FAILED:
        raise _load_error(now)
    return now


def _load_error(instance: ModelInstance) -> ModelLoadFailed:
    kind = error_class(instance.error_code)
    if issubclass(kind, ModelLoadFailed) and kind is not ModelLoadFailed:  # it names the model by itself
        return kind(instance.error, details=instance.error_details)
    return ModelLoadFailed(f"{instance.identifier} could not be loaded: {instance.error}", details=instance.error_details)


def _take_identifier(name: str | None, model: InstalledModel, node: WorkerNode) -> str:
    """Return the name of a new instance: free on its node, and of no other model elsewhere; failed attempts make room.

    Raises ``Conflict`` if requests could not tell it from another.
    """
    ModelInstance.objects.filter(identifier=name or model.key, status=S.FAILED, node=node).delete()
    in_the_way = ModelInstance.objects.filter(Q(node=node) | ~Q(model=model.base_id or model.pk))
    taken = dict(in_the_way.values_list("identifier", "status"))
    if name is None:
        return naming.free_identifier(model.key, set(taken))
    if name in taken:
        state = "is loaded already" if taken[name] == S.READY else f"is {taken[name]} already"
        raise Conflict(f"'{name}' {state}. Unload it first, or choose another identifier.", param="identifier")
    if InstalledModel.objects.filter(key__iexact=name).exclude(pk=model.pk).exists():
        raise Conflict(f"'{name}' is the name of another model. Choose another identifier.", param="identifier")
    return name


def request_unload(*, principal: Principal | None, instance: ModelInstance) -> None:
    """Have a loaded model unloaded; its row disappears when its process has ended. Raises ``PermissionDenied``."""
    if principal:
        require(principal, Action.LOAD_MODELS)
    unload(instance)


def unload(instance: ModelInstance) -> None:
    """Ask the node to unload. Where no process can be left (a failed attempt, a dead node) the row goes at once."""
    rows = ModelInstance.objects.filter(pk=instance.pk)
    if instance.status == S.FAILED or not WorkerNode.objects.alive().filter(pk=instance.node_id).exists():
        rows.delete()
        return
    rows.update(status=S.UNLOADING)
    transaction.on_commit(lambda: _send(dispatch.UNLOAD, instance))


def set_pinned(*, principal: Principal | None, instance: ModelInstance, pinned: bool) -> None:
    """Keep a loaded model in memory until a person unloads it, or let it leave again. Raises ``PermissionDenied``."""
    if principal:
        require(principal, Action.CHANGE_DEFAULTS)
    ModelInstance.objects.filter(pk=instance.pk).update(pinned=pinned)


def _send(task: str, instance: ModelInstance) -> None:
    if not dispatch.send(task, instance.node_id, instance.pk):
        logger.warning("%s of %s waits until the message broker is back", task, instance)
