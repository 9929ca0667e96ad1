"""REST v1's wire format, field for field as LM Studio documents it. Unknown fields of requests are refused."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class ErrorBody(msgspec.Struct, frozen=True):
    """What went wrong; ``code`` is for programs. ``details`` is ours, where there are any: the bytes that are missing, and the like."""

    type: str
    message: str
    code: str
    param: str | None = None
    details: dict[str, Any] | UnsetType = UNSET


class ErrorResponse(msgspec.Struct, frozen=True):
    """The body of every answer with a status of 400 and above."""

    error: ErrorBody


class DownloadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to download: the name of a staff pick, ``user/repo``, or an address on the Hub."""

    model: str
    quantization: str | None = None


class DownloadJob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a download is. Sizes are in bytes, times in ISO 8601; which fields are there depends on ``status``.

    ``error`` is ours: why a download failed, why an admin declined it, or that it was cancelled.
    """

    status: Literal["downloading", "paused", "completed", "failed", "already_downloaded"]
    job_id: str | UnsetType = UNSET
    total_size_bytes: int | UnsetType = UNSET
    downloaded_bytes: int | UnsetType = UNSET
    bytes_per_second: float | UnsetType = UNSET
    estimated_completion: str | UnsetType = UNSET
    started_at: str | UnsetType = UNSET
    completed_at: str | UnsetType = UNSET
    error: ErrorBody | UnsetType = UNSET
