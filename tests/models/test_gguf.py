"""The parser accepts what the engine can load and refuses everything else with ``InvalidModelFile``, never with anything else."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import gguf as reference
import pytest
from hypothesis import given, settings, strategies as st

from lmweb.errors import InvalidModelFile
from models_app import gguf, gguf_header
from tests.micro_models import STARTER_GGUF, make_micro
from tests.models.hostile import VALID, RawTensor, hostile_files, mutants, numbers, string, strings, uint32

HOSTILE = hostile_files()


def parse(tmp_path: Path, data: bytes) -> gguf.ModelFile:
    file = tmp_path / "file.gguf"
    file.write_bytes(data)
    return gguf.read_model(file)


def test_starter_is_described() -> None:
    model = gguf.read_model(STARTER_GGUF)
    assert (model.architecture, model.type, model.quantization, model.bits_per_weight) == ("qwen3", "llm", "Q8_0", 8.0)
    assert (model.params_string, model.parameters, model.context_length, model.vocab_size) == ("5M", 5_008_768, 2048, 2912)
    assert model.capabilities == {"vision": False, "trained_for_tool_use": True, "reasoning": True}
    assert model.license == "apache-2.0"
    assert model.size_bytes == STARTER_GGUF.stat().st_size
    assert "<|im_start|>" in model.chat_template


@pytest.mark.parametrize(("quantization", "name"), [("f32", "F32"), ("f16", "F16"), ("q8_0", "Q8_0"), ("q4_0", "Q4_0")])
def test_written_models_are_read(tmp_path: Path, quantization: str, name: str) -> None:
    model = gguf.read_model(make_micro(tmp_path / "m.gguf", quantization=quantization, context=777, layers=3, name="My model"))
    assert (model.quantization, model.context_length, model.block_count, model.name) == (name, 777, 3, "My model")
    assert (model.head_counts, model.head_counts_kv) == ((4,), (2,))


def test_model_without_chat_template(tmp_path: Path) -> None:
    model = gguf.read_model(make_micro(tmp_path / "m.gguf", chat_template=None))
    assert model.chat_template == ""
    assert not any(model.capabilities.values())


def test_tensor_types_agree_with_the_reference() -> None:
    sizes = {kind.value: (kind.name, *reference.GGML_QUANT_SIZES[kind]) for kind in reference.GGMLQuantizationType}
    sizes[9] = ("Q8_1", 32, 36)  # the package counts two floats where the engine has two halves
    assert {code: sizes[code] for code in gguf_header.TENSOR_TYPES if code in sizes} == {
        c: t for c, t in gguf_header.TENSOR_TYPES.items() if c in sizes
    }
    assert set(sizes) <= set(gguf_header.TENSOR_TYPES)


def test_smallest_valid_file(tmp_path: Path) -> None:
    model = parse(tmp_path, VALID.encode())
    assert (model.name, model.context_length, model.vocab_size, model.parameters) == ("tiny one", 512, 3, 96)
    assert parse(tmp_path, replace(VALID, version=2).encode()).architecture == "llama"


@pytest.mark.parametrize(("architecture", "expected"), [("bert", "embedding"), ("nomic-bert-moe", "embedding"), ("llama", "llm")])
def test_type(tmp_path: Path, architecture: str, expected: str) -> None:
    values = {f"{architecture}__{name}": uint32(32) for name in ("context_length", "block_count", "embedding_length")}
    assert parse(tmp_path, VALID.with_values(general__architecture=string(architecture), **values).encode()).type == expected


def test_pooling_makes_an_embedding_model(tmp_path: Path) -> None:
    assert parse(tmp_path, VALID.with_values(llama__pooling_type=uint32(3)).encode()).type == "embedding"
    assert parse(tmp_path, VALID.with_values(llama__pooling_type=uint32(0)).encode()).type == "llm"


def test_head_counts_per_layer(tmp_path: Path) -> None:
    model = parse(tmp_path, VALID.with_values(llama__attention__head_count_kv=numbers(4, 0, 2)).encode())
    assert model.head_counts_kv == (4, 0, 2)


def test_labels_are_made_safe(tmp_path: Path) -> None:
    model = parse(tmp_path, VALID.with_values(general__name=string("a\u202eb\x1b[31m\n\t c\u200b" + "x" * 1000)).encode())
    assert model.name.startswith("ab[31m c")
    assert len(model.name) == 255
    assert model.name.isprintable()


def test_quantization_falls_back_to_the_tensors(tmp_path: Path) -> None:
    tensors = (RawTensor(type=8), RawTensor(name="norm", dimensions=(32,), offset=128))
    raw = replace(VALID, tensors=tensors, data_bytes=128 + 128)
    assert parse(tmp_path, raw.with_values(general__file_type=None).encode()).quantization == "Q8_0"
    assert parse(tmp_path, raw.with_values(general__file_type=uint32(1024)).encode()).quantization == "Q8_0"
    assert parse(tmp_path, raw.with_values(general__file_type=uint32(15)).encode()).quantization == "Q4_K_M"


@pytest.mark.parametrize(("label", "expected"), [("8x7B", "8x7B"), ("30B-A3B", "30B-A3B"), ("<b>x</b>", "96"), ("", "96")])
def test_params_string(tmp_path: Path, label: str, expected: str) -> None:
    assert parse(tmp_path, VALID.with_values(general__size_label=string(label)).encode()).params_string == expected


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_file_is_refused_in_words(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidModelFile) as caught:
        parse(tmp_path, HOSTILE[name])
    message = caught.value.message
    assert 15 < len(message) < 400
    assert message.endswith((".", "OUT.gguf"))
    assert message.isprintable()


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_file_is_refused_while_it_arrives(tmp_path: Path, name: str) -> None:
    """However it is cut into pieces, a beginning is never taken for a model, and the whole file is refused."""
    data, file = HOSTILE[name], tmp_path / "part"
    for end in {0, 1, 4, 8, 24, len(data) // 3, len(data) // 2}:
        file.write_bytes(data[: max(0, end)])
        try:
            assert not gguf.check_beginning(file, len(data)) or end >= len(data) // 3
        except InvalidModelFile:
            return
    file.write_bytes(data)
    with pytest.raises(InvalidModelFile):
        gguf.check_beginning(file, len(data))


def test_truncated_anywhere(tmp_path: Path) -> None:
    data = VALID.encode()
    for end in range(len(data)):
        with pytest.raises(InvalidModelFile):
            parse(tmp_path, data[:end])


def test_beginning_is_incomplete_until_the_header_is_there(tmp_path: Path) -> None:
    data, file = STARTER_GGUF.read_bytes(), tmp_path / "part"
    answers = []
    for end in (10, 1000, 50_000, 200_000, len(data)):
        file.write_bytes(data[:end])
        answers.append(gguf.check_beginning(file, len(data)))
    assert answers == [False, False, False, True, True]


def test_missing_and_unreadable_files_are_errors_too(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(InvalidModelFile):
            gguf.read_model(path)


def _outcome(file: Path, data: bytes) -> str:
    file.write_bytes(data)
    try:
        gguf.read_model(file)
    except InvalidModelFile:
        return "refused"
    return "accepted"


def test_two_thousand_mutations(tmp_path: Path) -> None:
    """Flipped, cut, repeated and overwritten bytes in headers never raise anything else."""
    micro = make_micro(tmp_path / "m.gguf", layers=1, quantization="q8_0").read_bytes()
    seeds = [VALID.encode(), VALID.encode(), micro, STARTER_GGUF.read_bytes()[:110_000]]
    outcomes = {"refused": 0, "accepted": 0}
    for data in mutants(seeds, 2000, seed=7):
        outcomes[_outcome(tmp_path / "mutant", data)] += 1
    assert outcomes["refused"] > 1000


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_after_the_magic(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "random.gguf"
    assert _outcome(file, b"GGUF\x03\x00\x00\x00" + data) == "refused"


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40), st.binary(max_size=60), st.integers(0, 12))
def test_any_metadata_entry(tmp_path_factory: pytest.TempPathFactory, key: str, value: bytes, kind: int) -> None:
    file = tmp_path_factory.getbasetemp() / "entry.gguf"
    _outcome(file, replace(VALID, metadata=[*VALID.metadata, (key, kind.to_bytes(4, "little") + value)]).encode())


def test_large_vocabulary_is_skipped_quickly_and_without_memory(tmp_path: Path) -> None:
    words = [f"token{n}" for n in range(152_000)]
    raw = VALID.with_values(
        tokenizer__ggml__tokens=strings(*words),
        tokenizer__ggml__token_type=numbers(*[1] * len(words)),
        tokenizer__ggml__merges=strings(*words),
    )
    file = tmp_path / "large.gguf"
    raw = replace(raw, tensors=(RawTensor(type=8, dimensions=(32, len(words))),), data_bytes=len(words) * 34)
    file.write_bytes(raw.encode())
    started = time.perf_counter()
    assert gguf.read_model(file).vocab_size == 152_000
    assert time.perf_counter() - started < 1.0
    tracemalloc.start()
    gguf.read_model(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000
