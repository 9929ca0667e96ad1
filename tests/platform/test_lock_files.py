"""The lock files hold what pyproject.toml asks for, and what the code imports."""

from __future__ import annotations

import re
import tomllib

from lmweb import bootstrap
from tests.live import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
RUNTIME = bootstrap.requirements(REPOSITORY / "requirements" / "runtime.txt")
DEV = bootstrap.requirements(REPOSITORY / "requirements" / "dev.txt")


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


def test_runtime_dependencies_are_locked():
    assert {name_of(entry) for entry in PROJECT["project"]["dependencies"]} <= set(RUNTIME)


def test_tools_are_locked():
    assert {name_of(entry) for entry in PROJECT["dependency-groups"]["dev"]} <= set(DEV)


def test_both_files_agree():
    """Versions and hashes are the same; a tool may need a package on more systems than the product does."""
    shared = RUNTIME.keys() & DEV.keys()
    assert {name: without_marker(DEV[name]) for name in shared} == {name: without_marker(RUNTIME[name]) for name in shared}


def without_marker(entry: str) -> str:
    return re.sub(r" ;[^\\\n]*", " ", entry)


def test_every_entry_has_hashes():
    assert all("--hash=sha256:" in entry for entry in (RUNTIME | DEV).values())
