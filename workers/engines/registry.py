"""Which engine runs which format. Adding one: a module with a ``load`` of type ``base.Factory``, and a line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lmweb.errors import ModelLoadFailed

if TYPE_CHECKING:  # workers read ``FORMATS``; they need not hold numpy and what else the engines use
    from workers.engines.base import Factory

ENGINES = {"llama.cpp": "workers.engines.llama_cpp"}
FORMATS = {"gguf": "llama.cpp"}


def factory(name: str) -> Factory:
    """Return the loader of an engine. Raises ``ModelLoadFailed`` for an unknown or uninstalled one."""
    if name not in ENGINES:
        raise ModelLoadFailed(f"There is no engine '{name}'.")
    try:
        load: Factory = import_module(ENGINES[name]).load
    except ImportError as error:
        raise ModelLoadFailed(f"The engine '{name}' is not installed: {error}") from error
    return load
