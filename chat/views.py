"""The chat page and the small requests it makes beside its websocket."""

from __future__ import annotations

import uuid
from datetime import date, datetime, timedelta
from itertools import groupby
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.utils import timezone
from django.utils.dateparse import parse_datetime
from django.views.decorators.http import require_GET, require_POST

from chat import history, services
from chat.models import Chat
from chat.prompting import LABELS
from chat.selectors import chat_models, default_model
from lmweb.access import Action, Principal
from lmweb.decoding import decode_json
from lmweb.errors import InvalidRequest
from models_app.generations import resolve_model
from models_app.loading import request_load, request_unload
from models_app.models import ModelInstance
from workers.schemas import SamplingParams

LIST_SIZE = 60
MAX_LIST_SIZE = 1200

#: Questions that the starter model answers well; they show what it is for.
STARTER_PROMPTS = ("What is lmweb?", "Which quantization should I choose?", "How do I use the OpenAI client?")


def _principal(request: HttpRequest) -> Principal:
    return Principal(request.user)  # type: ignore[arg-type]  # LoginRequiredMiddleware keeps anonymous people out


@require_GET
def chat_page(request: HttpRequest, chat_id: uuid.UUID | None = None) -> HttpResponse:
    """Show a chat, or an empty one. ``?through=`` picks the version of an answer that is shown."""
    principal = _principal(request)
    chat = services.get_chat(principal=principal, chat_id=chat_id) if chat_id else None
    branch = history.Branch(chat, _uuid(request, "through")) if chat else None
    messages, older = branch.page() if branch else ([], False)
    models = chat_models(principal)
    selected = default_model(principal, chat, models)
    defaults = SamplingParams()
    data = {
        "chat": {"id": str(chat.pk), "title": str(chat)} if chat else None,
        "messages": messages,
        "older": older,
        "newest": str(branch.newest) if branch and branch.newest else None,
        "models": models,
        "model": selected,
        "may_generate": principal.may(Action.GENERATE),
        "may_load": principal.may(Action.LOAD_MODELS),
        "settings": msgspec.to_builtins(services.settings_of(chat)),
        "defaults": {name: getattr(defaults, name) for name in LABELS},
    }
    context = {
        "chat": chat,
        "data": data,
        "selected": next((model for model in models if model["key"] == selected), None),
        "prompts": STARTER_PROMPTS,
    }
    return render(request, "chat/page.html", context | _list_context(request, principal, chat))


@require_GET
def chat_list(request: HttpRequest) -> HttpResponse:
    """Return the list of chats, at least as many as are ``shown`` already, or what follows after one (``before``: its ``updated_at``)."""
    principal = _principal(request)
    current_id = _uuid(request, "current")
    current = Chat.objects.visible_to(principal).filter(pk=current_id).first() if current_id else None
    return render(request, "chat/list.html", _list_context(request, principal, current))


@require_GET
def older_messages(request: HttpRequest, chat_id: uuid.UUID) -> JsonResponse:
    """Return the messages before one (``before``) on the branch that leads to it."""
    chat = services.get_chat(principal=_principal(request), chat_id=chat_id)
    before = _uuid(request, "before")
    messages, older = history.Branch(chat, before).page(before)
    return JsonResponse({"messages": messages, "older": older})


@require_GET
def models(request: HttpRequest) -> JsonResponse:
    """Return the models for the picker with what is loaded right now."""
    return JsonResponse({"models": chat_models(_principal(request))})


@require_POST
def load(request: HttpRequest) -> JsonResponse:
    """Start loading the chosen model, unless it is in memory already; its progress shows in the picker."""
    principal = _principal(request)
    model = resolve_model(principal, request.POST.get("model", ""))
    if not model.instances.exclude(status=ModelInstance.Status.FAILED).exists():
        request_load(principal=principal, model=model)
    return JsonResponse({"models": chat_models(principal)})


@require_POST
def eject(request: HttpRequest) -> JsonResponse:
    """Unload the chosen model everywhere."""
    principal = _principal(request)
    model = resolve_model(principal, request.POST.get("model", ""))
    for instance in model.instances.all():
        request_unload(principal=principal, instance=instance)
    return JsonResponse({"models": chat_models(principal)})


@require_POST
def rename(request: HttpRequest, chat_id: uuid.UUID) -> JsonResponse:
    """Give a chat another title."""
    chat = services.rename_chat(principal=_principal(request), chat_id=chat_id, title=request.POST.get("title", ""))
    return JsonResponse({"title": chat.title})


@require_POST
def delete(request: HttpRequest, chat_id: uuid.UUID) -> JsonResponse:
    """Delete a chat."""
    services.delete_chat(principal=_principal(request), chat_id=chat_id)
    return JsonResponse({})


@require_POST
def settings(request: HttpRequest, chat_id: uuid.UUID) -> JsonResponse:
    """Save the side panel."""
    try:
        wanted = decode_json(request.body, services.ChatSettings)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The settings were not understood: {error}.") from None
    services.save_settings(principal=_principal(request), chat_id=chat_id, settings=wanted)
    return JsonResponse({})


def _uuid(request: HttpRequest, name: str) -> uuid.UUID | None:
    """Return an id of the query string, or None when it is absent or no id."""
    try:
        return uuid.UUID(request.GET.get(name, ""))
    except ValueError:
        return None


def _moment(text: str) -> datetime | None:
    """Return a time with its zone, or None for what is none."""
    try:
        moment = parse_datetime(text.replace(" ", "+"))
    except ValueError:
        return None
    return moment if moment and timezone.is_aware(moment) else None


def _list_size(request: HttpRequest) -> int:
    """Return how many chats to list: those that are shown already stay, in whole pages."""
    text = request.GET.get("shown", "")
    shown = min(int(text), MAX_LIST_SIZE) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    return max(1, -(-shown // LIST_SIZE)) * LIST_SIZE


def _list_context(request: HttpRequest, principal: Principal, current: Chat | None) -> dict[str, Any]:
    """Return the list of chats, grouped by day in the reader's time zone."""
    chats = Chat.objects.visible_to(principal).only("id", "title", "updated_at")
    before = _moment(request.GET.get("before", ""))
    if before:
        chats = chats.filter(updated_at__lt=before)
    size = _list_size(request)
    found = list(chats[: size + 1])
    zone = _zone(request)
    today = timezone.now().astimezone(zone).date()
    groups = [(label, list(items)) for label, items in groupby(found[:size], key=lambda c: _day(c.updated_at, zone, today))]
    more = found[size - 1].updated_at.isoformat() if len(found) > size else ""
    return {"groups": groups, "more": more, "current": current, "first_page": before is None}


def _zone(request: HttpRequest) -> ZoneInfo:
    """Return the browser's time zone from its cookie; UTC for an unknown one."""
    try:
        return ZoneInfo(request.COOKIES.get("zone", "UTC"))
    except (ValueError, OSError, KeyError):
        return ZoneInfo("UTC")


def _day(moment: datetime, zone: ZoneInfo, today: date) -> str:
    day = moment.astimezone(zone).date()
    if day >= today:
        return "Today"
    if day == today - timedelta(days=1):
        return "Yesterday"
    if day > today - timedelta(days=7):
        return "Last 7 days"
    return day.strftime("%B %Y")
