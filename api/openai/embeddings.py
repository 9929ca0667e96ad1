"""``POST /v1/embeddings``: OpenAI's format of it, and the way to ours and back."""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Iterable
from typing import Literal

import msgspec

from api.body import parse
from api.openai.checks import without_nul
from api.openai.translate import invalid
from lmweb.decoding import convert
from lmweb.errors import GenerationInterrupted, InvalidRequest
from workers.events import AnyEvent, EmbeddingVectors, Stats
from workers.schemas import MAX_EMBEDDING_INPUTS, EmbeddingRequest

FLOAT_BYTES = 4


class EmbeddingsRequest(msgspec.Struct, frozen=True):
    """The body. ``truncate`` and ``ttl`` are not OpenAI's.

    The first cuts inputs that are longer than the model's context; the second is LM Studio's: seconds that the model stays without
    use if this request loads it.
    """

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    truncate: bool | None = None
    ttl: int | None = None


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """One vector: numbers, or the base64 of 32-bit little-endian floats."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """Exact token counts."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


_decoder = msgspec.json.Decoder(EmbeddingsRequest)


def parse_request(body: bytes) -> EmbeddingsRequest:
    """Decode a request body. Raises ``InvalidRequest`` that names the field at fault."""
    return parse(body, _decoder.decode, invalid)


def to_embedding_request(request: EmbeddingsRequest) -> EmbeddingRequest:
    """Translate a request. Raises ``InvalidRequest`` for inputs that are empty, too many or mixed, and values out of range."""
    inputs = _inputs(request.input)
    if not inputs:
        raise InvalidRequest("'input' is empty.", param="input")
    if len(inputs) > MAX_EMBEDDING_INPUTS:
        raise InvalidRequest(f"'input' has {len(inputs)} inputs; {MAX_EMBEDDING_INPUTS} is the most in one request.", param="input")
    for index, item in enumerate(inputs):
        where = f"input[{index}]" if len(inputs) > 1 else "input"
        if not item:
            raise InvalidRequest(f"'{where}' is empty.", param="input")
        if isinstance(item, str):
            without_nul(item, "input")
    data = {
        "model": request.model,
        "inputs": inputs,
        "dimensions": request.dimensions,
        "truncate": bool(request.truncate),
        "ttl_seconds": request.ttl,
    }
    try:
        return convert(data, EmbeddingRequest)
    except msgspec.ValidationError as error:
        raise invalid(error) from None


def _inputs(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Return the inputs: a text, a list of texts, a list of token ids, or a list of such lists."""
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(item, int) for item in given):
        return [[item for item in given if isinstance(item, int)]]
    inputs = [item for item in given if not isinstance(item, int)]
    if len(inputs) != len(given):
        raise InvalidRequest("'input' mixes token ids with texts or lists.", param="input")
    return inputs


class Collector:
    """Puts the ``count`` vectors of one request together, whatever the order and number of events that bring them."""

    def __init__(self, count: int, *, as_base64: bool) -> None:
        self._vectors: list[bytes] = [b""] * count
        self._encode = _base64 if as_base64 else _floats

    def take(self, events: Iterable[AnyEvent]) -> None:
        """Take the vectors out of some events. One that comes again, after a crash, replaces the first."""
        for event in events:
            if isinstance(event, EmbeddingVectors):
                size = event.width * FLOAT_BYTES
                for row in range(len(event.data) // size):
                    self._vectors[event.start + row] = event.data[row * size : (row + 1) * size]

    def answer(self, model: str, stats: Stats) -> Embeddings:
        """Return the whole answer. Raises ``GenerationInterrupted`` if vectors were lost with their stream."""
        if not all(self._vectors):
            raise GenerationInterrupted("The embeddings were lost before they could be read. Please send the request again.")
        return Embeddings(
            data=[Embedding(index=index, embedding=self._encode(vector)) for index, vector in enumerate(self._vectors)],
            model=model,
            usage=EmbeddingUsage(stats.input_tokens, stats.input_tokens),
        )


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()


def _floats(vector: bytes) -> list[float]:
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
