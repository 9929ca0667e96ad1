"""An MLX model as the engine needs it: weights from a checked directory, and the vocabulary. No policy.

Nothing of transformers reads the directory: its tokenizer classes and configurations can name code to run. The tokenizer is that
of ``tokenizer.json`` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
from llguidance import LLTokenizer
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING, load_model
from tokenizers import Tokenizer

from lmweb.errors import ModelLoadFailed
from workers.mlx_directory import CONFIG, TOKENIZER, MlxDirectory
from workers.parsing.visible import VISIBLE_SPECIALS

#: Weights are read so much at a time, between reports of progress.
READ_BYTES = 64 * 1024 * 1024
#: What the libraries raise for settings and weights that make no sense to them; one of mlx-lm's modules exits for want of a package.
_LIBRARY_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    OSError,
    ImportError,
    SystemExit,
)


class Vocabulary:
    """The tokens of a model. ``size`` is the width of its logits, which may be more than the tokenizer has."""

    def __init__(self, directory: MlxDirectory, size: int) -> None:
        """Read ``tokenizer.json``. Raises ``ModelLoadFailed``."""
        text = directory.files[TOKENIZER].read_text(encoding="utf-8", errors="replace")
        try:
            self._tokenizer = Tokenizer.from_str(text)
            self.ends = self._end_tokens(directory, size)
            self.table = LLTokenizer(text, n_vocab=size, eos_token=list(self.ends) or None)
        except Exception as error:  # the libraries raise nothing more specific for a file that they do not understand
            raise ModelLoadFailed(f"The model's tokenizer.json cannot be used: {_reason(error)}") from error
        self.size = size
        self.bos_text = directory.special("bos_token")
        self.eos_text = directory.special("eos_token")
        bos = self._tokenizer.token_to_id(self.bos_text) if self.bos_text else None
        opening = self._tokenizer.encode("", add_special_tokens=True).ids
        self._bos = [bos] if bos is not None and opening[:1] == [bos] else []
        added = self._tokenizer.get_added_tokens_decoder()
        self._shown = {number for number, token in added.items() if not token.special or token.content in VISIBLE_SPECIALS}
        self._pieces: dict[int, bytes] = {}

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """Return the tokens of a text; special tokens written in it count as such."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._bos + tokens if add_bos else tokens

    def piece(self, token: int) -> bytes:
        """Return a token's bytes; control tokens are empty except the markers that parsers look for."""
        found = self._pieces.get(token)
        if found is None:
            hidden = self.table.is_special_token(token) and token not in self._shown
            found = self._pieces[token] = b"" if hidden else self.table.decode_bytes([token])
        return found

    def _end_tokens(self, directory: MlxDirectory, size: int) -> frozenset[int]:
        declared = self._tokenizer.token_to_id(directory.special("eos_token") or "")
        return frozenset(token for token in (*directory.ends, declared) if token is not None and token < size)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory. ``can_trim``: its caches can take back tokens, so that a prefix of one can be used."""

    model: Any
    vocabulary: Vocabulary
    weights_bytes: int
    can_trim: bool


def open_model(directory: MlxDirectory, on_progress: Callable[[float], None]) -> Loaded:
    """Load weights and vocabulary. Raises ``ModelLoadFailed`` in words."""
    _check_architecture(directory)
    try:
        model, _ = load_model(directory.files[CONFIG].parent, lazy=True, trust_remote_code=False)
        _read_weights(model, on_progress)
        width = int(model(mx.array([[0]], dtype=mx.uint32)).shape[-1])
        cache = make_prompt_cache(model)
    except _LIBRARY_ERRORS as error:
        raise ModelLoadFailed(f"mlx-lm could not load the model: {_reason(error)}") from error
    if not all(hasattr(layer, "merge") for layer in cache):
        raise ModelLoadFailed(
            f"mlx-lm cannot compute several answers of a '{directory.model_type}' model together, which this server needs."
        )
    return Loaded(model, Vocabulary(directory, width), directory.weights_bytes, all(layer.is_trimmable() for layer in cache))


def _read_weights(model: Any, on_progress: Callable[[float], None]) -> None:
    """Bring the weights into memory, which ``load_model`` has only described, some at a time."""
    weights: list[Any] = [entry[1] for entry in tree_flatten(model.parameters())]
    total, done, batch, size = sum(value.nbytes for value in weights) or 1, 0, [], 0
    for value in weights:
        batch.append(value)
        size += value.nbytes
        if size >= READ_BYTES:
            mx.eval(batch)
            done, batch, size = done + size, [], 0
            on_progress(done / total)
    mx.eval(batch)
    on_progress(1.0)


def _check_architecture(directory: MlxDirectory) -> None:
    """Refuse a type that is no model of mlx-lm, before its name becomes that of a module to import."""
    name = directory.model_type
    for architecture in _architectures(directory):
        name = MODEL_ARCHITECTURE_REMAPPING.get((name, architecture), name)
    name = MODEL_REMAPPING.get(name, name)
    spec = find_spec("mlx_lm.models")
    folders = spec.submodule_search_locations if spec else None
    if not any((Path(folder) / f"{name}.py").is_file() for folder in folders or ()):
        raise ModelLoadFailed(f"mlx-lm has no models of the type '{directory.model_type}'.")


def _architectures(directory: MlxDirectory) -> list[str]:
    declared = directory.config.get("architectures")
    return [name for name in declared if isinstance(name, str)] if isinstance(declared, list) else []


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
