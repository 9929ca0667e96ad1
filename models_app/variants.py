"""What can be downloaded from a repository: its files, grouped into variants that are one download each.

A variant of a GGUF repository is one quantization: one file, or all parts of a model that was split, with the vision projector
(``mmproj``) if the repository has one. An MLX repository is one variant: its directory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from models_app.gguf import MAX_PARTS
from models_app.hub import Format, RemoteFile, Repository
from workers.mlx_directory import CONFIG, TOKENIZER, is_part, is_weights

SPLIT_PART: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)

_LABEL = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q[0-9]_[0-9KXSMLN_]+|TQ[0-9]_[0-9]|(?:MX|NV)FP4(?:_MOE)?|BF16|FP?16|FP?32))(?=[-._/]|$)", re.IGNORECASE
)
PROJECTOR: Final = re.compile(r"(^|[-._])mmproj", re.IGNORECASE)
_OTHER_GGUF = re.compile(r"(^|[-._])(imatrix|lora|adapter|vocab)([-._]|$)", re.IGNORECASE)
_BITS = re.compile(r"(?:^|[-_])([2-8])[-_]?bits?(?:[-_]|$)|(?:^|[-_])(bf16|fp16|mxfp4)(?:[-_]|$)", re.IGNORECASE)
_PREFERRED_PROJECTORS = ("F16", "BF16", "Q8_0", "F32")

#: Quantizations from the most to the least wanted: 4 bits with mixed precision is the usual balance of quality and size.
RECOMMENDED: Final = (
    "UD-Q4_K_XL", "Q4_K_M", "MXFP4", "MXFP4_MOE", "NVFP4", "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_0", "Q5_K_M", "UD-Q5_K_XL", "Q5_K_S", "Q6_K",
    "Q3_K_L", "Q3_K_M", "Q8_0", "IQ3_M", "Q3_K_S", "Q2_K",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One download: ``label`` is the quantization as people know it. ``files`` begin with the weights, in the order of their parts."""

    label: str
    format: Format
    files: tuple[RemoteFile, ...]
    projector: RemoteFile | None = None

    @property
    def all_files(self) -> tuple[RemoteFile, ...]:
        """Return the files with the projector."""
        return (*self.files, self.projector) if self.projector else self.files

    @property
    def size_bytes(self) -> int:
        """Return the size of the whole download."""
        return sum(file.size for file in self.all_files)


def variants(repository: Repository) -> list[Variant]:
    """Return what a repository offers, smallest first."""
    found = _gguf_variants(repository.files)
    if not found and "mlx" in repository.found.tags:
        found = _mlx_variants(repository)
    return sorted(found, key=lambda variant: (variant.size_bytes, variant.label))


def find_variant(offered: list[Variant], wanted: str) -> Variant | None:
    """Return the variant of this label, whatever the case, or None."""
    return next((variant for variant in offered if variant.label.lower() == wanted.strip().lower()), None)


def variant_of_file(offered: list[Variant], path: str) -> Variant | None:
    """Return the variant that a file of the repository belongs to, or None."""
    return next((variant for variant in offered if any(file.path == path for file in variant.files)), None)


def _gguf_variants(files: Iterable[RemoteFile]) -> list[Variant]:
    weights = [f for f in files if f.name.lower().endswith(".gguf") and f.size and not _OTHER_GGUF.search(f.name)]
    projector = _best_projector([f for f in weights if PROJECTOR.search(f.name)])
    groups: dict[str, list[RemoteFile]] = defaultdict(list)
    for file in weights:
        if PROJECTOR.search(file.name):
            continue
        part = SPLIT_PART.fullmatch(file.path)
        groups[part["stem"] if part else file.path[: -len(".gguf")]].append(file)
    variants: list[Variant] = []
    taken: set[str] = set()
    for stem, members in sorted(groups.items()):
        ordered = _complete(members)
        if ordered is None:
            continue
        label = _label_of(stem)
        if label.lower() in taken:  # two models in one repository
            label = stem.rsplit("/", 1)[-1]
        if label.lower() not in taken:
            taken.add(label.lower())
            variants.append(Variant(label[:120], "gguf", tuple(ordered), projector))
    return variants


def _complete(members: list[RemoteFile]) -> list[RemoteFile] | None:
    """Return the parts of one model in order, or None if they are not exactly all of them."""
    parts = [SPLIT_PART.fullmatch(file.path) for file in members]
    if len(members) == 1 and parts[0] is None:
        return members
    numbered = {int(part["number"]): file for part, file in zip(parts, members, strict=True) if part}
    counts = {int(part["count"]) for part in parts if part}
    count = counts.pop() if len(counts) == 1 else 0
    if not 0 < count <= MAX_PARTS or len(members) != count or sorted(numbered) != list(range(1, count + 1)):
        return None
    return [numbered[number] for number in range(1, count + 1)]


def _label_of(stem: str) -> str:
    found = _LABEL.findall(stem.rsplit("/", 1)[-1]) or _LABEL.findall(stem)
    return found[-1].upper() if found else stem.rsplit("/", 1)[-1]


def _best_projector(projectors: list[RemoteFile]) -> RemoteFile | None:
    def rank(file: RemoteFile) -> tuple[int, int]:
        label = _label_of(file.path[: -len(".gguf")])
        return (_PREFERRED_PROJECTORS.index(label) if label in _PREFERRED_PROJECTORS else len(_PREFERRED_PROJECTORS), file.size)

    return min(projectors, key=rank, default=None)


def _mlx_variants(repository: Repository) -> list[Variant]:
    files = [file for file in repository.files if is_part(file.path)]  # no code, no pickles, nothing below the top
    names = {file.path for file in files}
    if not {CONFIG, TOKENIZER} <= names or not any(map(is_weights, names)):
        return []
    bits = _BITS.search(repository.found.name)
    label = f"{bits[1]}bit" if bits and bits[1] else (bits[2].upper() if bits else "MLX")
    return [Variant(label, "mlx", tuple(sorted(files, key=lambda file: (file.path != CONFIG, file.path))))]


def recommended(usable: list[Variant]) -> Variant | None:
    """Return the variant to recommend among those that would run: the most wanted one, else the smallest."""
    for label in RECOMMENDED:
        if (found := find_variant(usable, label)) is not None:
            return found
    return min(usable, key=lambda variant: variant.size_bytes, default=None)
