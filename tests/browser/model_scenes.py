"""Models in memory and downloads in every state, for ``model_pictures.py``; runs inside an installation (``Live.python``)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.utils import timezone

from lmweb.models import User
from models_app.models import Download, InstalledModel, ModelInstance
from workers.models import WorkerNode

FAMILIES = ("Llama 3.2", "Qwen3", "Mistral Small", "Gemma 3", "Phi 4", "Granite 4", "DeepSeek R1 Distill")
QUANTIZATIONS = (("Q4_K_M", 4.0), ("Q8_0", 8.0), ("IQ2_XXS", 2.0), ("BF16", 16.0))
LONG_NAME = "Qwen3-Coder-480B-A35B-Instruct-Abliterated-v2-i1-Uncensored-Longer-Name-Than-Anyone-Wants-GGUF"
MEMORY_IS_SHORT = (
    "big needs about 41.20 GB of memory, and 6.10 GB are free, of which 0.80 GB are kept for everything else (guardrail 'balanced'). Unload "
    "a model, load it with a shorter context, or let an admin lower LMWEB_MODEL_LOADING_GUARDRAILS."
)


def many_models(count: int) -> None:
    """Add models that exist on paper only."""
    rows = []
    for number in range(count):
        family, (quantization, bits) = FAMILIES[number % len(FAMILIES)], QUANTIZATIONS[number % len(QUANTIZATIONS)]
        billions = (1, 3, 8, 14, 24, 70, 480)[number % 7]
        name = f"{family} {billions}B Instruct {number}" if number else LONG_NAME
        key = f"publisher-{number % 9}/{name.lower().replace(' ', '-')}"
        rows.append(
            InstalledModel(
                key=key, publisher=key.partition("/")[0], display_name=name, architecture=family.split()[0].lower(), quantization=quantization,
                bits_per_weight=bits, params_string=f"{billions}B", size_bytes=int(billions * bits / 8 * 1.1e9), max_context_length=131_072,
                path=f"{key}/model-{number}.gguf", capabilities={"trained_for_tool_use": number % 2 == 0, "reasoning": number % 3 == 0},
            )
        )  # fmt: skip
    for row in InstalledModel.objects.bulk_create(rows):
        if row.pk % 50:  # the files of the others are missing
            row.file.parent.mkdir(parents=True, exist_ok=True)
            row.file.touch()


def in_memory() -> None:
    """Let some of them be in memory, in every state."""
    node = WorkerNode.objects.get()
    states: list[dict[str, Any]] = [
        {"status": "ready", "memory_bytes": 9_100_000_000, "pinned": True},
        {"status": "loading", "progress": 0.43},
        {"status": "loading", "note": "Waiting until lmweb/starter has finished."},
        {"status": "failed", "error": MEMORY_IS_SHORT},
        {"status": "unloading"},
        {"status": "ready", "memory_bytes": 2_400_000_000, "ttl_seconds": 3600, "jit": True},
    ]
    models = list(InstalledModel.objects.exclude(key="lmweb/starter").order_by("display_name")[: len(states)])
    for model, state in zip(models, states, strict=True):
        ModelInstance.objects.create(identifier=model.key, model=model, node=node, config={"context_length": 8192}, **state)
    second = {"status": "ready", "memory_bytes": 2_600_000_000, "config": {"context_length": 32_768}}
    ModelInstance.objects.create(identifier="translations", model=models[-1], node=node, **second)


def downloads(member: str, admin: str) -> None:
    """Make a download in every state; nobody works on them."""
    now = timezone.now()
    ben, ada = User.objects.get(username=member), User.objects.get(username=admin)
    lease = {"lease_until": now + timedelta(days=1), "started_at": now - timedelta(minutes=9)}
    ended = {"finished_at": now - timedelta(minutes=3)}
    states: list[tuple[User, dict[str, Any]]] = [
        (ada, {"status": "downloading", "done_bytes": 9_000_000_000, "bytes_per_second": 48_000_000.0, **lease}),
        (ben, {"status": "downloading", "done_bytes": 1_000_000_000, "note": "The Hub answers with errors (503). Next try in 12 s.", **lease}),
        (ada, {"status": "verifying", "done_bytes": 12_000_000_000, **lease}),
        (ben, {"status": "paused", "done_bytes": 700_000_000}),
        (ben, {"status": "requested"}),
        (ada, {"status": "failed", "error_code": "outbound_failed", "error_message": "The Hub cannot be reached. After 12 tries the download was given up; what arrived is kept.", **ended}),
        (ben, {"status": "declined", "decided_by": ada, "reason": "This one needs more memory than any of our machines has. Take the 8B.", **ended}),
        (ada, {"status": "cancelled", **ended}),
        (ben, {"status": "completed", "done_bytes": 14_333_908_832, "decided_by": ada, **ended}),
    ]  # fmt: skip
    for number, (person, fields) in enumerate(states):
        row = Download.objects.create(
            repo=f"publisher-{number}/{LONG_NAME if number == 1 else f'Model-{number}-GGUF'}", revision="0" * 40, label="Q4_K_M", format="gguf",
            files=[], fingerprint=f"{number:064}", total_bytes=14_333_908_832, requested_by=person, **fields,
        )  # fmt: skip
        row.people.add(person)


def clear() -> None:
    """Take all of that away again, with every model."""
    Download.objects.all().delete()
    ModelInstance.objects.all().delete()
    InstalledModel.objects.all().delete()
