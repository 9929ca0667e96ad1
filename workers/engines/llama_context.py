"""A thin, safe layer over llama-cpp-python's low-level API: model, context, batch, KV operations. No policy."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as C
import numpy as np
from llguidance import LLTokenizer
from llguidance.llamacpp import lltokenizer_from_vocab
from numpy.typing import NDArray

from lmweb.errors import ModelLoadFailed
from workers.memory import kv_bytes_per_token
from workers.schemas import KvCacheType

GGML_LOG_LEVEL_ERROR = 4
_PIECE_BYTES = 512
KV_TYPES: dict[KvCacheType, int] = {
    "f32": C.GGML_TYPE_F32,
    "f16": C.GGML_TYPE_F16,
    "q8_0": C.GGML_TYPE_Q8_0,
    "q5_1": C.GGML_TYPE_Q5_1,
    "q5_0": C.GGML_TYPE_Q5_0,
    "q4_1": C.GGML_TYPE_Q4_1,
    "q4_0": C.GGML_TYPE_Q4_0,
    "iq4_nl": C.GGML_TYPE_IQ4_NL,
}


class _Log:
    """Keeps llama.cpp's last errors, which are the only explanation of a failed load."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.callback = C.llama_log_callback(self._write)

    def _write(self, level: int, text: bytes, _data: Any) -> None:
        if level == GGML_LOG_LEVEL_ERROR:
            self.errors = [*self.errors, text.decode("utf-8", "replace").strip()][:8]

    def reason(self) -> str:
        """Return the first complaint since ``clear``: later ones only say that the caller gave up."""
        if not self.errors:
            return "the engine gave no reason"
        return re.sub(r"^(?:llama_\w+:|error loading model:|\s)+", "", self.errors[0])

    def clear(self) -> None:
        self.errors = []


_log = _Log()


class Model:
    """Weights and vocabulary of one file."""

    def __init__(self, path: str, *, gpu_layers: int, on_progress: Callable[[float], None], experts: int | None = None) -> None:
        """Load the file; ``experts`` is how many experts of a mixture are to work on a token, None the model's own number.

        Raises ``ModelLoadFailed`` with the engine's own reason.
        """
        C.llama_log_set(_log.callback, ctypes.c_void_p(0))
        C.llama_backend_init()
        _log.clear()
        params = C.llama_model_default_params()
        params.n_gpu_layers = gpu_layers if gpu_layers >= 0 else 999_999

        if experts is not None:
            self._overrides = _expert_overrides(path, experts)
            params.kv_overrides = self._overrides

        def report(fraction: float, _data: Any) -> bool:
            on_progress(fraction)
            return True  # False would cancel the load

        self._progress = C.llama_progress_callback(report)  # must outlive the call
        params.progress_callback = self._progress
        self.handle = C.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise ModelLoadFailed(f"llama.cpp could not load the model: {_log.reason()}")
        self.vocab = C.llama_model_get_vocab(self.handle)
        self.vocab_size = C.llama_vocab_n_tokens(self.vocab)
        self.trained_context = C.llama_model_n_ctx_train(self.handle)
        self.width = C.llama_model_n_embd_out(self.handle)
        self.size_bytes = C.llama_model_size(self.handle)
        self.can_cut = not (C.llama_model_is_recurrent(self.handle) or C.llama_model_is_hybrid(self.handle))
        self._buffer = ctypes.create_string_buffer(_PIECE_BYTES)

    def kv_bytes_per_token(self) -> int:
        """Return the size of one token's keys and values at 16 bits, from the model's shape."""
        return kv_bytes_per_token(
            C.llama_model_n_layer(self.handle),
            C.llama_model_n_embd(self.handle),
            C.llama_model_n_head(self.handle),
            C.llama_model_n_head_kv(self.handle),
        )

    def metadata(self, key: str) -> str:
        """Return a metadata value as text, empty if absent."""
        return _metadata(self.handle, key)

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """Return the tokens of a text; special tokens written in it count as such."""
        raw = text.encode("utf-8", "replace")
        size = len(raw) + 8
        tokens = (C.llama_token * size)()
        n = C.llama_tokenize(self.vocab, raw, len(raw), tokens, size, add_bos, True)
        return list(tokens[:n])

    def piece(self, token: int, *, special: bool) -> bytes:
        """Return a token's bytes; ``special`` writes control tokens out too."""
        n = C.llama_token_to_piece(self.vocab, token, self._buffer, _PIECE_BYTES, 0, special)
        if n < 0:
            size = -n
            buffer = ctypes.create_string_buffer(size)
            n = C.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            return buffer.raw[: max(n, 0)]
        return self._buffer.raw[:n]

    def token_text(self, token: int) -> str:
        """Return the text of a special token such as BOS; empty for none."""
        if token < 0:
            return ""
        text = C.llama_vocab_get_text(self.vocab, token)
        return text.decode("utf-8", "replace") if text else ""

    def grammar_tokenizer(self) -> LLTokenizer:
        """Return the vocabulary in the form that constraints need; takes up to a second for 150,000 tokens."""
        ends = [token for token in range(self.vocab_size) if C.llama_vocab_is_eog(self.vocab, token)]
        return lltokenizer_from_vocab(self.vocab, eos_token=ends or None)

    def close(self) -> None:
        """Free the weights."""
        C.llama_model_free(self.handle)


