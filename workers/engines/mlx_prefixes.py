"""Computed prefixes of ended sequences, in mlx-lm's ``LRUPromptCache``: what is private to one person never serves another."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache

from workers.engines.base import Sequence
from workers.engines.kv_park import MIN_TOKENS

MAX_ENTRIES = 4096


class Prefixes:
    """Caches by person; those of system prompts are everybody's."""

    def __init__(self, limit_bytes: int) -> None:
        self._stored = LRUPromptCache(max_size=MAX_ENTRIES, max_bytes=limit_bytes)

    def find(self, sequence: Sequence) -> tuple[list[Any] | None, int]:
        """Return the longest cache that the sequence may use and the number of its tokens; one token at least is left to compute."""
        tokens = sequence.tokens[:-1]
        best, length = self._fetch(_private(sequence.owner), tokens)
        shared = tokens[: sequence.shared_prefix]
        if len(shared) > length:
            other, n = self._fetch(_SHARED, shared)
            if n > length:
                best, length = other, n
        return best, length

    def keep(self, owner: str, tokens: list[int], cache: list[Any]) -> None:
        """Keep what one person's sequence computed."""
        self._store(_private(owner), tokens, cache, "assistant")

    def keep_shared(self, tokens: list[int], cache: list[Any]) -> None:
        """Keep a system prompt, for everybody who has the same one."""
        self._store(_SHARED, tokens, cache, "system")

    def _store(self, key: tuple[str, ...], tokens: list[int], cache: list[Any], kind: str) -> None:
        if len(tokens) >= MIN_TOKENS:
            mx.eval([layer.state for layer in cache])  # else it would keep the whole batch that it was cut out of
            self._stored.insert_cache(key, tokens, cache, cache_type=kind)

    def _fetch(self, key: tuple[str, ...], tokens: list[int]) -> tuple[list[Any] | None, int]:
        if len(tokens) < MIN_TOKENS:
            return None, 0
        cache, rest = self._stored.fetch_nearest_cache(key, tokens)
        n = len(tokens) - len(rest)
        return (cache, n) if cache is not None and n >= MIN_TOKENS else (None, 0)


_SHARED = ("everybody",)


def _private(owner: str) -> tuple[str, str]:
    return "person", owner


def cut(cache: list[Any], held: int, wanted: int) -> bool:
    """Shorten a cache of ``held`` tokens to its first ``wanted``; returns whether that was possible."""
    if held == wanted:
        return True
    if not can_trim_prompt_cache(cache):
        return False
    trim_prompt_cache(cache, held - wanted)
    return True
