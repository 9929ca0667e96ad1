"""Machines that run models."""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar

from django.db import models
from django.utils import timezone

HEARTBEAT_SECONDS = 2.0
ALIVE_SECONDS = 8.0


class WorkerNodeQuerySet(models.QuerySet["WorkerNode"]):
    """Queries over nodes."""

    def alive(self) -> WorkerNodeQuerySet:
        """Return the nodes whose heartbeat is recent."""
        return self.filter(heartbeat_at__gt=timezone.now() - timedelta(seconds=ALIVE_SECONDS))


class WorkerNode(models.Model):
    """One GPU worker process. ``incarnation`` changes with every start, which tells its leases from those of a dead predecessor."""

    name = models.CharField(max_length=100, primary_key=True)
    incarnation = models.UUIDField()
    started_at = models.DateTimeField(default=timezone.now)
    heartbeat_at = models.DateTimeField(default=timezone.now)
    hardware = models.JSONField(default=dict)
    engines = models.JSONField(default=list)
    free_memory_bytes = models.BigIntegerField(default=0)
    total_memory_bytes = models.BigIntegerField(default=0)

    objects: ClassVar[models.Manager[WorkerNode]] = WorkerNodeQuerySet.as_manager()

    def __str__(self) -> str:
        return self.name

    @property
    def queue(self) -> str:
        """Return the name of this node's Celery queue."""
        return f"gpu.{self.name}"
