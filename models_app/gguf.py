"""Reads the header of GGUF model files, which come from strangers, without trusting a byte of them.

Every count, length, dimension, type and offset is checked against the size of the file and against fixed limits before it is
used. Nothing is allocated in proportion to a number in the file: vocabularies are skipped, and only short texts and lists are
kept. What llama.cpp's own loader would refuse is refused here first, in words, so that no broken file is ever stored.

Supported are versions 2 and 3, little-endian. The format is described in the documentation of ggml ("GGUF").
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal

from lmweb.errors import InvalidModelFile
from workers.parsing.reasoning import THINK, tags_of

MAX_HEADER_BYTES: Final = 128 * 1024 * 1024  # the largest vocabularies in use need about 20 MB
MAX_KEYS: Final = 4096
MAX_TENSORS: Final = 65_536
MAX_KEY_BYTES: Final = 1024
MAX_TENSOR_NAME_BYTES: Final = 63
MAX_TENSOR_ELEMENTS: Final = 2**48
MAX_ALIGNMENT: Final = 1024 * 1024
MAX_TEXT_BYTES: Final = 1024 * 1024
MAX_CONTEXT: Final = 16_777_216
MAX_LAYERS: Final = 512
MAX_WIDTH: Final = 1_048_576
MAX_PARTS: Final = 1000

_WINDOW_BYTES: Final = 1024 * 1024

# The types of metadata values: code -> struct format. 8 is a string, 9 an array.
_SCALARS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9

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

#: ``general.file_type``: how most of the weights are stored.
FILE_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L",
    14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
    36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0",
}  # fmt: skip

# Only these are kept, so that a header full of long texts or lists costs time but no memory.
_KEPT_TEXTS: Final = {
    "general.architecture", "general.description", "general.license", "general.name", "general.organization", "general.size_label",
    "general.type", "tokenizer.chat_template", "tokenizer.ggml.model",
}  # fmt: skip
_KEPT_LISTS: Final = (".attention.head_count", ".attention.head_count_kv")

_FIRST_PART = re.compile(r"(?P<stem>.+)-00001-of-(?P<count>[0-9]{5})\.gguf")
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_SIZE_LABEL = re.compile(r"[0-9][0-9A-Za-z.x-]{0,31}")
_EMBEDDING_ARCHITECTURE = re.compile(r"(.+-)?bert(-.+)?|eurobert|t5encoder|gemma-embedding|llama-embed")

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


@dataclass(frozen=True)
class ModelFile:
    """What lmweb needs to know of a model file. Texts are safe to store and show; sizes are in bytes, lengths in tokens."""

    architecture: str
    name: str
    type: Literal["llm", "embedding"]
    organization: str
    description: str
    license: str
    quantization: str
    bits_per_weight: float | None
    parameters: int
    params_string: str
    size_bytes: int
    context_length: int
    vocab_size: int
    block_count: int
    embedding_length: int
    head_counts: tuple[int, ...]
    head_counts_kv: tuple[int, ...]
    key_length: int
    value_length: int
    chat_template: str
    capabilities: dict[str, bool]


def read_model(path: Path) -> ModelFile:
    """Read and check a whole model, given its file or the first of its parts.

    Raises ``InvalidModelFile`` for anything that is not a complete, loadable model.
    """
    return read_parts(part_paths(path))


def part_paths(path: Path) -> list[Path]:
    """Return the files of the model that begins with ``path``: itself, or all parts of one that was split."""
    part = _FIRST_PART.fullmatch(path.name)
    count = int(part["count"]) if part else 1
    if part is None or not 1 < count <= MAX_PARTS:
        return [path]
    return [path.with_name(f"{part['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def read_parts(paths: list[Path]) -> ModelFile:
    """Read and check a model whose parts, in order, are these files; one file is a whole model. Raises ``InvalidModelFile``."""
    return describe(*read_headers(paths))


def read_headers(paths: list[Path]) -> tuple[Header, int]:
    """Return the header that a model would have in one file, and the size of all its parts. Raises ``InvalidModelFile``."""
    headers: list[Header] = []
    size = 0
    for path in paths:
        try:
            with path.open("rb") as stream:
                headers.append(read_header(stream))
                size += os.fstat(stream.fileno()).st_size
        except OSError as error:
            what = f"Part {len(headers) + 1} of {len(paths)} of the model" if len(paths) > 1 else "The file"
            raise InvalidModelFile(f"{what} cannot be read: {error.strerror or error}.") from None
    return (headers[0] if len(headers) == 1 else _joined(headers)), size


def _joined(headers: list[Header]) -> Header:
    """Return the header that the model would have in one file."""
    tensors: list[Tensor] = []
    for number, header in enumerate(headers):
        if header.metadata.get("split.no") != number or header.metadata.get("split.count") != len(headers):
            raise InvalidModelFile(f"Part {number + 1} of {len(headers)} of this model is not what its name says.")
        tensors += header.tensors
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise InvalidModelFile("Two parts of this model hold the same weights.")
    if headers[0].metadata.get("split.tensors.count", len(tensors)) != len(tensors):
        raise InvalidModelFile("The parts of this model do not hold all of its weights.")
    metadata = {key: value for key, value in headers[0].metadata.items() if not key.startswith("split.")}
    return Header(headers[0].version, metadata, tensors, headers[0].data_start)


def check_projector(path: Path) -> None:
    """Raise ``InvalidModelFile`` unless a file is a vision projector."""
    try:
        with path.open("rb") as stream:
            header = read_header(stream)
    except OSError as error:
        raise InvalidModelFile(f"The file cannot be read: {error.strerror or error}.") from None
    if header.metadata.get("general.architecture") != "clip" and header.metadata.get("general.type") != "mmproj":
        raise InvalidModelFile("The file that should be the model's vision projector is something else.")


def read_header(stream: BinaryIO) -> Header:
    """Parse the header of a complete file. Raises ``InvalidModelFile``."""
    size = stream.seek(0, os.SEEK_END)
    try:
        return _parse(_Cursor(stream, size, size))
    except _IncompleteError:  # cannot happen: all of the file is there
        raise InvalidModelFile("The file ends within its header.") from None


def check_beginning(path: Path, total_size: int) -> bool:
    """Check as much as has arrived of a file that will have ``total_size`` bytes.

    Returns True once the whole header is there and describes a model, False while more bytes are needed to tell.
    Raises ``InvalidModelFile`` as soon as it is clear that this is none.
    """
    try:
        with path.open("rb") as stream:
            available = min(os.fstat(stream.fileno()).st_size, total_size)
            describe(_parse(_Cursor(stream, total_size, available)), total_size)
    except _IncompleteError:
        return False
    except OSError as error:
        raise InvalidModelFile(f"The file cannot be read: {error.strerror or error}.") from None
    return True


#: Vocabularies of one family differ in the first, special tokens, and in unused ones at the end (llama.cpp's tolerance).
_FIRST_COMPARED_TOKEN: Final = 5
_MAX_SIZE_DIFFERENCE: Final = 128


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as far as two are compared. ``digests`` maps lengths, from ``size`` down, to the hash of so many tokens."""

    kind: str
    size: int
    ends: tuple[Value, ...]
    digests: dict[int, bytes]

    def mismatch(self, draft: Vocabulary) -> str:
        """Return why the tokens of a draft model with that vocabulary cannot be used with this one, empty if they can."""
        if self.kind != draft.kind:
            return "its tokenizer is of another kind"
        if abs(self.size - draft.size) > _MAX_SIZE_DIFFERENCE:
            return f"it knows {draft.size} tokens, the model {self.size}"
        common = min(self.size, draft.size)
        if self.ends != draft.ends or self.digests[common] != draft.digests[common]:
            return "its tokens are others than the model's"
        return ""


