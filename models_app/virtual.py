"""Virtual models: a ``model.yaml`` gives a model on disk another name, settings of its own, and switches for its chat template.

https://modelyaml.org; LM Studio's field names. A virtual model has a row but no weights: it runs on those of its base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
import yaml
from django.db import IntegrityError, transaction
from msgspec import Meta

from lmweb.access import Action, Principal, require
from lmweb.decoding import convert
from lmweb.errors import Conflict, InvalidRequest
from models_app import naming, placement
from models_app.catalog import SafeLoader
from models_app.defaults import InferenceDefaults, check_against_file, check_sampling, load_config
from models_app.models import InstalledModel
from workers.schemas import RESERVED_TEMPLATE_NAMES

MAX_BYTES: Final = 256 * 1024
FILE_NAME: Final = "model.yaml"

Short = Annotated[str, Meta(max_length=255)]


class Source(msgspec.Struct, frozen=True):
    """Where the files of a base come from."""

    type: str = ""
    user: Short = ""
    repo: Short = ""


class Base(msgspec.Struct, frozen=True):
    """One of the models that a virtual model can run on."""

    key: Short = ""
    sources: Annotated[list[Source], Meta(max_length=50)] = []


class Setting(msgspec.Struct, frozen=True):
    """A setting by LM Studio's key."""

    key: Short
    value: Any = None


class Settings(msgspec.Struct, frozen=True):
    """Settings of loads or answers."""

    fields: Annotated[list[Setting], Meta(max_length=200)] = []


class Config(msgspec.Struct, frozen=True):
    """The settings that a virtual model brings."""

    operation: Settings = Settings()
    load: Settings = Settings()


class Effect(msgspec.Struct, frozen=True):
    """What a custom field does; others than ``setJinjaVariable`` are kept and not applied."""

    type: Short = ""
    variable: Short = ""


class CustomField(msgspec.Struct, frozen=True, rename="camel"):
    """A switch of this model."""

    key: Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
    display_name: Short = ""
    description: Annotated[str, Meta(max_length=1000)] = ""
    type: Literal["boolean", "string", "number", "select"] = "string"
    default_value: bool | int | float | str | None = None
    options: Annotated[list[Any], Meta(max_length=50)] = []
    effects: Annotated[list[Effect], Meta(max_length=20)] = []


class Document(msgspec.Struct, frozen=True, rename="camel"):
    """The parts of a ``model.yaml`` that are used here."""

    model: Short
    base: str | Annotated[list[Base], Meta(max_length=50)]
    metadata_overrides: dict[str, Any] = {}
    config: Config = Config()
    custom_fields: Annotated[list[CustomField], Meta(max_length=50)] = []
    description: Annotated[str, Meta(max_length=2000)] = ""


def _plain(value: Any) -> Any:
    return value


def _checked(value: Any) -> Any:
    """Return the value of a setting that can be switched off: None if it is."""
    return (value.get("value") if value.get("checked") else None) if isinstance(value, dict) else value


def _switched(off: Any) -> Callable[[Any], Any]:
    """Return the reader of a setting whose switched-off state has a value of its own."""

    def read(value: Any) -> Any:
        found = _checked(value)
        return off if found is None else found

    return read


OPERATION: Final[dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "llm.prediction.temperature": ("temperature", _plain),
    "llm.prediction.topKSampling": ("top_k", _plain),
    "llm.prediction.topPSampling": ("top_p", _switched(1.0)),
    "llm.prediction.minPSampling": ("min_p", _switched(0.0)),
    "llm.prediction.repeatPenalty": ("repeat_penalty", _switched(1.0)),
    "llm.prediction.maxPredictedTokens": ("max_tokens", _checked),
    "llm.prediction.stopStrings": ("stop", _plain),
}
LOAD: Final[dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "llm.load.contextLength": ("context_length", _plain),
    "llm.load.numExperts": ("num_experts", lambda value: value or None),
    "llm.load.offloadKVCacheToGpu": ("offload_kv_cache_to_gpu", _plain),
    "llm.load.useUnifiedKvCache": ("unified_kv_cache", _plain),
    "llm.load.numParallelSessions": ("parallel", _plain),
    "llm.load.llama.evalBatchSize": ("eval_batch_size", _plain),
    "llm.load.llama.flashAttention": ("flash_attention", _plain),
    "llm.load.llama.cpuThreadPoolSize": ("cpu_threads", _plain),
    "llm.load.llama.kCacheQuantizationType": ("k_cache_type", _checked),
    "llm.load.llama.vCacheQuantizationType": ("v_cache_type", _checked),
}


