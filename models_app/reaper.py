"""Finds generations that nobody works on any more, and sends them to a worker again. Runs every few seconds in the io worker."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

from django.db.models import F, Q
from django.db.models.functions import Now
from django.utils import timezone

from models_app import routing
from models_app.models import Generation, ModelInstance
from workers.models import WorkerNode
from workers.router import DEAD_SECONDS, Refuse

logger = logging.getLogger(__name__)

#: How long a request waits for any worker to appear.
PATIENCE_SECONDS = 10 * 60
#: After this silence a node's models count as gone.
DEAD_NODE_SECONDS = 30


class Reaper:
    """Remembers what it saw in the last round, to tell what is lost from what is late.

    Lost is a lease that had expired then, or was that of a node without a heartbeat, and has not been renewed since.

    After an outage of PostgreSQL all leases look expired; their owners renew them within a second, before the second look.
    """

    def __init__(self) -> None:
        self._suspects: dict[str, datetime | None] = {}

    def run(self) -> None:
        """Look once."""
        now = timezone.now()
        self._requeue_lost(now)
        self._resend_queued(now)
        ModelInstance.objects.filter(node__heartbeat_at__lt=now - timedelta(seconds=DEAD_NODE_SECONDS)).delete()

    def _requeue_lost(self, now: datetime) -> None:
        dead = WorkerNode.objects.filter(heartbeat_at__lt=Now() - timedelta(seconds=DEAD_SECONDS)).values("pk")
        expired = Generation.objects.filter(Q(lease_until__lt=now) | Q(node__in=dead), status=Generation.Status.RUNNING)
        seen = {str(pk): lease for pk, lease in expired.values_list("pk", "lease_until")}
        for pk, lease in seen.items():
            if self._suspects.get(pk) == lease:
                lost = Generation.objects.filter(pk=pk, status=Generation.Status.RUNNING, lease_until=lease)
                if lost.update(status=Generation.Status.QUEUED, resumes=F("resumes") + 1, lease_until=None):
                    logger.warning("generation %s was lost by its worker and goes on elsewhere", pk)
        self._suspects = dict(seen)

    def _resend_queued(self, now: datetime) -> None:
        waiting = Generation.objects.filter(Q(lease_until=None) | Q(lease_until__lt=now), status=Generation.Status.QUEUED)
        alive = WorkerNode.objects.alive().exists()
        routing.forget()
        for generation in waiting.select_related("model__base").order_by("created_at")[:500]:
            found = routing.reroute(generation.model, generation.request["model"]) if alive and generation.model else None
            if found is not None and found.node:
                generation.node, generation.lease_until = found.node, now + timedelta(seconds=routing.DISPATCH_SECONDS)
                generation.save(update_fields=["node", "lease_until"])
            elif generation.cancel_requested:
                self._end(generation, Generation.Status.CANCELLED, "", "")
            elif generation.created_at < now - timedelta(seconds=PATIENCE_SECONDS):
                reason = found.reason if isinstance(found, Refuse) else "No worker is running. Ask an admin to start one."
                self._end(generation, Generation.Status.FAILED, "service_unavailable", reason)

    @staticmethod
    def _end(generation: Generation, status: str, code: str, message: str) -> None:
        Generation.objects.filter(pk=generation.pk, status=Generation.Status.QUEUED).update(
            status=status, error_code=code, error_message=message, finished_at=timezone.now()
        )
