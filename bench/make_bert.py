"""Write bert-type embedding models (GGUF) with random weights: real WordPiece tokenizer and tensor shapes, meaningless vectors.

The vocabulary is made of letters, the syllables of two letters and a few words, so any text in lower-case ASCII can be written.
Needs the packages ``gguf`` and ``numpy``.

    python -m bench.make_bert --preset micro --out bert.gguf
    python -m bench.make_bert --preset minilm --out minilm-shape.gguf      # the shape of all-MiniLM-L6-v2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from bench.make_gguf import CONTROL, NORMAL, QUANTIZATIONS, Shape

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
#: WordPiece in GGUF marks the beginning of a word, where vocab.txt marks its continuation.
WORD_START = "▁"

PRESETS = {
    "micro": Shape(layers=2, width=64, feed_forward=128, heads=4, kv_heads=4),
    "minilm": Shape(layers=6, width=384, feed_forward=1536, heads=12, kv_heads=12, quantization="f16"),
}


def vocabulary() -> list[str]:
    """Return the tokens; the special ones come first, in the order of ``SPECIAL``."""
    syllables = [first + second for first in ascii_lowercase for second in ascii_lowercase]
    pieces = [*ascii_lowercase, *digits, *syllables]
    return [*SPECIAL, *(WORD_START + mark for mark in punctuation), *(WORD_START + piece for piece in pieces), *pieces]


def write_bert(
    path: Path,
    shape: Shape,
    *,
    name: str = "random-bert",
    context: int = 512,
    seed: int = 0,
    pooling: gguf.PoolingType | None = gguf.PoolingType.MEAN,
) -> Path:
    """Write the model and return its path. The same arguments always give the same bytes. ``pooling`` None leaves it unsaid."""
    tokens = vocabulary()
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name(name)
    writer.add_file_type(QUANTIZATIONS[shape.quantization][1])
    writer.add_block_count(shape.layers)
    writer.add_context_length(context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    _add_tokenizer(writer, tokens)
    _add_weights(writer, shape, len(tokens), context, np.random.default_rng(seed))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, tokens: list[str]) -> None:
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in SPECIAL else NORMAL for token in tokens])
    writer.add_token_type_count(2)
    writer.add_pad_token_id(SPECIAL.index("[PAD]"))
    writer.add_unk_token_id(SPECIAL.index("[UNK]"))
    writer.add_bos_token_id(SPECIAL.index("[CLS]"))
    writer.add_eos_token_id(SPECIAL.index("[SEP]"))
    writer.add_sep_token_id(SPECIAL.index("[SEP]"))
    writer.add_mask_token_id(SPECIAL.index("[MASK]"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


def _add_weights(writer: gguf.GGUFWriter, shape: Shape, vocab_size: int, context: int, random: np.random.Generator) -> None:
    width, wide = shape.width, shape.feed_forward

    def matrix(name: str, rows: int, columns: int, *, quantize: bool = True) -> None:
        kind = QUANTIZATIONS[shape.quantization if quantize else "f32"][0]
        values = random.standard_normal((rows, columns)).astype(np.float32) / np.float32(np.sqrt(columns))
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def vector(name: str, values: npt.NDArray[Any]) -> None:
        writer.add_tensor(name, values.astype(np.float32))

    def norm(name: str) -> None:
        vector(f"{name}.weight", np.ones(width, np.float32))
        vector(f"{name}.bias", np.zeros(width, np.float32))

    matrix("token_embd", vocab_size, width)
    matrix("position_embd", context, width, quantize=False)
    matrix("token_types", 2, width, quantize=False)
    norm("token_embd_norm")
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        for name, rows, columns in (
            ("attn_q", width, width),
            ("attn_k", width, width),
            ("attn_v", width, width),
            ("attn_output", width, width),
            ("ffn_up", wide, width),
            ("ffn_down", width, wide),
        ):
            matrix(f"{block}.{name}", rows, columns)
            vector(f"{block}.{name}.bias", random.standard_normal(rows) * 0.02)
        norm(f"{block}.attn_output_norm")
        norm(f"{block}.layer_output_norm")


def main() -> None:
    """Write the model that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="micro")
    parser.add_argument("--context", type=int, default=512, help="in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_bert(options.out, PRESETS[options.preset], context=options.context, seed=options.seed)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