def _expert_overrides(path: str, experts: int) -> Any:
    """Return llama.cpp's list of metadata to read differently: one number, and the empty entry that ends the list.

    Raises ``ModelLoadFailed`` for more experts than the model has.
    """
    params = C.llama_model_default_params()
    params.vocab_only = True  # reads the header, no weights
    handle = C.llama_model_load_from_file(os.fsencode(path), params)
    if not handle:
        raise ModelLoadFailed(f"llama.cpp could not load the model: {_log.reason()}")
    architecture = _metadata(handle, "general.architecture")
    available = _metadata(handle, f"{architecture}.expert_count") or "0"
    C.llama_model_free(handle)
    if experts > int(available):
        raise ModelLoadFailed(f"{experts} experts were asked for; this model has {available}.")
    overrides = (C.llama_model_kv_override * 2)()
    overrides[0].tag, overrides[0].key = C.LLAMA_KV_OVERRIDE_TYPE_INT, f"{architecture}.expert_used_count".encode()
    value: Any = overrides[0].value  # ctypes: a union, not what its declared type says
    value.val_i64 = experts
    return overrides


def _metadata(handle: Any, key: str) -> str:
    size = C.llama_model_meta_val_str(handle, key.encode(), None, 0)
    if size < 0:
        return ""
    buffer = ctypes.create_string_buffer(size + 1)
    C.llama_model_meta_val_str(handle, key.encode(), buffer, size + 1)
    return buffer.value.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class KvCache:
    """The precisions of keys and values, and whether a GPU's memory holds them."""

    keys: KvCacheType = "f16"
    values: KvCacheType = "f16"
    on_gpu: bool = True


@dataclass(frozen=True, slots=True)
class ContextSize:
    """How much a context holds: ``cells`` (tokens) in ``parallel`` sequences, ``batch_tokens`` per step, ``outputs`` of them with a result.

    Without ``is_unified`` each sequence has an equal part of the cells for itself.
    """

    cells: int
    parallel: int
    batch_tokens: int
    outputs: int
    is_unified: bool = True


