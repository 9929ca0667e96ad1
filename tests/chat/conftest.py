"""A model in the database, principals, and a stand-in for a worker: what it would write to the stream and to the row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lmweb.access import Principal
    from lmweb.models import User
    from models_app.models import InstalledModel


@pytest.fixture
def model(transactional_db: None) -> InstalledModel:
    """Return a model that exists in the database only."""
    from models_app.models import InstalledModel

    return InstalledModel.objects.create(
        key="acme/tiny",
        publisher="acme",
        display_name="Tiny",
        architecture="llama",
        size_bytes=1,
        max_context_length=256,
        path="acme/tiny/t.gguf",
    )


@pytest.fixture
def me(owner: User) -> Principal:
    """Return the owner as they come through the page."""
    from lmweb.access import Principal

    return Principal(owner)


@pytest.fixture
def other(teammate: User) -> Principal:
    """Return another member."""
    from lmweb.access import Principal

    return Principal(teammate)


@pytest_asyncio.fixture(loop_scope="session")
async def closed_connections() -> AsyncIterator[None]:
    """Close what the stream's client keeps open, before the loop that it belongs to is gone."""
    yield
    from models_app import generations

    await generations._client().aclose()
