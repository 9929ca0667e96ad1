"""``estimate``: how much memory a model would take, before it is loaded."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from lmweb.management.commands.load import whole_number
from models_app import memory
from models_app.cli import ModelCommand, find_model, size
from workers.models import WorkerNode
from workers.schemas import LoadConfig


class Command(ModelCommand):
    """Say what loading a model takes."""

    help = "Estimate the memory that a model takes, without loading it."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        super().add_arguments(parser)
        parser.add_argument("model", help="the model's key, as ls shows it")
        parser.add_argument("--context-length", type=whole_number(16, 16_777_216), metavar="N", help="tokens of context")
        parser.add_argument("--parallel", type=whole_number(1, 256), metavar="N", default=LoadConfig().parallel, help="answers at once")

    def handle(self, *_: Any, **options: Any) -> None:
        """Print the parts and the sum."""
        model = find_model(options["model"])
        config = LoadConfig(context_length=options["context_length"], parallel=options["parallel"])
        config = memory.complete(config, model.max_context_length)
        found = memory.estimate_model(model, config)
        nodes = {node.name: node.free_memory_bytes for node in WorkerNode.objects.alive()}
        if options["json"]:
            return self.print_json(
                {
                    "modelKey": model.key,
                    "contextLength": config.context_length,
                    "parallel": config.parallel,
                    "neededBytes": found.needed_bytes,
                    "weightsBytes": found.weights_bytes,
                    "repackedBytes": found.repacked_bytes,
                    "kvBytes": found.kv_bytes,
                    "computeBytes": found.compute_bytes,
                    "measuredBytes": found.measured_bytes,
                    "freeBytes": nodes,
                }
            )
        self.stdout.write(
            f"{model.key} with a context of {config.context_length} for {config.parallel} answers at once: {size(found.needed_bytes)}"
        )
        parts = [
            ["weights", size(found.weights_bytes)],
            ["weights, repacked for the CPU", size(found.repacked_bytes)],
            ["keys and values", size(found.kv_bytes)],
            ["computing", size(found.compute_bytes)],
        ]
        if found.measured_bytes:
            parts.append(["measured when it was loaded like this", size(found.measured_bytes)])
        self.print_table(["PART", "SIZE"], parts)
        for name, free in nodes.items():
            self.stdout.write(f"{name} has {size(free)} free")
        return None
