"""``load``: bring a model into memory, as ``lms load`` does."""

from __future__ import annotations

import argparse
import time
from typing import Any

from django.core.management.base import CommandParser

from lmweb.errors import InvalidRequest, ModelLoadFailed
from models_app import gguf, services
from models_app.cli import ModelCommand, find_model, instance_info
from models_app.models import InstalledModel, ModelInstance
from workers.schemas import LoadConfig

POLL_SECONDS = 0.1


class Command(ModelCommand):
    """Load a model and wait until it is ready."""

    help = "Load a model into memory and wait until it is ready."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        super().add_arguments(parser)
        parser.add_argument("model", help="the model's key, as ls shows it")
        parser.add_argument("--context-length", type=whole_number(16, 16_777_216), metavar="N", help="tokens of context")
        parser.add_argument(
            "--parallel", type=whole_number(1, 256), metavar="N", default=LoadConfig().parallel, help="answers at the same time"
        )
        parser.add_argument("--gpu", default="auto", metavar="off|max|auto|0-1", help="how much of the model to put on the GPU")
        parser.add_argument("--draft-model", metavar="KEY", default="", help="a smaller model with the same vocabulary that guesses ahead")
        parser.add_argument("--prompt-lookup", action="store_true", help="guess ahead from the text itself")
        parser.add_argument("--identifier", help="the name for requests; the model's key without it")

    def handle(self, *_: Any, **options: Any) -> None:
        """Load, showing the progress."""
        started = time.monotonic()
        model = find_model(options["model"])
        config = LoadConfig(
            context_length=options["context_length"],
            parallel=options["parallel"],
            gpu_layers=_gpu_layers(options["gpu"], model),
            draft_model=options["draft_model"],
            prompt_lookup=options["prompt_lookup"],
        )
        instance = services.request_load(principal=None, model=model, config=config, identifier=options["identifier"])
        try:
            ready = self._wait(instance)
        except KeyboardInterrupt:
            self.end_progress()
            self.stderr.write(f"It goes on loading. To stop it: python3 manage.py unload {instance.identifier}")
            raise
        if options["json"]:
            return self.print_json(instance_info(ready))
        context = ready.config.get("context_length")
        about = f", context {context}" if context else ""
        self.stdout.write(f"Loaded {ready.identifier} in {time.monotonic() - started:.1f} s (on {ready.node_id}{about})")
        return None

    def _wait(self, instance: ModelInstance) -> ModelInstance:
        while True:
            now = ModelInstance.objects.select_related("model").filter(pk=instance.pk).first()
            if now is None or now.status == ModelInstance.Status.UNLOADING:
                self.end_progress()
                raise ModelLoadFailed(f"{instance.identifier} was unloaded while it was being loaded.")
            if now.status == ModelInstance.Status.FAILED:
                self.end_progress()
                raise ModelLoadFailed(f"{instance.identifier} could not be loaded: {now.error}")
            if now.status == ModelInstance.Status.READY:
                self.end_progress()
                return now
            self.progress(f"Loading {instance.identifier}: {now.progress:.0%}")
            time.sleep(POLL_SECONDS)


def whole_number(low: int, high: int) -> Any:
    """Return the reader of an argument that is a whole number within limits."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 12 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {low} to {high}")
        return int(text)

    return parse


def _gpu_layers(text: str, model: InstalledModel) -> int:
    """Return the number of layers for lms' way of saying it: off, max, auto or a fraction. Raises ``InvalidRequest``."""
    named = {"off": 0, "max": -1, "auto": -1}
    if text in named:
        return named[text]
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0.0 <= fraction <= 1.0:
        raise InvalidRequest(f"--gpu is off, max, auto or a number from 0 to 1, not '{text}'.", param="gpu")
    return -1 if fraction == 1.0 else round(fraction * gguf.read_model(model.file).block_count)
