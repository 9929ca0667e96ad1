"""Whether a model that is not here yet would run here: a guess from its size, before anything of it is downloaded.

The sum is that of a load (``workers.memory``), for a shape guessed from the number of parameters: transformers of all sizes keep
close to ``parameters = 12 * layers * width**2`` with a width of about 128 per layer, and four query heads share one pair of key
and value heads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from django.conf import settings

from models_app.hub import Repository
from models_app.memory import REPACKED_TYPES
from models_app.variants import Variant
from workers.memory import RESERVED, Guardrail, ModelShape, estimate
from workers.models import WorkerNode
from workers.schemas import LoadConfig

_HEAD_WIDTH: Final = 128
_VOCABULARY: Final = 150_000
_MIN_PARAMETERS: Final = 1_000_000
_BYTES_PER_WEIGHT: Final = {"2": 0.37, "3": 0.47, "4": 0.6, "5": 0.71, "6": 0.82, "8": 1.06, "16": 2.0, "32": 4.0}


class Fit(StrEnum):
    """How a model fits."""

    FITS = "fits"
    OFFLOAD = "offload"
    TOO_LARGE = "too_large"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Hardware:
    """The memory that models may take on the best machine of this installation, in bytes; ``gpu_bytes`` 0: no GPU that we know of."""

    host_bytes: int
    gpu_bytes: int = 0

    @classmethod
    def of_installation(cls) -> Hardware | None:
        """Return that of the machine with most memory; None while no worker runs."""
        machines = [cls(node.total_memory_bytes, int(node.hardware.get("gpu_memory_bytes") or 0)) for node in WorkerNode.objects.alive()]
        best = max(machines, key=lambda machine: machine.host_bytes + machine.gpu_bytes, default=None)
        if best is None:
            return None
        kept = RESERVED.get(Guardrail(settings.MODEL_LOADING_GUARDRAILS), 0.0)
        return cls(int(best.host_bytes * (1 - kept)), best.gpu_bytes)


@dataclass(frozen=True)
class Verdict:
    """A guess, with the memory that it is based on."""

    fit: Fit
    needed_bytes: int

    @property
    def fits(self) -> bool:
        """Return whether the model would run."""
        return self.fit in {Fit.FITS, Fit.OFFLOAD}


def verdict_of(repository: Repository, variant: Variant, hardware: Hardware | None) -> Verdict:
    """Return how a variant would fit on this hardware."""
    on_gpu = hardware is not None and hardware.gpu_bytes > 0
    needed = needed_bytes(variant, repository.found.parameters, repository.context_length, on_gpu=on_gpu)
    if hardware is None:
        return Verdict(Fit.UNKNOWN, needed)
    if hardware.gpu_bytes:
        if needed <= hardware.gpu_bytes:
            return Verdict(Fit.FITS, needed)
        return Verdict(Fit.OFFLOAD if needed <= hardware.gpu_bytes + hardware.host_bytes else Fit.TOO_LARGE, needed)
    return Verdict(Fit.FITS if needed <= hardware.host_bytes else Fit.TOO_LARGE, needed)


def needed_bytes(variant: Variant, parameters: int | None, context_length: int | None, *, on_gpu: bool = False) -> int:
    """Return about how much memory a load with the installation's settings would take. A GPU needs no second copy of weights."""
    size = variant.size_bytes
    count = max(_MIN_PARAMETERS, parameters or int(size / _bytes_per_weight(variant.label)))
    layers = max(1, round((count / (12 * _HEAD_WIDTH**2)) ** (1 / 3)))
    width = _HEAD_WIDTH * layers
    context = min(settings.DEFAULT_CONTEXT_LENGTH, context_length or settings.DEFAULT_CONTEXT_LENGTH)
    shape = ModelShape(
        file_bytes=size,
        repacked_bytes=0 if on_gpu or not any(kind in variant.label for kind in REPACKED_TYPES) else size,
        layers=layers,
        width=width,
        heads=layers,
        heads_kv=max(1, layers // 4),
        token_kv_bytes=2 * 2 * width // 4 * layers,
        vocab_size=_VOCABULARY,
        trained_context=context,
        is_embedding=False,
    )
    return estimate(shape, LoadConfig(context_length=context)).needed_bytes


def _bytes_per_weight(label: str) -> float:
    bits = re.search(r"(32|16|[2-8])", label)
    return _BYTES_PER_WEIGHT.get(bits[1], 1.06) if bits else 1.06
