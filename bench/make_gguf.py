"""Write decoder models (GGUF) with random weights, a real vocabulary and a chat template.

The result loads in llama.cpp like a downloaded model: real tokenizer and special tokens, chat template, right tensor shapes;
only its text is nonsense. The vocabulary comes from any GGUF file with a BPE tokenizer, also from one without tensors (the
``ggml-vocab-*.gguf`` files of llama.cpp). Needs the packages ``gguf`` and ``numpy``.

    python -m bench.make_gguf --vocab models_app/starter/lmweb-starter.gguf --preset micro --out micro.gguf
    python -m bench.make_gguf --vocab ggml-vocab-qwen2.gguf --preset tiny --out tiny.gguf      # 45 MB, 152k tokens
    python -m bench.make_gguf --vocab ggml-vocab-qwen2.gguf --preset small --out small.gguf    # shape of a 0.5B model

Tokens that are not plain ASCII words get a zero row in the tied embedding, so their logit is 0 and greedy decoding never picks
them: one token is then one printable chunk, and no end-of-sequence is sampled by accident.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QUANTIZATIONS = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. ``keep_tokens`` 0 keeps the whole vocabulary."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    keep_tokens: int = 0
    quantization: str = "f32"

    @property
    def head_width(self) -> int:
        """Return the width of one attention head."""
        return self.width // self.heads


PRESETS = {
    "micro": Shape(layers=2, width=64, feed_forward=128, heads=4, kv_heads=2, keep_tokens=4096, quantization="f32"),
    "tiny": Shape(layers=4, width=256, feed_forward=768, heads=8, kv_heads=2, quantization="q8_0"),
    "small": Shape(layers=24, width=896, feed_forward=4864, heads=14, kv_heads=2, quantization="q4_0"),
}


@dataclass(frozen=True)
class Vocabulary:
    """A BPE vocabulary: token texts, their types, merge rules and the remaining ``tokenizer.*`` fields."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    fields: dict[str, Any]

    @classmethod
    def read(cls, path: Path, keep: int = 0) -> Vocabulary:
        """Read the vocabulary of a GGUF file, cut to its first ``keep`` tokens plus the special ones (0: all)."""
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.ggml.")}
        tokens, types = fields.pop("tokenizer.ggml.tokens"), fields.pop("tokenizer.ggml.token_type")
        whole = cls(tokens, types, fields.pop("tokenizer.ggml.merges", []), fields)
        return whole._cut(keep) if 0 < keep < len(tokens) else whole

    def _cut(self, keep: int) -> Vocabulary:
        # BPE vocabularies are ordered by merge rank, so a prefix of the tokens is a valid smaller vocabulary.
        names = set(self.tokens[:keep])
        special = [i for i in range(keep, len(self.tokens)) if self.types[i] in (CONTROL, USER_DEFINED) and "PAD" not in self.tokens[i]]
        moved = {old: keep + new for new, old in enumerate(special)}
        fields = {name: moved.get(value, value) if name.endswith("_token_id") else value for name, value in self.fields.items()}
        merges = [m for m in self.merges if m.replace(" ", "") in names and all(part in names for part in m.split(" "))]
        return Vocabulary(
            self.tokens[:keep] + [self.tokens[i] for i in special], self.types[:keep] + [self.types[i] for i in special], merges, fields
        )

    def plain(self) -> npt.NDArray[np.bool_]:
        """Return which tokens are plain ASCII words, the only ones that a random model should write."""
        words = (token.replace("Ġ", "").replace("▁", "") for token in self.tokens)
        return np.array([kind == NORMAL and word.isascii() and word.isalpha() for word, kind in zip(words, self.types, strict=True)])


