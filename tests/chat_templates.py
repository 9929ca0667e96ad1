"""The real chat templates of the families, out of llama-cpp-python's source distribution.

They come with llama.cpp, in ``models/templates`` of its source, and are not ours to pass on. The locked source distribution is fetched
once through pip (whose cache usually has it: the engine is compiled from it) and its templates kept in the user's cache directory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from lmweb.bootstrap import BootstrapError, pip

REPOSITORY = Path(__file__).resolve().parent.parent
_LOCK = re.compile(r"^llama-cpp-python==(?P<version>\S+) \\\n(?:    --hash=\S+(?: \\)?\n)+", re.MULTILINE)


class TemplatesUnavailable(Exception):
    """The source distribution cannot be had now."""


def fetch() -> Path:
    """Return a folder with the templates. Raises ``TemplatesUnavailable``."""
    found = _LOCK.search((REPOSITORY / "requirements" / "runtime.txt").read_text())
    assert found
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "lmweb" / f"chat-templates-{found['version']}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            archive = _download(found[0], Path(scratch))
            kept = Path(scratch) / "templates"
            kept.mkdir()
            _extract(archive, kept)
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not folder.is_dir():  # another test run may have been faster
                shutil.copytree(kept, folder, dirs_exist_ok=True)
    return folder


def _download(requirement: str, scratch: Path) -> Path:
    (scratch / "locked.txt").write_text(requirement)
    try:
        command = [*pip(Path(sys.prefix)), "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--require-hashes"]
        subprocess.run([*command, "--dest", str(scratch), "-r", str(scratch / "locked.txt")], check=True, capture_output=True, timeout=150)
    except (BootstrapError, subprocess.SubprocessError) as error:
        raise TemplatesUnavailable(f"llama-cpp-python's source distribution cannot be fetched: {error}") from error
    return next(scratch.glob("llama_cpp_python-*.tar.gz"))


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as source:
        for member in source:
            if "/llama.cpp/models/templates/" in member.name and member.name.endswith(".jinja"):
                content = source.extractfile(member)
                assert content is not None
                (folder / Path(member.name).name).write_bytes(content.read())
