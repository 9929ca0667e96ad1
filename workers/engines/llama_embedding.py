"""Embeddings with llama.cpp: whole inputs at once through encoders (bert and its kin), chunk by chunk through decoders."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from lmweb.errors import InvalidRequest, ModelLoadFailed
from workers.constraints import ConstraintFactory
from workers.engines.base import EngineInfo, Sequence, StepResult, TokenTaker
from workers.engines.llama_context import Context, ContextSize, Model

import llama_cpp.llama_cpp as C  # isort: skip

#: Inputs per batch at most. llama.cpp aborts unless the tokens of a batch are a multiple of it.
MAX_INPUTS = 64
#: Tokens per batch of short inputs. In one batch of an encoder every token is compared with every other, also of other inputs,
#: so on a CPU larger batches cost more than they save (passages of 200 tokens: one per batch is 3 % faster than two, and 12 % than four).
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 256, 2048
#: llama.cpp keeps room for the logits of every embedded token; it must stay small.
LOGITS_BYTES = 128 * 1024 * 1024
#: Families trained so that the first part of a vector is a vector too (Matryoshka), by the names on their cards; GGUF has no key for it.
_SHORTENABLE = re.compile(
    r"nomic.?embed.?text.?v1\.5|nomic.?embed.?text.?v2|qwen3.?embedding|embedding.?gemma|mxbai.?embed.?large"
    r"|(snowflake.?)?arctic.?embed.*(v1\.5|v2)|jina.?embeddings.?v[3-9]",
    re.IGNORECASE,
)


class Pooling(IntEnum):
    """How the vectors of tokens become one; llama.cpp's numbers."""

    NONE = 0
    MEAN = 1
    CLS = 2
    LAST = 3
    RANK = 4


def declared_pooling(model: Model) -> Pooling | None:
    """Return what the file says about pooling: what a model made for embeddings says, and others do not.

    Raises ``ModelLoadFailed`` for kinds that give no vectors.
    """
    text = model.metadata(f"{model.metadata('general.architecture')}.pooling_type")
    if not text or text == "0":
        return None
    if text == str(int(Pooling.RANK)):
        raise ModelLoadFailed("This model ranks pairs of texts; it neither writes nor makes embeddings, so it cannot be used here.")
    try:
        return Pooling(int(text))
    except ValueError:
        raise ModelLoadFailed(f"The model's pooling type is unknown ({text[:20]}).") from None


