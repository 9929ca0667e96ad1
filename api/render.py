"""Refusals that happen before any route is chosen, in the format of the dialect whose path it was."""

from __future__ import annotations

import msgspec

from api.handler import is_api_path
from api.openai.translate import error_response
from api.rest_v1.translate import error_response as rest_v1_error_response
from lmweb.body_limits import MIB, Limit, plain_text
from lmweb.errors import LmwebError

BODY_LIMITS = (Limit("/v1/", 20 * MIB), Limit("/api/", 20 * MIB))


def render_refusal(path: str, error: LmwebError) -> tuple[str, bytes]:
    """Return the content type and the body of an error on a path."""
    if not is_api_path(path):
        return plain_text(path, error)
    body: msgspec.Struct = rest_v1_error_response(error) if path.startswith("/api") else error_response(error)
    return "application/json", msgspec.json.encode(body)
