"""A model in the database, and tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.workers.conftest import bench  # noqa: F401  (a fixture)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

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
def token(transactional_db: None, owner: User) -> str:
    """Return the secret of a token with the default scopes."""
    from lmweb.models import ApiToken

    return ApiToken.issue(user=owner, name="test")[1]


@pytest_asyncio.fixture(loop_scope="session", autouse=True)
async def closed_connections() -> AsyncIterator[None]:
    """Close what the stream's client keeps open, before the loop that it belongs to is gone."""
    yield
    from models_app import generations

    await generations._client().aclose()
