"""REST v1's wire format, field for field as LM Studio documents it. Unknown fields of requests are refused."""

from __future__ import annotations

import msgspec


class ErrorBody(msgspec.Struct, frozen=True):
    """What went wrong; ``code`` is for programs."""

    type: str
    message: str
    code: str
    param: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True):
    """The body of every answer with a status of 400 and above."""

    error: ErrorBody
