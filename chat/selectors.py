"""Reading what the chat page shows beside the conversation: the models to choose from."""

from __future__ import annotations

from typing import Any

from chat.models import Chat
from lmweb.access import Principal
from models_app.models import InstalledModel, ModelInstance
from models_app.services import STARTER_USER_REPO

#: The nearer to answering, the further left.
_ORDER = (ModelInstance.Status.READY, ModelInstance.Status.LOADING, ModelInstance.Status.UNLOADING, ModelInstance.Status.FAILED)


def chat_models(principal: Principal) -> list[dict[str, Any]]:
    """Return the models that this person may chat with, the loaded ones first, as the page gets them."""
    found = InstalledModel.objects.visible_to(principal).filter(type=InstalledModel.Type.LLM).prefetch_related("instances")
    return sorted((_view(model) for model in found), key=lambda model: (not model["state"], model["name"].lower()))


def default_model(principal: Principal, chat: Chat | None, models: list[dict[str, Any]]) -> str:
    """Return the key to preselect: the chat's, else the one of the latest chat, else a loaded one, else the first; or nothing."""
    keys = {model["key"] for model in models}
    if chat:
        return chat.model_key if chat.model_key in keys or not models else models[0]["key"]
    latest = Chat.objects.visible_to(principal).exclude(model_key="").values_list("model_key", flat=True).first()
    if latest in keys:
        return str(latest)
    return models[0]["key"] if models else ""


def _view(model: InstalledModel) -> dict[str, Any]:
    instances = sorted(model.instances.all(), key=lambda instance: _ORDER.index(ModelInstance.Status(instance.status)))
    best = instances[0] if instances else None
    return {
        "id": model.pk,
        "key": model.key,
        "name": model.display_name or model.key,
        "publisher": model.publisher,
        "is_starter": model.path.startswith(f"{STARTER_USER_REPO}/"),
        "params": model.params_string,
        "quantization": model.quantization,
        "size_bytes": model.size_bytes,
        "context": (best.config.get("context_length") if best else None) or model.max_context_length,
        "state": best.status if best and best.status != ModelInstance.Status.FAILED else "",
        "progress": best.progress if best else 0,
        "error": best.error if best else "",
    }
