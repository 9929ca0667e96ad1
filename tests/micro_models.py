"""Models of about 1 MB with random weights, made on the fly: they load in milliseconds and answer the same on every machine."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from gguf import GGUFReader
from safetensors.numpy import save_file

from bench.make_bert import PRESETS as BERT_PRESETS, write_bert
from bench.make_gguf import CHATML, PRESETS, Shape, Vocabulary, write_model

STARTER_MLX = Path(__file__).resolve().parent.parent / "models_app" / "starter" / "lmweb-starter-mlx"
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


#: How the tensors of a GGUF file are called in a Hugging Face directory.
_HF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def make_micro_mlx(path: Path, *, seed: int = 0, context: int = 2048, layers: int = 2, chat_template: str | None = CHATML) -> Path:
    """Write the model of ``make_micro`` (qwen2, F32), number for number, as an MLX directory to ``path`` and return its config.json."""
    path.mkdir()
    source = make_micro(path / "micro.gguf", seed=seed, context=context, layers=layers)
    tensors = {}
    for tensor in GGUFReader(source).tensors:
        *block, name, kind = tensor.name.split(".")
        prefix = f"model.layers.{block[1]}." if block else ""
        tensors[f"{prefix}{_HF_NAMES[name]}.{kind}"] = tensor.data.reshape(tuple(reversed(tensor.shape.tolist())))
    source.unlink()
    save_file(tensors, path / "model.safetensors", metadata={"format": "mlx"})
    micro = PRESETS["micro"]
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": micro.width,
        "num_hidden_layers": layers,
        "intermediate_size": micro.feed_forward,
        "num_attention_heads": micro.heads,
        "num_key_value_heads": micro.kv_heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": len(starter_vocabulary().tokens),
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": context,
        "eos_token_id": starter_vocabulary().tokens.index("<|im_end|>"),
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>", "chat_template": chat_template}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer.json").write_bytes((STARTER_MLX / "tokenizer.json").read_bytes())
    return path / "config.json"
