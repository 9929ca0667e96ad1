"""The card of the MLX engine."""

from __future__ import annotations

import sys
from types import MappingProxyType

from workers.engines.card import EngineCard, Feature, version_of

_GPU_PACKAGES = ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")


def _devices() -> list[str]:
    if sys.platform == "darwin":
        return ["metal", "cpu"]
    return ["cuda", "cpu"] if any(map(version_of, _GPU_PACKAGES)) else ["cpu"]


CARD = EngineCard(
    name="mlx-lm",
    module="workers.engines.mlx_engine",
    packages=("mlx-lm", "mlx"),
    formats=("mlx",),
    devices=_devices,
    lacks=MappingProxyType(
        {
            Feature.EMBEDDINGS: "mlx-lm has no embedding models; take one in the GGUF format.",
            Feature.DRAFT_MODEL: "mlx-lm guesses ahead for one answer at a time only, not for several together.",
            Feature.PROMPT_LOOKUP: "mlx-lm has no guesses from the text so far.",
            Feature.KV_CACHE_TYPES: "mlx-lm keeps keys and values in the precision of the model when it computes several answers together.",
            Feature.OWN_KV_CACHES: "mlx-lm keeps one cache for all answers.",
            Feature.NUM_EXPERTS: "mlx-lm uses as many experts as the model was trained with.",
            Feature.GPU_LAYERS: "MLX computes on one device: all layers (-1) or none (0) on the GPU, keys and values beside them.",
            Feature.FLASH_ATTENTION: "MLX always uses its own fused attention.",
            Feature.CPU_THREADS: "MLX decides itself how many threads it uses.",
            Feature.DRY: "DRY sampling needs a GGUF model's vocabulary.",
        }
    ),
    install="Start lmweb with LMWEB_MLX=on once (python3 manage.py up): it installs the engine, about 100 MB.",
)