class LlamaEmbedder:
    """See ``workers.engines.base.Embedder``. Contexts are made when the first input comes, and larger ones for longer inputs."""

    def __init__(self, model: Model, *, limit: int, threads: int, flash_attention: bool | None, on_gpu: bool) -> None:
        """``limit`` is the longest input in tokens. Raises ``ModelLoadFailed`` for lack of memory."""
        self._model = model
        self._threads, self._flash_attention = threads, flash_attention
        self.limit = min(limit, model.trained_context)
        self.width: int = model.width
        self.max_inputs = MAX_INPUTS
        self.closing_tokens = int(self.tokenize("a")[-1:] in ([C.llama_vocab_eos(model.vocab)], [C.llama_vocab_sep(model.vocab)]))
        self.can_shorten = bool(_SHORTENABLE.search(f"{model.metadata('general.name')} {model.metadata('general.basename')}"))
        self._pooling = declared_pooling(model) or Pooling.MEAN
        fitting = min(GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS, LOGITS_BYTES // (4 * model.vocab_size))
        self.batch_tokens = max(MAX_INPUTS, fitting // MAX_INPUTS * MAX_INPUTS)
        self._context = self._make_context(self.batch_tokens, self._pooling)
        causal = model.metadata(f"{model.metadata('general.architecture')}.attention.causal") != "false"
        self._in_chunks = self._context.has_memory and causal
        if self._in_chunks:  # the pooling is done here, so that an input may be longer than a batch
            self._context.close()
            self._context = self._make_context(self.batch_tokens, Pooling.NONE)
        self._size = self.batch_tokens

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, with those that the model wants around it."""
        return self._model.tokenize(text, add_bos=True)

    def embed(self, inputs: list[list[int]]) -> Iterator[NDArray[np.float32] | None]:
        """Yield None while there is more to compute, then one row of length 1 per input, in their order."""
        self._grow(sum(map(len, inputs)))
        self._context.clear_all()
        rows = (yield from self._chunks(inputs)) if self._in_chunks else self._whole(inputs)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        yield rows / np.maximum(length, 1e-12)

    def close(self) -> None:
        """Free the context."""
        self._context.close()

    def _whole(self, inputs: list[list[int]]) -> NDArray[np.float32]:
        self._context.decode(self._fill(_flat(inputs)))
        return np.stack([self._context.embedding(i) for i in range(len(inputs))])

    def _chunks(self, inputs: list[list[int]]) -> Generator[None, None, NDArray[np.float32]]:
        entries = _flat(inputs)
        sums = np.zeros((len(inputs), self.width), np.float32)
        lasts = np.cumsum([len(tokens) for tokens in inputs]) - 1
        firsts = np.concatenate(([0], lasts[:-1] + 1))
        for start in range(0, entries.shape[1], self.batch_tokens):
            if start:
                yield None
            chunk = entries[:, start : start + self.batch_tokens]
            if self._context.decode(self._fill(chunk)):
                raise RuntimeError("the embedding context has no room for its batch")
            vectors = self._context.token_embeddings(chunk.shape[1])
            if self._pooling == Pooling.MEAN:
                np.add.at(sums, chunk[2], vectors)
            else:
                wanted = firsts if self._pooling == Pooling.CLS else lasts
                here = (wanted >= start) & (wanted < start + chunk.shape[1])
                sums[here] = vectors[wanted[here] - start]
        return sums  # the mean has the same direction

    def _fill(self, entries: NDArray[np.int32]) -> int:
        n = int(entries.shape[1])
        context = self._context
        context.tokens[:n], context.positions[:n], context.sequence_ids[:n] = entries
        context.outputs[:n] = 1
        return n

    def _grow(self, tokens: int) -> None:
        """Make room for a batch of so many tokens. Raises ``ModelLoadFailed`` if there is none; the old context remains then."""
        if tokens <= self._size:
            return
        size = 1 << (tokens - 1).bit_length()
        larger = self._make_context(size, Pooling.NONE if self._in_chunks else self._pooling)
        self._context.close()
        self._context, self._size = larger, size

    def _make_context(self, size: int, pooling: Pooling) -> Context:
        batch_tokens = self.batch_tokens if pooling is Pooling.NONE else size
        return Context(
            self._model,
            size=ContextSize(max(size, 256), MAX_INPUTS, batch_tokens, outputs=batch_tokens),
            threads=self._threads,
            flash_attention=self._flash_attention,
            pooling=pooling,
        )


def _flat(inputs: list[list[int]]) -> NDArray[np.int32]:
    """Return three rows: tokens, positions and input numbers of all inputs, one after the other."""
    lengths = [len(tokens) for tokens in inputs]
    return np.array(
        [
            [token for tokens in inputs for token in tokens],
            np.concatenate([np.arange(n) for n in lengths]),
            np.repeat(np.arange(len(inputs)), lengths),
        ],
        np.int32,
    )


class LlamaEmbeddingEngine:
    """A model that makes embeddings and nothing else. Everything about generating refuses or has nothing to do."""

    def __init__(self, model: Model, embedder: LlamaEmbedder, info: EngineInfo) -> None:
        self.model = model
        self.info = info
        self._embedder = embedder
        self.has_work = False

    def embedder(self) -> LlamaEmbedder:
        """Return what computes embeddings."""
        return self._embedder

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """Return the tokens of a text."""
        return self.model.tokenize(text, add_bos=add_bos)

    def piece(self, token: int) -> bytes:
        """Return a token's bytes."""
        return self.model.piece(token, special=False)

    def is_end(self, token: int) -> bool:
        """Return False: nothing is generated."""
        return False

    def constraints(self) -> ConstraintFactory:
        """Refuse."""
        raise _cannot_generate()

    def add(self, sequence: Sequence) -> None:
        """Refuse."""
        raise _cannot_generate()

    def remove(self, sequence_id: str) -> None:
        """Ignore: there is none."""

    def queue(self) -> list[Sequence]:
        """Return nothing: nobody waits."""
        return []

    def use_draft(self, key: str, path: str) -> bool:
        """Refuse: vectors are not guessed."""
        raise InvalidRequest("A model that makes embeddings has no use for a draft model.", param="draft_model")

    def step(self, take: TokenTaker) -> StepResult:
        """Do nothing."""
        return StepResult()

    def close(self) -> None:
        """Free everything."""
        self._embedder.close()
        self.model.close()


def _cannot_generate() -> InvalidRequest:
    return InvalidRequest("This model makes embeddings; it cannot write.", param="model")
