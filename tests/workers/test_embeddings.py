"""Embeddings: the same vectors as llama.cpp gives each input alone, in the order asked for, whoever else is served meanwhile."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.micro_models import make_micro, make_micro_bert
from workers.engines import registry
from workers.engines.base import Engine
from workers.schemas import EmbeddingRequest, LoadConfig, request_to_builtins

if TYPE_CHECKING:
    from models_app.models import Generation, InstalledModel
    from tests.workers.support import Bench

MEAN = 1


def texts(count: int, words: int = 12) -> list[str]:
    """Return texts of various lengths."""
    rng = random.Random(7)
    syllables = ["to", "be", "or", "no", "in", "at", "we", "us", "he", "me"]
    return [" ".join(rng.choice(syllables) for _ in range(rng.randrange(1, 2 * words))) for _ in range(count)]


def reference(path: Path, inputs: list[str], **options: Any) -> NDArray[np.float32]:
    """Return what llama.cpp's own high-level interface says to each input alone."""
    model = llama_cpp.Llama(str(path), embedding=True, n_ctx=2048, n_batch=2048, n_ubatch=2048, n_threads=1, verbose=False, **options)
    try:
        return np.array([model.embed(text, normalize=True) for text in inputs], np.float32)
    finally:
        model.close()


def open_engine(path: Path) -> Engine:
    return registry.factory("llama.cpp")(str(path), LoadConfig(context_length=2048, parallel=4, cpu_threads=1), lambda _: None)


def embed(engine: Engine, inputs: list[str]) -> NDArray[np.float32]:
    embedder = engine.embedder()
    rows = [row for row in embedder.embed([embedder.tokenize(text) for text in inputs]) if row is not None]
    assert len(rows) == 1
    return rows[0]


