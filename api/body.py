"""Bodies of requests and answers, the same for every dialect."""

from __future__ import annotations

import msgspec
from django.http import HttpRequest, HttpResponse

from lmweb.errors import InvalidRequest

_encoder = msgspec.json.Encoder()


def json_body(request: HttpRequest) -> bytes:
    """Return the body. Raises ``InvalidRequest`` if it is declared as something else than JSON."""
    kind = (request.content_type or "").lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise InvalidRequest(f"The body must be application/json, not {kind[:80]}.")
    return request.body


def json_response(body: msgspec.Struct, *, status: int = 200) -> HttpResponse:
    """Return a struct as JSON."""
    content = _encoder.encode(body)
    headers = {"Content-Length": str(len(content)), "X-Content-Type-Options": "nosniff"}
    return HttpResponse(content, status=status, content_type="application/json", headers=headers)
