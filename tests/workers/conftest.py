"""Fixtures of the worker tests. Imports of the product wait until its settings are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lmweb.models import User
    from models_app.models import InstalledModel
    from tests.workers.support import Bench


@pytest.fixture
def bench(transactional_db: None, owner: User, tmp_path: Path) -> Iterator[Bench]:
    """Return a bench whose runners end with the test."""
    from tests.workers.support import Bench, make_host

    bench = Bench(make_host(tmp_path / "logs"), owner)
    bench.host.start()
    yield bench
    bench.host.stop()


@pytest.fixture
def starter(bench: Bench, starter_gguf: Path) -> InstalledModel:
    """Return the starter model as a row."""
    return bench.install(starter_gguf, "lmweb/starter")
