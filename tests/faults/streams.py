"""Clients that stream an answer over HTTP and keep what they got, whatever happens to the server."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from typing import Any

from tests.live import Live

NETWORK_ERRORS = (OSError, http.client.HTTPException)


class Stream:
    """One streaming chat completion in a thread of its own."""

    def __init__(self, live: Live, token: str, prompt: str, *, model: str, max_tokens: int, **parameters: Any) -> None:
        host, port = live.base_url.removeprefix("http://").rsplit(":", 1)
        self._connection = http.client.HTTPConnection(host, int(port), timeout=120)
        body = {
            "model": model,
            "stream": True,
            "temperature": 0,
            "max_tokens": max_tokens,
            "messages": [{"role": "user", "content": prompt}],
        }
        self._body = json.dumps(body | parameters)
        self._token = token
        self.text = ""
        self.error: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self.done = False
        self.lost = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            self._connection.request("POST", "/v1/chat/completions", self._body, headers)
            with self._connection.getresponse() as response:
                for line in response:
                    self._take(line.decode().strip())
            self.lost = not self.done and self.error is None
        except NETWORK_ERRORS:
            self.lost = True
        finally:
            self._connection.close()

    def _take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith(("data: ", "{")):
            chunk = json.loads(line.removeprefix("data: "))
            self.error = chunk.get("error") or self.error
            for choice in chunk.get("choices", []):
                self.text += choice["delta"].get("content") or ""
                self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def close(self) -> None:
        """Hang up, as a client that goes away does."""
        with contextlib.suppress(OSError):
            if self._connection.sock is not None:
                self._connection.sock.shutdown(socket.SHUT_RDWR)
        self.thread.join(10)