def parse(text: str) -> Document:
    """Return the document of a ``model.yaml``. Raises ``InvalidRequest`` that says what is wrong."""
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise InvalidRequest(f"The file is larger than {MAX_BYTES // 1024} KiB.", param="file")
    try:
        data = yaml.load(text, Loader=SafeLoader)  # noqa: S506  (a SafeLoader)
        document = convert(data, Document)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        what = str(error).splitlines()[0] if isinstance(error, msgspec.ValidationError) else "it is not valid YAML"
        raise InvalidRequest(f"This is no model.yaml: {what[:300]}.", param="file") from None
    taken = RESERVED_TEMPLATE_NAMES & {effect.variable for field in document.custom_fields for effect in field.effects}
    if taken:
        raise InvalidRequest(f"No switch can set '{min(taken)}' of the chat template: lmweb sets it itself.", param="file")
    return document


def install(*, principal: Principal | None, text: str) -> InstalledModel:
    """Add the virtual model of a ``model.yaml``. Raises ``PermissionDenied``, ``InvalidRequest`` or ``Conflict``."""
    if principal:
        require(principal, Action.CHANGE_DEFAULTS)
    row = read(text)
    row.imported_by = principal.user if principal else None
    return _store(row, text)


def read(text: str) -> InstalledModel:
    """Return the virtual model of a ``model.yaml``, stored nowhere. Raises ``InvalidRequest``, or ``Conflict`` if its name is taken."""
    document = parse(text)
    publisher, name = naming.parse_user_repo(document.model)
    found = _find_base(document)
    base = found.base or found
    key = naming.make_key(publisher, name)
    facts = document.metadata_overrides
    row = InstalledModel(
        key=key,
        base=base,
        type=base.type,
        publisher=publisher,
        display_name=name,
        description=document.description or f"Virtual model on {base.key}.",
        architecture=base.architecture,
        quantization=base.quantization,
        bits_per_weight=base.bits_per_weight,
        params_string=base.params_string,
        size_bytes=0,
        max_context_length=base.max_context_length,
        format=base.format,
        capabilities={**found.capabilities, **_capabilities(facts)},
        path=f"{publisher}/{name}/{FILE_NAME}",
        chat_template=base.chat_template,
        chat_template_override=found.chat_template_override,
        custom_fields=_custom_fields(found, document),
    )
    row.load_defaults = {**found.load_defaults, **_settings(document.config.load, LOAD)}
    check_against_file(row, load_config(row))  # says what is wrong with it
    sampling = _settings(document.config.operation, OPERATION)
    check_sampling(sampling)
    prompts = [field.value for field in document.config.operation.fields if field.key == "llm.prediction.systemPrompt"]
    prompt = prompts[0] if prompts and isinstance(prompts[0], str) else ""
    inherited = convert(found.inference_defaults, InferenceDefaults)
    row.inference_defaults = msgspec.to_builtins(
        msgspec.structs.replace(inherited, sampling={**inherited.sampling, **sampling}, system_prompt=prompt or inherited.system_prompt)
    )
    if InstalledModel.objects.filter(key=row.key).exists():
        raise _taken(row)
    return row


def _taken(row: InstalledModel) -> Conflict:
    return Conflict(f"There is a model named {row.key} already.", param="file")


def _store(row: InstalledModel, text: str) -> InstalledModel:
    file = placement.models_dir() / row.path
    try:
        with transaction.atomic():
            row.save(force_insert=True)
            placement.write_new(file, text)
    except IntegrityError:
        raise _taken(row) from None
    return row


def _custom_fields(found: InstalledModel, document: Document) -> list[dict[str, Any]]:
    """Return the switches of the model that this one stands on, and its own, which replace those of the same key."""
    fields = {field["key"]: field for field in (*found.custom_fields, *msgspec.to_builtins(document.custom_fields))}
    return list(fields.values())


def _find_base(document: Document) -> InstalledModel:
    """Return the first of the bases that is installed; it may be virtual itself. Raises ``InvalidRequest``."""
    wanted = [Base(key=document.base)] if isinstance(document.base, str) else document.base
    names = [name for base in wanted for name in (base.key, *(f"{s.user}/{s.repo}" for s in base.sources if s.user and s.repo)) if name]
    for name in names:
        if "\x00" in name or name.count("/") != 1:
            continue
        key = naming.make_key(*name.split("/"))
        found = InstalledModel.objects.filter(key=key).first() or InstalledModel.objects.filter(key__startswith=f"{key}@").first()
        if found is not None:
            return found
    listed = ", ".join(names[:5]) or "none"
    raise InvalidRequest(f"None of the models that this one runs on is installed ({listed}). Get one of them first.", param="file")


def _capabilities(facts: Mapping[str, Any]) -> dict[str, bool]:
    named = {"vision": "vision", "reasoning": "reasoning", "trainedForToolUse": "trained_for_tool_use"}
    return {ours: facts[theirs] for theirs, ours in named.items() if isinstance(facts.get(theirs), bool)}


def _settings(settings: Settings, known: Mapping[str, tuple[str, Callable[[Any], Any]]]) -> dict[str, Any]:
    """Return the settings that we know under our names; LM Studio has more, which concern its other engines."""
    found = {known[field.key][0]: known[field.key][1](field.value) for field in settings.fields if field.key in known}
    return {name: value for name, value in found.items() if value is not None}
