"""``models``, ``models/load`` and ``models/unload`` of REST v1, field for field as LM Studio documents them."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from django.db.models import Prefetch
from django.http import HttpRequest, HttpResponse

from api.auth import principal_of
from api.body import decode, json_response
from lmweb.access import Action, Principal, require
from lmweb.db import run_db
from lmweb.decoding import convert
from lmweb.errors import ModelNotFound
from models_app.defaults import load_config
from models_app.generations import resolve_model
from models_app.loading import loading_state, request_load, request_unload
from models_app.models import InstalledModel, ModelInstance
from workers.schemas import LoadConfig

POLL_SECONDS = 0.1
#: A worker that is away unloads when it is back; the row says so meanwhile.
UNLOAD_WAIT_SECONDS = 30.0

S = ModelInstance.Status


# --- the wire ---------------------------------------------------------------------------------------------------------


class Quantization(msgspec.Struct, frozen=True):
    """How the weights are stored."""

    name: str
    bits_per_weight: float | None


class Capabilities(msgspec.Struct, frozen=True):
    """What a language model can do."""

    vision: bool
    trained_for_tool_use: bool


class InstanceConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """How an instance is loaded."""

    context_length: int | None = None
    eval_batch_size: int | None = None
    flash_attention: bool | None = None
    num_experts: int | None = None
    offload_kv_cache_to_gpu: bool | None = None


class Instance(msgspec.Struct, frozen=True):
    """A model in memory."""

    id: str
    config: InstanceConfig


class Model(msgspec.Struct, frozen=True):
    """A model on disk."""

    type: str
    publisher: str
    key: str
    display_name: str
    architecture: str
    quantization: Quantization | None
    size_bytes: int
    params_string: str | None
    loaded_instances: list[Instance]
    max_context_length: int
    format: str
    capabilities: Capabilities | msgspec.UnsetType = msgspec.UNSET
    description: str | None = None


class Models(msgspec.Struct, frozen=True):
    """All models."""

    models: list[Model]


class LoadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to load, and how; what is left out takes the model's defaults. ``node`` is ours: on which worker."""

    model: str
    context_length: int | None = None
    eval_batch_size: int | None = None
    flash_attention: bool | None = None
    num_experts: int | None = None
    offload_kv_cache_to_gpu: bool | None = None
    echo_load_config: bool = False
    node: str | None = None


class LoadResponse(msgspec.Struct, frozen=True):
    """The model is in memory."""

    type: str
    instance_id: str
    load_time_seconds: float
    status: str = "loaded"
    load_config: InstanceConfig | msgspec.UnsetType = msgspec.UNSET


class UnloadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to unload."""

    instance_id: str


class UnloadResponse(msgspec.Struct, frozen=True):
    """It is out of memory."""

    instance_id: str


# --- the routes (routes.py says where) -------------------------------------------------------------------------------------------------------


async def list_models(request: HttpRequest) -> HttpResponse:
    """List the models on disk, with their instances in memory."""
    return json_response(await run_db(_models, principal_of(request)))


async def load_model(request: HttpRequest) -> HttpResponse:
    """Load a further instance of a model, and answer when it is there."""
    body = decode(request, LoadRequest)
    instance = await run_db(_begin_load, principal_of(request), body)
    while instance.status == S.LOADING:
        await asyncio.sleep(POLL_SECONDS)
        instance = await run_db(loading_state, instance)
    config = _config(instance.config)
    return json_response(
        LoadResponse(
            type=instance.model.type,
            instance_id=instance.identifier,
            load_time_seconds=round(instance.load_seconds or 0.0, 3),
            load_config=config if body.echo_load_config else msgspec.UNSET,
        )
    )


async def unload_model(request: HttpRequest) -> HttpResponse:
    """Unload an instance, and answer when its memory is free."""
    body = decode(request, UnloadRequest)
    keys = await run_db(_begin_unload, principal_of(request), body.instance_id)
    deadline = asyncio.get_running_loop().time() + UNLOAD_WAIT_SECONDS
    while await run_db(ModelInstance.objects.filter(pk__in=keys).exists) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(POLL_SECONDS)
    return json_response(UnloadResponse(body.instance_id))


def _models(principal: Principal) -> Models:
    require(principal, Action.READ_MODELS)
    ready = Prefetch("instances", ModelInstance.objects.filter(status=S.READY).order_by("identifier"))
    return Models([_model(model) for model in InstalledModel.objects.visible_to(principal).select_related("base").prefetch_related(ready)])


def _begin_load(principal: Principal, body: LoadRequest) -> ModelInstance:
    require(principal, Action.LOAD_MODELS)
    model = InstalledModel.objects.get(pk=resolve_model(principal, body.model).pk)
    overrides = {name: getattr(body, name) for name in InstanceConfig.__struct_fields__}
    return request_load(principal=principal, model=model, config=load_config(model, overrides), node=body.node)


def _begin_unload(principal: Principal, identifier: str) -> list[int]:
    """Unload everything of this name: one instance, or its replicas on several nodes. Returns the rows."""
    require(principal, Action.LOAD_MODELS)
    visible = ModelInstance.objects.filter(model__in=InstalledModel.objects.visible_to(principal))
    instances = [] if "\x00" in identifier else list(visible.filter(identifier=identifier))
    if not instances:
        raise ModelNotFound(f"There is no loaded model '{identifier[:200]}'.", param="instance_id")
    for instance in instances:
        request_unload(principal=principal, instance=instance)
    return [instance.pk for instance in instances]


def _model(model: InstalledModel) -> Model:
    quantization = Quantization(model.quantization, model.bits_per_weight) if model.quantization else None
    can = model.capabilities
    return Model(
        type=model.type,
        publisher=model.publisher,
        key=model.key,
        display_name=model.display_name,
        architecture=model.architecture,
        quantization=quantization,
        size_bytes=model.weights_bytes,
        params_string=model.params_string or None,
        loaded_instances=[Instance(instance.identifier, _config(instance.config)) for instance in model.instances.all()],
        max_context_length=model.max_context_length,
        format=model.format,
        capabilities=Capabilities(vision=bool(can.get("vision")), trained_for_tool_use=bool(can.get("trained_for_tool_use")))
        if model.type == InstalledModel.Type.LLM
        else msgspec.UNSET,
        description=model.description or None,
    )


def _config(config: dict[str, Any]) -> InstanceConfig:
    """Return a stored configuration, which lacks what is at its default, in full."""
    full = convert(config, LoadConfig)
    return InstanceConfig(**{name: getattr(full, name) for name in InstanceConfig.__struct_fields__})
