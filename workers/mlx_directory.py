"""Reads model directories in the MLX format (config.json, safetensors, tokenizer.json), which come from strangers, and trusts none of it.

Read before anything is stored, and again before an engine opens the directory: what could run code is refused (modules that the
configuration names, Python files, pickles), and so are files that are links to somewhere else, sizes beyond fixed limits, and
weights whose header does not fit the file. Formats: the documentation of safetensors, and that of Hugging Face's config files.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

from lmweb.errors import InvalidModelFile

MAX_CONFIG_BYTES: Final = 4 * 1024 * 1024
MAX_TOKENIZER_BYTES: Final = 128 * 1024 * 1024
MAX_TEMPLATE_BYTES: Final = 1024 * 1024
MAX_HEADER_BYTES: Final = 100 * 1000 * 1000  # safetensors' own limit
MAX_TENSORS: Final = 1_000_000
MAX_FILES: Final = 1000
MAX_ENDS: Final = 256
MAX_CONTEXT: Final = 16_777_216
#: Of models that do not say what they were trained with (recurrent ones have no limit of their own).
DEFAULT_CONTEXT: Final = 8192

CONFIG: Final = "config.json"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
GENERATION_CONFIG: Final = "generation_config.json"
TEMPLATE: Final = "chat_template.jinja"
INDEX: Final = "model.safetensors.index.json"
#: What belongs to a model, besides its weights.
SETTINGS: Final = (
    CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, TEMPLATE, INDEX,
    "chat_template.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "hf_quant_config.json",
)  # fmt: skip

_WEIGHTS: Final = re.compile(r"model[A-Za-z0-9._-]*\.safetensors")
_CODE: Final = re.compile(r".+\.(py|pyc|pyd|so|dylib|dll|sh)", re.IGNORECASE)
_PICKLE: Final = re.compile(r".+\.(bin|pt|pth|pkl|pickle|ckpt|joblib|npz|npy|h5|msgpack)", re.IGNORECASE)
_MODEL_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_DTYPE_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
#: Sizes that the model is built from before its weights are seen.
_BOUNDS: Final = {
    "num_hidden_layers": 1024, "n_layer": 1024, "n_layers": 1024, "hidden_size": 1_048_576, "intermediate_size": 8_388_608,
    "vocab_size": 8_388_608, "num_attention_heads": 65_536, "num_key_value_heads": 65_536, "head_dim": 65_536,
    "num_experts": 65_536, "num_local_experts": 65_536, "n_routed_experts": 65_536,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a weights file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Return how many numbers are stored."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class MlxDirectory:
    """What a directory says about its model.

    Attributes:
        files: where each of its files is, by name, the one that stands for the model first. Others in the directory are left alone.
        config: config.json.
        text_config: the part of it that describes the language model.
        tokenizer_config: tokenizer_config.json, empty if there is none.
        chat_template: from its own file, or from tokenizer_config.json.
        ends: the tokens that end an answer, by the configuration.
        tensors: all weights by name.
    """

    files: dict[str, Path]
    config: dict[str, Any]
    text_config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    chat_template: str
    ends: tuple[int, ...]
    tensors: dict[str, Tensor]

    @property
    def size_bytes(self) -> int:
        """Return what all files take on disk."""
        return sum(file.stat().st_size for file in self.files.values())

    @property
    def weights_bytes(self) -> int:
        """Return what the files of the weights take."""
        return sum(file.stat().st_size for name, file in self.files.items() if is_weights(name))

    @property
    def model_type(self) -> str:
        """Return the architecture's name."""
        return str(self.config["model_type"])

    def number(self, *names: str) -> int:
        """Return the first of these settings that is a positive number, of the language model or of the whole; 0 if none is."""
        for name in names:
            for source in (self.text_config, self.config):
                value = source.get(name)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return 0

    @property
    def layers(self) -> int:
        """Return the number of layers."""
        return self.number("num_hidden_layers", "n_layers", "n_layer") or 1

    @property
    def width(self) -> int:
        """Return how many numbers stand for a token between two layers."""
        return self.number("hidden_size", "n_embd", "d_model", "dim") or 1

    @property
    def heads(self) -> int:
        """Return the number of attention heads."""
        return self.number("num_attention_heads", "n_heads", "n_head") or 1

    @property
    def context_length(self) -> int:
        """Return the longest context that the model was trained for, in tokens."""
        names = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions", "n_ctx", "seq_length")
        return min(self.number(*names) or DEFAULT_CONTEXT, MAX_CONTEXT)

    @property
    def kv_bytes_per_token(self) -> int:
        """Return what one token's keys and values take in all layers: they have the precision of the computation."""
        exact = all(tensor.dtype == "F32" for tensor in self.tensors.values())
        if rank := self.number("kv_lora_rank"):  # multi-head latent attention keeps what keys and values are made from
            numbers = rank + self.number("qk_rope_head_dim")
        else:
            heads = self.number("num_key_value_heads", "n_kv_heads") or self.heads
            numbers = 2 * heads * (self.number("head_dim") or self.width // self.heads)
        return self.layers * numbers * (4 if exact else 2)

    def special(self, name: str) -> str:
        """Return the text of a special token such as ``bos_token``; empty for none."""
        value = self.tokenizer_config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) and len(value) <= 256 else ""


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights."""
    return bool(_WEIGHTS.fullmatch(name))


def is_part(name: str) -> bool:
    """Whether a file of this name belongs to a model."""
    return name in SETTINGS or is_weights(name)


def check_entries(path: Path) -> None:
    """Look at what lies in a directory that comes from elsewhere. Raises ``InvalidModelFile`` for code, pickles, and links that lead out."""
    root = path.resolve()
    for entry in _entries(path):
        name = _shown(entry.name)
        if _CODE.fullmatch(entry.name):
            raise InvalidModelFile(f"The directory contains program code ({name}), which lmweb does not run. Remove it and try again.")
        if _PICKLE.fullmatch(entry.name):
            raise InvalidModelFile(f"{name} may be a pickle, a format that can run code. Only safetensors are taken; remove the file.")
        if entry.is_symlink() and not entry.resolve().is_relative_to(root):
            raise InvalidModelFile(f"{name} is a link that leads out of the directory. Put the file itself in its place.")


def read_directory(path: Path) -> MlxDirectory:
    """Read and check what belongs to a model in a directory; see ``read_files``."""
    return read_files({entry.name: entry for entry in _entries(path)})


def read_files(candidates: Mapping[str, Path]) -> MlxDirectory:
    """Read and check everything but the numbers of the weights. Runs nothing and opens no other file.

    ``candidates`` are files by the names that they have in the directory. Raises ``InvalidModelFile`` in words.
    """
    ordered = [*SETTINGS, *sorted(filter(is_weights, candidates))]
    files = {name: candidates[name] for name in ordered if name in candidates}
    if CONFIG not in files:
        raise InvalidModelFile("The directory has no config.json, so it is no MLX model.")
    config = _read_json(files[CONFIG], CONFIG)
    _check_config(config)
    text_config = config.get("text_config")
    tokenizer_config = _optional_json(files, TOKENIZER_CONFIG)
    if TOKENIZER not in files:
        raise InvalidModelFile("The directory has no tokenizer.json, which this server needs.")
    _regular(files[TOKENIZER], TOKENIZER, MAX_TOKENIZER_BYTES)
    if not any(map(is_weights, files)):
        raise InvalidModelFile("The directory has no weights (model.safetensors).")
    _check_index(files)
    return MlxDirectory(
        files=files,
        config=config,
        text_config=text_config if isinstance(text_config, dict) else {},
        tokenizer_config=tokenizer_config,
        chat_template=_template(files, tokenizer_config),
        ends=_ends(files, config),
        tensors=_read_weights(files),
    )


def read_safetensors(path: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by its header, which must account for every byte.

    ``name`` is what the file is called in messages. Raises ``InvalidModelFile``.
    """
    size = _regular(path, name, 1 << 48)
    name = _shown(name)
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise InvalidModelFile(f"{name} is no safetensors file: its header does not fit into it.")
        header = _decode(stream.read(length), name)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise InvalidModelFile(f"{name} has more than {MAX_TENSORS} tensors.")
    spans = []
    tensors = {}
    for key, entry in header.items():
        tensors[key], span = _tensor(key, entry)
        spans.append(span)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise InvalidModelFile(f"The tensors of {name} overlap or leave gaps.")
        end = last
    if 8 + length + end != size:
        raise InvalidModelFile(f"{name} has {size} bytes; its header describes {8 + length + end}. It is damaged or not complete.")
    return tensors


