"""Server-sent events, shared by every API dialect: the encoder and the response that nothing in between may buffer."""

from __future__ import annotations

from collections.abc import AsyncIterator

from django.http import StreamingHttpResponse

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def data(payload: bytes) -> bytes:
    """Return an unnamed event. ``payload`` is one line, as JSON encoders write it."""
    return b"data: " + payload + b"\n\n"


def comment(text: str) -> bytes:
    """Return a line that clients skip, which keeps connections and proxies awake. ``text`` has no line breaks."""
    return f": {text}\n\n".encode()


def response(events: AsyncIterator[bytes]) -> StreamingHttpResponse:
    """Return the response that sends ``events`` as they come."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}
    return StreamingHttpResponse(events, content_type="text/event-stream; charset=utf-8", headers=headers)
