"""Which engine runs which format. Adding one: a module with a ``load`` of type ``base.Factory``, its card, and a line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lmweb.errors import ModelLoadFailed
from workers.engines import card, llama_card, mlx_card

if TYPE_CHECKING:  # workers read ``FORMATS``; they need not hold numpy and what else the engines use
    from workers.engines.base import Factory

CARDS = {each.name: each for each in (llama_card.CARD, mlx_card.CARD)}
FORMATS = {name: each.name for each in CARDS.values() for name in each.formats}


def describe() -> list[card.Description]:
    """Return all engines as they are on this machine, also those that are not installed. Imports none of their libraries."""
    return [card.describe(each) for each in CARDS.values()]


def card_of(format_: str) -> card.EngineCard:
    """Return the card of the engine that reads a format. Raises ``KeyError`` for one that none reads."""
    return CARDS[FORMATS[format_]]


def lack(format_: str, feature: card.Feature) -> str:
    """Return why models of a format cannot do something, empty if they can."""
    return card_of(format_).lacks.get(feature, "")


def factory(name: str) -> Factory:
    """Return the loader of an engine. Raises ``ModelLoadFailed`` for an unknown or uninstalled one."""
    if name not in CARDS:
        raise ModelLoadFailed(f"There is no engine '{name}'.")
    chosen = CARDS[name]
    if not chosen.is_installed:
        raise ModelLoadFailed(f"The engine '{name}' is not installed here. {chosen.install}")
    load: Factory = import_module(chosen.module).load
    return load
