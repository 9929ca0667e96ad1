"""A model in the database, principals, and a stand-in for a worker: what it would write to the stream and to the row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.api.conftest import model  # noqa: F401  (a fixture)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lmweb.access import Principal
    from lmweb.models import User


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