def assert_same(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    cosines = np.sum(found * expected, axis=1)
    assert cosines.min() > 0.9999, cosines


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_micro_bert(tmp_path_factory.mktemp("embeddings") / "bert.gguf")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_micro(tmp_path_factory.mktemp("embeddings") / "decoder.gguf")


# --- the engine alone -------------------------------------------------------------------------------------------------


def test_a_batch_through_an_encoder_is_what_llama_cpp_says_to_each_input_alone(bert: Path) -> None:
    engine = open_engine(bert)
    inputs = texts(24)
    assert not engine.info.can_generate
    assert_same(embed(engine, inputs), reference(bert, inputs))
    engine.close()


def test_a_batch_through_a_decoder_is_what_llama_cpp_says_to_each_input_alone_also_in_chunks(decoder: Path) -> None:
    engine = open_engine(decoder)
    inputs = [*texts(6), " ".join(texts(60)), *texts(3, words=40)]
    embedder = engine.embedder()
    assert len(embedder.tokenize(inputs[6])) > 2 * embedder.batch_tokens
    assert_same(embed(engine, inputs), reference(decoder, inputs, pooling_type=MEAN))
    engine.close()


def test_an_encoder_grows_for_a_longer_input_and_says_the_same_before_and_after(bert: Path) -> None:
    engine = open_engine(bert)
    short, long = texts(2), ["to be " * 220]
    before = embed(engine, short)
    assert len(engine.embedder().tokenize(long[0])) > engine.embedder().batch_tokens
    assert_same(embed(engine, long), reference(bert, long))
    assert_same(embed(engine, short), before)
    engine.close()


# --- through host and runner ------------------------------------------------------------------------------------------


@pytest.fixture
def embedding_model(bench: Bench, bert: Path) -> InstalledModel:
    return bench.install(bert, "test/bert", type="embedding", architecture="bert", max_context_length=512)


def request(bench: Bench, model: InstalledModel, inputs: list[Any], **fields: Any) -> Generation:
    from models_app.models import Generation

    native = EmbeddingRequest(model=model.key, inputs=inputs, **fields)
    generation = Generation.objects.create(
        user=bench.principal.user,
        source="test",
        model=model,
        model_key=model.key,
        request=request_to_builtins(native),
        node="test-node",
    )
    bench.host.generate(str(generation.pk))
    return generation


def vectors(bench: Bench, generation: Generation, count: int) -> NDArray[np.float32]:
    """Return the vectors of a finished request, as its viewer puts them together."""
    from workers.events import EmbeddingVectors

    found: dict[int, NDArray[np.float32]] = {}
    for event in bench.events(generation):
        if isinstance(event, EmbeddingVectors):
            for row, vector in enumerate(np.frombuffer(event.data, "<f4").reshape(-1, event.width)):
                found[event.start + row] = vector
    assert sorted(found) == list(range(count))
    return np.stack([found[index] for index in range(count)])


def test_two_requests_of_many_inputs_share_batches_and_keep_their_order(bench: Bench, embedding_model: InstalledModel, bert: Path) -> None:
    inputs = texts(200)
    first = request(bench, embedding_model, inputs)
    second = request(bench, embedding_model, inputs[::-1][:50])
    expected = reference(bert, inputs)
    assert bench.finished(first).status == bench.finished(second).status == "completed"
    np.testing.assert_allclose(vectors(bench, first, 200), expected, atol=2e-3)
    np.testing.assert_allclose(vectors(bench, second, 50), expected[::-1][:50], atol=2e-3)
    model = llama_cpp.Llama(str(bert), embedding=True, vocab_only=True, verbose=False)
    assert first.stats["input_tokens"] == sum(len(model.tokenize(text.encode(), special=True)) for text in inputs)
    assert "inputs" not in first.request, "what was embedded is not kept"
    assert 0 < bench.redis.ttl(f"gen:{first.pk}") <= 60


def test_a_language_model_embeds_while_it_writes(bench: Bench, decoder: Path) -> None:
    from tests.workers.support import GREEDY

    model = bench.install(decoder)
    sampling = msgspec.structs.replace(GREEDY, max_tokens=300)
    alone = bench.run(model, "to be", sampling=sampling)
    talking = bench.create(model, "to be", sampling=sampling)
    bench.host.generate(str(talking.pk))
    embedding = request(bench, model, texts(30))
    assert bench.finished(embedding).status == "completed"
    assert_same(vectors(bench, embedding, 30), reference(decoder, texts(30), pooling_type=MEAN))
    assert bench.finished(talking).content == alone.content


def test_token_ids_are_taken_as_they_are(bench: Bench, embedding_model: InstalledModel, bert: Path) -> None:
    model = llama_cpp.Llama(str(bert), embedding=True, vocab_only=True, verbose=False)
    ids = model.tokenize(b"to be or not", special=True)
    generation = bench.finished(request(bench, embedding_model, [ids, "to be or not"]))
    by_ids, by_text = vectors(bench, generation, 2)
    np.testing.assert_allclose(by_ids, by_text, atol=1e-3)
    for wrong in ([10**6], [-1]):
        refused = bench.finished(request(bench, embedding_model, ["fine", wrong]))
        assert (refused.status, refused.error_code) == ("failed", "invalid_request")
        assert "Input 1 has token ids outside" in refused.error_message


def test_an_input_beyond_the_context_is_an_error_or_cut_when_asked(bench: Bench, embedding_model: InstalledModel, bert: Path) -> None:
    long = "to " * 700
    refused = bench.finished(request(bench, embedding_model, ["be", long]))
    assert (refused.status, refused.error_code) == ("failed", "context_length_exceeded")
    assert refused.error_message == 'Input 1 has 702 tokens, but the model takes 512. Shorten it, or send "truncate": true.'
    cut = bench.finished(request(bench, embedding_model, ["be", long], truncate=True))
    assert cut.stats["input_tokens"] == 3 + 512
    assert_same(vectors(bench, cut, 2)[1:], reference(bert, ["to " * 510]))


def test_dimensions_only_where_the_model_was_trained_for_it(
    bench: Bench, embedding_model: InstalledModel, bert: Path, tmp_path: Path
) -> None:
    refused = bench.finished(request(bench, embedding_model, ["to be"], dimensions=16))
    assert "were not trained to be shortened" in refused.error_message
    too_many = bench.finished(request(bench, embedding_model, ["to be"], dimensions=65))
    assert too_many.error_message == "The model's embeddings have 64 dimensions, not 65."
    whole = bench.finished(request(bench, embedding_model, ["to be"], dimensions=64))
    assert whole.status == "completed"
    file = make_micro_bert(tmp_path / "nomic.gguf", name="nomic-embed-text-v1.5")
    nomic = bench.install(file, "test/nomic", type="embedding", max_context_length=512)
    short = vectors(bench, bench.finished(request(bench, nomic, ["to be"], dimensions=16)), 1)[0]
    expected = reference(file, ["to be"])[0][:16]
    np.testing.assert_allclose(short, expected / np.linalg.norm(expected), atol=1e-3)


def test_a_cancelled_request_ends_and_its_neighbour_does_not_notice(bench: Bench, embedding_model: InstalledModel) -> None:
    bench.finished(request(bench, embedding_model, ["to"]))
    big = request(bench, embedding_model, ["to be " * 200] * 2000)
    small = request(bench, embedding_model, texts(5))
    assert bench.finished(small).status == "completed"
    bench.host.cancel(str(big.pk))
    ended = bench.finished(big, seconds=5)
    assert ended.status == "cancelled"
    assert bench.finished(request(bench, embedding_model, ["be"])).status == "completed"


def test_a_killed_runner_is_replaced_and_no_vector_is_missing(bench: Bench, embedding_model: InstalledModel, bert: Path) -> None:
    from tests.workers.support import wait_for

    bench.finished(request(bench, embedding_model, ["to"]))
    inputs = texts(70) + ["to be " * 200] * 400
    generation = request(bench, embedding_model, inputs)
    wait_for(lambda: len(bench.entries(generation)) > 0)
    for runner in list(bench.host.runners.by_id.values()):
        os.kill(runner.process.pid, signal.SIGKILL)
    assert bench.finished(generation).status == "completed"
    assert generation.resumes == 1
    found = vectors(bench, generation, 470)
    assert_same(found[:70], reference(bert, inputs[:70]))
    np.testing.assert_allclose(found[70:], np.broadcast_to(reference(bert, inputs[-1:]), (400, 64)), atol=2e-3)


def test_an_embedding_model_does_not_chat(bench: Bench, embedding_model: InstalledModel, settings: Any) -> None:
    from lmweb.errors import InvalidRequest
    from models_app.generations import start_generation
    from workers.schemas import ChatMessage, GenerationRequest

    chat = GenerationRequest(model=embedding_model.key, messages=[ChatMessage(role="user", content="hello")])
    with pytest.raises(InvalidRequest, match="is an embedding model"):
        start_generation(principal=bench.principal, request=chat, source="test")
    # Also when the row does not know what the file is.
    embedding_model.type = "llm"
    embedding_model.save()
    refused = bench.finished(_sent(bench, embedding_model))
    assert (refused.status, refused.error_code) == ("failed", "invalid_request")
    assert "cannot chat" in refused.error_message


def _sent(bench: Bench, model: InstalledModel) -> Generation:
    generation = bench.create(model, "hello")
    bench.host.generate(str(generation.pk))
    return generation
