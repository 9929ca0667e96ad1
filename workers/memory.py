"""How much memory a loaded model takes."""

from __future__ import annotations

#: KV cells beyond one full context, so that short requests run side by side, cost at most this much memory.
EXTRA_CELLS_BYTES = 64 * 1024 * 1024


def kv_cells(context_length: int, parallel: int, bytes_per_token: int) -> int:
    """Return the KV cells (tokens) that ``parallel`` sequences of at most ``context_length`` tokens share."""
    extra = EXTRA_CELLS_BYTES // max(1, bytes_per_token)
    cells = max(context_length, min(parallel * context_length, extra))
    return -(-cells // 256) * 256