def _tensor(key: str, entry: object) -> tuple[Tensor, tuple[int, int]]:
    shown = _shown(key)
    if not isinstance(entry, dict) or entry.get("dtype") not in _DTYPE_BYTES:
        raise InvalidModelFile(f"The tensor {shown} has no known type.")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_counts(shape) or len(shape) > 16 or not _are_counts(offsets) or len(offsets) != 2:
        raise InvalidModelFile(f"The tensor {shown} has no proper shape or place.")
    tensor = Tensor(entry["dtype"], tuple(shape))
    first, last = offsets
    if last - first != tensor.elements * _DTYPE_BYTES[tensor.dtype]:
        raise InvalidModelFile(f"The tensor {shown} has another size than its shape says.")
    return tensor, (first, last)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 48 for number in value)


def _read_weights(files: dict[str, Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, file in files.items():
        if not is_weights(name):
            continue
        found = read_safetensors(file, name)
        if twice := tensors.keys() & found.keys():
            raise InvalidModelFile(f"The tensor {_shown(min(twice))} is in two files.")
        tensors |= found
    return tensors


def _check_config(config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not _MODEL_TYPE.fullmatch(model_type):
        raise InvalidModelFile("config.json does not name the model's type (model_type).")
    for source in (config, config.get("text_config")):
        if not isinstance(source, dict):
            continue
        if source.get("model_file") is not None:
            raise InvalidModelFile(
                "config.json wants program code from the model's directory to be run (model_file). lmweb does not do that."
            )
        for name, most in _BOUNDS.items():
            value = source.get(name, 0)
            if isinstance(value, int | float) and not 0 <= value <= most:
                raise InvalidModelFile(f"config.json: {name} is out of range.")


def _check_index(files: dict[str, Path]) -> None:
    """Refuse an index that names weights which are not there."""
    if INDEX not in files:
        return
    parts = _read_json(files[INDEX], INDEX, limit=MAX_TOKENIZER_BYTES).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise InvalidModelFile(f"{INDEX} does not say where the weights are.")
    for name in sorted(set(parts.values())):
        if not is_weights(name) or name not in files:
            raise InvalidModelFile(f"A part of the weights is missing: {_shown(name)}.")


def _template(files: dict[str, Path], tokenizer_config: dict[str, Any]) -> str:
    if TEMPLATE in files:
        _regular(files[TEMPLATE], TEMPLATE, MAX_TEMPLATE_BYTES)
        return _storable(files[TEMPLATE].read_text(encoding="utf-8", errors="replace"))
    declared = tokenizer_config.get("chat_template")
    if declared is None:
        declared = _optional_json(files, "chat_template.json").get("chat_template")
    if isinstance(declared, list):  # several by name: the default, else the first
        named = {item["name"]: item.get("template") for item in declared if isinstance(item, dict) and isinstance(item.get("name"), str)}
        declared = named.get("default", next(iter(named.values()), None))
    return _storable(declared) if isinstance(declared, str) and len(declared) <= MAX_TEMPLATE_BYTES else ""


def _storable(text: str) -> str:
    """Return a text without what no database takes: NUL and halves of characters."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")


def _ends(files: dict[str, Path], config: dict[str, Any]) -> tuple[int, ...]:
    ends: dict[int, None] = {}
    for source in (config, config.get("text_config"), _optional_json(files, GENERATION_CONFIG)):
        value = source.get("eos_token_id") if isinstance(source, dict) else None
        for token in value if isinstance(value, list) else [value]:
            if type(token) is int and 0 <= token < _BOUNDS["vocab_size"] and len(ends) < MAX_ENDS:
                ends[token] = None
    return tuple(ends)


def _entries(path: Path) -> list[Path]:
    try:
        entries = sorted(path.iterdir())
    except NotADirectoryError:
        raise InvalidModelFile(f"{_shown(path.name)} is not a directory.") from None
    except OSError as error:
        raise InvalidModelFile(f"The directory {_shown(path.name)} cannot be read: {error.strerror}.") from None
    if len(entries) > MAX_FILES:
        raise InvalidModelFile(f"The directory has more than {MAX_FILES} entries.")
    return entries


def _regular(file: Path, name: str, limit: int) -> int:
    """Return the size of a regular file of at most ``limit`` bytes."""
    try:
        status = file.stat()
    except OSError as error:
        raise InvalidModelFile(f"{_shown(name)} cannot be read: {error.strerror}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidModelFile(f"{_shown(name)} is not a regular file.")
    if status.st_size > limit:
        raise InvalidModelFile(f"{_shown(name)} is larger than {limit // 1_000_000} MB.")
    return status.st_size


def _optional_json(files: dict[str, Path], name: str) -> dict[str, Any]:
    return _read_json(files[name], name) if name in files else {}


def _read_json(file: Path, name: str, *, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    _regular(file, name, limit)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InvalidModelFile(f"{_shown(name)} cannot be read: {error.strerror}.") from None
    return _decode(content, name)


def _decode(content: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise InvalidModelFile(f"{_shown(name)} does not contain valid JSON.") from None
    if not isinstance(value, dict):
        raise InvalidModelFile(f"{_shown(name)} does not contain a JSON object.")
    return value


def _shown(text: str) -> str:
    """Return a name from a file as it may stand in a message."""
    return "".join(char if char.isprintable() else "?" for char in text[:80])
