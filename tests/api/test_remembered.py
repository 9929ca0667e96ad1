"""The short way to a first token: who asked lately is remembered, and proved by the row that the request stores."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from lmweb.access import authenticate_token, recall_token
from lmweb.db import Stale, run_db
from lmweb.errors import LmwebError, NotAuthenticated
from lmweb.models import ApiToken, User
from models_app.generations import start_generation
from models_app.models import Generation, InstalledModel
from tests.api.client import call
from tests.api.hand import hand
from tests.api.test_chat_completions import BODY, URL, begin
from workers.models import WorkerNode
from workers.schemas import ChatMessage, GenerationRequest

if TYPE_CHECKING:
    from collections.abc import Callable

REQUEST = GenerationRequest(model="acme/tiny", messages=[ChatMessage(role="user", content="Hi")])


def _revoke() -> None:
    ApiToken.objects.update(revoked_at=timezone.now())


def _narrow() -> None:
    ApiToken.objects.update(scopes=["models:read"])


def _deactivate() -> None:
    User.objects.update(is_active=False)


def _demote() -> None:
    User.objects.update(role="viewer", is_superuser=False)


def _delete_model() -> None:
    InstalledModel.objects.all().delete()


def _make_it_embed() -> None:
    InstalledModel.objects.update(type="embedding")


CHANGES: list[tuple[Callable[[], None], int]] = [
    (_revoke, 401),
    (_deactivate, 401),
    (_narrow, 403),
    (_demote, 403),
    (_delete_model, 404),
    (_make_it_embed, 400),
]


@pytest.fixture
def used(model: InstalledModel, token: str) -> str:
    """Return a token that was used, with its person and the model remembered."""
    for _ in range(2):  # the first use is noted in the token's row, which makes what was read of it obsolete
        start_generation(principal=authenticate_token(token), request=REQUEST, source="openai")
    remembered = recall_token(token)
    assert remembered is not None
    return token


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(("change", "status"), CHANGES)
async def test_what_changed_counts_at_once(used: str, change: Callable[[], None], status: int) -> None:
    await run_db(change)
    answer = await call("POST", URL, token=used, json_body=BODY)
    assert answer.status == status
    assert await run_db(Generation.objects.count) == 2


@pytest.mark.asyncio(loop_scope="session")
async def test_defaults_that_changed_reach_the_request(used: str) -> None:
    await run_db(InstalledModel.objects.update, inference_defaults={"sampling": {"temperature": 0.125}})
    request = begin(used)
    worker = await hand(3)
    await run_db(worker.end)
    await request.done()
    row = await run_db(Generation.objects.get, pk=worker.id)
    assert row.request["sampling"]["temperature"] == 0.125


def test_a_remembered_start_is_one_query(used: str) -> None:
    WorkerNode.objects.create(name="box", incarnation=uuid.uuid4())
    remembered = recall_token(used)
    assert remembered is not None
    start_generation(principal=remembered, request=REQUEST, source="openai")  # the node is chosen and remembered, too
    with CaptureQueriesContext(
        connection,
    ) as queries:
        start_generation(principal=remembered, request=REQUEST, source="openai")
    assert [query["sql"].split()[0] for query in queries] == ["INSERT"]


@pytest.mark.parametrize("change", [change for change, _ in CHANGES])
def test_nothing_is_stored_on_what_is_not_true_any_more(used: str, change: Callable[[], None]) -> None:
    remembered = recall_token(used)
    assert remembered is not None
    change()
    with pytest.raises(LmwebError) as error:
        start_generation(principal=remembered, request=REQUEST, source="openai")
    assert isinstance(error.value, Stale)
    assert Generation.objects.count() == 2


def test_an_expired_token_is_not_recalled(used: str) -> None:
    remembered = recall_token(used)
    assert remembered is not None
    assert remembered.token is not None
    remembered.token.expires_at = timezone.now()
    assert recall_token(used) is None
    remembered.token.expires_at = None
    ApiToken.objects.update(expires_at=timezone.now())
    with pytest.raises(NotAuthenticated):
        authenticate_token(used)


def test_strangers_are_not_recalled(used: str) -> None:
    assert recall_token(used + "x") is None
    assert recall_token("") is None
