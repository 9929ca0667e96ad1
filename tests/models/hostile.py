"""Builds small GGUF files byte by byte, valid ones and every kind of broken one."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
F32, Q8_0, Q4_K = 0, 8, 12
HUGE = 2**64 - 1


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def string(value: str | bytes) -> bytes:
    return struct.pack("<I", STRING) + text(value)


def uint32(value: int) -> bytes:
    return struct.pack("<II", UINT32, value)


def int32(value: int) -> bytes:
    return struct.pack("<Ii", INT32, value)


def float32(value: float) -> bytes:
    return struct.pack("<If", FLOAT32, value)


def boolean(value: int) -> bytes:
    return struct.pack("<IB", BOOL, value)


def strings(*values: str, count: int | None = None) -> bytes:
    return struct.pack("<IIQ", ARRAY, STRING, len(values) if count is None else count) + b"".join(map(text, values))


def numbers(*values: int, kind: int = UINT32, count: int | None = None) -> bytes:
    head = struct.pack("<IIQ", ARRAY, kind, len(values) if count is None else count)
    return head + b"".join(struct.pack("<I", value) for value in values)


@dataclass(frozen=True)
class RawTensor:
    name: str | bytes = "token_embd.weight"
    dimensions: tuple[int, ...] = (32, 3)
    type: int = F32
    offset: int = 0
    dimension_count: int | None = None

    def encode(self) -> bytes:
        count = len(self.dimensions) if self.dimension_count is None else self.dimension_count
        shape = b"".join(struct.pack("<Q", n) for n in self.dimensions)
        return text(self.name) + struct.pack("<I", count) + shape + struct.pack("<IQ", self.type, self.offset)


METADATA = {
    "general.architecture": string("llama"),
    "general.name": string("tiny one"),
    "general.file_type": uint32(0),
    "llama.context_length": uint32(512),
    "llama.block_count": uint32(1),
    "llama.embedding_length": uint32(32),
    "llama.attention.head_count": uint32(4),
    "tokenizer.ggml.model": string("gpt2"),
    "tokenizer.ggml.tokens": strings("a", "b", "c"),
    "tokenizer.ggml.token_type": numbers(1, 1, 1),
}


@dataclass(frozen=True)
class RawModel:
    """A GGUF file; every part can be made wrong."""

    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None
    metadata: list[tuple[str | bytes, bytes]] = field(default_factory=lambda: list(METADATA.items()))
    tensors: tuple[RawTensor, ...] = (RawTensor(),)
    data_bytes: int = 384

    def with_values(self, **values: bytes | None) -> RawModel:
        """Replace or add metadata; ``__`` in a name stands for a dot, None removes the entry."""
        merged: dict[str | bytes, bytes | None] = {
            **dict(self.metadata),
            **{key.replace("__", "."): value for key, value in values.items()},
        }
        return replace(self, metadata=[(key, value) for key, value in merged.items() if value is not None])

    def header(self) -> bytes:
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        keys = len(self.metadata) if self.key_count is None else self.key_count
        head = self.magic + struct.pack("<IQQ", self.version, tensors, keys)
        return head + b"".join(text(key) + value for key, value in self.metadata) + b"".join(t.encode() for t in self.tensors)

    def encode(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % 32) + bytes(self.data_bytes)


VALID = RawModel()


def hostile_files() -> dict[str, bytes]:
    """Return broken or foreign files by what is wrong with them."""
    two = replace(VALID, data_bytes=768)
    v = VALID.with_values
    models: dict[str, RawModel] = {
        "version 0": replace(VALID, version=0),
        "version 1": replace(VALID, version=1),
        "version 4": replace(VALID, version=4),
        "big-endian": replace(VALID, version=0x03000000),
        "tensor count beyond the file": replace(VALID, tensor_count=50_000),
        "tensor count overflow": replace(VALID, tensor_count=HUGE),
        "tensor count one too many": replace(VALID, tensor_count=2),
        "key count beyond the file": replace(VALID, key_count=4000),
        "key count overflow": replace(VALID, key_count=HUGE),
        "key count one too many": replace(VALID, key_count=len(METADATA) + 1),
        "empty key": replace(VALID, metadata=[*METADATA.items(), ("", uint32(1))]),
        "duplicate key": replace(VALID, metadata=[*METADATA.items(), ("general.name", string("again"))]),
        "key of 1 MB": replace(VALID, metadata=[*METADATA.items(), ("k" * 1_000_000, uint32(1))]),
        "key is no UTF-8": replace(VALID, metadata=[*METADATA.items(), (b"\xff\xfe", uint32(1))]),
        "key with NUL": replace(VALID, metadata=[*METADATA.items(), ("a\x00b", uint32(1))]),
        "string length overflow": v(general__name=struct.pack("<IQ", STRING, HUGE)),
        "string length beyond the file": v(general__name=struct.pack("<IQ", STRING, 10_000)),
        "skipped string length overflow": v(general__url=struct.pack("<IQ", STRING, HUGE)),
        "unknown value type": v(general__x=struct.pack("<II", 99, 0)),
        "unknown element type": v(general__x=struct.pack("<IIQ", ARRAY, 99, 1)),
        "boolean 7": v(general__x=boolean(7)),
        "not a number": v(llama__rope__freq_base=float32(float("nan"))),
        "infinite": v(llama__rope__freq_base=float32(float("inf"))),
        "array in array": v(general__x=struct.pack("<IIQ", ARRAY, ARRAY, 1) + numbers(1)),
        "array length overflow": v(general__x=numbers(count=HUGE)),
        "array length beyond the file": v(general__x=numbers(count=100_000)),
        "string array length overflow": v(tokenizer__ggml__tokens=strings("a", count=HUGE)),
        "string array longer than it says": v(tokenizer__ggml__tokens=strings("a", "b", "c", count=4)),
        "string in array overflow": v(tokenizer__ggml__tokens=struct.pack("<IIQQ", ARRAY, STRING, 1, HUGE)),
        "no architecture": v(general__architecture=None),
        "architecture is a number": v(general__architecture=uint32(3)),
        "architecture is a path": v(general__architecture=string("../../etc/passwd")),
        "no context length": v(llama__context_length=None),
        "context length 0": v(llama__context_length=uint32(0)),
        "context length negative": v(llama__context_length=int32(-1)),
        "context length huge": v(llama__context_length=uint32(2**32 - 1)),
        "context length is text": v(llama__context_length=string("many")),
        "context length is a list": v(llama__context_length=numbers(512)),
        "no layers": v(llama__block_count=uint32(0)),
        "a billion layers": v(llama__block_count=uint32(10**9)),
        "width 0": v(llama__embedding_length=uint32(0)),
        "head count huge": v(llama__attention__head_count=uint32(2**31)),
        "head count is a fraction": v(llama__attention__head_count=float32(1.5)),
        "head count is an empty list": v(llama__attention__head_count=numbers()),
        "head counts for 600 layers": v(llama__attention__head_count=numbers(*[4] * 600)),
        "no vocabulary": v(tokenizer__ggml__tokens=None),
        "vocabulary of numbers": v(tokenizer__ggml__tokens=numbers(1, 2, 3)),
        "token types shorter than the vocabulary": v(tokenizer__ggml__token_type=numbers(1)),
        "scores shorter than the vocabulary": v(tokenizer__ggml__scores=numbers(1, kind=FLOAT32)),
        "chat template is no UTF-8": v(tokenizer__chat_template=string(b"\xc3\x28")),
        "chat template with NUL": v(tokenizer__chat_template=string("a\x00b")),
        "chat template of 2 MB": v(tokenizer__chat_template=string("x" * 2_000_000)),
        "chat template is a number": v(tokenizer__chat_template=uint32(1)),
        "alignment 0": v(general__alignment=uint32(0)),
        "alignment 48": v(general__alignment=uint32(48)),
        "alignment huge": v(general__alignment=uint32(2**31)),
        "alignment is text": v(general__alignment=string("32")),
        "tensor without name": replace(VALID, tensors=(RawTensor(name=""),)),
        "tensor name too long": replace(VALID, tensors=(RawTensor(name="x" * 64),)),
        "tensor without dimensions": replace(VALID, tensors=(RawTensor(dimensions=()),)),
        "tensor with five dimensions": replace(VALID, tensors=(RawTensor(dimensions=(32, 1, 1, 1, 1)),)),
        "tensor with 4 billion dimensions": replace(VALID, tensors=(RawTensor(dimension_count=2**32 - 1),)),
        "dimension 0": replace(VALID, tensors=(RawTensor(dimensions=(32, 0)),)),
        "dimension negative": replace(VALID, tensors=(RawTensor(dimensions=(32, HUGE)),)),
        "dimensions overflow": replace(VALID, tensors=(RawTensor(dimensions=(2**40, 2**40)),)),
        "tensor larger than the file": replace(VALID, tensors=(RawTensor(dimensions=(32, 4)),)),
        "unknown tensor type": replace(VALID, tensors=(RawTensor(type=77),)),
        "removed tensor type": replace(VALID, tensors=(RawTensor(type=4),)),
        "rows no multiple of the block": replace(VALID, tensors=(RawTensor(type=Q4_K),)),
        "offset not aligned": replace(VALID, tensors=(RawTensor(offset=8),)),
        "offset beyond the file": replace(VALID, tensors=(RawTensor(offset=2**40),)),
        "offset overflow": replace(VALID, tensors=(RawTensor(offset=HUGE - 31),)),
        "tensors overlap": replace(two, tensors=(RawTensor(), RawTensor(name="other", offset=0))),
        "gap between tensors": replace(two, tensors=(RawTensor(), RawTensor(name="other", offset=416))),
        "duplicate tensor": replace(two, tensors=(RawTensor(), RawTensor(offset=384))),
        "no token embedding": replace(VALID, tensors=(RawTensor(name="output.weight"),)),
        "embedding smaller than the vocabulary": replace(VALID, tensors=(RawTensor(dimensions=(32, 2)),)),
        "embedding of another shape": replace(VALID, tensors=(RawTensor(dimensions=(96,)),)),
        "vocabulary only": replace(VALID, tensors=(), data_bytes=0),
        "vision projector": v(general__architecture=string("clip")),
        "adapter": v(general__type=string("adapter"), adapter__type=string("lora")),
        "importance matrix": v(general__type=string("imatrix")),
        "first part of three": v(split__count=uint32(3), split__no=uint32(0)),
        "part count is text": v(split__count=string("3")),
    }
    files = {name: model.encode() for name, model in models.items()}
    valid = VALID.encode()
    files |= {
        "empty": b"",
        "magic only": b"GGUF",
        "text": b"Hello, this is no model at all.\n" * 100,
        "pickle": b"\x80\x04\x95" + bytes(500),
        "zip": b"PK\x03\x04" + bytes(500),
        "safetensors": struct.pack("<Q", 64) + b'{"__metadata__":{"format":"pt"}}' + bytes(300),
        "zeros": bytes(4096),
        "one byte short": valid[:-1],
        "only the header": VALID.header(),
    }
    return files


def mutants(seeds: Sequence[bytes], count: int, *, seed: int) -> Iterator[bytes]:
    """Yield model files whose headers were flipped, overwritten, cut or repeated in up to four places, the same ones every time."""
    rng = random.Random(seed)
    for number in range(count):
        data = bytearray(seeds[number % len(seeds)])
        # Most of the interesting numbers are at the beginning; vocabularies fill the rest of real headers.
        limit = min(len(data), 1000 if number % 2 else _header_bytes(data))
        for _ in range(rng.randint(1, 4)):
            _mutate(rng, data, limit)
            limit = min(limit, len(data)) or 1
        yield bytes(data)


def _header_bytes(data: bytearray) -> int:
    found = data.rfind(b".weight")  # the name of the last tensor
    return found + 64 if found > 0 else len(data)


def _mutate(rng: random.Random, data: bytearray, limit: int) -> None:
    at, kind = rng.randrange(limit), rng.randrange(5)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at : at + 8] = rng.choice([HUGE, 2**63, 2**32, 2**31, 0, 1]).to_bytes(8, "little")
    elif kind == 2:
        data[at : at + 4] = rng.randbytes(4)
    elif kind == 3:
        del data[at : at + rng.randint(1, 64)]
    else:
        data[at:at] = data[at : at + rng.randint(1, 64)]


def overwrite(data: bytes, key: str, value: bytes, *, skip: int = 0) -> bytes:
    """Return a model file with other bytes in a metadata value, ``skip`` bytes after its type."""
    at = data.index(text(key)) + 8 + len(key) + 4 + skip
    return data[:at] + value + data[at + len(value) :]


def engine_killers(model: bytes) -> dict[str, bytes]:
    """Return files that the parser lets through and that make llama.cpp end its process, by what is wrong with them.

    ``model`` is a micro model of the architecture qwen2; its first two tokens have names of one length.
    """
    tokens, array_head = "tokenizer.ggml.tokens", 4 + 8
    first = text_at(model, tokens, array_head)
    return {
        "two tokens of one name": overwrite(model, tokens, text(first) + text(first), skip=array_head),
        "normalization with a negative number": overwrite(model, "qwen2.attention.layer_norm_rms_epsilon", struct.pack("<f", -1.0)),
    }


def text_at(data: bytes, key: str, skip: int) -> bytes:
    """Return the text that begins so many bytes after the type of a metadata value."""
    at = data.index(text(key)) + 8 + len(key) + 4 + skip
    return data[at + 8 : at + 8 + struct.unpack_from("<Q", data, at)[0]]
