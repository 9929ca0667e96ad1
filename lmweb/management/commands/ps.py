"""``ps``: the models in memory."""

from __future__ import annotations

from typing import Any

from django.db.models import Count

from models_app.cli import ModelCommand, instance_info, size
from models_app.models import Generation, ModelInstance

S = Generation.Status


class Command(ModelCommand):
    """List the models in memory."""

    help = "List the models that are loaded, or are being loaded."

    def handle(self, *_: Any, **options: Any) -> None:
        """Print one line per instance."""
        instances = list(ModelInstance.objects.select_related("model").order_by("identifier", "node_id"))
        work = _work({instance.model_id for instance in instances})
        if options["json"]:
            counts = ({"generating": work[i.model_id][0], "queued": work[i.model_id][1]} for i in instances)
            return self.print_json([instance_info(i) | count for i, count in zip(instances, counts, strict=True)])
        if not instances:
            self.stdout.write("No model is loaded. Load one with: python3 manage.py load MODEL")
            return None
        self.print_table(["IDENTIFIER", "MODEL", "STATUS", "SIZE", "CONTEXT", "NODE"], (_row(i, *work[i.model_id]) for i in instances))
        return None


def _work(model_ids: set[int]) -> dict[int, tuple[int, int]]:
    """Return how many requests each model answers, and how many wait for it."""
    work = dict.fromkeys(model_ids, (0, 0))
    for entry in Generation.objects.unfinished().filter(model__in=model_ids).values("model", "status").annotate(count=Count("pk")):
        running, queued = work[entry["model"]]
        work[entry["model"]] = (entry["count"], queued) if entry["status"] == S.RUNNING else (running, entry["count"])
    return work


def _row(instance: ModelInstance, running: int, queued: int) -> list[str]:
    status: str = instance.status
    if status == ModelInstance.Status.READY:
        status = f"generating {running}, {queued} queued" if running or queued else "idle"
    elif status == ModelInstance.Status.LOADING:
        status = f"loading {instance.progress:.0%}"
    elif status == ModelInstance.Status.FAILED:
        status = f"failed: {instance.error[:80]}"
    context = str(instance.config.get("context_length") or "")
    return [instance.identifier, instance.model.key, status, size(instance.model.size_bytes), context, instance.node_id]
