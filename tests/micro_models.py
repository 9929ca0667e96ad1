"""Models of about 1 MB with random weights, made on the fly: they load in milliseconds and answer the same on every machine."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from bench.make_bert import PRESETS as BERT_PRESETS, write_bert
from bench.make_gguf import CHATML, PRESETS, Shape, Vocabulary, write_model

STARTER_GGUF = Path(__file__).resolve().parent.parent / "models_app" / "starter" / "lmweb-starter.gguf"


@lru_cache(maxsize=1)
def starter_vocabulary() -> Vocabulary:
    """Return the starter's vocabulary (2,912 tokens, ChatML special tokens)."""
    return Vocabulary.read(STARTER_GGUF)


def make_micro(
    path: Path,
    *,
    seed: int = 0,
    context: int = 2048,
    layers: int = 2,
    name: str = "micro",
    architecture: str = "qwen2",
    quantization: str = "f32",
    chat_template: str | None = CHATML,
    split_tensors: int = 0,
) -> Path:
    """Write a micro model (width 64) with the starter's vocabulary to ``path`` and return it.

    It never ends a greedy answer by itself: the end-of-sequence token's logit is 0. ``chat_template`` None writes a file without
    one; ``split_tensors`` writes parts of so many tensors, named ``…-00001-of-….gguf``. ``context`` is in tokens; ``quantization`` is a key of ``bench.make_gguf.QUANTIZATIONS``.
    """
    micro = PRESETS["micro"]
    shape = Shape(layers, micro.width, micro.feed_forward, micro.heads, micro.kv_heads, quantization=quantization)
    return write_model(
        path,
        shape,
        starter_vocabulary(),
        architecture=architecture,
        name=name,
        context=context,
        seed=seed,
        chat_template=chat_template,
        split_tensors=split_tensors,
    )


def make_micro_bert(path: Path, *, seed: int = 0, name: str = "micro-bert", context: int = 512) -> Path:
    """Write a bert-type embedding model (width 64, mean pooling) to ``path`` and return it. ``context`` is in tokens."""
    return write_bert(path, BERT_PRESETS["micro"], name=name, context=context, seed=seed)
