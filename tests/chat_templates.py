"""The real chat templates of the families, out of llama-cpp-python's source distribution.

They come with llama.cpp, in ``models/templates`` of its source, and are not ours to pass on. The locked source distribution is fetched
once through pip (whose cache usually has it: the engine is compiled from it) and its templates kept in the user's cache directory.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from bench import engine_source


def fetch() -> Path:
    """Return a folder with the templates. Raises ``SourceUnavailable``."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "lmweb" / f"chat-templates-{engine_source.version()}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            archive = engine_source.download(Path(scratch))
            kept = Path(scratch) / "templates"
            kept.mkdir()
            _extract(archive, kept)
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not folder.is_dir():  # another test run may have been faster
                shutil.copytree(kept, folder, dirs_exist_ok=True)
    return folder


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as source:
        for member in source:
            if "/llama.cpp/models/templates/" in member.name and member.name.endswith(".jinja"):
                content = source.extractfile(member)
                assert content is not None
                (folder / Path(member.name).name).write_bytes(content.read())
