"""Reads the header of GGUF files, which come from strangers, without trusting a byte of them.

Every count, length, dimension, type and offset is checked against the size of the file and against fixed limits before it is
used. Nothing is allocated in proportion to a number in the file: vocabularies are skipped, and only short texts and lists are
kept. What the numbers mean for a model is ``models_app.gguf``'s business.

Supported are versions 2 and 3, little-endian. The format is described in the documentation of ggml ("GGUF").
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from lmweb.errors import InvalidModelFile

MAX_HEADER_BYTES: Final = 128 * 1024 * 1024  # the largest vocabularies in use need about 20 MB
MAX_KEYS: Final = 4096
MAX_TENSORS: Final = 65_536
MAX_KEY_BYTES: Final = 1024
MAX_TENSOR_NAME_BYTES: Final = 63
MAX_TENSOR_ELEMENTS: Final = 2**48
MAX_ALIGNMENT: Final = 1024 * 1024
MAX_TEXT_BYTES: Final = 1024 * 1024
MAX_KEPT_ELEMENTS: Final = 512  # of a list: one per layer

_WINDOW_BYTES: Final = 1024 * 1024

# The types of metadata values: code -> struct format. 8 is a string, 9 an array.
_SCALARS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, STRING, _ARRAY = 7, 8, 9

#: Tensor types that the engine knows: code -> (name, elements per block, bytes per block).
TENSOR_TYPES: Final = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

# Only these are kept, so that a header full of long texts or lists costs time but no memory.
_KEPT_TEXTS: Final = {
    "general.architecture", "general.description", "general.license", "general.name", "general.organization", "general.size_label",
    "general.type", "tokenizer.chat_template", "tokenizer.ggml.model",
}  # fmt: skip
_KEPT_LISTS: Final = (".attention.head_count", ".attention.head_count_kv")

Scalar = int | float | bool | str


@dataclass(frozen=True)
class Array:
    """An array of the metadata. ``values`` is None for one that nobody needs, such as a vocabulary; it begins at byte ``start``."""

    element_type: int
    length: int
    values: list[Scalar] | None
    start: int


Value = Scalar | Array | None  # None: a text that nobody needs


@dataclass(frozen=True)
class Tensor:
    """One tensor: ``offset`` counts from the start of the data section; ``size`` is in bytes."""

    name: str
    dimensions: tuple[int, ...]
    type_name: str
    offset: int
    size: int

    @property
    def elements(self) -> int:
        """Return the number of weights."""
        return math.prod(self.dimensions)


@dataclass(frozen=True)
class Header:
    """Everything before the weights, checked against the file."""

    version: int
    metadata: dict[str, Value]
    tensors: list[Tensor]
    data_start: int


@contextlib.contextmanager
def opened(path: Path, what: str = "The file") -> Iterator[BinaryIO]:
    """Open a file to read. Raises ``InvalidModelFile``, which names it ``what``, if it cannot be read, also later on."""
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise InvalidModelFile(f"{what} cannot be read: {error.strerror or error}.") from None


def read_header(stream: BinaryIO) -> Header:
    """Parse the header of a complete file. Raises ``InvalidModelFile``."""
    size = stream.seek(0, os.SEEK_END)
    header = read_beginning(stream, size, size)
    if header is None:  # cannot happen: all of the file is there
        raise InvalidModelFile("The file ends within its header.")
    return header


def read_beginning(stream: BinaryIO, total_size: int, available: int) -> Header | None:
    """Parse the header of a file of ``total_size`` bytes of which ``available`` are there; None while they are not enough.

    Raises ``InvalidModelFile`` as soon as it is clear that this is no such header.
    """
    try:
        return _parse(_Cursor(stream, total_size, available))
    except _IncompleteError:
        return None


def read_strings(stream: BinaryIO, array: Array, *, skip: int = 0) -> Iterator[bytes]:
    """Yield the strings of an array in a complete file one after the other, without the first ``skip``.

    Raises ``InvalidModelFile`` for one that is too long.
    """
    what = "a list of texts"
    cursor = _Cursor(stream, *[stream.seek(0, os.SEEK_END)] * 2)
    cursor.skip(array.start, what)
    cursor.skip_strings(min(skip, array.length), what)
    for _ in range(skip, array.length):
        length = cursor.count(what)
        if length > MAX_TEXT_BYTES:
            raise InvalidModelFile(f"A text in {what} is longer than {MAX_TEXT_BYTES >> 20} MiB.")
        yield cursor.take(length, what)


def shown(name: str) -> str:
    """Return a name from a file as it may stand in a message."""
    return "".join(char if char.isprintable() else "?" for char in name[:80])


class _IncompleteError(Exception):
    """More bytes are needed than have arrived so far."""


class _Cursor:
    """Reads forward through a window over the file; refuses to go past its end or past the limit for headers."""

    def __init__(self, stream: BinaryIO, size: int, available: int) -> None:
        self._stream = stream
        self._size = size
        self._available = available
        self._window = b""
        self._window_start = 0
        self._at = 0

    @property
    def position(self) -> int:
        return self._at

    @property
    def remaining(self) -> int:
        """Bytes between here and the end of the complete file."""
        return self._size - self._at

    def take(self, count: int, what: str) -> bytes:
        """Return the next bytes; ``count`` must have been checked against a limit of its own."""
        self._require(count, what)
        start = self._at - self._window_start
        if start + count > len(self._window):
            self._refill(count)
            start = 0
            if len(self._window) < count:  # the file shrank while it was read
                raise InvalidModelFile(f"The file ends within {what}: it is truncated.")
        self._at += count
        return self._window[start : start + count]

    def skip(self, count: int, what: str) -> None:
        self._require(count, what)
        self._at += count

    def number(self, layout: str, what: str) -> int | float:
        value: int | float = struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]
        return value

    def count(self, what: str) -> int:
        return int(self.number("<Q", what))

    def skip_strings(self, count: int, what: str) -> None:
        """Skip an array of strings, in a tight loop: a vocabulary has hundreds of thousands."""
        unpack = struct.Struct("<Q").unpack_from
        while count:
            self.take(8, what)
            self._at -= 8  # now at least eight bytes are in the window
            at, end, window = self._at - self._window_start, len(self._window), self._window
            while count and at + 8 <= end:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.skip(at - (self._at - self._window_start), what)

    def _require(self, count: int, what: str) -> None:
        end = self._at + count
        if end > self._size:
            raise InvalidModelFile(f"The file ends within {what}: it is truncated, or a length in it is wrong.")
        if end > MAX_HEADER_BYTES:
            raise InvalidModelFile(f"The file's header is larger than {MAX_HEADER_BYTES >> 20} MiB.")
        if end > self._available:
            raise _IncompleteError

    def _refill(self, count: int) -> None:
        self._stream.seek(self._at)
        self._window = self._stream.read(max(count, min(_WINDOW_BYTES, self._available - self._at)))
        self._window_start = self._at


def _parse(cursor: _Cursor) -> Header:
    version = _read_version(cursor)
    tensor_count, key_count = cursor.count("the header"), cursor.count("the header")
    _check_count(tensor_count, MAX_TENSORS, cursor.remaining // 24, "tensors")
    _check_count(key_count, MAX_KEYS, cursor.remaining // 12, "metadata entries")
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = _read_name(cursor, MAX_KEY_BYTES, "a metadata key")
        if key in metadata:
            raise InvalidModelFile(f"The metadata key '{shown(key)}' occurs twice.")
        metadata[key] = _read_value(cursor, key)
    alignment = _alignment(metadata)
    tensors = _read_tensors(cursor, tensor_count, alignment)
    data_start = _padded(cursor.position, alignment)
    for tensor in tensors:
        if data_start + tensor.offset + tensor.size > cursor.position + cursor.remaining:
            raise InvalidModelFile(f"The data of tensor '{tensor.name}' lies beyond the end of the file: it is truncated.")
    return Header(version, metadata, tensors, data_start)


def _read_version(cursor: _Cursor) -> int:
    if cursor.remaining < 24:
        raise InvalidModelFile("The file is too short to be a GGUF model.")
    if cursor.take(4, "the header") != b"GGUF":
        raise InvalidModelFile("This is not a GGUF file. Only models in the GGUF format can be imported.")
    version = int(cursor.number("<I", "the header"))
    if version and version & 0xFFFF == 0:
        raise InvalidModelFile("This GGUF file is big-endian, which is not supported.")
    if version not in (2, 3):
        raise InvalidModelFile(f"GGUF version {version} is not supported (2 and 3 are).")
    return version


def _check_count(count: int, limit: int, room: int, what: str) -> None:
    if count > limit:
        raise InvalidModelFile(f"The file claims {count} {what}; at most {limit} are accepted.")
    if count > room:
        raise InvalidModelFile(f"The file claims {count} {what}, more than fit into it.")


def _read_name(cursor: _Cursor, limit: int, what: str) -> str:
    length = cursor.count(what)
    if not 0 < length <= limit:
        raise InvalidModelFile(f"The length of {what} is {length} bytes; 1 to {limit} are accepted.")
    return _decode(cursor.take(length, what), what)


def _decode(data: bytes, what: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidModelFile(f"{what[:1].upper()}{what[1:]} is not valid UTF-8.") from None
    if "\x00" in text:
        raise InvalidModelFile(f"{what[:1].upper()}{what[1:]} contains a NUL character.")
    return text


def _read_value(cursor: _Cursor, key: str) -> Value:
    what = f"the metadata value '{shown(key)}'"
    kind = int(cursor.number("<I", what))
    if kind == _ARRAY:
        return _read_array(cursor, what, keep=key.endswith(_KEPT_LISTS))
    if kind == STRING:
        return _read_text(cursor, what, keep=key in _KEPT_TEXTS)
    return _read_number(cursor, kind, what)


def _read_text(cursor: _Cursor, what: str, *, keep: bool) -> str | None:
    length = cursor.count(what)
    if not keep:
        cursor.skip(length, what)
        return None
    if length > MAX_TEXT_BYTES:
        raise InvalidModelFile(f"The text in {what} is longer than {MAX_TEXT_BYTES >> 20} MiB.")
    return _decode(cursor.take(length, what), what)


def _read_number(cursor: _Cursor, kind: int, what: str) -> int | float | bool:
    if kind not in _SCALARS:
        raise InvalidModelFile(f"The type of {what} is unknown ({kind}).")
    value = cursor.number(_SCALARS[kind], what)
    if kind == _BOOL:
        if value not in (0, 1):
            raise InvalidModelFile(f"{what[:1].upper()}{what[1:]} is neither true nor false.")
        return bool(value)
    if not math.isfinite(value):
        raise InvalidModelFile(f"{what[:1].upper()}{what[1:]} is not a finite number.")
    return value


def _read_array(cursor: _Cursor, what: str, *, keep: bool) -> Array:
    kind = int(cursor.number("<I", what))
    length = cursor.count(what)
    if kind == _ARRAY:
        raise InvalidModelFile(f"Arrays within arrays are not supported ({what}).")
    if kind != STRING and kind not in _SCALARS:
        raise InvalidModelFile(f"The type of {what} is unknown ({kind}).")
    element = 8 if kind == STRING else struct.calcsize(_SCALARS[kind])
    if length > cursor.remaining // element:
        raise InvalidModelFile(f"The file claims {length} elements for {what}, more than fit into it.")
    start = cursor.position
    if keep and kind != STRING and length <= MAX_KEPT_ELEMENTS:
        return Array(kind, length, [_read_number(cursor, kind, what) for _ in range(length)], start)
    if kind == STRING:
        cursor.skip_strings(length, what)
    else:
        cursor.skip(length * element, what)
    return Array(kind, length, None, start)


def _alignment(metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise InvalidModelFile("The alignment of the file's data is not a power of two of at least 8.")
    return value


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> list[Tensor]:
    tensors: list[Tensor] = []
    seen: set[str] = set()
    expected_offset = 0
    for _ in range(count):
        tensor = _read_tensor(cursor)
        if tensor.name in seen:
            raise InvalidModelFile(f"The tensor '{shown(tensor.name)}' occurs twice.")
        if tensor.offset != expected_offset:
            raise InvalidModelFile(f"The tensor '{shown(tensor.name)}' lies at offset {tensor.offset} instead of {expected_offset}.")
        seen.add(tensor.name)
        tensors.append(tensor)
        expected_offset = _padded(tensor.offset + tensor.size, alignment)
    return tensors


def _read_tensor(cursor: _Cursor) -> Tensor:
    name = _read_name(cursor, MAX_TENSOR_NAME_BYTES, "a tensor's name")
    what = f"the tensor '{shown(name)}'"
    dimension_count = int(cursor.number("<I", what))
    if not 1 <= dimension_count <= 4:
        raise InvalidModelFile(f"The tensor '{shown(name)}' has {dimension_count} dimensions; 1 to 4 are possible.")
    dimensions = tuple(cursor.count(what) for _ in range(dimension_count))
    if min(dimensions) < 1 or max(dimensions) > MAX_TENSOR_ELEMENTS or math.prod(dimensions) > MAX_TENSOR_ELEMENTS:
        raise InvalidModelFile(f"The dimensions of the tensor '{shown(name)}' are impossible: {' x '.join(map(str, dimensions))}.")
    code = int(cursor.number("<I", what))
    if code not in TENSOR_TYPES:
        raise InvalidModelFile(f"The type of the tensor '{shown(name)}' is unknown ({code}).")
    type_name, block, block_bytes = TENSOR_TYPES[code]
    if dimensions[0] % block:
        raise InvalidModelFile(
            f"The rows of the tensor '{shown(name)}' ({dimensions[0]}) are no multiple of {block}, as {type_name} needs."
        )
    return Tensor(name, dimensions, type_name, cursor.count(what), math.prod(dimensions) // block * block_bytes)
