"""Forms of the My Models page."""

from __future__ import annotations

from django import forms
from django.conf import settings
from django.http import QueryDict

from models_app.models import InstalledModel
from workers.schemas import LoadConfig


class LoadForm(forms.Form):
    """How to load a model; starts with the values that Load without options uses."""

    context_length = forms.IntegerField(label="Context length", min_value=16)
    parallel = forms.IntegerField(
        label="Answers at the same time", min_value=1, max_value=256, help_text="They share the context length. More wait in the queue."
    )
    gpu_layers = forms.IntegerField(
        label="Layers on the GPU",
        min_value=-1,
        max_value=100_000,
        help_text="-1 puts all of them there, 0 none. Without a GPU it has no effect.",
    )
    identifier = forms.CharField(
        label="Identifier", required=False, max_length=200, help_text="The name for API requests. Empty: the model's own name."
    )

    def __init__(self, model: InstalledModel, data: QueryDict | None = None) -> None:
        defaults = LoadConfig()
        initial = {
            "context_length": min(settings.DEFAULT_CONTEXT_LENGTH, model.max_context_length),
            "parallel": defaults.parallel,
            "gpu_layers": defaults.gpu_layers,
        }
        super().__init__(data, initial=initial)
        field = self.fields["context_length"]
        field.help_text = f"In tokens, at most {model.max_context_length:,}. A longer context needs more memory."
        self.fields["identifier"].widget.attrs["placeholder"] = model.key

    def config(self) -> LoadConfig:
        """Return the valid form's values."""
        data = self.cleaned_data
        return LoadConfig(context_length=data["context_length"], parallel=data["parallel"], gpu_layers=data["gpu_layers"])
