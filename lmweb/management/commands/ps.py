"""``ps``: the models in memory."""

from __future__ import annotations

from typing import Any

from django.utils import timezone

from models_app.cli import ModelCommand, instance_info, size
from models_app.loading import work_of
from models_app.models import ModelInstance


class Command(ModelCommand):
    """List the models in memory."""

    help = "List the models that are loaded, or are being loaded."

    def handle(self, *_: Any, **options: Any) -> None:
        """Print one line per instance."""
        instances = list(ModelInstance.objects.select_related("model").order_by("identifier", "node_id"))
        work = work_of(instances)
        if options["json"]:
            counts = ({"generating": work[i.pk][0], "queued": work[i.pk][1]} for i in instances)
            return self.print_json([instance_info(i) | count for i, count in zip(instances, counts, strict=True)])
        if not instances:
            self.stdout.write("No model is loaded. Load one with: python3 manage.py load MODEL")
            return None
        self.print_table(
            ["IDENTIFIER", "MODEL", "STATUS", "SIZE", "MEMORY", "CONTEXT", "TTL", "NODE"], (_row(i, *work[i.pk]) for i in instances)
        )
        return None


def _row(instance: ModelInstance, running: int, queued: int) -> list[str]:
    status: str = instance.status
    if status == ModelInstance.Status.READY:
        status = f"generating {running}, {queued} queued" if running or queued else "idle"
    elif status == ModelInstance.Status.LOADING:
        status = instance.note or f"loading {instance.progress:.0%}"
    elif status == ModelInstance.Status.FAILED:
        status = f"failed: {instance.error[:80]}"
    context = str(instance.config.get("context_length") or "")
    memory = size(instance.memory_bytes) if instance.memory_bytes else ""
    file_size = size(instance.model.size_bytes)
    return [instance.identifier, instance.model.key, status, file_size, memory, context, _ttl(instance), instance.node_id]


def _ttl(instance: ModelInstance) -> str:
    """Return how long the model will stay if nobody uses it."""
    if instance.pinned or instance.ttl_seconds is None:
        return "pinned" if instance.pinned else ""
    left = max(0, instance.ttl_seconds - int((timezone.now() - instance.last_used_at).total_seconds()))
    return f"{left // 60} min" if left >= 120 else f"{left} s"