def read_vocabulary(path: Path) -> Vocabulary:
    """Read the vocabulary of a model file. Raises ``InvalidModelFile``."""
    try:
        with path.open("rb") as stream:
            header = read_header(stream)
            tokens = header.metadata.get("tokenizer.ggml.tokens")
            if not isinstance(tokens, Array) or tokens.element_type != _STRING:
                raise InvalidModelFile("The file has no vocabulary (tokenizer.ggml.tokens).")
            digests = _digest_tokens(stream, tokens)
    except OSError as error:
        raise InvalidModelFile(f"The file cannot be read: {error.strerror or error}.") from None
    ends = tuple(header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    return Vocabulary(str(header.metadata.get("tokenizer.ggml.model")), tokens.length, ends, digests)


def _digest_tokens(stream: BinaryIO, tokens: Array) -> dict[int, bytes]:
    cursor = _Cursor(stream, *[stream.seek(0, os.SEEK_END)] * 2)
    cursor.skip(tokens.start, "the vocabulary")
    cursor.skip_strings(min(_FIRST_COMPARED_TOKEN, tokens.length), "the vocabulary")
    found, digest = {}, hashlib.blake2b(digest_size=16)
    for n in range(min(_FIRST_COMPARED_TOKEN, tokens.length) + 1, tokens.length + 1):
        length = cursor.count("the vocabulary")
        if length > MAX_TEXT_BYTES:
            raise InvalidModelFile("A token of the vocabulary is too long.")
        digest.update(length.to_bytes(8, "little") + cursor.take(length, "the vocabulary"))
        if n >= tokens.length - _MAX_SIZE_DIFFERENCE:
            found[n] = digest.digest()
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


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
            raise InvalidModelFile(f"The metadata key '{_shown(key)}' occurs twice.")
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
    what = f"the metadata value '{_shown(key)}'"
    kind = int(cursor.number("<I", what))
    if kind == _ARRAY:
        return _read_array(cursor, what, keep=key.endswith(_KEPT_LISTS))
    if kind == _STRING:
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
    if kind != _STRING and kind not in _SCALARS:
        raise InvalidModelFile(f"The type of {what} is unknown ({kind}).")
    element = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind])
    if length > cursor.remaining // element:
        raise InvalidModelFile(f"The file claims {length} elements for {what}, more than fit into it.")
    start = cursor.position
    if keep and kind != _STRING and length <= MAX_LAYERS:
        return Array(kind, length, [_read_number(cursor, kind, what) for _ in range(length)], start)
    if kind == _STRING:
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
            raise InvalidModelFile(f"The tensor '{_shown(tensor.name)}' occurs twice.")
        if tensor.offset != expected_offset:
            raise InvalidModelFile(f"The tensor '{_shown(tensor.name)}' lies at offset {tensor.offset} instead of {expected_offset}.")
        seen.add(tensor.name)
        tensors.append(tensor)
        expected_offset = _padded(tensor.offset + tensor.size, alignment)
    return tensors


