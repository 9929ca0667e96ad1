"""``unload``: take models out of memory, as ``lms unload`` does."""

from __future__ import annotations

import time
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db.models import Q

from lmweb.errors import Conflict, NotFound
from models_app import loading
from models_app.cli import ModelCommand, choose, size
from models_app.models import ModelInstance

WAIT_SECONDS = 30.0


class Command(ModelCommand):
    """Unload models and wait until their memory is free."""

    help = "Unload a model (or all of them) and wait until its memory is free."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        super().add_arguments(parser)
        parser.add_argument("identifier", nargs="?", help="identifier or model, as ps shows them")
        parser.add_argument("--all", action="store_true", help="unload every model")
        parser.add_argument("--node", metavar="NAME", help="only on this worker")

    def handle(self, *_: Any, **options: Any) -> None:
        """Unload, and say which."""
        name = options["identifier"]
        if options["all"] and name is not None:
            raise CommandError("Name what to unload, or give --all, not both.")
        if not options["all"] and name is None:
            name = choose("Unload which one?", list(ModelInstance.objects.values_list("identifier", flat=True)), ask=not options["json"])
        instances = list(_named(name) if name else ModelInstance.objects.all())
        if options["node"] is not None:
            instances = [instance for instance in instances if instance.node_id == options["node"]]
        if name and not instances:
            raise NotFound(f"'{name}' is not loaded" + (f" on {options['node']}." if options["node"] is not None else "."))
        for instance in instances:
            loading.request_unload(principal=None, instance=instance)
        self._wait([instance.pk for instance in instances])
        names = [instance.identifier for instance in instances]
        freed = sum(instance.memory_bytes or 0 for instance in instances)
        if options["json"]:
            return self.print_json({"unloaded": names, "freedBytes": freed})
        back = f"; {size(freed)} of memory came back" if freed else ""
        self.stdout.write(f"Unloaded {', '.join(names)}{back}" if names else "No model was loaded.")
        return None

    def _wait(self, keys: list[int]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while left := list(ModelInstance.objects.filter(pk__in=keys).values_list("identifier", flat=True)):
            if time.monotonic() > deadline:
                raise Conflict(f"Still being unloaded: {', '.join(left)}.")
            time.sleep(0.05)


def _named(name: str) -> list[ModelInstance]:
    """Return the instances of this identifier, or else all of the model of this key."""
    if "\x00" in name:
        return []
    exact = list(ModelInstance.objects.filter(identifier__iexact=name))
    return exact or list(ModelInstance.objects.filter(Q(model__key__iexact=name) | Q(model__key__iendswith=f"/{name}")))
