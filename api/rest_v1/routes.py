"""The routes of REST v1: models. They parse, call a service and write; what is allowed is decided in ``lmweb.access``."""

from __future__ import annotations

from collections.abc import Callable

from django.http import HttpRequest, HttpResponse
from ninja import Router

from api.auth import principal_of
from api.body import READ, decode, json_response
from api.rest_v1 import models, translate
from api.rest_v1.schemas import DownloadJob, DownloadRequest
from lmweb.access import Action, Principal, require
from lmweb.db import run_db
from models_app import downloads

router = Router()
router.api_operation(READ, "/models")(models.list_models)
router.post("/models/load")(models.load_model)
router.post("/models/unload")(models.unload_model)


@router.post("/models/download")
async def download_model(request: HttpRequest) -> HttpResponse:
    """Have a model downloaded from the Hub: a new job, the one that is under way, or word that the model is here.

    Whoever lacks the right to download asks an admin for it; that job is paused until it is decided.
    """
    body = decode(request, DownloadRequest)
    return json_response(await run_db(_download, principal_of(request), body))


@router.api_operation(READ, "/models/download/status/{job_id}")
async def download_status(request: HttpRequest, job_id: str) -> HttpResponse:
    """Say how far a download is."""
    return json_response(await run_db(_download_status, principal_of(request), job_id))


@router.post("/models/download/{job_id}/pause")
async def pause_download(request: HttpRequest, job_id: str) -> HttpResponse:
    """Stop a download for now; what has arrived is kept."""
    return json_response(await run_db(_change, principal_of(request), job_id, downloads.pause))


@router.post("/models/download/{job_id}/resume")
async def resume_download(request: HttpRequest, job_id: str) -> HttpResponse:
    """Go on with a download that was paused, or try one again that has failed, from what has arrived."""
    return json_response(await run_db(_change, principal_of(request), job_id, downloads.resume))


@router.post("/models/download/{job_id}/cancel")
async def cancel_download(request: HttpRequest, job_id: str) -> HttpResponse:
    """End a download and delete what has arrived; withdraw a request."""
    return json_response(await run_db(_change, principal_of(request), job_id, downloads.cancel))


def _download(principal: Principal, body: DownloadRequest) -> DownloadJob:
    require(principal, Action.REQUEST_DOWNLOADS)  # before the Hub is asked for somebody who may not even ask an admin
    found = downloads.find(body.model, body.quantization or "")
    asked = downloads.ask(principal=principal, repository=found.repository, variant=found.chosen)
    return translate.download_job(asked.download) if asked.download else translate.already_downloaded()


def _download_status(principal: Principal, job_id: str) -> DownloadJob:
    require(principal, Action.READ_MODELS)
    return translate.download_job(downloads.get(principal, job_id))


def _change(principal: Principal, job_id: str, act: Callable[..., None]) -> DownloadJob:
    require(principal, Action.REQUEST_DOWNLOADS)
    download = downloads.get(principal, job_id)
    act(principal=principal, download=download)
    return translate.download_job(downloads.get(principal, job_id))
