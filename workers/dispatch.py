"""Sending work to the nodes: the only module that publishes Celery messages and control commands for models.

Tasks are named, not imported, so that the web process never loads the runtime. Arguments are ids only.
"""

from __future__ import annotations

import logging
import time

from django.db.models import Count, Q
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from workers.models import WorkerNode

logger = logging.getLogger(__name__)

LOAD = "workers.tasks.load_model"
UNLOAD = "workers.tasks.unload_model"
CANCEL = "cancel_generation"


#: How long a choice of node holds. Heartbeats are older than this, and a node that has died is found out anyway.
CHOICE_SECONDS = 1.0
_choices: dict[int, tuple[float, WorkerNode]] = {}


def choose_node(model_id: int) -> WorkerNode | None:
    """Return the node to run this model on: one that has it in memory, else the one with most free memory; None if no node lives.

    The choice is remembered for ``CHOICE_SECONDS``: requests come in bursts, and each query delays a first token.
    """
    now = time.monotonic()
    chosen_at, node = _choices.get(model_id, (0.0, None))
    if node is None or now - chosen_at > CHOICE_SECONDS:
        node = _best_node(model_id)
        if node is None:
            return None
        _choices[model_id] = now, node
    return node


def _best_node(model_id: int) -> WorkerNode | None:
    usable = Q(instances__model_id=model_id, instances__status__in=["ready", "loading"])
    nodes = WorkerNode.objects.alive().annotate(loaded=Count("instances", filter=usable))
    return nodes.order_by("-loaded", "-free_memory_bytes").first()


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
