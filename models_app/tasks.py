"""Celery tasks of the io worker about downloads and files: thin, named, with ids as arguments."""

from __future__ import annotations

import threading
import uuid
from typing import Any

from celery import signals
from django.conf import settings

from lmweb.celery import app
from lmweb.db import visit
from models_app import downloads, transfer, verify

_worker = transfer.Worker(settings.NODE_NAME, uuid.uuid4(), threading.Event())


@app.task(name=downloads.RUN_TASK)
def run_download(download_id: str) -> None:
    """Do the work of a download, unless somebody else does or enough run."""
    visit(transfer.run, download_id, _worker)


@app.task(name=verify.TASK)
def verify_model(model_id: int) -> None:
    """Check the files of a model."""
    visit(verify.run, model_id)


@app.task(name="models_app.tasks.tend_downloads")
def tend_downloads() -> None:
    """Let downloads of dead workers wait again, and start what waits (every few seconds)."""
    visit(_tend)


def _tend(node: str = "") -> None:
    transfer.release_lost(node=node, incarnation=_worker.incarnation)
    downloads.send_waiting()


@signals.worker_ready.connect
def take_up(sender: Any, **_: Any) -> None:
    """Go on with what the predecessor of this process had in hand."""
    if sender.hostname.startswith("io@"):
        visit(_tend, _worker.node)


@signals.worker_shutting_down.connect
def give_back(**_: Any) -> None:
    """Have downloads end at their next report; they wait until the worker is back."""
    _worker.stopping.set()
