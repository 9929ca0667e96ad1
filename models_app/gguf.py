"""What a GGUF file says about the model in it: facts to store and show, parts that belong together, vocabularies to compare.

What llama.cpp's own loader would refuse is refused here first, in words, so that no broken file is ever stored. The bytes are read
by ``models_app.gguf_header``, which trusts none of them.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal

from lmweb.errors import InvalidModelFile
from models_app.gguf_header import STRING, Array, Header, Tensor, Value, opened, read_beginning, read_header, read_strings
from workers.parsing.reasoning import THINK, tags_of

FORMAT: Final = "gguf"
MAX_CONTEXT: Final = 16_777_216
MAX_LAYERS: Final = 512
MAX_WIDTH: Final = 1_048_576
MAX_PARTS: Final = 1000

#: ``general.file_type``: how most of the weights are stored.
FILE_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L",
    14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
    36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0",
}  # fmt: skip

_FIRST_PART = re.compile(r"(?P<stem>.+)-00001-of-(?P<count>[0-9]{5})\.gguf")
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_SIZE_LABEL = re.compile(r"[0-9][0-9A-Za-z.x-]{0,31}")
_EMBEDDING_ARCHITECTURE = re.compile(r"(.+-)?bert(-.+)?|eurobert|t5encoder|gemma-embedding|llama-embed")


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
    expert_count: int = 0


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
    for number, path in enumerate(paths, 1):
        with opened(path, f"Part {number} of {len(paths)} of the model" if len(paths) > 1 else "The file") as stream:
            headers.append(read_header(stream))
            size += os.fstat(stream.fileno()).st_size
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
    with opened(path) as stream:
        header = read_header(stream)
    if header.metadata.get("general.architecture") != "clip" and header.metadata.get("general.type") != "mmproj":
        raise InvalidModelFile("The file that should be the model's vision projector is something else.")


def check_beginning(path: Path, total_size: int) -> bool:
    """Check as much as has arrived of a file that will have ``total_size`` bytes.

    Returns True once the whole header is there and describes a model, False while more bytes are needed to tell.
    Raises ``InvalidModelFile`` as soon as it is clear that this is none.
    """
    with opened(path) as stream:
        header = read_beginning(stream, total_size, min(os.fstat(stream.fileno()).st_size, total_size))
    if header is not None:
        describe(header, total_size)
    return header is not None


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
    with opened(path) as stream:
        header = read_header(stream)
        tokens = header.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, Array) or tokens.element_type != STRING:
            raise InvalidModelFile("The file has no vocabulary (tokenizer.ggml.tokens).")
        digests = _digest_tokens(stream, tokens)
    ends = tuple(header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    return Vocabulary(str(header.metadata.get("tokenizer.ggml.model")), tokens.length, ends, digests)


def _digest_tokens(stream: BinaryIO, tokens: Array) -> dict[int, bytes]:
    found, digest = {}, hashlib.blake2b(digest_size=16)
    for n, token in enumerate(read_strings(stream, tokens, skip=_FIRST_COMPARED_TOKEN), _FIRST_COMPARED_TOKEN + 1):
        digest.update(len(token).to_bytes(8, "little") + token)
        if n >= tokens.length - _MAX_SIZE_DIFFERENCE:
            found[n] = digest.digest()
    return found


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
        expert_count=facts.number("expert_count", 0, 65_536, default=0),
        chat_template=template,
        capabilities=capabilities(template),
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
        if not isinstance(tokens, Array) or tokens.element_type != STRING or not tokens.length:
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
    return label if _SIZE_LABEL.fullmatch(label) else size_label(parameters)


def size_label(parameters: int) -> str:
    """Return a number of parameters as people say it: 7B."""
    for factor, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= factor * 0.95:
            value = parameters / factor
            digits = 0 if value >= 9.95 else 1
            return f"{value:.{digits}f}".removesuffix(".0") + unit
    return str(parameters)


def capabilities(template: str) -> dict[str, bool]:
    """Return what the chat template shows that the model was trained for. Vision needs a projector, which is not supported."""
    has_tags = bool(re.search(r"<think>|</think>|enable_thinking|reasoning_content|<\|channel\|>analysis", template))
    return {
        "vision": False,
        "trained_for_tool_use": bool(re.search(r"\btools\b|<tool_call>|\btool_calls\b", template)),
        "reasoning": has_tags or tags_of(template) is not THINK,
    }
