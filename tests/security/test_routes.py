"""Every route of the server, called by everybody who must not get through: nobody, other people, viewers."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from django.test import Client

    from lmweb.models import User
    from tests.security.routes import Route

pytestmark = pytest.mark.django_db

METHODS = ("get", "post", "put", "patch", "delete")
#: What people who are not signed in may reach.
OPEN = {"sign-in", "setup/<str:secret>"}
#: Routes about objects of one person, by the parameter that names the object.
PERSONAL = {"chat_id", "token_id"}


def page_routes() -> list[Route]:
    from tests.security.routes import routes

    return routes("lmweb.urls")


def test_the_walk_finds_the_routes() -> None:
    templates = {route.template for route in page_routes()}
    assert {"", "developer/tokens/<uuid:token_id>/revoke", "models/<int:model_id>/delete", "chat/<uuid:chat_id>"} <= templates


def test_nobody_gets_through(client: Client) -> None:
    for route in page_routes():
        for method in METHODS:
            response = getattr(client, method)(route.path())
            if route.template in OPEN:
                assert response.status_code in {200, 404, 405}, (method, route)
                continue
            led_to_sign_in = response.status_code == 302 and response["Location"].startswith("/sign-in")
            assert led_to_sign_in or response.status_code in {401, 403, 404, 405}, (method, route, response.status_code)


def test_other_people_s_things_are_not_found(client: Client, owner: User, teammate: User) -> None:
    from chat.models import Chat
    from lmweb.models import ApiToken

    chat = Chat.objects.create(user=owner, title="private-title")
    token, _ = ApiToken.issue(user=owner, name="private-token")
    client.force_login(teammate)
    called = 0
    for route in page_routes():
        if not route.parameters & PERSONAL:
            continue
        for method in METHODS:
            response = getattr(client, method)(route.path(chat_id=chat.pk, token_id=token.pk))
            missing = getattr(client, method)(route.path())
            assert response.status_code == missing.status_code, (method, route)
            assert response.status_code in {400, 404, 405}, (method, route, response.status_code)
            assert b"private" not in response.content
            called += 1
    assert called
    chat.refresh_from_db()
    token.refresh_from_db()
    assert (chat.title, token.revoked_at) == ("private-title", None)


def test_people_s_things_are_in_no_list_of_others(client: Client, owner: User, teammate: User) -> None:
    from chat.models import Chat
    from lmweb.models import ApiToken

    Chat.objects.create(user=owner, title="private-title")
    ApiToken.issue(user=owner, name="private-token")
    client.force_login(teammate)
    for route in page_routes():
        if not route.parameters:
            assert b"private-" not in client.get(route.path()).content, route


def test_viewers_change_nothing_about_models(client: Client, stranger: User) -> None:
    from models_app.models import InstalledModel, ModelInstance
    from workers.models import WorkerNode

    model = InstalledModel.objects.create(
        key="acme/m", publisher="acme", display_name="M", architecture="llama", size_bytes=1, max_context_length=9, path="p"
    )
    node = WorkerNode.objects.create(name="box", incarnation=uuid.uuid4())
    instance = ModelInstance.objects.create(identifier="acme/m", model=model, node=node, status="ready")
    client.force_login(stranger)
    for route in page_routes():
        if route.template.startswith(("models/", "chat/models/", "discover/", "activity/", "workers/")):
            for method in ("post", "put", "patch", "delete"):
                response = getattr(client, method)(route.path(model_id=model.pk, instance_id=instance.pk))
                assert response.status_code in {400, 403, 404, 405}, (method, route, response.status_code)
    assert InstalledModel.objects.filter(pk=model.pk).exists()
    instance.refresh_from_db()
    assert instance.status == "ready"


def test_no_route_fails_on_odd_input(client: Client, owner: User) -> None:
    """Odd parameters of every route end below 500."""
    client.force_login(owner)
    odd: list[dict[str, Any]] = [{"model_id": 10**30, "instance_id": 10**30}, {}]
    for route in page_routes():
        for values in odd:
            for method in ("get", "post"):
                response = getattr(client, method)(route.path(**values) + "?q=%F0%9F%92%A9&sort=%27&limit=-1&model=%22&before=x&after=x")
                assert response.status_code < 500, (method, route, values)


def test_templates_have_nothing_inline_that_the_policy_refuses() -> None:
    """Browsers ignore style attributes and handlers of events under the server's Content-Security-Policy."""
    inline = re.compile(r"<[^>]*\s(style|on[a-z]+)=[\"']", re.IGNORECASE)
    templates = list((Path(__file__).resolve().parent.parent.parent / "templates").rglob("*.html"))
    assert templates
    assert not [str(file) for file in templates if inline.search(file.read_text())]
