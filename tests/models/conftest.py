"""A models directory of its own for every test, and the people as principals."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest reads this file before the settings are known
    from pytest_django import Settings

    from lmweb.access import Principal
    from lmweb.models import User
    from workers.models import WorkerNode


@pytest.fixture(autouse=True)
def models_dir(tmp_path: Path, settings: Settings) -> Path:
    settings.MODELS_DIR = tmp_path / "models"
    return settings.MODELS_DIR


@pytest.fixture
def micro(tmp_path: Path) -> Path:
    """Return a micro model's file, outside the models directory."""
    from tests.micro_models import make_micro

    return make_micro(tmp_path / "Micro-Test-F32.gguf", name="Micro Test")


@pytest.fixture
def member(owner: User) -> Principal:
    from lmweb.access import Principal

    return Principal(owner)


@pytest.fixture
def boss(admin: User) -> Principal:
    from lmweb.access import Principal

    return Principal(admin)


@pytest.fixture
def node(db: None) -> WorkerNode:
    """Return a node whose heartbeat is fresh; what is sent to it waits in its queue."""
    from workers.models import WorkerNode

    return WorkerNode.objects.create(name=f"test-{uuid.uuid4().hex[:8]}", incarnation=uuid.uuid4())


def stored_files(models_dir: Path) -> list[str]:
    """Return everything below the models directory but the hidden folders themselves."""
    return sorted(str(p.relative_to(models_dir)) for p in models_dir.rglob("*") if p.name not in {".incoming", ".uploads"})
