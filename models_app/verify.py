"""Checks that the files of a model are what they were: SHA-256 of every byte, in the io worker, with its progress in the row."""

from __future__ import annotations

import hashlib
import logging
import time
from datetime import datetime
from typing import Any, Final

from django.db import transaction
from django.utils import timezone
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from lmweb.access import Action, Principal, require
from lmweb.errors import Conflict, ServiceUnavailable
from models_app.models import InstalledModel, ModelFile

logger = logging.getLogger(__name__)

TASK: Final = "models_app.tasks.verify_model"
CHUNK_BYTES: Final = 8 * 1024 * 1024
REPORT_SECONDS: Final = 1.0
#: A check that has not reported for so long was lost with its worker.
LOST_SECONDS: Final = 60


def request_verification(*, principal: Principal, model: InstalledModel) -> None:
    """Have the files of a model checked. Raises ``PermissionDenied``, ``Conflict`` while that is under way, ``ServiceUnavailable``."""
    require(principal, Action.IMPORT_MODELS)
    if model.base_id:
        raise Conflict(f"{model.key} has no files of its own; check the model that it runs on.")
    if is_running(model.verification):
        raise Conflict(f"{model.key} is being checked already.")
    _begin(model)


def note_checksums(model: InstalledModel) -> None:
    """Have the checksums of a model's files computed and noted, unless that is under way. Raises ``ServiceUnavailable``."""
    if not is_running(model.verification):
        _begin(model)


def _begin(model: InstalledModel) -> None:
    _note(model.pk, status="running", done=0, total=model.size_bytes, message="")
    transaction.on_commit(lambda: _send(model.pk))


def is_running(state: dict[str, Any]) -> bool:
    """Whether a check is under way, by what its row says."""
    if state.get("status") != "running":
        return False
    return (timezone.now() - datetime.fromisoformat(state["at"])).total_seconds() < LOST_SECONDS


def run(model_id: int) -> None:
    """Read all files and compare; a file whose checksum was not known is noted down with it."""
    model = InstalledModel.objects.filter(pk=model_id).first()
    if model is None:
        return
    report = _Report(model_id, model.size_bytes)
    noted, wrong = 0, []
    for file in model.files.all():
        try:
            digest = _digest(file, report)
        except OSError as error:
            wrong.append(f"{file.path} cannot be read ({error.strerror})")
            continue
        if not file.sha256:
            noted += 1
            ModelFile.objects.filter(pk=file.pk).update(sha256=digest)
        elif file.sha256 != digest:
            wrong.append(f"{file.path} has changed or is damaged")
    if wrong:
        _note(model_id, status="failed", message=f"{'; '.join(wrong)}. Delete the model and get it again.")
    elif noted:
        _note(model_id, status="noted", message="No checksum was known. It is noted now, and the next check compares with it.")
    else:
        _note(model_id, status="ok", message="Every byte is as it was.")


class _Report:
    """Tells the row about once a second how far a check is."""

    def __init__(self, model_id: int, total: int) -> None:
        self._model_id, self._total = model_id, total
        self._done = 0
        self._told_at = time.monotonic()

    def add(self, count: int) -> None:
        """Count bytes that were read."""
        self._done += count
        if time.monotonic() - self._told_at >= REPORT_SECONDS:
            self._told_at = time.monotonic()
            _note(self._model_id, status="running", done=self._done, total=self._total, message="")


def _digest(file: ModelFile, report: _Report) -> str:
    digest = hashlib.sha256()
    with file.file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            report.add(len(chunk))
    return digest.hexdigest()


def _note(model_id: int, **state: Any) -> None:
    InstalledModel.objects.filter(pk=model_id).update(verification={**state, "at": timezone.now().isoformat()})


def _send(model_id: int) -> None:
    from lmweb.celery import app

    try:
        app.send_task(TASK, args=(model_id,), queue="io", ignore_result=True)
    except (OperationalError, RedisError, OSError) as error:
        logger.warning("the check of model %s could not be sent: %s", model_id, error)
        _note(model_id, status="failed", message="The worker could not be reached. Try again in a moment.")
        raise ServiceUnavailable("The worker could not be reached. Try again in a moment.") from None
