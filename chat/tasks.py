"""Celery tasks of chats; periodic, in the io worker."""

from __future__ import annotations

import logging

from chat import services
from lmweb.celery import app
from lmweb.db import visit

logger = logging.getLogger(__name__)


@app.task(name="chat.tasks.forget_deleted")
def forget_deleted() -> None:
    """Blank what answers wrote after their chat was deleted."""
    if forgotten := visit(services.forget_deleted):
        logger.info("forgot the text of %d answers of deleted chats", forgotten)
