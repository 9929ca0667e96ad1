"""Speaks HTTP to the ASGI application itself, with everything that wraps it: also streams, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote


@dataclass
class Answer:
    """What came back so far."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """Return the error of a body in OpenAI's format, checking its shape."""
        body = self.json()
        assert set(body) == {"error"}, body
        assert set(body["error"]) == {"message", "type", "param", "code"}, body
        assert body["error"]["message"]
        assert "Traceback" not in self.body.decode()
        return body["error"]

    def chunks(self) -> list[Any]:
        """Return the data of the events so far, decoded; ``[DONE]`` as the string."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def text(self) -> str:
        """Return the text of a stream."""
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in self.chunks() if chunk != "[DONE]" and chunk["choices"])


class Call:
    """One request in progress."""

    def __init__(self, method: str, path: str, *, headers: dict[str, str] | None = None, body: bytes | list[bytes] = b"") -> None:
        from lmweb.asgi import application

        address, _, query = path.partition("?")
        self.answer = Answer()
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._changed = asyncio.Event()
        parts = body if isinstance(body, list) else [body]
        for number, part in enumerate(parts, 1):
            self._inbox.put_nowait({"type": "http.request", "body": part, "more_body": number < len(parts)})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": unquote(address),
            "raw_path": address.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": query.encode(),
            "headers": [(b"host", b"testserver"), *((k.lower().encode(), v.encode("latin-1")) for k, v in (headers or {}).items())],
            "client": ["127.0.0.1", 40000],
            "server": ["127.0.0.1", 1234],
        }
        self.task = asyncio.ensure_future(application(scope, self._inbox.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.answer.status = message["status"]
            self.answer.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            self.answer.body += message.get("body", b"")
        self._changed.set()

    async def until(self, text: str, timeout: float = 10) -> Answer:
        """Wait until the body contains ``text``."""
        async with asyncio.timeout(timeout):
            while text.encode() not in self.answer.body:
                self._changed.clear()
                await self._changed.wait()
        return self.answer

    async def done(self, timeout: float = 20) -> Answer:
        """Wait for the end."""
        async with asyncio.timeout(timeout):
            await self.task
        return self.answer

    async def leave(self) -> None:
        """Close the connection, as a client that goes away."""
        self._inbox.put_nowait({"type": "http.disconnect"})
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(self.task, 5)


async def call(method: str, path: str, *, token: str = "", json_body: Any = None, **options: Any) -> Answer:
    """Make a whole request."""
    headers = dict(options.pop("headers", {}))
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if json_body is not None:
        headers.setdefault("Content-Type", "application/json")
        options["body"] = json.dumps(json_body).encode()
    return await Call(method, path, headers=headers, **options).done()
