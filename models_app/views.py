"""The My Models page: what is on disk and what is in memory. Every act is a call of a service."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, cast

from django.db.models import Count, Prefetch, Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.template.loader import render_to_string
from django.utils.cache import patch_cache_control
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from lmweb.access import Action, Principal, require
from lmweb.errors import InvalidRequest, LmwebError, NotFound
from lmweb.models import User
from lmweb.templatetags.interface import filesize
from models_app import loading, placement, scan, services, uploads, virtual
from models_app.forms import LoadForm
from models_app.models import InstalledModel, ModelInstance
from models_app.placement import Mode
from workers.models import WorkerNode

P = ParamSpec("P")

PAGE_SIZE: Final = 100
MAX_LIMIT: Final = 10_000

#: The columns that sort: name in the address -> (label, ordering in the natural direction).
SORTS: Final = {
    "name": ("Name", "display_name"),
    "publisher": ("Publisher", "publisher"),
    "size": ("Size", "-size_bytes"),
    "context": ("Context", "-max_context_length"),
    "added": ("Newest", "-created_at"),
    "loaded": ("Loaded first", "-instance_count"),
}


@dataclass(frozen=True)
class Filter:
    """Which models are listed, and in what order; anything odd counts as not given."""

    query: str
    sort: str
    limit: int

    @classmethod
    def parse(cls, request: HttpRequest) -> Filter:
        """Read it from the address, or from the fields that a button sends along."""
        given = request.POST if request.method == "POST" else request.GET
        sort, limit = given.get("sort", ""), given.get("limit", "")
        number = int(limit) if limit.isascii() and limit.isdigit() and len(limit) < 7 else PAGE_SIZE
        query = given.get("q", "").replace("\x00", "")[:200]
        return cls(query, sort if sort in SORTS else "name", min(MAX_LIMIT, max(PAGE_SIZE, number)))


@dataclass(frozen=True)
class InMemory:
    """A model in memory as the list shows it: how many requests it answers, and how many wait for it."""

    instance: ModelInstance
    running: int
    queued: int


@dataclass(frozen=True)
class Row:
    """A model as the list shows it."""

    model: InstalledModel
    is_missing: bool
    in_memory: list[InMemory]


View = Callable[Concatenate[HttpRequest, P], HttpResponse]


# --- boundaries -------------------------------------------------------------------------------------------------------


def shows_errors(view: View[P]) -> View[P]:
    """Render the project's errors of a button as an alert above the list, which stays as it is."""

    @functools.wraps(view)
    def wrapper(request: HttpRequest, /, *args: P.args, **kwargs: P.kwargs) -> HttpResponse:
        try:
            return view(request, *args, **kwargs)
        except LmwebError as error:
            response = render(request, "errors/part.html", {"error": error}, status=error.status)
            response.headers["HX-Retarget"] = "#model-alerts"
            response.headers["HX-Reswap"] = "innerHTML"
            return response

    return wrapper


def unless_seen(request: HttpRequest, html: str) -> HttpResponse:
    """Answer a page that asks for its list again: 204 when it is what the page shows already (``seen``)."""
    response = HttpResponse(status=204) if f'data-seen="{request.GET.get("seen", "-")[:64]}"' in html[:400] else HttpResponse(html)
    patch_cache_control(response, no_store=True)
    return response


def principal_of(request: HttpRequest) -> Principal:
    """Return who looks at a page."""
    return Principal(cast("User", request.user))  # LoginRequiredMiddleware lets nobody else in


# --- the page ---------------------------------------------------------------------------------------------------------


@require_GET
def my_models(request: HttpRequest) -> HttpResponse:
    """Show the whole page."""
    principal = principal_of(request)
    may_import = principal.may(Action.IMPORT_MODELS)
    context = {
        "list": _list_html(request),
        "sorts": SORTS,
        "filter": Filter.parse(request),
        "may_import": may_import,
        "may_add_virtual": principal.may(Action.CHANGE_DEFAULTS),
        "may_import_paths": principal.may(Action.IMPORT_FROM_SERVER),
        "unfinished": uploads.mine(principal=principal) if may_import else [],
        "chunk_bytes": uploads.CHUNK_BYTES,
    }
    return render(request, "models_app/page.html", context)


@require_GET
def model_list(request: HttpRequest) -> HttpResponse:
    """Return the list alone; 204 when it is what the page shows already (``seen``)."""
    return unless_seen(request, _list_html(request))


