"""Forms of My Models. What a form does not show, or leaves empty, is at its default."""

from __future__ import annotations

import re
from typing import Any, Final, get_args

import msgspec
from django import forms
from django.conf import settings
from django.http import QueryDict
from django.utils.html import escape

from lmweb.decoding import convert
from lmweb.errors import LmwebError
from models_app.defaults import MAX_SYSTEM_PROMPT, InferenceDefaults, load_config
from models_app.loading import loading_nodes
from models_app.models import InstalledModel
from workers.engines import registry
from workers.models import WorkerNode
from workers.schemas import KvCacheType, LoadConfig, SamplingParams

ON_OFF: Final = [("on", "On"), ("off", "Off")]
AUTOMATIC: Final = [("", "Automatic"), *ON_OFF]
#: Options that are on, off or, where that is offered, automatic.
SWITCHES: Final = ("flash_attention", "offload_kv_cache_to_gpu", "unified_kv_cache", "prompt_lookup")
PRECISIONS: Final = [(name, name.upper()) for name in get_args(KvCacheType)]


class ServiceForm(forms.Form):
    """A form whose values go to a service that may find something wrong with them."""

    def fail(self, error: LmwebError) -> None:
        """Show an error of a service at its field."""
        name = {"ttl": "ttl_minutes"}.get(error.param or "", error.param)
        self.add_error(name if name in self.fields else None, error.message)


class ConfigForm(ServiceForm):
    """How to load a model: all of ``LoadConfig``."""

    #: What everybody understands; the rest is behind a fold.
    MAIN: Final = ("context_length", "gpu_layers", "parallel")

    context_length = forms.IntegerField(label="Context length", min_value=16)
    gpu_layers = forms.IntegerField(
        label="Layers on the GPU",
        min_value=-1,
        max_value=100_000,
        required=False,
        help_text="-1 puts all of them there, 0 none. Without a GPU it has no effect.",
    )
    parallel = forms.IntegerField(
        label="Answers at the same time",
        min_value=1,
        max_value=256,
        required=False,
        help_text="More wait in the queue.",
    )
    flash_attention = forms.ChoiceField(
        label="Flash attention",
        choices=AUTOMATIC,
        required=False,
        help_text="Off: prompts are read more slowly on a CPU, and it takes more memory.",
    )
    eval_batch_size = forms.IntegerField(
        label="Evaluation batch size", min_value=32, max_value=16_384, required=False, help_text="Tokens of a prompt per step."
    )
    k_cache_type = forms.ChoiceField(
        label="K cache precision", choices=PRECISIONS, required=False, help_text="Fewer bits take less memory."
    )
    v_cache_type = forms.ChoiceField(
        label="V cache precision", choices=PRECISIONS, required=False, help_text="Below 16 bits it needs flash attention."
    )
    offload_kv_cache_to_gpu = forms.ChoiceField(label="KV cache on the GPU", choices=ON_OFF, required=False)
    unified_kv_cache = forms.ChoiceField(
        label="Unified KV cache",
        choices=AUTOMATIC,
        required=False,
        help_text="On: all answers share one cache. Off: each has its own, which is faster and takes more memory.",
    )
    num_experts = forms.IntegerField(
        label="Experts per token",
        min_value=1,
        max_value=4096,
        required=False,
        help_text="Of a mixture of experts. Empty: as it was trained.",
    )
    cpu_threads = forms.IntegerField(
        label="CPU threads", min_value=0, max_value=1024, required=False, help_text="0 or empty: what suits this server."
    )
    draft_model = forms.CharField(
        label="Draft model",
        max_length=512,
        required=False,
        help_text="A smaller model with the same vocabulary that guesses ahead.",
        widget=forms.TextInput(attrs={"list": "model-keys", "autocomplete": "off", "spellcheck": "false"}),
    )
    prompt_lookup = forms.ChoiceField(label="Guess ahead from the text", choices=[("off", "Off"), ("on", "On")], required=False)

    def __init__(self, model: InstalledModel, data: QueryDict | None = None) -> None:
        self.model = model
        # Layers are of no interest where there is no GPU to put them on.
        has_gpu = WorkerNode.objects.alive().filter(hardware__has_gpu=True).exists()
        self._main = [name for name in self.MAIN if name != "gpu_layers" or has_gpu]
        config = load_config(model)
        initial = {**msgspec.structs.asdict(LoadConfig()), **msgspec.structs.asdict(config)}
        initial["context_length"] = config.context_length or min(settings.DEFAULT_CONTEXT_LENGTH, model.max_context_length)
        for name in SWITCHES:
            initial[name] = {True: "on", False: "off", None: ""}[initial[name]]
        super().__init__(data, initial=initial)
        field = self.fields["context_length"]
        field.help_text = f"In tokens, at most {model.max_context_length:,}. A longer context needs more memory."
        for name, reason in registry.card_of(model.format).lacking_options().items():
            self.fields[name].help_text = escape(reason)
            self.fields[name].disabled = name != "gpu_layers"  # of these all or none are possible everywhere

    def main_fields(self) -> list[forms.BoundField]:
        """Return the fields that are always shown."""
        return [self[name] for name in self._main]

    def more_fields(self) -> list[forms.BoundField]:
        """Return the fields behind the fold."""
        return [self[name] for name in ConfigForm.base_fields if name not in self._main]

    def more_is_open(self) -> bool:
        """Whether the fold is open: something in it is wrong, or not at its default."""
        rest = {name: value for name, value in self.model.load_defaults.items() if name not in self._main}
        return bool(rest or any(field.errors for field in self.more_fields()))

    def config(self) -> LoadConfig:
        """Return the valid form's values. Raises ``InvalidRequest`` that names the field for what the model cannot have."""
        data = {name: value for name, value in self.cleaned_data.items() if name in ConfigForm.base_fields and value not in {None, ""}}
        for name in SWITCHES:
            if name in data:
                data[name] = data[name] == "on"
        return load_config(
            InstalledModel(key=self.model.key, format=self.model.format, max_context_length=self.model.max_context_length), data
        )


