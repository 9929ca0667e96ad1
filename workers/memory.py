"""How much memory a model takes once it is loaded, whether it may be loaded, and what would have to leave. Knows neither engines nor the database."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from lmweb.errors import InsufficientMemory
from workers.schemas import LoadConfig

#: KV cells beyond one full context, so that short requests run side by side, cost at most this much memory.
EXTRA_CELLS_BYTES = 256 * 1024 * 1024
#: On a CPU each sequence has a KV cache of its own where all of them take at most this, and at most a tenth of the machine's memory:
#: in a shared one a token's attention passes over the cells of everybody (a step of sixteen took two thirds more time).
OWN_CACHES_BYTES = 2 * 1024**3
OWN_CACHES_SHARE = 10
#: Bytes per number of the precisions that keys and values may have, relative to 16 bits (ggml's block formats with their scales).
KV_FACTORS = {
    "f32": 2.0, "f16": 1.0, "q8_0": 34 / 64, "q5_1": 24 / 64, "q5_0": 22 / 64, "q4_1": 20 / 64, "q4_0": 18 / 64, "iq4_nl": 18 / 64,
}  # fmt: skip
#: A runner without a model: Python, NumPy, llama.cpp.
RUNTIME_BYTES = 55 * 1024 * 1024
#: Floats of intermediate results per token of a batch, in multiples of the model's width (its feed-forward layer is about four times as wide).
COMPUTE_WIDTHS = 14
EMBEDDING_BATCH_TOKENS = 256
#: Rows of logits that a model has at least, so that a single sequence can have guesses checked.
GUESS_ROWS = 9


class Guardrail(StrEnum):
    """How much of the machine's memory a model may not take: LM Studio's levels."""

    OFF = "off"
    RELAXED = "relaxed"
    BALANCED = "balanced"
    STRICT = "strict"


class AutoEvict(StrEnum):
    """When models that requests loaded leave for others that requests load."""

    ON = "on"  # always: one that chats and one that embeds at a time
    NEEDED = "needed"  # only if memory is short
    OFF = "off"  # never


#: The part of all memory that has to stay free after a load, beside everything that is in use already.
RESERVED = {Guardrail.RELAXED: 0.0, Guardrail.BALANCED: 0.05, Guardrail.STRICT: 0.15}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model file says about itself; sizes in bytes, ``trained_context`` in tokens.

    ``repacked_bytes`` are weights of which llama.cpp makes a second copy in an order that the CPU likes; ``token_kv_bytes`` is
    what one token's keys and values take in all layers at 16 bits. ``cell_bytes`` is the same where its engine counts cells by it,
    0 for heads that share the width evenly. ``is_one_cache``: its engine, or its kind of memory, knows no KV cache per sequence.
    ``experts`` are those of a mixture, 0 for other models; ``runtime_bytes`` is a runner without a model.
    """

    file_bytes: int
    repacked_bytes: int
    layers: int
    width: int
    heads: int
    heads_kv: int
    token_kv_bytes: int
    vocab_size: int
    trained_context: int
    is_embedding: bool
    cell_bytes: int = 0
    is_one_cache: bool = False
    experts: int = 0
    runtime_bytes: int = RUNTIME_BYTES


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The KV cells (tokens) of a loaded model in all: shared by its sequences if ``is_unified``, else an equal part for each."""

    cells: int
    is_unified: bool


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of memory, of the host and of GPUs together.

    ``measured_bytes`` is what an earlier load of this configuration really took, if there was one; ``draft_bytes`` is what the draft
    model takes, if there is one; ``gpu_bytes`` is about how much of all this lies on GPUs.
    """

    weights_bytes: int
    repacked_bytes: int
    kv_bytes: int
    compute_bytes: int
    measured_bytes: int | None = None
    draft_bytes: int = 0
    gpu_bytes: int = 0
    runtime_bytes: int = RUNTIME_BYTES

    @property
    def needed_bytes(self) -> int:
        """Return all of it. A measured size lacks the compute buffers, which are touched by the first requests only."""
        loaded = self.measured_bytes or self.runtime_bytes + self.weights_bytes + self.repacked_bytes + self.kv_bytes
        return loaded + self.compute_bytes + self.draft_bytes


