"""``load``: bring a model into memory, as ``lms load`` does."""

from __future__ import annotations

import time
from typing import Any

from django.core.management.base import CommandParser
from tqdm import tqdm

from models_app import loading
from models_app.cli import ModelCommand, choose, find_model, instance_info, model_choices, plan_info, plan_lines
from models_app.defaults import load_config
from models_app.load_options import add_config_arguments, overrides, whole_number
from models_app.models import ModelInstance

POLL_SECONDS = 0.1
S = ModelInstance.Status


class Command(ModelCommand):
    """Load a model and wait until it is ready."""

    help = "Load a model into memory and wait until it is ready."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        super().add_arguments(parser)
        parser.add_argument("model", nargs="?", help="the model's key, as ls shows it; without, you are asked")
        add_config_arguments(parser)
        parser.add_argument("--identifier", help="the name for requests; the model's key without it")
        parser.add_argument("--ttl", type=whole_number(1, 315_360_000), metavar="SECONDS", help="unload after so long without use")
        parser.add_argument("--node", metavar="NAME", help="on this worker; without, on the one that suits it best")
        parser.add_argument("--estimate-only", action="store_true", help="say what it would take, and load nothing")
        parser.add_argument("--make-room", action="store_true", help="unload others if memory is short; they come back if the load fails")
        parser.add_argument("--remember", action="store_true", help="load the model like this from now on")
        parser.add_argument("-y", "--yes", action="store_true", help="ask nothing")

    def handle(self, *_: Any, **options: Any) -> None:
        """Load, showing the progress."""
        started = time.monotonic()
        name = options["model"] or choose("Load which model?", model_choices(), ask=not options["yes"] and not options["json"])
        model = find_model(name)
        config = load_config(model, overrides(options, model))
        if options["estimate_only"]:
            plan = loading.plan_load(principal=None, model=model, config=config, node=options["node"])
            return self.print_json(plan_info(model, config, plan)) if options["json"] else self.print_lines(plan_lines(model, config, plan))
        instance = loading.request_load(
            principal=None,
            model=model,
            config=config,
            identifier=options["identifier"],
            ttl_seconds=options["ttl"],
            make_room=options["make_room"],
            remember=options["remember"],
            node=options["node"],
        )
        try:
            ready = self._wait(instance)
        except KeyboardInterrupt:
            self.stderr.write(f"It goes on loading. To stop it: python3 manage.py unload {instance.identifier}")
            raise
        if options["json"]:
            return self.print_json(instance_info(ready))
        context = ready.config.get("context_length")
        about = f", context {context}" if context else ""
        self.stdout.write(f"Loaded {ready.identifier} in {time.monotonic() - started:.1f} s (on {ready.node_id}{about})")
        return None

    def _wait(self, instance: ModelInstance) -> ModelInstance:
        with self.bar(desc=f"Loading {instance.identifier}", total=100, bar_format="{desc}: {percentage:3.0f} % |{bar}| {postfix}") as bar:
            while True:
                now = loading.loading_state(instance)
                if now.status == S.READY:
                    return now
                self._show(bar, now)
                time.sleep(POLL_SECONDS)

    @staticmethod
    def _show(bar: tqdm[Any], instance: ModelInstance) -> None:
        bar.n = round(instance.progress * 100)
        bar.set_postfix_str(instance.note)
