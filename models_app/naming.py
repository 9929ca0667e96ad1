"""How models are named: the rules for what people type, and guesses from files for what they do not.

Names become folder names, so they are plain ASCII: no separators, no leading dots, no look-alike letters.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Final

from lmweb.errors import InvalidRequest
from models_app.gguf import ModelFile

MAX_NAME_LENGTH: Final = 96
MAX_FILE_NAME_LENGTH: Final = 160
DEFAULT_PUBLISHER: Final = "local"
SUFFIX: Final = ".gguf"

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_IDENTIFIER = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:/@-]{0,198}[A-Za-z0-9])?")
_QUANTIZATION = re.compile(
    r"[-._](?:UD-)?(?:I?Q[0-9]_[0-9KXSMLN_]+|TQ[0-9]_[0-9]|(?:MX|NV)FP4(?:_MOE)?|BF16|FP?16|FP?32)$",
    re.IGNORECASE,
)


def parse_user_repo(text: str) -> tuple[str, str]:
    """Return publisher and name of ``publisher/name``. Raises ``InvalidRequest`` that says what is wrong."""
    parts = text.strip().split("/")
    if len(parts) != 2:
        raise InvalidRequest("Give the folder as publisher/name, such as my-team/my-model.", param="user_repo")
    return check_name(parts[0], "publisher"), check_name(parts[1], "name")


def check_name(text: str, what: str) -> str:
    """Return a publisher's or model's name unchanged. Raises ``InvalidRequest`` unless it may be a folder's name."""
    if not text:
        raise InvalidRequest(f"The {what} is empty.", param=what)
    if len(text) > MAX_NAME_LENGTH:
        raise InvalidRequest(f"The {what} is longer than {MAX_NAME_LENGTH} characters.", param=what)
    if not _NAME.fullmatch(text) or ".." in text:
        raise InvalidRequest(
            f"The {what} may contain the letters a to z, digits, '.', '_' and '-', and must begin and end with a letter or digit.",
            param=what,
        )
    return text


def check_identifier(text: str) -> str:
    """Return the identifier of a loaded model unchanged. Raises ``InvalidRequest`` for one that requests could not name safely."""
    if not _IDENTIFIER.fullmatch(text):
        raise InvalidRequest(
            "An identifier has at most 200 characters: letters, digits and '. _ : / @ -', beginning and ending with a letter or digit.",
            param="identifier",
        )
    return text


def free_identifier(wanted: str, taken: set[str]) -> str:
    """Return the name of a further instance of a model: the model's own, then ``name:2``, ``name:3`` and so on, as LM Studio does."""
    number = 2
    name = wanted
    while name in taken:
        name, number = f"{wanted}:{number}", number + 1
    return name


def file_name(original: str) -> str:
    """Return a safe name for the stored file, close to what the file was called. Raises ``InvalidRequest`` unless it ends in .gguf."""
    base = PurePosixPath(original.replace("\\", "/")).name
    if not base.lower().endswith(SUFFIX):
        raise InvalidRequest("Only model files in the GGUF format (.gguf) can be imported.", param="file")
    return (_slug(base[: -len(SUFFIX)], MAX_FILE_NAME_LENGTH) or "model") + SUFFIX


def guess_user_repo(original: str, model: ModelFile) -> tuple[str, str]:
    """Return publisher and name for a file that nobody named: what it says itself, and its file name without the quantization."""
    stem = _QUANTIZATION.sub("", file_name(original)[: -len(SUFFIX)])
    return _slug(model.organization, MAX_NAME_LENGTH) or DEFAULT_PUBLISHER, _slug(stem, MAX_NAME_LENGTH) or "model"


def guess_directory(source: Path) -> tuple[str, str]:
    """Return publisher and name for a directory that nobody named."""
    return DEFAULT_PUBLISHER, _slug(source.name, MAX_NAME_LENGTH) or "model"


def is_quantization(label: str) -> bool:
    """Return whether a text is the name of a quantization, such as Q4_K_M."""
    return bool(_QUANTIZATION.fullmatch(f"-{label}"))


def make_key(publisher: str, name: str) -> str:
    """Return what API clients call the model: lower case, without the usual suffix of GGUF repositories."""
    return f"{publisher}/{re.sub(r'[-._]gguf$', '', name, flags=re.IGNORECASE)}".lower()


def _slug(text: str, limit: int) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", plain)
    return re.sub(r"\.{2,}", ".", slug)[:limit].strip("._-")