def kv_bytes_per_token(layers: int, width: int, heads: int, heads_kv: int) -> int:
    """Return the size of one token's keys and values at 16 bits, for heads that share the width evenly."""
    return int(layers * (width * max(1, heads_kv) // max(1, heads)) * 2 * 2)


def kv_cells(context_length: int, parallel: int, bytes_per_token: int) -> int:
    """Return the KV cells (tokens) that ``parallel`` sequences of at most ``context_length`` tokens share."""
    extra = EXTRA_CELLS_BYTES // max(1, bytes_per_token)
    cells = max(context_length, min(parallel * context_length, extra))
    return _whole_blocks(cells)


def kv_layout(config: LoadConfig, context_length: int, bytes_per_token: int, *, on_gpu: bool) -> KvLayout:
    """Return the cells of a load whose engine can give each sequence a KV cache of its own."""
    own = config.parallel * _whole_blocks(context_length)
    unified = config.unified_kv_cache
    if unified is None:
        limit = min(OWN_CACHES_BYTES, machine_memory()[1] // OWN_CACHES_SHARE)
        unified = on_gpu or own * bytes_per_token > limit
    return KvLayout(kv_cells(context_length, config.parallel, bytes_per_token) if unified else own, unified)


def _whole_blocks(cells: int) -> int:
    return -(-cells // 256) * 256


def logits_rows(config: LoadConfig) -> int:
    """Return for how many tokens of a step a language model computes logits: each sequence's last, or a few guesses of one."""
    return max(config.parallel, GUESS_ROWS)


def estimate(shape: ModelShape, config: LoadConfig, *, measured_bytes: int | None = None, on_gpu: bool = False) -> MemoryEstimate:
    """Return what a load takes. ``config.context_length`` None is the model's own; ``on_gpu`` says that there is a GPU to put layers on.

    What was measured is the memory of the process alone, which says little about a load that lies on a GPU.
    """
    share = gpu_share(shape, config) if on_gpu else 0.0
    if shape.is_embedding:
        cells, in_sight, batch, outputs = 0, 0, EMBEDDING_BATCH_TOKENS, EMBEDDING_BATCH_TOKENS
    else:
        layout = _layout(shape, config, on_gpu=bool(share))
        cells, in_sight = layout.cells, layout.cells if layout.is_unified else layout.cells // config.parallel
        batch, outputs = max(config.eval_batch_size, config.parallel), logits_rows(config)
    kv = int(cells * shape.token_kv_bytes * (KV_FACTORS[config.k_cache_type] + KV_FACTORS[config.v_cache_type]) / 2)
    compute = 4 * (batch * COMPUTE_WIDTHS * shape.width + batch * in_sight + outputs * shape.vocab_size)
    on_gpu_bytes = shape.file_bytes + (kv if config.offload_kv_cache_to_gpu else 0)
    return MemoryEstimate(
        weights_bytes=shape.file_bytes,
        repacked_bytes=int(shape.repacked_bytes * (1 - share)),
        kv_bytes=kv,
        compute_bytes=compute,
        measured_bytes=None if share else measured_bytes,
        gpu_bytes=int(share * on_gpu_bytes) + (compute if share else 0),
        runtime_bytes=shape.runtime_bytes,
    )


def _layout(shape: ModelShape, config: LoadConfig, *, on_gpu: bool) -> KvLayout:
    context = min(config.context_length or shape.trained_context, shape.trained_context)
    cell_bytes = shape.cell_bytes or kv_bytes_per_token(shape.layers, shape.width, shape.heads, shape.heads_kv)
    if shape.is_one_cache:
        return KvLayout(kv_cells(context, config.parallel, cell_bytes), is_unified=True)
    return kv_layout(config, context, cell_bytes, on_gpu=on_gpu)


def gpu_share(shape: ModelShape, config: LoadConfig) -> float:
    """Return which part of a model a load puts on the GPU, from 0 to 1. The output layer counts as one more layer, as in llama.cpp."""
    layers = shape.layers + 1
    return 1.0 if config.gpu_layers < 0 else min(config.gpu_layers, layers) / layers


def reserve(level: Guardrail, total_bytes: int) -> int:
    """Return the bytes that have to stay free at this level."""
    return int(RESERVED.get(level, 0.0) * total_bytes)


def refusal(
    name: str, needed_bytes: int, *, level: Guardrail, free_bytes: int, total_bytes: int, held_by: dict[str, int]
) -> InsufficientMemory:
    """Return the error of a model that must not be loaded at this level. ``held_by`` maps loaded models to their bytes."""
    reserved = reserve(level, total_bytes)
    kept = f", of which {_size(reserved)} are kept for everything else (guardrail '{level}')" if reserved else ""
    holders = ", ".join(f"{holder} ({_size(size)})" for holder, size in held_by.items())
    advice = "Unload a model" if held_by else "Close other programs"
    return InsufficientMemory(
        f"{name} needs about {_size(needed_bytes)} of memory, and {_size(max(0, free_bytes))} are free{kept}. "
        + (f"Loaded models hold: {holders}. " if holders else "")
        + f"{advice}, load it with a shorter context, or let an admin lower LMWEB_MODEL_LOADING_GUARDRAILS.",
        details={"needed_bytes": needed_bytes, "free_bytes": max(0, free_bytes), "held_by": _holders(held_by)},
    )


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in memory, as the choice of what has to leave sees it. ``unused_seconds`` is the time since its last request."""

    id: int
    memory_bytes: int
    is_busy: bool
    unused_seconds: float
    is_embedding: bool = False


def choose_leavers(missing_bytes: int, residents: list[Resident]) -> list[Resident] | None:
    """Return whom to unload for so many bytes: idle ones before busy ones, the longest unused first, and nobody without need.

    None if all of them together do not free enough.
    """
    ranked = sorted(residents, key=lambda resident: (resident.is_busy, -resident.unused_seconds))
    chosen: list[Resident] = []
    while ranked and sum(resident.memory_bytes for resident in chosen) < missing_bytes:
        chosen.append(ranked.pop(0))
    for resident in list(chosen):  # the last one may free enough by itself
        if sum(other.memory_bytes for other in chosen if other is not resident) >= missing_bytes:
            chosen.remove(resident)
    return chosen if sum(resident.memory_bytes for resident in chosen) >= missing_bytes else None


def leavers_for_request(
    missing_bytes: int, residents: list[Resident], auto_evict: AutoEvict, *, is_embedding: bool = False
) -> list[Resident] | None:
    """Return whom a load that a request needs displaces among what may leave for it; None if that does not free enough.

    ``is_embedding`` says what is loaded. Without need it displaces its own kind only: who asks questions about documents uses an
    embedding model and a language model in turn, and each would be loaded anew for every question.
    """
    if auto_evict is AutoEvict.OFF:
        return [] if missing_bytes <= 0 else None
    leaving = []
    if auto_evict is AutoEvict.ON:
        leaving = [resident for resident in residents if not resident.is_busy and resident.is_embedding == is_embedding]
    missing_bytes -= sum(resident.memory_bytes for resident in leaving)
    if missing_bytes <= 0:
        return leaving
    rest = choose_leavers(missing_bytes, [resident for resident in residents if resident not in leaving])
    return None if rest is None else leaving + rest


def machine_memory() -> tuple[int, int]:
    """Return the free and all memory that processes here may use, in bytes; a container's limit counts."""
    memory = psutil.virtual_memory()
    free, total = int(memory.available), int(memory.total)
    limit, used = _number(Path("/sys/fs/cgroup/memory.max")), _number(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and used is not None and limit < total:
        # The page cache counts as used here, and gives way when memory is needed.
        cached = _cgroup_cache(Path("/sys/fs/cgroup/memory.stat"))
        free, total = min(free, limit - used + cached), limit
    return max(0, free), total


def gpu_backends() -> list[str]:
    """Return the kinds of GPUs that llama.cpp was compiled for, by the libraries that lie beside it."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return []
    names = [file.name for file in (Path(spec.origin).parent / "lib").glob("*ggml-*")]
    return [kind for kind in ("cuda", "hip", "vulkan", "metal") if any(f"ggml-{kind}" in name for name in names)]


def has_gpu_build() -> bool:
    """Whether llama.cpp was compiled for a GPU, whose memory this module does not know."""
    return bool(gpu_backends())


def gpu_memory() -> int:
    """Return the memory of all NVIDIA GPUs that llama.cpp was compiled for and can reach, in bytes; 0 where that cannot be told."""
    if not has_gpu_build():
        return 0
    try:
        command = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(int(line) for line in answer.split() if line.isdigit()) * 1024 * 1024


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_cache(file: Path) -> int:
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return 0
    return sum(int(line[1]) for line in lines if line[0] == "inactive_file")


def _holders(held_by: dict[str, int]) -> list[dict[str, Any]]:
    return [{"identifier": name, "memory_bytes": size} for name, size in held_by.items()]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
