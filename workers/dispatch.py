"""Sending work to the nodes: the only module that publishes Celery messages and control commands for models.

Tasks are named, not imported, so that the web process never loads the runtime. Arguments are ids only.
"""

from __future__ import annotations

import logging

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

LOAD = "workers.tasks.load_model"
UNLOAD = "workers.tasks.unload_model"
CANCEL = "cancel_generation"


def send(task: str, node: str, *args: str | int) -> bool:
    """Publish a task to a node's queue. Returns False when the broker is away; the reaper sends unfinished rows again."""
    from lmweb.celery import app

    try:
        app.send_task(task, args=args, queue=f"gpu.{node}", ignore_result=True)
    except (OperationalError, RedisError, OSError) as error:
        logger.warning("could not send %s%s: %s", task, args, error)
        return False
    return True


def broadcast_cancel(generation_id: str) -> None:
    """Tell every node at once to stop a generation. The row's ``cancel_requested`` flag covers a lost message."""
    from lmweb.celery import app

    try:
        app.control.broadcast(CANCEL, arguments={"generation_id": generation_id})
    except (OperationalError, RedisError, OSError) as error:
        logger.warning("could not broadcast the end of %s: %s", generation_id, error)
