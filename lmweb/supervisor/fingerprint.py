"""Whether the database and the static files were prepared by this very code; if so, a start need not do it again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lmweb.supervisor.programs import REPOSITORY

_SOURCES = ("static", "models_app/starter", "requirements", "lmweb/migrations", "workers/migrations", "models_app/migrations")
_MORE_SOURCES = ("chat/migrations", "lmweb/management/commands", "lmweb/settings.py", "lmweb/storage.py", "pyproject.toml")


def fingerprint(*facts: str) -> str:
    """Return a digest of everything that the preparation depends on, and of ``facts``. Takes a few milliseconds."""
    digest = hashlib.sha256("\0".join(facts).encode())
    for name in (*_SOURCES, *_MORE_SOURCES):
        for path, size, changed in sorted(_files(REPOSITORY / name)):
            digest.update(f"{path}\0{size}\0{changed}\n".encode())
    return digest.hexdigest()


def _files(path: Path) -> list[tuple[str, int, int]]:
    if path.is_file():
        info = path.stat()
        return [(str(path), info.st_size, info.st_mtime_ns)]
    found = []
    for directory, names, files in os.walk(path):
        names[:] = [name for name in names if name != "__pycache__"]
        for file in files:
            info = os.stat(os.path.join(directory, file))  # noqa: PTH116, PTH118  (half the time of Path for thousands of files)
            found.append((os.path.join(directory, file), info.st_size, info.st_mtime_ns))  # noqa: PTH118
    return found
