"""Between REST v1 and ours."""

from __future__ import annotations

from api.rest_v1.schemas import ErrorBody, ErrorResponse
from lmweb.errors import LmwebError


def error_response(error: LmwebError) -> ErrorResponse:
    """Return an error in the format of REST v1."""
    return ErrorResponse(ErrorBody(type=_error_type(error), message=error.message, code=error.code, param=error.param))


def _error_type(error: LmwebError) -> str:
    if error.code in {"model_not_found", "job_not_found"}:
        return error.code
    return "internal_error" if error.status >= 500 else "invalid_request"
