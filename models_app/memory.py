"""What loading a model takes, from its file and from what earlier loads really took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from msgspec.structs import replace

from models_app import gguf, mlx
from models_app.file_memory import remembered
from models_app.models import InstalledModel, MemoryMeasurement
from workers.memory import MemoryEstimate, ModelShape, estimate
from workers.mlx_directory import CONFIG
from workers.schemas import LoadConfig

#: How a measurement names the choice between one cache and many.
_CACHES = {None: "", True: " 1", False: " n"}
#: Weights that llama.cpp copies into another order for the CPU.
REPACKED_TYPES = frozenset({"Q4_0", "Q4_K", "IQ4_NL"})


def estimate_model(model: InstalledModel, config: LoadConfig, *, on_gpu: bool = False) -> MemoryEstimate:
    """Return what loading takes, on a machine with a GPU or without. Raises ``InvalidModelFile`` if the file is gone or broken."""
    shape = read_shape(model.file)
    config = complete(config, shape.trained_context)
    found = MemoryMeasurement.objects.filter(model=model, **_what_matters(config)).first()
    return estimate(shape, config, measured_bytes=found.memory_bytes if found else None, on_gpu=on_gpu and model.format != mlx.FORMAT)


def note_measurement(model_id: int, config: LoadConfig, memory_bytes: int) -> None:
    """Keep what a load really took, for the next estimate of the same configuration; one with a draft model says too little."""
    if memory_bytes and config.context_length is not None and not config.draft_model:
        MemoryMeasurement.objects.update_or_create(
            model_id=model_id,
            **_what_matters(config),
            defaults={"memory_bytes": memory_bytes},
        )


def _what_matters(config: LoadConfig) -> dict[str, Any]:
    """Return the parts of a configuration that change what a load takes."""
    return {
        "context_length": config.context_length,
        "parallel": config.parallel,
        "gpu_layers": config.gpu_layers,
        "kv_cache": f"{config.k_cache_type}/{config.v_cache_type}{_CACHES[config.unified_kv_cache]}",
    }


def complete(config: LoadConfig, trained_context: int) -> LoadConfig:
    """Return the configuration with the context length that a load will have."""
    return replace(config, context_length=min(config.context_length or settings.DEFAULT_CONTEXT_LENGTH, trained_context))


@remembered(files=64)
def read_shape(file: Path) -> ModelShape:
    """Return what the file says. Raises ``InvalidModelFile``."""
    if file.name == CONFIG:
        return mlx.read_shape(file)
    header, size = gguf.read_headers(gguf.part_paths(file))
    model = gguf.describe(header, size)
    head_width = model.embedding_length // max(1, model.head_counts[0])
    width = (model.key_length or head_width) + (model.value_length or head_width)
    heads_kv = model.head_counts_kv if len(model.head_counts_kv) > 1 else model.head_counts_kv * model.block_count
    repacked = [t.size for t in header.tensors if t.type_name in REPACKED_TYPES and t.name != "token_embd.weight"]
    return ModelShape(
        file_bytes=size,
        repacked_bytes=sum(repacked),
        layers=model.block_count,
        width=model.embedding_length,
        heads=model.head_counts[0],
        heads_kv=model.head_counts_kv[0],
        token_kv_bytes=2 * width * sum(heads_kv),
        vocab_size=model.vocab_size,
        trained_context=model.context_length,
        is_embedding=model.type == "embedding",
        is_one_cache=any(".ssm." in key or ".wkv." in key for key in header.metadata),  # recurrent, at least in part
        experts=model.expert_count,
    )
