"""Machines that run models: which ones there are, how they came in, and who was turned away."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import ClassVar

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models.functions import Now
from django.utils import timezone

from lmweb.models import BearerToken
from workers.router import DEAD_SECONDS
from workers.store import NodeState

HEARTBEAT_SECONDS = 2.0


class WorkerNodeQuerySet(models.QuerySet["WorkerNode"]):
    """Queries over nodes."""

    def alive(self) -> WorkerNodeQuerySet:
        """Return the nodes whose heartbeat is recent, by the database's clock, which also dates the heartbeats."""
        return self.filter(heartbeat_at__gt=Now() - timedelta(seconds=DEAD_SECONDS))


class WorkerNode(models.Model):
    """One GPU worker process. ``incarnation`` changes with every start, which tells its leases from those of a dead predecessor."""

    class State(models.TextChoices):
        """What an admin lets a node do (``workers.store.NodeState``, with labels)."""

        ACTIVE = NodeState.ACTIVE.value, "Active"
        CORDONED = NodeState.CORDONED.value, "Cordoned"
        DRAINING = NodeState.DRAINING.value, "Draining"

    name = models.CharField(max_length=100, primary_key=True)
    state = models.CharField(max_length=16, choices=State.choices, default=State.ACTIVE)
    incarnation = models.UUIDField()
    started_at = models.DateTimeField(default=timezone.now)
    heartbeat_at = models.DateTimeField(default=timezone.now)
    hardware = models.JSONField(default=dict, help_text="cpu_cores, cpu_name, gpu_memory_bytes, gpu_names, system.")
    engines = models.JSONField(default=list)
    free_memory_bytes = models.BigIntegerField(default=0)
    total_memory_bytes = models.BigIntegerField(default=0)
    free_disk_bytes = models.BigIntegerField(default=0, help_text="Of the disk with its models directory.")
    clock_offset_seconds = models.FloatField(default=0.0, help_text="Its clock minus the database's, at its last heartbeat.")
    version = models.CharField(max_length=32, blank=True, help_text="The release that it runs.")
    log_lines = ArrayField(models.TextField(), default=list, help_text="The last lines of its log, without secrets.")
    key_digest = models.CharField(
        max_length=64, blank=True, help_text="Of the key that it was given when it joined; empty: the server's own."
    )
    joined_with = models.ForeignKey("NodeToken", null=True, on_delete=models.SET_NULL, related_name="nodes")
    joined_at = models.DateTimeField(default=timezone.now)

    objects: ClassVar[models.Manager[WorkerNode]] = WorkerNodeQuerySet.as_manager()

    def __str__(self) -> str:
        return self.name

    @property
    def queue(self) -> str:
        """Return the name of this node's Celery queue."""
        return f"gpu.{self.name}"

    @property
    def has_gpu(self) -> bool:
        """Whether its llama.cpp was compiled for a GPU."""
        return bool(self.hardware.get("has_gpu"))

    @property
    def is_local(self) -> bool:
        """Whether it belongs to the server's own machine, which needs no token."""
        return not self.key_digest


class NodeToken(BearerToken):
    """What a machine shows once to become a node; from then on it has a key of its own. Any number of machines may use it."""

    PREFIX = "lmweb-node-"

    @classmethod
    def issue(cls, *, name: str, expires_at: datetime | None = None) -> tuple[NodeToken, str]:
        """Create a token and return it with its secret, which is not stored and cannot be shown again."""
        secret = cls.new_secret()
        return cls.objects.create(name=name, hint=secret[:15], digest=cls.hash(secret), expires_at=expires_at), secret


class RemovedNode(models.Model):
    """A node that an admin removed: neither its name nor its key comes back by a token that is older than this."""

    name = models.CharField(max_length=100, primary_key=True)
    key_digest = models.CharField(max_length=64, blank=True)
    removed_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return self.name


class JoinRefusal(models.Model):
    """The last time that a machine was not let in, and why, for admins to see."""

    name = models.CharField(max_length=100, primary_key=True)
    reason = models.TextField()
    refused_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return self.name


class Installation(models.Model):
    """The one row that says which release last prepared the database."""

    version = models.CharField(max_length=32)
    prepared_at = models.DateTimeField(auto_now=True)

    def __str__(self) -> str:
        return self.version
