"""``ls``: the models on disk."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from models_app.cli import ModelCommand, model_info, size
from models_app.models import InstalledModel


class Command(ModelCommand):
    """List the models on disk."""

    help = "List the models that are stored on this server."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        super().add_arguments(parser)
        kind = parser.add_mutually_exclusive_group()
        kind.add_argument("--llm", dest="type", action="store_const", const="llm", help="language models only")
        kind.add_argument("--embedding", dest="type", action="store_const", const="embedding", help="embedding models only")

    def handle(self, *_: Any, **options: Any) -> None:
        """Print one line per model."""
        found = InstalledModel.objects.filter(type=options["type"]) if options["type"] else InstalledModel.objects.all()
        models = list(found.prefetch_related("instances"))
        if options["json"]:
            return self.print_json([model_info(model) for model in models])
        if not models:
            self.stdout.write("No models. Import one with: python3 manage.py import_model FILE.gguf")
            return None
        self.print_table(
            ["MODEL", "PARAMS", "ARCH", "QUANT", "SIZE", "CONTEXT", "STATE"],
            (
                [m.key, m.params_string, m.architecture, m.quantization, size(m.size_bytes), str(m.max_context_length), _state(m)]
                for m in models
            ),
        )
        self.stdout.write(f"{len(models)} model{'' if len(models) == 1 else 's'}, {size(sum(m.size_bytes for m in models))} on disk")
        return None


def _state(model: InstalledModel) -> str:
    if not model.file.is_file():
        return "file is missing"
    return ", ".join(sorted(instance.status for instance in model.instances.all()))