def _list_html(request: HttpRequest) -> str:
    """Render the list with a fingerprint of its content, so that an unchanged one need not be sent again."""
    principal = principal_of(request)
    visible = InstalledModel.objects.visible_to(principal)
    sizes = list(visible.values_list("size_bytes", flat=True))
    wanted = Filter.parse(request)
    found = list(_filtered(visible, wanted)[: wanted.limit + 1])
    models = found[: wanted.limit]
    work = loading.work_of(instance for model in models for instance in model.instances.all())
    context = {
        "models": [
            Row(model, not model.file.is_file(), [InMemory(instance, *work[instance.pk]) for instance in model.instances.all()])
            for model in models
        ],
        "more": wanted.limit + PAGE_SIZE if len(found) > wanted.limit else 0,
        "filter": wanted,
        "count": len(sizes),
        "total_bytes": sum(sizes),
        "free_bytes": shutil.disk_usage(placement.models_dir()).free // 10**8 * 10**8,  # coarse: it changes all the time
        "may_load": principal.may(Action.LOAD_MODELS),
        "may_delete": principal.may(Action.DELETE_MODELS),
        "may_pin": principal.may(Action.CHANGE_DEFAULTS),
        "may_import": principal.may(Action.IMPORT_MODELS),
        "several_nodes": WorkerNode.objects.alive().count() > 1,
    }
    rows = render_to_string("models_app/rows.html", context, request)
    busy = any(i.status in {"loading", "unloading"} for model in models for i in model.instances.all())
    context |= {"rows": rows, "seen": hashlib.sha256(rows.encode()).hexdigest()[:32], "busy": busy}
    return render_to_string("models_app/list.html", context, request)


def _filtered(visible: QuerySet[InstalledModel], wanted: Filter) -> QuerySet[InstalledModel]:
    models = visible.select_related("base").prefetch_related(Prefetch("instances", ModelInstance.objects.order_by("identifier")))
    for word in wanted.query.split()[:8]:
        anywhere = Q()
        for field in ("key", "display_name", "publisher", "architecture", "quantization", "params_string"):
            anywhere |= Q(**{f"{field}__icontains": word})
        models = models.filter(anywhere)
    if wanted.sort == "loaded":
        models = models.annotate(instance_count=Count("instances"))
    return models.order_by(SORTS[wanted.sort][1], "key")


# --- acts -------------------------------------------------------------------------------------------------------------


@require_POST
@shows_errors
def load(request: HttpRequest, model_id: int) -> HttpResponse:
    """Load a model as it is, without asking."""
    model = _model(request, model_id)
    loading.request_load(principal=principal_of(request), model=model)
    return _changed(request)


@require_http_methods(["GET", "POST"])
@shows_errors
def load_options(request: HttpRequest, model_id: int) -> HttpResponse:
    """Show the load options in a dialog, and load with them; what was typed stays in the form when something is wrong."""
    principal, model = principal_of(request), _model(request, model_id)
    require(principal, Action.LOAD_MODELS)
    form = LoadForm(model, request.POST or None)
    if request.method == "POST" and form.is_valid():
        typed = form.cleaned_data
        try:
            loading.request_load(
                principal=principal,
                model=model,
                config=form.config(),
                identifier=typed["identifier"].strip() or None,
                ttl_seconds=typed["ttl_minutes"] * 60 if typed["ttl_minutes"] else None,
                make_room=typed["make_room"],
                remember=typed["remember"],
                node=form.chosen_node(),
            )
        except LmwebError as error:
            form.fail(error)
        else:
            return _changed(request, {"close-dialog": True})
    context = {
        "form": form,
        "model": model,
        "may_remember": principal.may(Action.CHANGE_DEFAULTS),
        "keys": InstalledModel.objects.visible_to(principal).exclude(pk=model.pk).values_list("key", flat=True)[:500],
    }
    return render(request, "models_app/load-options.html", context, status=422 if form.errors else 200)


@require_POST
@shows_errors
def estimate(request: HttpRequest, model_id: int) -> HttpResponse:
    """Say what a load with these options would take, against the memory that is free now, and who would have to leave."""
    require(principal_of(request), Action.LOAD_MODELS)
    model = _model(request, model_id)
    form = LoadForm(model, request.POST)
    context: dict[str, Any] = {"problem": "Estimated once the options are complete."}
    if form.is_valid():
        try:
            plan = loading.plan_load(principal=principal_of(request), model=model, config=form.config(), node=form.chosen_node())
        except LmwebError as error:
            context = {"problem": error.message}
        else:
            parts = {"used": plan.total_bytes - plan.free_bytes, "needed": min(plan.estimate.needed_bytes, plan.free_bytes)}
            shares = {name: 100 * part / max(1, plan.total_bytes) for name, part in parts.items()}
            context = {"plan": plan, "shares": shares}
    return render(
        request, "models_app/estimate.html", {**context, "make_room": "make_room" in request.POST or "was_asked" not in request.POST}
    )


