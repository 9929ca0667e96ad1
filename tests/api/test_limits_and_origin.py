"""What a client may send at all, and which pages may open a websocket."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lmweb import body_limits
from lmweb.body_limits import Limit, RequestLimits
from lmweb.origin import is_own_origin
from tests.api.client import call

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def request(
    parts: list[bytes], *, path: str = "/x", query: bytes = b"", delay: float = 0, length: str = ""
) -> tuple[int, bytes, bool]:
    """Send a body through the wrapper; return the status, the body, and whether the application had the whole request."""
    reached = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            if not message.get("more_body"):
                break
        reached.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    inbox = iter(parts)
    left = len(parts)

    async def receive() -> dict[str, Any]:
        nonlocal left
        await asyncio.sleep(delay)
        left -= 1
        return {"type": "http.request", "body": next(inbox), "more_body": left > 0}

    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", length.encode())] if length else []
    scope = {"type": "http", "path": path, "root_path": "/x", "query_string": query, "headers": headers}
    await RequestLimits(application, (Limit("/small", 4),))(scope, receive, send)
    assert all(scope["root_path"] == "" for scope in reached)
    return sent[0]["status"], sent[1]["body"], bool(reached)


async def test_bodies_within_the_limit_pass() -> None:
    assert await request([b"ab", b"cd"], path="/small/x", length="4") == (200, b"ok", True)
    assert await request([b"x" * 5], path="/large") == (200, b"ok", True)


@pytest.mark.parametrize(("parts", "length"), [([b"ab", b"cde"], ""), ([b""], "5"), ([b""], "9" * 5000)])
async def test_bodies_over_the_limit_are_refused(parts: list[bytes], length: str) -> None:
    status, _, reached = await request(parts, path="/small/x", length=length)
    assert (status, reached) == (413, False)


async def test_slow_bodies_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limits, "BODY_SECONDS", 0.1)
    status, _, reached = await request([b"x"] * 10, delay=0.03)
    assert (status, reached) == (408, False)


@pytest.mark.parametrize(("path", "query"), [("/a\x00b", b""), ("/", b"q=%00")])
async def test_nul_characters_in_addresses_are_refused(path: str, query: bytes) -> None:
    status, _, reached = await request([b""], path=path, query=query)
    assert (status, reached) == (400, False)


@pytest.mark.usefixtures("db")
async def test_nul_in_an_api_path_has_the_api_format() -> None:
    answer = await call("GET", "/v1/models/a%00b")
    assert (answer.status, answer.error()["code"]) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("origin", "host", "own"),
    [
        ("http://localhost:1234", "localhost:1234", True),
        ("https://lm.example.org", "lm.example.org", True),
        ("http://localhost:3000", "localhost:1234", False),
        ("http://evil.example", "localhost:1234", False),
        ("http://localhost:1234.evil.example", "localhost:1234", False),
        ("null", "localhost:1234", False),
        ("", "localhost:1234", False),
        ("", "", False),
        ("http://", "", False),
        ("file://", "localhost:1234", False),
        ("http://[", "localhost:1234", False),
        ("https://proxy.example", "10.0.0.5:1234", True),
    ],
)
async def test_only_own_pages_open_websockets(origin: str, host: str, own: bool, settings: Any) -> None:
    settings.CSRF_TRUSTED_ORIGINS = ["https://proxy.example"]
    assert is_own_origin(origin, host) is own
