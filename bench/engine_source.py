"""The source distribution of our engine, llama-cpp-python at the locked version, which carries llama.cpp's source."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lmweb import bootstrap

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARY = "llama-cpp-python"
SECONDS = 300


class SourceUnavailable(Exception):
    """It cannot be had now."""


def locked() -> str:
    """Return the entry of the lock file, with its hashes."""
    return bootstrap.requirements(REPOSITORY / "requirements" / "runtime.txt")[LIBRARY]


def version() -> str:
    """Return the locked version."""
    return locked().split("==")[1].split()[0]


def download(folder: Path) -> Path:
    """Return the archive, downloaded into a folder (or taken from pip's cache) and checked by its hash. Raises ``SourceUnavailable``."""
    listed = folder / "locked.txt"
    listed.write_text(locked())
    try:
        command = [*bootstrap.pip(Path(sys.prefix)), "download", "--quiet", "--no-deps", "--no-binary", LIBRARY, "--require-hashes"]
        subprocess.run([*command, "--dest", str(folder), "-r", str(listed)], check=True, capture_output=True, timeout=SECONDS)
    except (bootstrap.BootstrapError, subprocess.SubprocessError) as error:
        raise SourceUnavailable(f"{LIBRARY}'s source distribution cannot be fetched: {error}") from error
    return next(folder.glob("llama_cpp_python-*.tar.gz"))
