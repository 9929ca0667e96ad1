"""From data to typed structs, safely in several threads.

msgspec builds what it knows of a type when the type is first used, without a lock: a second thread that comes meanwhile reads what is
not there yet, and the process ends with a segmentation fault. Here the first use of each type has a lock around it.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_lock = threading.Lock()
_known: set[Any] = set()


def convert(data: Any, kind: type[T], *, strict: bool = True) -> T:
    """Return ``msgspec.convert(data, kind)``. Raises ``msgspec.ValidationError``."""
    prepare(kind)
    return msgspec.convert(data, kind, strict=strict)


def decode_json(text: bytes | str, kind: type[T], *, strict: bool = True) -> T:
    """Return ``msgspec.json.decode(text, type=kind)``. Raises ``msgspec.DecodeError``."""
    prepare(kind)
    return msgspec.json.decode(text, type=kind, strict=strict)


def prepare(kind: Any) -> None:
    """Build what msgspec has to know of a type, once, before a decoder of one's own is made for it."""
    if kind not in _known:
        with _lock:
            msgspec.json.Decoder(kind)
            _known.add(kind)