class Context:
    """The KV cache and compute state over a model, with its own batch arrays (pointers set once, filled through numpy)."""

    def __init__(
        self,
        model: Model,
        *,
        size: ContextSize,
        threads: int,
        flash_attention: bool | None,
        pooling: int | None = None,
        kv: KvCache | None = None,
    ) -> None:
        """Create the context, with ``pooling`` (llama.cpp's number) one that computes embeddings instead of logits.

        Raises ``ModelLoadFailed``, usually for lack of memory.
        """
        params = C.llama_context_default_params()
        params.n_ctx, params.n_seq_max = size.cells, size.parallel
        params.n_batch = params.n_ubatch = size.batch_tokens
        params.n_outputs_max = size.outputs
        if pooling is not None:
            params.embeddings, params.pooling_type = True, pooling
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified, params.swa_full, params.no_perf = size.is_unified, True, True
        if kv is not None:
            params.type_k, params.type_v, params.offload_kqv = KV_TYPES[kv.keys], KV_TYPES[kv.values], kv.on_gpu
        params.flash_attn_type = -1 if flash_attention is None else int(flash_attention)
        _log.clear()
        self.handle = C.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise ModelLoadFailed(f"llama.cpp could not create a context of {size.cells} tokens: {_log.reason()}")
        self.is_unified = size.is_unified
        self._vocab_size, self._width = model.vocab_size, model.width
        self._memory = C.llama_get_memory(self.handle)
        self.tokens = np.zeros(size.batch_tokens, np.int32)
        self.positions = np.zeros(size.batch_tokens, np.int32)
        self.sequence_ids = np.zeros(size.batch_tokens, np.int32)
        self.outputs = np.zeros(size.batch_tokens, np.int8)
        self._batch = self._make_batch(size.batch_tokens)

    def _make_batch(self, n: int) -> Any:
        self._counts = np.ones(n, np.int32)
        self._pointers = np.arange(n, dtype=np.uint64) * 4 + np.uint64(self.sequence_ids.ctypes.data)
        batch: Any = C.llama_batch()  # ctypes: the declared field types are not what it takes
        batch.token = self.tokens.ctypes.data_as(ctypes.POINTER(C.llama_token))
        batch.pos = self.positions.ctypes.data_as(ctypes.POINTER(C.llama_pos))
        batch.n_seq_id = self._counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.seq_id = self._pointers.ctypes.data_as(type(batch.seq_id))
        batch.logits = self.outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        batch.embd = None
        return batch

    def decode(self, n: int) -> int:
        """Compute the first ``n`` entries of the batch arrays. Returns 0, or 1 when the KV cache has no room (nothing changed).

        Raises ``RuntimeError`` for a fatal engine error.
        """
        self._batch.n_tokens = n
        _log.clear()
        code: int = C.llama_decode(self.handle, self._batch)
        if code not in {0, 1}:
            raise RuntimeError(f"llama_decode returned {code}: {_log.reason()}")
        return code

    def logits(self, index: int) -> NDArray[np.float32]:
        """Return the logits of a batch entry as a writable view, valid until the next ``decode``."""
        return self._floats(C.llama_get_logits_ith(self.handle, index), self._vocab_size)

    @property
    def has_memory(self) -> bool:
        """Whether there is a KV cache or a state; encoders have none and cannot generate."""
        return bool(self._memory)

    def embedding(self, sequence: int) -> NDArray[np.float32]:
        """Return a copy of the pooled embedding of a sequence of the last batch."""
        return self._floats(C.llama_get_embeddings_seq(self.handle, sequence), self._width).copy()

    def token_embeddings(self, n: int) -> NDArray[np.float32]:
        """Return the embeddings of the first ``n`` batch entries as a view, valid until the next ``decode``."""
        return self._floats(C.llama_get_embeddings(self.handle), n * self._width).reshape(n, self._width)

    @staticmethod
    def _floats(pointer: Any, n: int) -> NDArray[np.float32]:
        array: NDArray[np.float32] = np.ctypeslib.as_array((ctypes.c_float * n).from_address(ctypes.addressof(pointer.contents)))
        return array

    def clear_all(self) -> None:
        """Remove all tokens of all sequences."""
        if self._memory:
            C.llama_memory_clear(self._memory, False)

    def copy(self, source: int, target: int, n: int) -> None:
        """Let ``target`` share the first ``n`` cells of ``source``, in a unified cache."""
        C.llama_memory_seq_cp(self._memory, source, target, 0, n)

    def cut(self, sequence: int, start: int) -> bool:
        """Remove the tokens from position ``start`` on. Returns False if this memory cannot be cut there."""
        return bool(C.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def clear(self, sequence: int) -> None:
        """Remove all tokens of a sequence."""
        C.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def save(self, sequence: int) -> bytearray:
        """Return the state of a sequence."""
        state = bytearray(C.llama_state_seq_get_size(self.handle, sequence))
        n = C.llama_state_seq_get_data(self.handle, (ctypes.c_uint8 * len(state)).from_buffer(state), len(state), sequence)
        return state if n == len(state) else state[:n]

    def restore(self, sequence: int, state: bytearray) -> bool:
        """Load a saved state into a free sequence. Returns False (and leaves it empty) when the cells do not suffice."""
        n = C.llama_state_seq_set_data(self.handle, (ctypes.c_uint8 * len(state)).from_buffer(state), len(state), sequence)
        if n == len(state):
            return True
        self.clear(sequence)
        return False

    def close(self) -> None:
        """Free the context."""
        C.llama_free(self.handle)
