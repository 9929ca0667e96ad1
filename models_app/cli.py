"""What the commands about models share: errors as one line, finding a model by what somebody typed, plain tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError

from lmweb.errors import InvalidRequest, LmwebError, ModelNotFound
from models_app.models import InstalledModel, ModelInstance


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

    def progress(self, text: str) -> None:
        """Show where a long act stands, on one line that is overwritten; nothing when nobody watches."""
        if sys.stderr.isatty():
            self.stderr.write(f"\r\x1b[K{text}", ending="")

    def end_progress(self) -> None:
        """Clear that line."""
        self.progress("")


def find_model(text: str) -> InstalledModel:
    """Return the model of this key, or the only one of this name without its publisher. Raises ``ModelNotFound``."""
    if "\x00" not in text:
        models = InstalledModel.objects.all()
        found = models.filter(key__iexact=text).first()
        if found is not None:
            return found
        candidates = list(models.filter(key__iendswith=f"/{text}")[:2])
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise InvalidRequest(f"Several models are called '{text}': {', '.join(m.key for m in candidates)}. Name the publisher too.")
    known = list(InstalledModel.objects.values_list("key", flat=True)[:10])
    raise ModelNotFound(f"There is no model '{text}'. " + (f"Installed: {', '.join(known)}." if known else "None is installed."))


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
        "sizeBytes": model.size_bytes,
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
    }
