"""The Developer page: addresses, tokens and examples."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from django.test import Client

    from lmweb.models import User

pytestmark = pytest.mark.django_db

FORM = {"name": "my script", "scopes": ["inference", "models:read"], "days": "30"}


@pytest.fixture
def page(client: Client, owner: User) -> Client:
    client.force_login(owner)
    return client


def secret_in(body: str) -> str:
    found = re.search(r"sk-lm-[\w-]{20,}", body)
    assert found
    return found[0]


def test_a_token_is_shown_one_time(page: Client, owner: User) -> None:
    from lmweb.access import authenticate_token
    from lmweb.models import ApiToken

    response = page.post("/developer/tokens", FORM)
    assert response.status_code == 200
    assert "no-store" in response["Cache-Control"]
    secret = secret_in(response.content.decode())
    assert authenticate_token(secret).user == owner
    token = ApiToken.objects.get()
    assert (token.name, token.scopes) == ("my script", ["inference", "models:read"])
    assert token.expires_at
    later = page.get("/developer/").content.decode()
    assert "my script" in later
    assert secret not in later
    assert token.hint in later


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "Give it a name"),
        ({"name": "  "}, "Give it a name"),
        ({"name": "a\x00b"}, "Null characters"),
        ({"name": "x" * 101}, "100"),
        ({"scopes": []}, "Choose at least one"),
        ({"scopes": ["root"]}, "Select a valid choice"),
        ({"days": "5"}, "Select a valid choice"),
    ],
)
def test_mistakes_are_explained_and_nothing_typed_is_lost(page: Client, change: dict[str, Any], message: str) -> None:
    from lmweb.models import ApiToken

    response = page.post("/developer/tokens", FORM | change)
    body = html.unescape(response.content.decode())
    assert response.status_code == 422
    assert message in body
    if "name" not in change:
        assert 'value="my script"' in body
    assert not ApiToken.objects.exists()


def test_revoking_is_for_the_owner_only(page: Client, owner: User, teammate: User) -> None:
    from lmweb.models import ApiToken

    mine, _ = ApiToken.issue(user=owner, name="mine")
    theirs, _ = ApiToken.issue(user=teammate, name="theirs")
    assert page.post(f"/developer/tokens/{theirs.pk}/revoke").status_code == 404
    response = page.post(f"/developer/tokens/{mine.pk}/revoke")
    assert "Revoked" in response.content.decode()
    mine.refresh_from_db()
    theirs.refresh_from_db()
    assert (mine.state, theirs.state) == ("revoked", "active")
    assert "theirs" not in page.get("/developer/").content.decode()


def test_a_viewer_is_offered_only_what_a_viewer_may(client: Client, stranger: User) -> None:
    client.force_login(stranger)
    body = client.get("/developer/").content.decode()
    assert 'value="models:read"' in body
    assert 'value="inference"' not in body
    assert client.post("/developer/tokens", FORM).status_code == 422


def test_examples_name_this_server_and_a_model_that_exists(page: Client) -> None:
    from models_app.models import InstalledModel

    empty = page.get("/developer/", headers={"host": "lm.example:8080"}).content.decode()
    assert "http://lm.example:8080/v1" in empty
    assert "No model is installed yet" in empty
    for number in range(2):
        InstalledModel.objects.create(
            key=f"acme/m{number}",
            publisher="acme",
            display_name="M",
            architecture="llama",
            size_bytes=1,
            max_context_length=9,
            path=f"p{number}",
        )
    body = html.unescape(page.get("/developer/").content.decode())
    assert body.count('"acme/m0"') == 3
    other = html.unescape(page.get("/developer/snippets?model=acme/m1").content.decode())
    assert other.count('"acme/m1"') == 3
    assert '"><script>' not in html.unescape(page.get('/developer/snippets?model="><script>').content.decode())


def test_loaded_models_are_listed(page: Client) -> None:
    from models_app.models import InstalledModel, ModelInstance
    from workers.models import WorkerNode

    assert "No model is in memory" in page.get("/developer/instances").content.decode()
    model = InstalledModel.objects.create(
        key="acme/m", publisher="acme", display_name="M", architecture="llama", size_bytes=1, max_context_length=9, path="p"
    )
    node = WorkerNode.objects.create(name="box", incarnation="00000000-0000-0000-0000-000000000001")
    ModelInstance.objects.create(identifier="my-name", model=model, node=node, status="ready", config={"context_length": 4096})
    body = page.get("/developer/instances").content.decode()
    assert "my-name" in body
    assert "4,096" in body


def test_nobody_sees_nothing(client: Client) -> None:
    for path in ("/developer/", "/developer/instances", "/developer/snippets"):
        response = client.get(path)
        assert response.status_code == 302
        assert response["Location"].startswith("/sign-in")
    assert client.post("/developer/tokens", FORM).status_code == 302


def test_forms_need_the_csrf_token(owner: User) -> None:
    from django.test import Client as Browser

    browser = Browser(enforce_csrf_checks=True)
    browser.force_login(owner)
    assert browser.post("/developer/tokens", FORM).status_code == 403
