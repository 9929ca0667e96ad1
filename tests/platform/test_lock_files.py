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
    assert {name: DEV[name] for name in RUNTIME.keys() & DEV.keys()} == {name: RUNTIME[name] for name in RUNTIME.keys() & DEV.keys()}


def test_every_entry_has_hashes():
    assert all("--hash=sha256:" in entry for entry in (RUNTIME | DEV).values())
