"""The lock files hold what pyproject.toml asks for, and what the code imports."""

from __future__ import annotations

import re
import tomllib

import pytest

from lmweb import bootstrap
from tests.live import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
RUNTIME = bootstrap.requirements(REPOSITORY / "requirements" / "runtime.txt")
MLX = bootstrap.requirements(REPOSITORY / "requirements" / "mlx.txt")
DEV = bootstrap.requirements(REPOSITORY / "requirements" / "dev.txt")


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


def test_runtime_dependencies_are_locked():
    assert {name_of(entry) for entry in PROJECT["project"]["dependencies"]} <= set(RUNTIME)


def test_the_mlx_engine_is_locked_and_no_part_of_the_runtime():
    wanted = {name_of(entry) for entry in PROJECT["project"]["optional-dependencies"]["mlx"]}
    assert wanted <= set(MLX)
    assert not wanted & set(RUNTIME)


def test_tools_are_locked():
    assert {name_of(entry) for entry in PROJECT["dependency-groups"]["dev"]} <= set(DEV)


@pytest.mark.parametrize(("more", "less"), [(DEV, RUNTIME), (MLX, RUNTIME), (DEV, MLX)], ids=["dev-runtime", "mlx-runtime", "dev-mlx"])
def test_the_files_agree(more: dict[str, str], less: dict[str, str]):
    """Versions and hashes are the same; a tool may need a package on more systems than the product does."""
    shared = more.keys() & less.keys()
    assert {name: without_marker(more[name]) for name in shared} == {name: without_marker(less[name]) for name in shared}


def without_marker(entry: str) -> str:
    return re.sub(r" ;[^\\\n]*", " ", entry)


def test_every_entry_has_hashes():
    assert all("--hash=sha256:" in entry for entry in (RUNTIME | MLX | DEV).values())
