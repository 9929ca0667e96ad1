"""Refusals that happen before any route is chosen, in the format of the dialect whose path it was."""

from __future__ import annotations

import msgspec

from api.handler import is_api_path
from api.openai.translate import error_response
from lmweb.body_limits import MIB, Limit, plain_text
from lmweb.errors import LmwebError

BODY_LIMITS = (Limit("/v1/", 20 * MIB),)


def render_refusal(path: str, error: LmwebError) -> tuple[str, bytes]:
    """Return the content type and the body of an error on a path."""
    if is_api_path(path):
        return "application/json", msgspec.json.encode(error_response(error))
    return plain_text(path, error)
