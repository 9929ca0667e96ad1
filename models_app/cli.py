"""What the commands about models share: errors as one line, finding a model by what somebody typed, plain tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError
from tqdm import tqdm

from lmweb.errors import InvalidRequest, LmwebError, ModelNotFound
from models_app import memory
from models_app.loading import LoadPlan
from models_app.models import InstalledModel, ModelInstance
from workers.schemas import LoadConfig


class ModelCommand(BaseCommand):
    """A command that shows the project's errors as one line with exit status 1, and answers in JSON when asked to."""

    requires_system_checks: list[str] = []  # noqa: RUF012  (Django's own attribute; checks cost half a second)

    def add_arguments(self, parser: CommandParser) -> None:
        """Add what all of them have."""
        parser.add_argument("--json", action="store_true", help="answer in JSON")

    def execute(self, *args: Any, **options: Any) -> str | None:
        """Run the command and word its errors."""
        try:
            return super().execute(*args, **options)
        except LmwebError as error:
            raise CommandError(error.message) from None
        except DatabaseError as error:
            first_line = str(error).strip().split("\n")[0]
            raise CommandError(f"The database does not answer. Is lmweb running? ({first_line})") from None

    def print_json(self, data: Any) -> None:
        """Print an answer for programs."""
        self.stdout.write(json.dumps(data, indent=2))

    def print_table(self, head: list[str], rows: Iterable[list[str]]) -> None:
        """Print columns as wide as their content."""
        lines = [head, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        for line in lines:
            self.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

    def print_lines(self, lines: Iterable[str]) -> None:
        """Print text."""
        for line in lines:
            self.stdout.write(line)

    @staticmethod
    def bar(**options: Any) -> tqdm[Any]:
        """Return a progress bar on standard error that disappears at the end; nothing is shown when nobody watches."""
        return tqdm(file=sys.stderr, leave=False, dynamic_ncols=True, disable=None, **options)


def find_model(text: str) -> InstalledModel:
    """Return the model of this key or path (``publisher/name/file.gguf``), or the only one of this name without its publisher.

    Raises ``ModelNotFound``, and ``InvalidRequest`` where several are meant.
    """
    if "\x00" not in text:
        models = InstalledModel.objects.all()
        found = models.filter(key__iexact=text).first() or models.filter(path__iexact=text).first()
        if found is not None:
            return found
        candidates = list(models.filter(key__iendswith=f"/{text}")[:2])
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise InvalidRequest(f"Several models are called '{text}': {', '.join(m.key for m in candidates)}. Name the publisher too.")
    known = list(InstalledModel.objects.values_list("key", flat=True)[:10])
    raise ModelNotFound(f"There is no model '{text}'. " + (f"Installed: {', '.join(known)}." if known else "None is installed."))


def model_choices() -> list[str]:
    """Return what ``choose`` offers to load."""
    return list(InstalledModel.objects.values_list("key", flat=True))


def choose(question: str, choices: list[str], *, ask: bool = True) -> str:
    """Return which of these the person at the terminal wants. Raises ``InvalidRequest`` where nobody can be asked."""
    if not choices:
        raise ModelNotFound("There is none to choose from.")
    if not ask or not sys.stdin.isatty():
        raise InvalidRequest(f"{question} Name it: {', '.join(choices[:10])}.")
    for number, name in enumerate(choices, 1):
        sys.stderr.write(f"{number:3}  {name}\n")
    sys.stderr.write(f"{question} ")
    sys.stderr.flush()
    answer = sys.stdin.readline().strip()
    if answer.isdigit() and 1 <= int(answer) <= len(choices):
        return choices[int(answer) - 1]
    if answer in choices:
        return answer
    raise InvalidRequest(f"'{answer}' is none of them.")


VERDICTS = {
    "fits": "This model may be loaded based on your resource guardrails settings.",
    "unknown": "How much of it fits on the GPU is known to the engine only.",
    "too_large": "This model cannot be loaded like this: there is not enough memory, even if everything that may leave were unloaded.",
}


def plan_info(model: InstalledModel, config: LoadConfig, plan: LoadPlan) -> dict[str, Any]:
    """Return what a load would take, for programs."""
    found = plan.estimate
    return {
        "modelKey": model.key,
        "contextLength": memory.complete(config, model.max_context_length).context_length,
        "parallel": config.parallel,
        "neededBytes": found.needed_bytes,
        "gpuBytes": found.gpu_bytes,
        "weightsBytes": found.weights_bytes,
        "repackedBytes": found.repacked_bytes,
        "kvBytes": found.kv_bytes,
        "computeBytes": found.compute_bytes,
        "draftBytes": found.draft_bytes,
        "measuredBytes": found.measured_bytes,
        "node": plan.node.name,
        "freeBytes": plan.free_bytes,
        "availableBytes": plan.available_bytes,
        "verdict": plan.verdict,
        "wouldUnload": [
            {"identifier": each.instance.identifier, "memoryBytes": each.memory_bytes, "generating": each.running, "queued": each.queued}
            for each in plan.leavers
        ],
    }


def plan_lines(model: InstalledModel, config: LoadConfig, plan: LoadPlan) -> list[str]:
    """Return what a load would take, in words."""
    found, context = plan.estimate, memory.complete(config, model.max_context_length).context_length
    lines = [
        f"Model: {model.key}",
        f"Context: {context} tokens, {config.parallel} answers at once",
        f"Estimated GPU Memory:   {size(found.gpu_bytes) if plan.node.has_gpu else f'none, {plan.node.name} has no GPU that llama.cpp can use'}",
        f"Estimated Total Memory: {size(found.needed_bytes)}",
    ]
    parts = {"weights": found.weights_bytes, "repacked for the CPU": found.repacked_bytes}
    parts |= {"keys and values": found.kv_bytes, "computing": found.compute_bytes}
    if found.draft_bytes:
        parts["draft model"] = found.draft_bytes
    lines.append("  " + ", ".join(f"{name} {size(count)}" for name, count in parts.items()))
    if found.measured_bytes:
        lines.append(f"  It took {size(found.measured_bytes)} when it was loaded like this.")
    lines.append(f"{plan.node.name} has {size(plan.free_bytes)} free, {size(plan.available_bytes)} of it for models.")
    if plan.verdict == "swap":
        leaving = ", ".join(f"{each.instance.identifier} ({size(each.memory_bytes)})" for each in plan.leavers)
        return [*lines, f"Estimate: it fits after unloading {leaving}; load --make-room does that."]
    return [*lines, f"Estimate: {VERDICTS[plan.verdict]}"]


def size(count: int) -> str:
    """Return bytes as people read them."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def model_info(model: InstalledModel) -> dict[str, Any]:
    """Return a model on disk, with the field names of ``lms ls --json``."""
    return {
        "type": model.type,
        "modelKey": model.key,
        "format": model.format,
        "displayName": model.display_name,
        "publisher": model.publisher,
        "path": model.path,
        "sizeBytes": model.weights_bytes,
        "paramsString": model.params_string,
        "architecture": model.architecture,
        "quantization": {"name": model.quantization, "bits": model.bits_per_weight},
        "vision": bool(model.capabilities.get("vision")),
        "trainedForToolUse": bool(model.capabilities.get("trained_for_tool_use")),
        "maxContextLength": model.max_context_length,
    }


def instance_info(instance: ModelInstance) -> dict[str, Any]:
    """Return a model in memory, with the field names of ``lms ps --json``."""
    info = model_info(instance.model)
    return info | {
        "identifier": instance.identifier,
        "node": instance.node_id,
        "status": instance.status,
        "error": instance.error or None,
        "contextLength": instance.config.get("context_length"),
        "memoryBytes": instance.memory_bytes,
        "ttlMs": None if instance.ttl_seconds is None else instance.ttl_seconds * 1000,
        "lastUsedTime": int(instance.last_used_at.timestamp() * 1000),
        "pinned": instance.pinned,
    }
