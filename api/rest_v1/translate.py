"""Between REST v1 and ours."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from django.utils import timezone
from msgspec import UNSET, UnsetType

from api.rest_v1.schemas import DownloadJob, ErrorBody, ErrorResponse
from lmweb.errors import LmwebError
from models_app.models import Download

JobStatus = Literal["downloading", "paused", "completed", "failed"]

#: Our finer states in the words of REST v1. What somebody else decides about waits.
JOB_STATUSES: Final[dict[str, JobStatus]] = {
    Download.Status.REQUESTED: "paused",
    Download.Status.DECLINED: "failed",
    Download.Status.QUEUED: "downloading",
    Download.Status.DOWNLOADING: "downloading",
    Download.Status.VERIFYING: "downloading",
    Download.Status.PAUSED: "paused",
    Download.Status.COMPLETED: "completed",
    Download.Status.FAILED: "failed",
    Download.Status.CANCELLED: "failed",
}


def already_downloaded() -> DownloadJob:
    """Return the answer about a model that is here."""
    return DownloadJob(status="already_downloaded")


def download_job(download: Download) -> DownloadJob:
    """Return how far a download is."""
    status = JOB_STATUSES[download.status]
    moves = status == "downloading"
    # All bytes are there while they are verified; ``done_bytes`` counts the verified ones then.
    arrived = download.total_bytes if download.status == Download.Status.VERIFYING else download.done_bytes
    left = download.seconds_left
    return DownloadJob(
        status=status,
        job_id=download.pk,
        total_size_bytes=download.total_bytes,
        downloaded_bytes=arrived,
        bytes_per_second=download.bytes_per_second if moves else UNSET,
        estimated_completion=_iso(timezone.now() + timedelta(seconds=left)) if moves and left is not None else UNSET,
        started_at=_iso(download.started_at or download.created_at),
        completed_at=_iso(download.finished_at) if status == "completed" and download.finished_at else UNSET,
        error=_download_error(download),
    )


def _download_error(download: Download) -> ErrorBody | UnsetType:
    if download.status == Download.Status.FAILED:
        return ErrorBody(type="download_failed", message=download.error_message, code=download.error_code)
    if download.status == Download.Status.DECLINED:
        return ErrorBody(type="request_declined", message=download.reason, code="request_declined")
    if download.status == Download.Status.CANCELLED:
        return ErrorBody(type="download_cancelled", message="The download was cancelled.", code="download_cancelled")
    return UNSET


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def error_response(error: LmwebError) -> ErrorResponse:
    """Return an error in the format of REST v1."""
    return ErrorResponse(
        ErrorBody(type=_error_type(error), message=error.message, code=error.code, param=error.param, details=error.details or UNSET)
    )


def _error_type(error: LmwebError) -> str:
    named = error.status >= 500 or error.code in {"model_not_found", "job_not_found"}
    return error.code if named else "invalid_request"
