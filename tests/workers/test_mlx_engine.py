"""What only the MLX engine has to cope with: architectures with other kinds of memory, quantized weights, directories that make no sense."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from lmweb.errors import ModelLoadFailed
from tests.micro_models import STARTER_MLX, make_micro_mlx, starter_vocabulary
from tests.workers.engines import WORDS, alone, finish, open_engine, sequence
from workers.engines.mlx_engine import MlxEngine
from workers.engines.mlx_model import Vocabulary
from workers.mlx_directory import read_directory

COMMON = {
    "vocab_size": len(starter_vocabulary().tokens),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
#: A window that slides; layers with a state of fixed size beside layers with attention.
KINDS: dict[str, dict[str, Any]] = {
    "sliding": {
        "model_type": "gemma3_text", "intermediate_size": 128, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24,
        "sliding_window_pattern": 2,
    },
    "hybrid": {
        "model_type": "lfm2", "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 64, "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "intermediate_size": 128, "full_attn_idxs": [1],
    },
}  # fmt: skip


def make(folder: Path, config: dict[str, Any], *, bits: int = 0) -> Path:
    """Write a model with random weights and return its config.json."""
    folder.mkdir()
    config = {**COMMON, **config}
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict(config))
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STARTER_MLX / name, folder / name)
    return folder / "config.json"


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_memory_are_batched_and_cached(tmp_path: Path, kind: str) -> None:
    file = make(tmp_path / "m", KINDS[kind])
    engine = open_engine("mlx-lm", file, context_length=512, parallel=4, eval_batch_size=64)
    texts = [" ".join(WORDS[i : i + 3] * (2 + 4 * i)) for i in range(4)]
    together = finish(engine, *(sequence(engine, str(i), text, limit=6) for i, text in enumerate(texts)))
    assert together == [alone("mlx-lm", file, text, limit=6) for text in texts]
    first = sequence(engine, "first", " ".join(WORDS), limit=12)
    finish(engine, first)
    follow = sequence(engine, "second", "", limit=6)
    follow.prompt = first.prompt + first.output + engine.tokenize(" and", add_bos=False)
    output = finish(engine, follow)
    assert follow.cached >= len(first.prompt), "the whole first turn is known"
    fresh = open_engine("mlx-lm", file, context_length=512, parallel=1)
    again = sequence(fresh, "again", "", limit=6)
    again.prompt = follow.prompt
    assert output == finish(fresh, again)
    other = sequence(engine, "other", "", limit=2, owner="b")
    other.prompt = follow.prompt
    finish(engine, other)
    assert other.cached == 0


def test_quantized_weights(tmp_path: Path) -> None:
    file = make(tmp_path / "m", {**KINDS["sliding"], "hidden_size": 64}, bits=4)
    engine = open_engine("mlx-lm", file, context_length=256, parallel=2)
    assert isinstance(engine, MlxEngine)
    assert len(finish(engine, sequence(engine, "x", "time year", limit=5))[0]) == 5


def edit(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


SENSELESS: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown type": (edit("config.json", model_type="nosuchtype"), "no models of the type 'nosuchtype'"),
    "a module that is no model": (edit("config.json", model_type="base"), "could not load the model"),
    "a module that exits": (edit("config.json", model_type="olmo"), "could not load the model"),
    "a package": (edit("config.json", model_type="__init__"), "model_type"),
    "other shapes": (edit("config.json", hidden_size=128), "could not load the model"),
    "a missing setting": (edit("config.json", rms_norm_eps=None), "could not load the model"),
    "text for a number": (edit("config.json", num_attention_heads="four"), "could not load the model"),
    "no heads": (edit("config.json", num_attention_heads=0), "could not load the model"),
    "more layers than weights": (edit("config.json", num_hidden_layers=3), "could not load the model"),
    "no tokenizer": (edit("tokenizer.json", model={}), "tokenizer.json cannot be used"),
    "code": (edit("config.json", model_file="evil.py"), "model_file"),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_directories_that_make_no_sense_are_refused_in_words(tmp_path: Path, name: str) -> None:
    folder = make_micro_mlx(tmp_path / "m").parent
    change, words = SENSELESS[name]
    change(folder)
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ModelLoadFailed, match=words):
        open_engine("mlx-lm", folder / "config.json", context_length=256)


def test_a_type_that_cannot_be_batched_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engines.mlx_model.make_prompt_cache", lambda _model: [object()])
    with pytest.raises(ModelLoadFailed, match="several answers of a 'qwen2' model"):
        open_engine("mlx-lm", make_micro_mlx(tmp_path / "m"), context_length=256)


def test_progress_is_reported_while_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.engines.mlx_engine import load
    from workers.schemas import LoadConfig

    monkeypatch.setattr("workers.engines.mlx_model.READ_BYTES", 100_000)
    told: list[float] = []
    load(str(make_micro_mlx(tmp_path / "m")), LoadConfig(context_length=256), told.append).close()
    assert len(told) > 3
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_pieces_of_both_families_of_tokenizers(tmp_path: Path) -> None:
    """Byte-level tokens, and those of SentencePiece with its sign for a blank and its bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    folder = make_micro_mlx(tmp_path / "m").parent
    directory = read_directory(folder)
    vocabulary = Vocabulary(directory, 3000)
    text = "Grüße, 世界 👋 <|im_start|>user"
    tokens = vocabulary.tokenize(text, add_bos=True)
    assert b"".join(map(vocabulary.piece, tokens)).decode() == text.replace("<|im_start|>", "")
    assert vocabulary.piece(2999) == b""

    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁world", "<think>"]
    sentencepiece = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    sentencepiece.normalizer = normalizers.Replace(" ", "▁")
    sentencepiece.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    sentencepiece.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<unk>", "<think>")])
    sentencepiece.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    vocabulary = Vocabulary(read_directory(folder), len(pieces))
    assert [vocabulary.piece(pieces.index(piece)) for piece in ("▁hello", "<0xC3>", "<s>", "<think>")] == [
        b" hello",
        b"\xc3",
        b"",
        b"<think>",
    ]
    assert 1 in vocabulary.ends
    assert vocabulary.tokenize("x", add_bos=True)[:1] != [0], "this tokenizer wants no beginning"