def write_model(  # noqa: PLR0913  (every property of the file)
    path: Path,
    shape: Shape,
    vocabulary: Vocabulary,
    *,
    architecture: str = "qwen2",
    name: str = "random",
    context: int = 32768,
    seed: int = 0,
    chat_template: str | None = CHATML,
    split_tensors: int = 0,
) -> Path:
    """Write the model and return its path. The same arguments always give the same bytes.

    ``architecture`` is ``qwen2`` or ``llama``; ``context`` is in tokens; without ``chat_template`` the file has none;
    ``split_tensors`` writes parts of so many tensors each.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_tensors)
    _add_metadata(writer, shape, vocabulary, architecture=architecture, name=name, context=context)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    _Weights(writer, shape, np.random.default_rng(seed)).add(vocabulary.plain(), biases=architecture == "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape, vocabulary: Vocabulary, *, architecture: str, name: str, context: int) -> None:
    writer.add_name(name)
    writer.add_file_type(QUANTIZATIONS[shape.quantization][1])
    writer.add_quantization_version(2)
    writer.add_block_count(shape.layers)
    writer.add_context_length(context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    if architecture == "llama":
        writer.add_rope_dimension_count(shape.head_width)
        writer.add_vocab_size(len(vocabulary.tokens))
    fields = vocabulary.fields
    writer.add_tokenizer_model(fields["tokenizer.ggml.model"])
    if "tokenizer.ggml.pre" in fields:
        writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"])
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(fields["tokenizer.ggml.bos_token_id"])
    known = vocabulary.tokens.index("<|im_end|>") if "<|im_end|>" in vocabulary.tokens else fields["tokenizer.ggml.eos_token_id"]
    writer.add_eos_token_id(known)
    writer.add_add_bos_token(False)


class _Weights:
    """Adds the tensors, matrices in the shape's quantization, norms and biases in F32."""

    def __init__(self, writer: gguf.GGUFWriter, shape: Shape, rng: np.random.Generator) -> None:
        self._writer, self._shape, self._rng = writer, shape, rng

    def add(self, plain: npt.NDArray[np.bool_], *, biases: bool) -> None:
        """Add everything. The output layer is the embedding (tied), scaled so that logits have a standard deviation of 4."""
        width, embedding_std = self._shape.width, 0.02
        self._matrix("token_embd.weight", len(plain), width, embedding_std, keep=plain)
        self._vector("output_norm.weight", width, 4.0 / (embedding_std * width**0.5))
        for layer in range(self._shape.layers):
            self._block(f"blk.{layer}.", biases=biases)

    def _block(self, prefix: str, *, biases: bool) -> None:
        shape = self._shape
        width, inner, kv_width = shape.width, shape.feed_forward, shape.head_width * shape.kv_heads
        self._vector(prefix + "attn_norm.weight", width, 1.0)
        self._vector(prefix + "ffn_norm.weight", width, 1.0)
        self._matrix(prefix + "attn_q.weight", width, width, 2.0 / width**0.5)
        self._matrix(prefix + "attn_k.weight", kv_width, width, 2.0 / width**0.5)
        self._matrix(prefix + "attn_v.weight", kv_width, width, 1.0 / width**0.5)
        self._matrix(prefix + "attn_output.weight", width, width, 1.0 / width**0.5)
        self._matrix(prefix + "ffn_gate.weight", inner, width, 1.0 / width**0.5)
        self._matrix(prefix + "ffn_up.weight", inner, width, 1.0 / width**0.5)
        self._matrix(prefix + "ffn_down.weight", width, inner, 1.0 / inner**0.5)
        if biases:
            for name, size in (("q", width), ("k", kv_width), ("v", kv_width)):
                self._vector(f"{prefix}attn_{name}.bias", size, 0.0)

    def _vector(self, name: str, size: int, value: float) -> None:
        self._writer.add_tensor(name, np.full(size, value, dtype=np.float32))

    def _matrix(self, name: str, rows: int, columns: int, std: float, keep: npt.NDArray[np.bool_] | None = None) -> None:
        values = self._rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(std)
        if keep is not None:
            values[~keep] = 0
        kind = QUANTIZATIONS[self._shape.quantization][0]
        if kind == gguf.GGMLQuantizationType.F32:
            self._writer.add_tensor(name, values)
        elif kind == gguf.GGMLQuantizationType.F16:
            self._writer.add_tensor(name, values.astype(np.float16))
        else:
            self._writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def main() -> None:
    """Write one model as the command line says and print its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", required=True, type=Path, help="GGUF file to take the vocabulary from")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--architecture", choices=["qwen2", "llama"], default="qwen2")
    parser.add_argument("--quantization", choices=QUANTIZATIONS)
    parser.add_argument("--template", type=Path, help="Jinja chat template (default: plain ChatML)")
    parser.add_argument("--name")
    parser.add_argument("--context", type=int, default=32768, help="context length in tokens")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = PRESETS[options.preset]
    shape = replace(shape, quantization=options.quantization or shape.quantization, layers=options.layers or shape.layers)
    vocabulary = Vocabulary.read(options.vocab, shape.keep_tokens)
    write_model(
        options.out,
        shape,
        vocabulary,
        architecture=options.architecture,
        name=options.name or f"random {options.preset}",
        context=options.context,
        seed=options.seed,
        chat_template=options.template.read_text(encoding="utf-8") if options.template else CHATML,
    )
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, {len(vocabulary.tokens)} tokens")


if __name__ == "__main__":
    main()
