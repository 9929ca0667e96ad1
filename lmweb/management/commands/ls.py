"""``ls``: the models on disk."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from django.core.management.base import CommandParser
from django.db.models import Q

from models_app.cli import ModelCommand, find_model, model_info, size
from models_app.models import InstalledModel

HEAD = ["MODEL", "PARAMS", "ARCH", "QUANT", "SIZE", "CONTEXT", "STATE"]


class Command(ModelCommand):
    """List the models on disk."""

    help = "List the models that are stored on this server."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        super().add_arguments(parser)
        parser.add_argument("model", nargs="?", help="only this model, with its quantizations and what is loaded of it")
        kind = parser.add_mutually_exclusive_group()
        kind.add_argument("--llm", dest="type", action="store_const", const="llm", help="language models only")
        kind.add_argument("--embedding", dest="type", action="store_const", const="embedding", help="embedding models only")
        parser.add_argument("--variants", action="store_true", help="only models of which there are several quantizations, together")

    def handle(self, *_: Any, **options: Any) -> None:
        """Print one line per model."""
        found = InstalledModel.objects.filter(type=options["type"]) if options["type"] else InstalledModel.objects.all()
        if options["model"]:
            name = _name(find_model(options["model"]))
            found = found.filter(Q(key=name) | Q(key__startswith=f"{name}@"))
        models = list(found.select_related("base").prefetch_related("instances"))
        if options["variants"]:
            models = [model for group in _groups(models) if len(group) > 1 for model in group]
        if options["json"]:
            return self.print_json(_infos(models))
        if not models:
            several = "No model is here in several quantizations."
            self.stdout.write(several if options["variants"] else "No models. Import one with: python3 manage.py import_model FILE.gguf")
            return None
        self.print_table(HEAD, (_row(model) for model in models))
        self.stdout.write(f"{len(models)} model{'' if len(models) == 1 else 's'}, {size(sum(m.size_bytes for m in models))} on disk")
        return None


def _name(model: InstalledModel) -> str:
    """Return what a model's quantizations have in common: the key without its variant."""
    return model.key.partition("@")[0]


def _groups(models: list[InstalledModel]) -> list[list[InstalledModel]]:
    """Return models by name, each name's quantizations together."""
    return [list(group) for _, group in groupby(sorted(models, key=lambda model: (_name(model), model.key)), key=_name)]


def _infos(models: list[InstalledModel]) -> list[dict[str, Any]]:
    """Return models for programs, with the fields that ``lms ls --json`` has for models of several variants."""
    variants = {_name(group[0]): [model.key for model in group] for group in _groups(models)}
    infos = []
    for model in models:
        others = variants[_name(model)]
        more = {"variants": others, "selectedVariant": model.key} if len(others) > 1 else {}
        infos.append({**model_info(model), **more, "loadedInstances": [each.identifier for each in model.instances.all()]})
    return infos


def _row(model: InstalledModel) -> list[str]:
    context = str(model.max_context_length)
    return [model.key, model.params_string, model.architecture, model.quantization, size(model.weights_bytes), context, _state(model)]


def _state(model: InstalledModel) -> str:
    if not model.file.is_file():
        return "file is missing"
    return ", ".join(sorted(instance.status for instance in model.instances.all()))