@require_POST
@shows_errors
def scan_folder(request: HttpRequest) -> HttpResponse:
    """Take in the model files that lie in the models directory and are in no list."""
    return _said(request, scan.scan(principal=principal_of(request)))


def _said(request: HttpRequest, found: list[scan.Found]) -> HttpResponse:
    """Return the list as it is now, and what was found."""
    problems = [f"{each.path}: {each.problem}" for each in found if each.problem]
    added = sum(bool(each.key) for each in found)
    text = f"{added} model{'' if added == 1 else 's'} added." if added else "" if problems else "Nothing new was found."
    said = " ".join([text, *problems[:3], f"And {len(problems) - 3} more problems." if len(problems) > 3 else ""]).strip()
    return _changed(request, {"toast": {"text": said, "kind": "bad" if problems else "good"}})


@require_POST
@shows_errors
def import_path(request: HttpRequest) -> HttpResponse:
    """Take in a file or a folder of model files that lies on the server's own disk; it stays where it is."""
    typed = request.POST.get("path", "").strip()
    if not typed or "\x00" in typed:
        raise InvalidRequest(
            "Give the path of a .gguf file, of an MLX directory, or of a folder like LM Studio's, on the server.", param="path"
        )
    mode = Mode.HARD_LINK if request.POST.get("mode") == Mode.HARD_LINK else Mode.SYMBOLIC_LINK
    return _said(request, scan.take_in(principal=principal_of(request), path=Path(typed), mode=mode))


@require_POST
@shows_errors
def add_virtual(request: HttpRequest) -> HttpResponse:
    """Add the virtual model of a ``model.yaml``."""
    model = virtual.install(principal=principal_of(request), text=request.POST.get("model_yaml", "").replace("\r\n", "\n"))
    return _changed(request, {"toast": {"text": f"{model.key} is added.", "kind": "good"}})


@require_POST
@shows_errors
def pin(request: HttpRequest, instance_id: int) -> HttpResponse:
    """Keep a loaded model in memory until a person unloads it, or let it leave again."""
    instance = _instance(request, instance_id)
    if instance is not None:
        loading.set_pinned(principal=principal_of(request), instance=instance, pinned=request.POST.get("pinned") == "on")
    return _changed(request)


@require_POST
@shows_errors
def unload(request: HttpRequest, instance_id: int) -> HttpResponse:
    """Unload one instance, or put away the error of one that failed."""
    instance = _instance(request, instance_id)
    if instance is not None:  # gone already is what was wanted
        loading.request_unload(principal=principal_of(request), instance=instance)
        if instance.status == ModelInstance.Status.READY and instance.memory_bytes:
            said = f"{instance.identifier} is being unloaded: {filesize(instance.memory_bytes)} of memory come back."
            return _changed(request, {"toast": {"text": said, "kind": "good"}})
    return _changed(request)


@require_POST
@shows_errors
def delete(request: HttpRequest, model_id: int) -> HttpResponse:
    """Delete a model and its file."""
    model = _model(request, model_id)
    services.delete_model(principal=principal_of(request), model=model)
    return _changed(request, {"toast": {"text": f"{model.key} is deleted.", "kind": "good"}})


def _instance(request: HttpRequest, instance_id: int) -> ModelInstance | None:
    return ModelInstance.objects.filter(pk=instance_id, model__in=InstalledModel.objects.visible_to(principal_of(request))).first()


def _model(request: HttpRequest, model_id: int) -> InstalledModel:
    model = InstalledModel.objects.visible_to(principal_of(request)).filter(pk=model_id).first()
    if model is None:
        raise NotFound("There is no such model any more. Reload the page.")
    return model


def _changed(request: HttpRequest, triggers: dict[str, Any] | None = None) -> HttpResponse:
    """Return the list as it is now, and clear old alerts."""
    response = HttpResponse(_list_html(request))
    response.headers["HX-Retarget"] = "#model-list"
    response.headers["HX-Reswap"] = "outerHTML"
    response.headers["HX-Trigger"] = json.dumps({"clear-alerts": True, **(triggers or {})})
    return response
