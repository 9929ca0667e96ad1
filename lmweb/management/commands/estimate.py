"""``estimate``: how much memory a model would take, and who would have to leave for it, before it is loaded."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from models_app import loading
from models_app.cli import ModelCommand, find_model, plan_info, plan_lines
from models_app.defaults import load_config
from models_app.load_options import add_config_arguments, overrides


class Command(ModelCommand):
    """Say what loading a model takes."""

    help = "Estimate the memory that a model takes, without loading it."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        super().add_arguments(parser)
        parser.add_argument("model", help="the model's key, as ls shows it")
        parser.add_argument("--node", metavar="NAME", help="on this worker; without, on the one that suits it best")
        add_config_arguments(parser)

    def handle(self, *_: Any, **options: Any) -> None:
        """Print the parts, the sum, and what follows from it."""
        model = find_model(options["model"])
        config = load_config(model, overrides(options, model))
        plan = loading.plan_load(principal=None, model=model, config=config, node=options["node"])
        if options["json"]:
            return self.print_json(plan_info(model, config, plan))
        return self.print_lines(plan_lines(model, config, plan))