def _read_tensor(cursor: _Cursor) -> Tensor:
    name = _read_name(cursor, MAX_TENSOR_NAME_BYTES, "a tensor's name")
    what = f"the tensor '{_shown(name)}'"
    dimension_count = int(cursor.number("<I", what))
    if not 1 <= dimension_count <= 4:
        raise InvalidModelFile(f"The tensor '{_shown(name)}' has {dimension_count} dimensions; 1 to 4 are possible.")
    dimensions = tuple(cursor.count(what) for _ in range(dimension_count))
    if min(dimensions) < 1 or max(dimensions) > MAX_TENSOR_ELEMENTS or math.prod(dimensions) > MAX_TENSOR_ELEMENTS:
        raise InvalidModelFile(f"The dimensions of the tensor '{_shown(name)}' are impossible: {' x '.join(map(str, dimensions))}.")
    code = int(cursor.number("<I", what))
    if code not in TENSOR_TYPES:
        raise InvalidModelFile(f"The type of the tensor '{_shown(name)}' is unknown ({code}).")
    type_name, block, block_bytes = TENSOR_TYPES[code]
    if dimensions[0] % block:
        raise InvalidModelFile(
            f"The rows of the tensor '{_shown(name)}' ({dimensions[0]}) are no multiple of {block}, as {type_name} needs."
        )
    return Tensor(name, dimensions, type_name, cursor.count(what), math.prod(dimensions) // block * block_bytes)


# --- meaning ----------------------------------------------------------------------------------------------------------


def describe(header: Header, file_size: int) -> ModelFile:
    """Return what the header says about the model. Raises ``InvalidModelFile`` for values out of range and for what is no model."""
    facts = _Facts(header.metadata)
    _refuse_other_kinds(header, facts)
    vocab_size = facts.vocabulary()
    _check_embedding(header, vocab_size)
    parameters = sum(tensor.elements for tensor in header.tensors)
    quantization = _quantization(header, facts)
    template = facts.text("tokenizer.chat_template")
    heads = facts.numbers("attention.head_count", 0, 65_536, default=1)
    return ModelFile(
        architecture=facts.architecture,
        name=facts.label("general.name"),
        type=_model_type(facts),
        organization=facts.label("general.organization"),
        description=facts.label("general.description", 2000),
        license=facts.label("general.license"),
        quantization=quantization,
        bits_per_weight=_nominal_bits(quantization),
        parameters=parameters,
        params_string=_params_string(facts, parameters),
        size_bytes=file_size,
        context_length=facts.number("context_length", 1, MAX_CONTEXT),
        vocab_size=vocab_size,
        block_count=facts.number("block_count", 1, MAX_LAYERS),
        embedding_length=facts.number("embedding_length", 1, MAX_WIDTH),
        head_counts=heads,
        head_counts_kv=facts.numbers("attention.head_count_kv", 0, 65_536, default=max(heads)),
        key_length=facts.number("attention.key_length", 0, 65_536, default=0),
        value_length=facts.number("attention.value_length", 0, 65_536, default=0),
        chat_template=template,
        capabilities=_capabilities(template),
    )


class _Facts:
    """Typed access to the metadata of one architecture."""

    def __init__(self, metadata: dict[str, Value]) -> None:
        self.metadata = metadata
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or not _ARCHITECTURE.fullmatch(architecture):
            raise InvalidModelFile("The file does not name its architecture (general.architecture).")
        self.architecture = architecture

    def text(self, key: str) -> str:
        value = self.metadata.get(key, "")
        if not isinstance(value, str):
            raise InvalidModelFile(f"'{key}' is not a text.")
        return value

    def label(self, key: str, limit: int = 255) -> str:
        """Return a text for people, on one line and without invisible or direction-changing characters, cut to ``limit``."""
        text = self.text(key)[: 4 * limit]
        text = "".join(" " if char.isspace() else char for char in text if char.isspace() or unicodedata.category(char)[0] != "C")
        return " ".join(text.split())[:limit].strip()

    def number(self, name: str, low: int, high: int, default: int | None = None) -> int:
        key = f"{self.architecture}.{name}"
        value = self.metadata.get(key, default)
        if value is None:
            raise InvalidModelFile(f"The file does not say its '{key}'.")
        return _in_range(key, value, low, high)

    def numbers(self, name: str, low: int, high: int, default: int) -> tuple[int, ...]:
        """Return a value that is one number for all layers, or a list with one per layer."""
        key = f"{self.architecture}.{name}"
        value = self.metadata.get(key, default)
        if not isinstance(value, Array):
            return (_in_range(key, value, low, high),)
        if not value.values or value.length > MAX_LAYERS:
            raise InvalidModelFile(f"'{key}' has {value.length} elements; 1 to {MAX_LAYERS} are possible.")
        return tuple(_in_range(key, element, low, high) for element in value.values)

    def vocabulary(self) -> int:
        """Return the number of tokens; parallel lists must be as long as the vocabulary, or the engine would read past their end."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, Array) or tokens.element_type != _STRING or not tokens.length:
            raise InvalidModelFile("The file has no vocabulary (tokenizer.ggml.tokens).")
        for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
            parallel = self.metadata.get(key)
            if parallel is not None and not (isinstance(parallel, Array) and parallel.length == tokens.length):
                raise InvalidModelFile(f"'{key}' is not as long as the vocabulary.")
        return tokens.length


def _in_range(key: str, value: Value, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidModelFile(f"'{key}' is not a whole number.")
    if not low <= value <= high:
        raise InvalidModelFile(f"'{key}' is {value}; {low} to {high} is possible.")
    return value


def _refuse_other_kinds(header: Header, facts: _Facts) -> None:
    kind = header.metadata.get("general.type", "model")
    if facts.architecture == "clip" or kind == "mmproj":
        raise InvalidModelFile("This is a vision projector (mmproj), not a model. Import the model that it belongs to.")
    if kind == "adapter" or "adapter.type" in header.metadata:
        raise InvalidModelFile("This is a LoRA adapter, not a model. Import a model that it was merged into.")
    if kind == "imatrix" or "imatrix.datasets" in header.metadata:
        raise InvalidModelFile("This is an importance matrix for quantizing, not a model.")
    parts = header.metadata.get("split.count", 1)
    if isinstance(parts, Array) or not isinstance(parts, int) or parts > 1:
        raise InvalidModelFile(
            "This is one part of a model that was split over several files. Import the first one (-00001-of-...) with all others beside it."
        )
    if not header.tensors:
        raise InvalidModelFile("The file has no weights, only a vocabulary.")


def _check_embedding(header: Header, vocab_size: int) -> None:
    """Refuse what has no row of weights for every token: every language model has this tensor, under this name."""
    embedding = next((tensor for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None:
        raise InvalidModelFile("The file has no token embedding (token_embd.weight), so it is no language model.")
    rows = embedding.elements // embedding.dimensions[0]
    if rows != vocab_size:
        raise InvalidModelFile(f"The token embedding has {rows} rows for a vocabulary of {vocab_size} tokens.")


def _model_type(facts: _Facts) -> Literal["llm", "embedding"]:
    pooling = facts.metadata.get(f"{facts.architecture}.pooling_type")  # 0 means none
    return "embedding" if pooling or _EMBEDDING_ARCHITECTURE.fullmatch(facts.architecture) else "llm"


def _quantization(header: Header, facts: _Facts) -> str:
    declared = facts.metadata.get("general.file_type")
    if isinstance(declared, int) and declared in FILE_TYPES:
        return FILE_TYPES[declared]
    elements: dict[str, int] = {}
    for tensor in header.tensors:
        elements[tensor.type_name] = elements.get(tensor.type_name, 0) + tensor.elements
    return max(elements, key=lambda name: elements[name])


def _nominal_bits(quantization: str) -> float | None:
    """Return the bits per weight as people name them: 4 for Q4_K_M."""
    digits = re.search(r"\d+", quantization)
    return float(digits.group()) if digits else None


def _params_string(facts: _Facts, parameters: int) -> str:
    label = facts.label("general.size_label", 32)
    if _SIZE_LABEL.fullmatch(label):
        return label
    for factor, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= factor * 0.95:
            value = parameters / factor
            digits = 0 if value >= 9.95 else 1
            return f"{value:.{digits}f}".removesuffix(".0") + unit
    return str(parameters)


def _capabilities(template: str) -> dict[str, bool]:
    """Return what the chat template shows that the model was trained for. Vision needs a projector, which is not supported."""
    has_tags = bool(re.search(r"<think>|</think>|enable_thinking|reasoning_content|<\|channel\|>analysis", template))
    return {
        "vision": False,
        "trained_for_tool_use": bool(re.search(r"\btools\b|<tool_call>|\btool_calls\b", template)),
        "reasoning": has_tags or tags_of(template) is not THINK,
    }


def _shown(name: str) -> str:
    """Return a name from the file as it may stand in a message."""
    return "".join(char if char.isprintable() else "?" for char in name[:80])
