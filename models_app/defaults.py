"""What a model does unless somebody says otherwise: per-model defaults for loads and for answers, set by admins, with a way back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from lmweb.access import Action, Principal, require
from lmweb.decoding import convert
from lmweb.errors import InvalidRequest
from models_app.memory import read_shape
from models_app.models import InstalledModel
from workers.engines import registry
from workers.schemas import AnyRequest, ChatMessage, GenerationRequest, LoadConfig, SamplingParams

T = TypeVar("T")

MAX_SYSTEM_PROMPT = 100_000

_SIGNS = {"<=": "at most", "<": "less than", ">=": "at least", ">": "more than"}


class InferenceDefaults(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """Defaults of answers: overrides of ``SamplingParams``, a system prompt for conversations without one, template variables.

    ``custom_fields`` are the values of a virtual model's switches, by their keys.
    """

    sampling: dict[str, Any] = {}
    system_prompt: Annotated[str, Meta(max_length=MAX_SYSTEM_PROMPT)] = ""
    template_kwargs: dict[str, Any] = {}
    custom_fields: dict[str, Any] = {}


def load_config(model: InstalledModel, overrides: Mapping[str, Any] | None = None) -> LoadConfig:
    """Return how a model is loaded: its defaults with these overrides. Raises ``InvalidRequest`` that names the field."""
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    return check_config(model, _convert({**model.load_defaults, **given}, LoadConfig))


def check_config(model: InstalledModel, config: LoadConfig) -> LoadConfig:
    """Return a configuration that the model can have. Raises ``InvalidRequest`` that names the field."""
    if config.context_length is not None and config.context_length > model.max_context_length:
        raise InvalidRequest(
            f"{model.key} was made for at most {model.max_context_length} tokens of context, not {config.context_length}.",
            param="context_length",
        )
    registry.card_of(model.format).check(config)
    if config.v_cache_type not in {"f16", "f32"} and config.flash_attention is False:
        raise InvalidRequest("Values of the cache below 16 bits need flash attention.", param="v_cache_type")
    return config


def check_against_file(model: InstalledModel, config: LoadConfig) -> LoadConfig:
    """Return a configuration that somebody asks for, and that the model in its file can have. Raises ``InvalidRequest`` that names the field.

    What is stored is not checked like this where it is only shown: the file may be another one by now, and the page is where to mend it.
    """
    config = check_config(model, config)
    if config.num_experts is not None and model.file.is_file():
        there = read_shape(model.file).experts
        if config.num_experts > there:
            reason = f"has {there} experts, not {config.num_experts}" if there else "is no mixture of experts"
            raise InvalidRequest(f"{model.key} {reason}.", param="num_experts")
    return config


def set_load_defaults(*, principal: Principal | None, model: InstalledModel, config: LoadConfig | None) -> None:
    """Load a model like this from now on, wherever it is loaded; None goes back to the installation's defaults.

    ``principal`` None stands for the administrator at the command line. Raises ``PermissionDenied`` or ``InvalidRequest``.
    """
    if principal:
        require(principal, Action.CHANGE_DEFAULTS)
    model.load_defaults = msgspec.to_builtins(check_against_file(model, config)) if config else {}
    InstalledModel.objects.filter(pk=model.pk).update(load_defaults=model.load_defaults)


def set_inference_defaults(*, principal: Principal | None, model: InstalledModel, defaults: InferenceDefaults | None) -> None:
    """Let a model answer like this from now on, where a request does not say otherwise; None goes back to the usual.

    Raises ``PermissionDenied``, or ``InvalidRequest`` that names the field.
    """
    if principal:
        require(principal, Action.CHANGE_DEFAULTS)
    if defaults is not None:
        if "\x00" in defaults.system_prompt:
            raise InvalidRequest("The system prompt contains a NUL character.", param="system_prompt")
        check_sampling(defaults.sampling)
    model.inference_defaults = msgspec.to_builtins(defaults) if defaults else {}
    InstalledModel.objects.filter(pk=model.pk).update(inference_defaults=model.inference_defaults)


def check_sampling(overrides: Mapping[str, Any]) -> None:
    """Raise ``InvalidRequest`` that names the field unless these are overrides of ``SamplingParams``."""
    for name, value in overrides.items():
        if name not in SamplingParams.__struct_fields__:
            raise InvalidRequest(f"There is no setting '{name[:100]}'.", param=name[:100])
        _convert({name: value}, SamplingParams)


def with_defaults(request: AnyRequest, model: InstalledModel) -> AnyRequest:
    """Return the request with the model's defaults where its sender said nothing."""
    if isinstance(request, GenerationRequest) and (model.inference_defaults or model.custom_fields):
        defaults = convert(model.inference_defaults, InferenceDefaults)
        missing = {name: value for name, value in defaults.sampling.items() if name not in request.given}
        sampling = convert({**msgspec.to_builtins(request.sampling, str_keys=True), **missing}, SamplingParams, strict=False)
        messages = request.messages
        if defaults.system_prompt.strip() and messages[0].role not in {"system", "developer"}:
            messages = [ChatMessage(role="system", content=defaults.system_prompt), *messages]
        chosen = {**defaults.custom_fields, **request.template_kwargs}
        variables = {**_custom_variables(model, chosen), **defaults.template_kwargs, **request.template_kwargs}
        request = msgspec.structs.replace(request, sampling=sampling, messages=messages, template_kwargs=variables)
    return msgspec.structs.replace(request, given=frozenset()) if isinstance(request, GenerationRequest) and request.given else request


def _custom_variables(model: InstalledModel, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template variables that a virtual model's switches set, as they were chosen or by their defaults."""
    return {
        effect["variable"]: chosen.get(field["key"], field["defaultValue"])
        for field in model.custom_fields
        for effect in field["effects"]
        if effect["type"] == "setJinjaVariable" and effect["variable"]
    }


def _convert(data: Mapping[str, Any], kind: type[T]) -> T:
    try:
        return convert(data, kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`").split("[")[0] or None
        raise InvalidRequest(f"{name or 'A setting'} {_in_words(text)}.", param=name) from None


def _in_words(text: str) -> str:
    """Return what msgspec says is wrong with a value, for people."""
    bound = re.match(r"Expected `\w+` (?P<sign>[<>]=?) (?P<limit>\S+)$", text)
    if bound is None:
        return f"is not right: {text[:1].lower()}{text[1:]}".replace("`", "")
    return f"must be {_SIGNS[bound['sign']]} {bound['limit'].removesuffix('.0')}"
