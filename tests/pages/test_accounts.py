"""Set-up, sign-in, passwords, and how pages look when something is wrong: real views, real database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth import get_user
from django.db import OperationalError
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import AsyncRequestFactory, Client, override_settings
from django.urls import path

from lmweb import setup
from lmweb.errors import Conflict
from lmweb.middleware import PageMiddleware
from lmweb.models import User
from lmweb.urls import handler404, handler500, urlpatterns as real_urls  # noqa: F401  (this module is a ROOT_URLCONF below)
from tests.live import PASSWORD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.django_db


def conflict(request: HttpRequest) -> HttpResponse:
    """Fail in an expected way."""
    raise Conflict("This is how it is <b>now</b>.")


def bug(request: HttpRequest) -> HttpResponse:
    """Fail in an unexpected way."""
    raise ZeroDivisionError("secret detail")


def database_away(request: HttpRequest) -> HttpResponse:
    """Fail as views do while PostgreSQL restarts."""
    raise OperationalError("connection refused")


urlpatterns = [*real_urls, path("x/conflict", conflict), path("x/bug", bug), path("x/database", database_away)]


@pytest.fixture
def signed_in(client: Client, owner: User) -> Client:
    """Return a client with a session."""
    client.force_login(owner)
    return client


def test_set_up_makes_an_admin_signs_in_and_works_once(client: Client) -> None:
    for url in ("/", "/sign-in"):
        response = client.get(url, follow=True)
        assert "no admin yet" in response.content.decode()
    url = f"/setup/{setup.issue_setup_token()}"
    assert client.get(url).status_code == 200
    response = client.post(url, {"username": "ada", "password": "correct-horse-9"})
    assert response.status_code == 302
    assert response.headers["Location"] == "/"
    user = get_user(client)
    assert isinstance(user, User)
    assert user.is_admin
    assert client.get("/").status_code == 200
    for again in (client.get(url), client.post(url, {"username": "eve", "password": "correct-horse-9"}), Client().get(url)):
        assert again.status_code == 404
        assert "not valid any more" in again.content.decode()
    assert User.objects.count() == 1


@pytest.mark.parametrize(
    ("username", "password", "said"),
    [
        ("ada", "short", "at least 8 characters"),
        ("ada", "12345678901", "entirely numeric"),
        ("adalovelace", "adalovelace1", "too similar"),
        ("a b/c", "correct-horse-9", "valid username"),
        ("", "correct-horse-9", "required"),
        ("taken", "correct-horse-9", "already exists"),
        ("a\x00b", "correct-horse-9", "not allowed"),
        ("x" * 5000, "correct-horse-9", "150"),
    ],
)
def test_set_up_says_what_is_wrong_and_keeps_the_name(client: Client, username: str, password: str, said: str) -> None:
    User.objects.create_user("taken", password=PASSWORD)
    response = client.post(f"/setup/{setup.issue_setup_token()}", {"username": username, "password": password})
    page = response.content.decode()
    assert response.status_code == 422
    assert said in page
    assert "\x00" in username or f'value="{username}"' in page or not username
    assert f'value="{password}"' not in page
    assert not setup.admin_exists()


@pytest.mark.parametrize("secret", ["x", "%00", "x" * 5000, "%2e%2e", "\N{SNOWMAN}"])
def test_a_wrong_set_up_link_leads_nowhere(client: Client, secret: str) -> None:
    setup.issue_setup_token()
    assert client.get(f"/setup/{secret}").status_code == 404
    assert not setup.admin_exists()


def test_sign_in_keeps_the_name_and_locks_out_guessing(client: Client, admin: User) -> None:
    response = client.post("/sign-in", {"username": "admin", "password": "wrong"})
    assert 'value="admin"' in response.content.decode()
    assert "Name or password is wrong" in response.content.decode()
    for _ in range(9):
        response = client.post("/sign-in", {"username": "admin", "password": "wrong"})
    assert response.status_code == 429
    assert "Wait 15 minutes" in response.content.decode()
    assert 'value="admin"' in response.content.decode()
    response = client.post("/sign-in", {"username": "admin", "password": PASSWORD})
    assert response.status_code == 429


def test_sign_in_leads_to_own_pages_only(client: Client, admin: User) -> None:
    for target, goes_to in (
        ("/models/", "/models/"),
        ("https://evil.example/", "/"),
        ("//evil.example", "/"),
        ("javascript:alert(1)", "/"),
    ):
        client.logout()
        response = client.post("/sign-in", {"username": "admin", "password": PASSWORD, "next": target})
        assert response.headers["Location"] == goes_to


def test_password_change_needs_the_old_one_and_ends_other_sessions(signed_in: Client, owner: User) -> None:
    other = Client()
    other.force_login(owner)
    new = "another-long-password"
    wrong = signed_in.post("/password", {"old_password": "no", "new_password1": new, "new_password2": new})
    assert wrong.status_code == 200
    assert "old password was entered incorrectly" in wrong.content.decode()
    right = signed_in.post("/password", {"old_password": PASSWORD, "new_password1": new, "new_password2": new}, follow=True)
    assert "Your password is changed" in right.content.decode()
    assert other.get("/").status_code == 302


def test_pages_need_a_sign_in_and_htmx_is_sent_there_whole(client: Client, admin: User) -> None:
    for url in ("/", "/chats", "/chat/models", "/password", "/chat/00000000-0000-0000-0000-000000000000"):
        assert client.get(url).headers["Location"].startswith("/sign-in")
    assert client.get("/chats", headers={"HX-Request": "true"}).headers["HX-Redirect"] == "/sign-in"


def test_headers(client: Client, signed_in: Client) -> None:
    for url in ("/", "/sign-in", "/nowhere"):
        headers = client.get(url).headers
        policy = headers["Content-Security-Policy"]
        assert "unsafe" not in policy
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"} <= set(policy.split("; "))
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "camera=()" in headers["Permissions-Policy"]
        assert headers["Referrer-Policy"] == "same-origin"


@override_settings(ROOT_URLCONF="tests.pages.test_accounts")
def test_errors_are_rendered_once_in_the_form_that_was_asked_for(signed_in: Client) -> None:
    signed_in.raise_request_exception = False
    page = signed_in.get("/x/conflict")
    assert page.status_code == 409
    assert "This is how it is &lt;b&gt;now&lt;/b&gt;." in page.content.decode()
    part = signed_in.get("/x/conflict", headers={"HX-Request": "true"})
    assert part.status_code == 409
    assert "<html" not in part.content.decode()
    data = signed_in.get("/x/conflict", headers={"Accept": "application/json"})
    assert (data.status_code, data.json()["error"]["code"]) == (409, "conflict")
    broken = signed_in.get("/x/bug")
    assert broken.status_code == 500
    assert "secret detail" not in broken.content.decode()
    assert "Traceback" not in broken.content.decode()
    away = signed_in.get("/x/database")
    assert (away.status_code, away.headers["Retry-After"]) == (503, "5")
    assert signed_in.get("/nowhere").status_code == 404


def test_a_form_without_a_token_is_refused_with_a_page(admin: User) -> None:
    response = Client(enforce_csrf_checks=True).post("/sign-in", {"username": "admin", "password": PASSWORD})
    assert response.status_code == 403
    assert "reload it" in response.content.decode()


@pytest.mark.parametrize(
    ("url", "method", "status"),
    [
        ("/chats?before=x&current=%00", "get", 200),
        ("/chats?before=2026-11-20T00:00:00%2B00:00", "get", 200),
        ("/chats?before=9999999-01-01", "get", 200),
        ("/chats?before=2026-13-45T00:00:00%2B00:00", "get", 200),
        ("/chat/00000000-0000-0000-0000-000000000000", "get", 404),
        ("/chat/00000000-0000-0000-0000-000000000000/messages?before=x", "get", 404),
        ("/chat/00000000-0000-0000-0000-000000000000/settings", "post", 400),
        ("/chat/00000000-0000-0000-0000-000000000000/delete", "get", 405),
        ("/chat/models/load", "post", 404),
        ("/chat/not-an-id", "get", 404),
    ],
)
def test_odd_requests_are_no_server_errors(signed_in: Client, url: str, method: str, status: int) -> None:
    assert getattr(signed_in, method)(url).status_code == status


async def test_streams_pass_through_unbuffered() -> None:
    sent: list[str] = []

    async def chunks() -> AsyncIterator[bytes]:
        for number in range(3):
            sent.append(f"made {number}")
            yield b"x"

    async def view(request: Any) -> StreamingHttpResponse:
        return StreamingHttpResponse(chunks())

    response = await PageMiddleware(view)(AsyncRequestFactory().get("/v1/x"))  # type: ignore[misc]
    assert sent == []
    async for _ in response.streaming_content:
        sent.append("read")
    assert sent == ["made 0", "read", "made 1", "read", "made 2", "read"]
    assert "Content-Security-Policy" in response.headers
