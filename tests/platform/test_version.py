"""The release that machines compare when they join is the one that is packaged."""

from __future__ import annotations

import tomllib
from pathlib import Path

from lmweb import __version__


def test_the_package_and_the_code_name_the_same_release() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
