"""What a directory in the MLX format says about its model, in the words of My Models."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Final

from lmweb.errors import InvalidModelFile, InvalidRequest
from models_app import gguf, placement
from models_app.placement import Mode
from workers.memory import RUNTIME_BYTES, ModelShape
from workers.mlx_directory import CONFIG, MlxDirectory, check_entries, is_weights, read_directory

FORMAT: Final = "mlx"
#: What its runner takes without a model, beyond that of another engine: its libraries are many.
EXTRA_RUNTIME_BYTES: Final = 75 * 1024 * 1024
_FLOATS: Final = {"BF16": 16, "F16": 16, "F32": 32}


def is_directory(path: Path) -> bool:
    """Whether this is a directory that holds a model."""
    try:
        return (path / CONFIG).is_file() and any(is_weights(entry.name) for entry in path.iterdir())
    except OSError:
        return False


def check_source(path: Path, mode: Mode) -> Path:
    """Return the absolute path of a directory to import.

    Raises ``InvalidRequest`` for none that ``mode`` can take, ``InvalidModelFile`` for code, pickles and links in it.
    """
    source = path.expanduser().absolute().resolve()
    if not source.is_dir():
        raise InvalidRequest(f"{path} is not a directory.", param="file")
    root = placement.models_dir()
    if root.is_relative_to(source) or (source.is_relative_to(root) and mode is not Mode.MOVE):
        raise InvalidRequest(f"{path} lies in the models directory already, or around it.", param="file")
    check_entries(source)
    return source


def describe(directory: MlxDirectory) -> gguf.ModelFile:
    """Return what is known of a model. Raises ``InvalidModelFile`` for sizes that make no sense."""
    parameters = _parameters(directory)
    quantization, bits = _quantization(directory)
    vocab_size = directory.number("vocab_size")
    if not vocab_size:
        raise InvalidModelFile("config.json does not say how large the vocabulary is (vocab_size).")
    heads_kv = directory.number("num_key_value_heads", "n_kv_heads") or directory.heads
    head_width = directory.number("head_dim") or directory.width // directory.heads
    return gguf.ModelFile(
        architecture=directory.model_type,
        name="",
        type="llm",
        organization="",
        description="",
        license="",
        quantization=quantization,
        bits_per_weight=bits,
        parameters=parameters,
        params_string=gguf.size_label(parameters),
        size_bytes=directory.size_bytes,
        context_length=directory.context_length,
        vocab_size=vocab_size,
        block_count=directory.layers,
        embedding_length=directory.width,
        head_counts=(directory.heads,),
        head_counts_kv=(heads_kv,),
        key_length=head_width,
        value_length=head_width,
        chat_template=directory.chat_template,
        capabilities=gguf.capabilities(directory.chat_template),
    )


def read_shape(config: Path) -> ModelShape:
    """Return what loading takes into account, by the path of a model's config.json. Raises ``InvalidModelFile``."""
    directory = read_directory(config.parent)
    model = describe(directory)
    return ModelShape(
        file_bytes=directory.weights_bytes,
        repacked_bytes=0,
        layers=model.block_count,
        width=model.embedding_length,
        heads=model.head_counts[0],
        heads_kv=model.head_counts_kv[0],
        token_kv_bytes=directory.kv_bytes_per_token,
        vocab_size=model.vocab_size,
        trained_context=model.context_length,
        is_embedding=False,
        cell_bytes=directory.kv_bytes_per_token,
        is_one_cache=True,
        runtime_bytes=RUNTIME_BYTES + EXTRA_RUNTIME_BYTES,
    )


def _quantization(directory: MlxDirectory) -> tuple[str, float | None]:
    """Return how people call the precision, and its bits per weight."""
    declared = directory.config.get("quantization") or directory.config.get("quantization_config")
    if isinstance(declared, dict):
        bits, mode = declared.get("bits"), declared.get("mode")
        if isinstance(mode, str) and mode in {"mxfp4", "mxfp8", "nvfp4"}:
            return mode.upper(), float(mode[-1])
        if isinstance(bits, int) and 1 <= bits <= 16:
            return f"{bits}bit", float(bits)
    sizes: Counter[str] = Counter()
    for tensor in directory.tensors.values():
        sizes[tensor.dtype] += tensor.elements
    most = sizes.most_common(1)[0][0] if sizes else ""
    return (most, float(_FLOATS[most])) if most in _FLOATS else ("", None)


def _parameters(directory: MlxDirectory) -> int:
    """Return the number of weights. Quantized ones lie in 32-bit words beside their scales: so many bits make one weight."""
    declared = directory.config.get("quantization")
    bits = declared.get("bits") if isinstance(declared, dict) else None
    packed = bits if isinstance(bits, int) and 1 <= bits <= 16 else 4
    total = 0
    for name, tensor in directory.tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind in {"scales", "biases"}:
            continue
        is_packed = tensor.dtype == "U32" and f"{stem}.scales" in directory.tensors
        total += math.floor(tensor.elements * 32 / packed) if is_packed else tensor.elements
    return total