class LoadForm(ConfigForm):
    """How to load a model once; starts with the values that Load without options uses."""

    identifier = forms.CharField(
        label="Identifier", required=False, max_length=200, help_text="The name for API requests. Empty: the model's own name."
    )
    ttl_minutes = forms.IntegerField(
        label="Unload when idle for (minutes)", required=False, min_value=1, max_value=5_000_000, help_text="Empty: it stays."
    )
    remember = forms.BooleanField(label="Remember these settings for this model", required=False)
    make_room = forms.BooleanField(required=False)

    def __init__(self, model: InstalledModel, data: QueryDict | None = None) -> None:
        super().__init__(model, data)
        self.fields["identifier"].widget.attrs["placeholder"] = model.key
        names = loading_nodes()
        if len(names) > 1:
            self.fields["node"] = forms.ChoiceField(
                label="Worker",
                choices=[("", "The one that suits it best"), *((name, name) for name in names)],
                required=False,
                help_text="In memory on several workers it answers more people at once, under the same name.",
            )

    def chosen_node(self) -> str | None:
        """Return the worker that was chosen; None: the one that suits it best."""
        return self.cleaned_data.get("node") or None


class InferenceForm(ServiceForm):
    """How a model answers where nobody says otherwise. Empty fields take the usual value, shown as placeholder."""

    system_prompt = forms.CharField(
        label="System prompt",
        required=False,
        max_length=MAX_SYSTEM_PROMPT,
        strip=False,
        widget=forms.Textarea(attrs={"rows": 3}),
        help_text="For conversations that have none.",
    )
    temperature = forms.FloatField(label="Temperature", min_value=0, max_value=5, required=False)
    top_k = forms.IntegerField(label="Top K", min_value=0, max_value=1_000_000, required=False)
    top_p = forms.FloatField(label="Top P", min_value=0, max_value=1, required=False)
    min_p = forms.FloatField(label="Min P", min_value=0, max_value=1, required=False)
    repeat_penalty = forms.FloatField(label="Repeat penalty", min_value=0.01, max_value=10, required=False)
    presence_penalty = forms.FloatField(label="Presence penalty", min_value=-2, max_value=2, required=False)
    frequency_penalty = forms.FloatField(label="Frequency penalty", min_value=-2, max_value=2, required=False)
    max_tokens = forms.IntegerField(label="Max tokens", min_value=1, max_value=10_000_000, required=False)
    stop = forms.CharField(
        label="Stop strings", required=False, strip=False, widget=forms.Textarea(attrs={"rows": 2}), help_text="One per line."
    )

    def __init__(self, model: InstalledModel, data: QueryDict | None = None) -> None:
        self.kept = convert(model.inference_defaults, InferenceDefaults)
        initial: dict[str, Any] = {**self.kept.sampling, "system_prompt": self.kept.system_prompt}
        initial["stop"] = "\n".join(self.kept.sampling.get("stop", []))
        super().__init__(data, initial=initial)
        usual = SamplingParams()
        for name, field in self.fields.items():
            value = getattr(usual, name, None)
            if isinstance(value, int | float):
                field.widget.attrs |= {"placeholder": f"{value:g}", "step": "any"}
        for custom in model.custom_fields:
            self.fields[f"custom_{custom['key']}"] = _custom_field(
                custom, self.kept.custom_fields.get(custom["key"], custom["defaultValue"])
            )

    def custom(self) -> list[forms.BoundField]:
        """Return the switches of a virtual model."""
        return [self[name] for name in self.fields if name.startswith("custom_")]

    def sampling_fields(self) -> list[forms.BoundField]:
        """Return the short fields, which stand side by side."""
        return [self[name] for name in self.base_fields if name not in {"system_prompt", "stop"}]

    def defaults(self) -> InferenceDefaults:
        """Return the valid form's values."""
        data = self.cleaned_data
        names = [name for name in self.base_fields if name not in {"system_prompt", "stop"}]
        sampling = {name: data[name] for name in names if data[name] is not None}
        if stop := [line for line in re.split(r"\r?\n", data["stop"]) if line]:
            sampling["stop"] = stop
        kept = {name: value for name, value in self.kept.sampling.items() if name not in self.base_fields}
        custom = {name.removeprefix("custom_"): value for name, value in data.items() if name.startswith("custom_")}
        return msgspec.structs.replace(
            self.kept,
            sampling={**kept, **sampling},
            system_prompt=data["system_prompt"],
            custom_fields={**self.kept.custom_fields, **custom},
        )


def _custom_field(custom: dict[str, Any], value: Any) -> forms.Field:
    """Return the form field of a virtual model's switch."""
    common = {
        "label": custom["displayName"] or custom["key"],
        "help_text": escape(custom["description"]),
        "required": False,
        "initial": value,
    }
    if custom["type"] == "boolean":
        return forms.BooleanField(**common)
    if custom["type"] == "number":
        return forms.FloatField(**common)
    if custom["type"] == "select":
        options = [str(option["value"] if isinstance(option, dict) else option) for option in custom["options"]]
        return forms.ChoiceField(choices=[(option, option) for option in options], **common)
    return forms.CharField(max_length=1000, **common)
