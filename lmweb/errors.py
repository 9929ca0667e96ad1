"""The one exception tree. Every boundary (HTTP, websocket, worker event, command) renders it in its own format.

An error carries a stable ``code`` for programs, an HTTP ``status`` and a ``message`` that is safe to show to anybody.
This module imports nothing, so that runner processes can use it too.
"""

from __future__ import annotations

from typing import Any, ClassVar


class LmwebError(Exception):
    """Base of all expected failures.

    Attributes:
        code: stable machine-readable name, also sent in ``error`` events.
        status: HTTP status of the response that renders this error.
        retryable: whether the same request may succeed later unchanged.
        retry_after_seconds: when to try again, if it is.
        param: name of the request field at fault, if one is.
        details: further JSON-serialisable facts (sizes, limits), never secrets.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    retry_after_seconds: ClassVar[int] = 1

    def __init__(self, message: str, *, param: str | None = None, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = details or {}


class InvalidRequest(LmwebError):
    """The request is malformed or a value is out of range."""

    code, status = "invalid_request", 400


class ContextLengthExceeded(InvalidRequest):
    """The prompt does not fit the model's context."""

    code = "context_length_exceeded"


class TemplateError(InvalidRequest):
    """The model's chat template could not render these messages."""

    code = "template_error"


class InvalidModelFile(InvalidRequest):
    """A model file is malformed, truncated, hostile or of an unsupported format."""

    code = "invalid_model_file"


class NotAuthenticated(LmwebError):
    """No credentials, or credentials that are wrong, expired or revoked."""

    code, status = "invalid_api_key", 401


class PermissionDenied(LmwebError):
    """The principal is known but may not do this."""

    code, status = "permission_denied", 403


class JoinRefused(LmwebError):
    """A machine may not run models for this installation, or not in the state that it is in.

    ``exit_status`` is that of a worker that ends for this reason (EX_CONFIG of sysexits.h): to start it again is of no use.
    """

    code, status = "join_refused", 403
    exit_status: ClassVar[int] = 78


class NotFound(LmwebError):
    """The object does not exist, or the principal may not know that it does."""

    code, status = "not_found", 404


class ModelNotFound(NotFound):
    """No model of this name is visible to the principal."""

    code = "model_not_found"


class ModelNotLoaded(ModelNotFound):
    """The model is not in memory, and requests do not load models here."""

    code = "model_not_loaded"


class JobNotFound(NotFound):
    """No download of this name is visible to the principal."""

    code = "job_not_found"


class Conflict(LmwebError):
    """The object is in a state that does not allow this."""

    code, status = "conflict", 409


class PayloadTooLarge(LmwebError):
    """The request body is larger than this route accepts."""

    code, status = "payload_too_large", 413


class TooManyRequests(LmwebError):
    """As many requests of this person wait as may; ``details`` has ``running_limit`` and ``waiting_limit``."""

    code, status, retryable = "rate_limit_exceeded", 429, True
    retry_after_seconds = 5


class ModelLoadFailed(LmwebError):
    """The engine could not load the model."""

    code, status = "model_load_failed", 503


class InsufficientMemory(ModelLoadFailed):
    """The model does not fit beside what is in use; ``details`` has ``needed_bytes``, ``free_bytes`` and ``held_by``."""

    code = "insufficient_memory"


class GenerationInterrupted(LmwebError):
    """The generation could not be finished, also after its retries; its text so far is kept."""

    code, status, retryable = "generation_interrupted", 503, True


class ServiceUnavailable(LmwebError):
    """A part of the system (database, Redis, every worker) is not reachable right now."""

    code, status, retryable = "service_unavailable", 503, True


class OutboundRefused(LmwebError):
    """A request to another server was not sent, or its answer not followed: its address is not one that may be reached."""

    code, status = "outbound_refused", 502


class OutboundFailed(LmwebError):
    """Another server could not be reached, or its answer did not arrive whole."""

    code, status, retryable = "outbound_failed", 502, True


class HubOffline(OutboundFailed):
    """The installation does not ask the Hub: an admin switched that off."""

    code, retryable = "hub_offline", False


class HubBusy(OutboundFailed):
    """The Hub asks to slow down; ``details`` has ``retry_after_seconds``."""

    code, status = "hub_busy", 503


class GatedModel(LmwebError):
    """The model's owner gives it only to accounts that they have accepted, and the Hub's token here is none of those."""

    code, status = "gated_model", 403


class CorruptDownload(LmwebError):
    """What arrived is not what the Hub announced."""

    code, status = "corrupt_download", 502


def error_class(code: str) -> type[LmwebError]:
    """Return the class whose ``code`` this is (``LmwebError`` for an unknown one), to rebuild an error from an event."""
    pending = [LmwebError]
    while pending:
        cls = pending.pop()
        if cls.code == code:
            return cls
        pending.extend(cls.__subclasses__())
    return LmwebError
