"""The API's doors: every route, every way to carry a token, everybody who may come (deny by default, one policy for all doors)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from django.test import Client

    from lmweb.models import User

pytestmark = pytest.mark.asyncio(loop_scope="session")

DOORS = {
    "bearer": lambda secret: {"Authorization": f"Bearer {secret}"},
    "bearer in lower case": lambda secret: {"authorization": f"bearer  {secret} "},
    "x-api-key": lambda secret: {"X-Api-Key": secret},
}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


@dataclass(frozen=True)
class Secrets:
    """The token of each kind of caller."""

    member: str
    viewer: str
    reader: str
    generator: str
    expired: str
    revoked: str
    inactive: str


@pytest.fixture
def secrets(transactional_db: None, owner: User, stranger: User, teammate: User) -> Secrets:
    from django.utils import timezone

    from lmweb.models import ApiToken
    from lmweb.tokens import revoke_token

    def issue(user: User, *scopes: str, **more: object) -> str:
        return ApiToken.issue(user=user, name="t", scopes=list(scopes) or None, **more)[1]  # type: ignore[arg-type]

    revoked, revoked_secret = ApiToken.issue(user=owner, name="revoked")
    revoke_token(revoked.pk)
    inactive = issue(teammate)
    teammate.is_active = False
    teammate.save()
    return Secrets(
        member=issue(owner),
        viewer=issue(stranger),
        reader=issue(owner, "models:read"),
        generator=issue(owner, "inference"),
        expired=issue(owner, expires_at=timezone.now() - timedelta(seconds=1)),
        revoked=revoked_secret,
        inactive=inactive,
    )


def api_paths() -> list[str]:
    from tests.security.routes import routes

    return [route.path() for route in routes("api.urls")]


@pytest.mark.usefixtures("secrets")
async def test_every_route_refuses_who_has_no_token() -> None:
    from tests.api.client import call

    assert len(api_paths()) >= 3
    for path in api_paths():
        for method in METHODS:
            answer = await call(method, path)
            assert answer.status in {401, 405}, (method, path)
            assert answer.error()
            assert "set-cookie" not in answer.headers
            if answer.status == 401:
                assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["expired", "revoked", "inactive", "unknown", "empty", "long", "odd"])
async def test_every_route_refuses_tokens_that_are_not_valid(secrets: Secrets, door: str, kind: str) -> None:
    from tests.api.client import call

    made = {"unknown": "sk-lm-0000000000000000", "empty": "", "long": "x" * 100_000, "odd": "sk-\xff\xe9"}
    headers = DOORS[door](made.get(kind) if kind in made else getattr(secrets, kind))
    for path in api_paths():
        for method in METHODS:
            answer = await call(method, path, headers=headers)
            assert answer.status in {401, 405}, (method, path)
            if answer.status == 401:
                assert answer.error()["code"] == "invalid_api_key"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("who", "reads", "generates"), [("member", 200, 404), ("viewer", 200, 403), ("reader", 200, 403), ("generator", 403, 404)]
)
async def test_the_same_policy_at_every_door(secrets: Secrets, door: str, who: str, reads: int, generates: int) -> None:
    from tests.api.client import call

    headers = DOORS[door](getattr(secrets, who))
    body = {"model": "no/model", "messages": [{"role": "user", "content": "x"}]}
    assert (await call("GET", "/v1/models", headers=headers)).status == reads
    assert (await call("GET", "/v1/models/no/model", headers=headers)).status == (404 if reads == 200 else reads)
    assert (await call("POST", "/v1/chat/completions", headers=headers, json_body=body)).status == generates
    body = {"model": "no/model", "input": "x"}
    assert (await call("POST", "/v1/embeddings", headers=headers, json_body=body)).status == generates


async def test_a_second_header_is_no_way_around(secrets: Secrets) -> None:
    from tests.api.client import call

    both = {"Authorization": f"Bearer {secrets.expired}", "X-Api-Key": secrets.member}
    assert (await call("GET", "/v1/models", headers=both)).status == 401
    basic = {"Authorization": "Basic b3duZXI6cGFzcw==", "X-Api-Key": secrets.member}
    assert (await call("GET", "/v1/models", headers=basic)).status == 401


async def test_a_token_in_the_address_is_not_read(secrets: Secrets) -> None:
    from tests.api.client import call

    for name in ("api_key", "token", "access_token", "key"):
        assert (await call("GET", f"/v1/models?{name}={secrets.member}")).status == 401


async def test_a_session_opens_no_api_route(secrets: Secrets, owner: User, client: Client) -> None:
    from lmweb.db import run_db
    from tests.api.client import call

    await run_db(client.force_login, owner)
    cookies = "; ".join(f"{name}={morsel.value}" for name, morsel in client.cookies.items())
    assert "sessionid" in cookies
    for path in api_paths():
        for method in METHODS:
            assert (await call(method, path, headers={"Cookie": cookies})).status in {401, 405}, (method, path)


async def test_a_token_opens_no_page(secrets: Secrets) -> None:
    from tests.api.client import call
    from tests.security.routes import routes

    for route in routes("lmweb.urls"):
        if route.template in {"sign-in", "setup/<str:secret>"}:
            continue
        refusals = {401} if route.template.startswith("node-files/") else {302, 403, 404, 405}  # that one is for machines
        for door in DOORS.values():
            answer = await call("GET", route.path(), headers=door(secrets.member))
            assert answer.status in refusals, route
            assert answer.status != 302 or answer.headers["location"].startswith("/sign-in"), route


async def test_pages_cannot_be_reached_through_the_api_s_way(secrets: Secrets) -> None:
    from tests.api.client import call
    from tests.security.routes import routes

    for route in routes("lmweb.urls"):
        answer = await call("GET", "/v1" + route.path(), headers=DOORS["bearer"](secrets.member))
        assert answer.status == 404, route
        answer.error()


@pytest.mark.usefixtures("secrets")
async def test_each_dialect_words_its_refusals() -> None:
    from tests.api.client import call

    native = (await call("GET", "/api/v1/nowhere")).error()
    assert (native["type"], native["code"]) == ("invalid_request", "invalid_api_key")
    assert (await call("GET", "/v1/nowhere")).error()["type"] == "authentication_error"
