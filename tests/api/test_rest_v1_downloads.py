"""REST v1's download endpoints, field for field."""

from __future__ import annotations

import re
import threading
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from tests.hub.server import Hub, Repo

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_django import Settings

    from lmweb.models import User

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def repo(hub: Hub, settings: Settings, tmp_path: Path) -> Repo:
    from django.core.cache import cache

    from tests.micro_models import make_micro

    settings.HF_ENDPOINT, settings.MODELS_DIR = hub.url, tmp_path / "models"
    cache.clear()
    return hub.add(Repo("acme/Api-GGUF", {"Api-F32.gguf": make_micro(tmp_path / "x.gguf").read_bytes(), "Api-Q8_0.gguf": b"x" * 5000}))


def token(user: User, *scopes: str) -> dict[str, str]:
    from lmweb.models import ApiToken

    return {"Authorization": f"Bearer {ApiToken.issue(user=user, name='t', scopes=list(scopes) or None)[1]}"}


async def test_download_and_status(repo: Repo, hub: Hub, admin: User) -> None:
    from asgiref.sync import sync_to_async

    from models_app import transfer
    from tests.api.client import call

    headers = await sync_to_async(token)(admin, "models:manage")
    body: dict[str, Any] = {"model": f"https://huggingface.co/{repo.name}", "quantization": "f32"}
    answer = (await call("POST", "/api/v1/models/download", headers=headers, json_body=body)).json()
    size = len(repo.files["Api-F32.gguf"])
    assert re.fullmatch(r"job_[0-9a-f]+", answer["job_id"])
    assert set(answer) == {"job_id", "status", "total_size_bytes", "downloaded_bytes", "bytes_per_second", "started_at"}
    assert (answer["status"], answer["total_size_bytes"], answer["downloaded_bytes"]) == ("downloading", size, 0)
    again = (await call("POST", "/api/v1/models/download", headers=headers, json_body=body)).json()
    assert again["job_id"] == answer["job_id"]
    await sync_to_async(transfer.run)(answer["job_id"], transfer.Worker("n", uuid.uuid4(), threading.Event()))
    done = (await call("GET", f"/api/v1/models/download/status/{answer['job_id']}", headers=headers)).json()
    assert set(done) == {"job_id", "status", "total_size_bytes", "downloaded_bytes", "started_at", "completed_at"}
    assert (done["status"], done["downloaded_bytes"]) == ("completed", size)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", done["completed_at"])
    assert (await call("POST", "/api/v1/models/download", headers=headers, json_body=body)).json() == {"status": "already_downloaded"}


def move(job_id: str, act: str, *people: User, **fields: Any) -> None:
    """Change a download as the page and the worker do."""
    from lmweb.access import Principal
    from models_app import downloads
    from models_app.models import Download

    download = Download.objects.get(pk=job_id)
    if act:
        getattr(downloads, act)(principal=Principal(people[0]), download=download, **fields)
    else:
        Download.objects.filter(pk=job_id).update(**fields)


async def test_pause_resume_retry_cancel(repo: Repo, admin: User) -> None:
    from asgiref.sync import sync_to_async

    from tests.api.client import call

    headers = await sync_to_async(token)(admin, "models:manage")
    job = (await call("POST", "/api/v1/models/download", headers=headers, json_body={"model": repo.name})).json()["job_id"]

    async def act(name: str) -> Any:
        return await call("POST", f"/api/v1/models/download/{job}/{name}", headers=headers)

    paused = await act("pause")
    assert (paused.status, paused.json()["status"]) == (200, "paused")
    assert "bytes_per_second" not in paused.json()
    again = await act("pause")
    assert (again.status, again.error()["code"]) == (409, "conflict")
    assert (await act("resume")).json()["status"] == "downloading"
    await sync_to_async(move)(job, "", status="failed", error_code="outbound_failed", error_message="The Hub is away.")
    failed = (await call("GET", f"/api/v1/models/download/status/{job}", headers=headers)).json()
    assert failed["error"] == {"type": "download_failed", "message": "The Hub is away.", "code": "outbound_failed", "param": None}
    assert "error" not in (await act("resume")).json()
    cancelled = (await act("cancel")).json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "download_cancelled")
    assert (await act("resume")).status == 409
    assert (await call("POST", "/api/v1/models/download/job_none/pause", headers=headers)).status == 404


async def test_members_ask_and_an_admin_decides(repo: Repo, admin: User, owner: User, teammate: User) -> None:
    from asgiref.sync import sync_to_async

    from tests.api.client import call

    member = await sync_to_async(token)(owner, "models:manage")
    other = await sync_to_async(token)(teammate, "models:manage")
    asked = (await call("POST", "/api/v1/models/download", headers=member, json_body={"model": repo.name})).json()
    job = asked["job_id"]
    assert asked["status"] == "paused"
    assert (await call("POST", f"/api/v1/models/download/{job}/resume", headers=member)).status == 403
    assert (await call("POST", f"/api/v1/models/download/{job}/cancel", headers=other)).status == 404
    await sync_to_async(move)(job, "decline", admin, reason="Too large for us.")
    declined = (await call("GET", f"/api/v1/models/download/status/{job}", headers=member)).json()
    assert (declined["status"], declined["error"]["message"]) == ("failed", "Too large for us.")
    again = (await call("POST", "/api/v1/models/download", headers=member, json_body={"model": repo.name})).json()["job_id"]
    assert (await call("POST", f"/api/v1/models/download/{again}/cancel", headers=member)).json()["status"] == "failed"


async def test_refusals(repo: Repo, admin: User, stranger: User) -> None:
    from asgiref.sync import sync_to_async

    from tests.api.client import call

    boss = await sync_to_async(token)(admin, "models:manage")
    reader = await sync_to_async(token)(admin)
    body = {"model": repo.name}
    viewer = await sync_to_async(token)(stranger, "models:manage")
    for headers in (viewer, reader):
        assert (await call("POST", "/api/v1/models/download", headers=headers, json_body=body)).status == 403
    for wrong in ({}, {"model": 5}, {"model": "x"}, {"model": repo.name, "quantization": "Q3"}, {"model": repo.name, "odd": 1}, []):
        answer = await call("POST", "/api/v1/models/download", headers=boss, json_body=wrong)
        assert (answer.status, answer.error()["type"]) == (400, "invalid_request"), wrong
    answer = await call("GET", "/api/v1/models/download/status/job_none", headers=boss)
    assert (answer.status, answer.error()["type"]) == (404, "job_not_found")
    assert (await call("POST", "/api/v1/models/download", headers=boss, json_body={"model": "acme/none"})).status == 404
