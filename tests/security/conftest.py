"""As the API's tests: what the asynchronous clients keep open is closed after each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest_asyncio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest_asyncio.fixture(loop_scope="session", autouse=True)
async def closed_connections() -> AsyncIterator[None]:
    """Close what the stream's client keeps open, before the loop that it belongs to is gone."""
    yield
    from models_app import generations

    await generations._client().aclose()
