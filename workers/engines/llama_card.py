"""The card of the llama.cpp engine."""

from __future__ import annotations

from workers.engines.card import EngineCard
from workers.memory import gpu_backends


def _devices() -> list[str]:
    return [*gpu_backends(), "cpu"]


CARD = EngineCard(
    name="llama.cpp",
    module="workers.engines.llama_cpp",
    packages=("llama-cpp-python",),
    formats=("gguf",),
    devices=_devices,
    lacks={},
    install="It comes with lmweb: start python3 manage.py up again, which repairs the environment.",
)
