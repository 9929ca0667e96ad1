"""The page of one model: facts and files, defaults of loads and answers, chat template. Every act is a call of a service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from lmweb.access import Action, require
from lmweb.errors import Conflict, InvalidRequest, NotFound, ServiceUnavailable, TemplateError
from models_app import defaults, services, verify
from models_app.forms import ConfigForm, InferenceForm
from models_app.models import InstalledModel
from models_app.views import principal_of


@require_GET
def show(request: HttpRequest, model_id: int) -> HttpResponse:
    """Show the page."""
    return _page(request, _model(request, model_id))


@require_POST
def load_defaults(request: HttpRequest, model_id: int) -> HttpResponse:
    """Save how the model is loaded, or go back to the usual."""
    model, principal = _model(request, model_id), principal_of(request)
    form = ConfigForm(model, request.POST)

    def save(*, reset: bool) -> None:
        defaults.set_load_defaults(principal=principal, model=model, config=None if reset else form.config())

    return _save(request, model, form, save, part="loads", shown_as="load_form")


@require_POST
def inference_defaults(request: HttpRequest, model_id: int) -> HttpResponse:
    """Save how the model answers, or go back to the usual."""
    model, principal = _model(request, model_id), principal_of(request)
    form = InferenceForm(model, request.POST)

    def save(*, reset: bool) -> None:
        defaults.set_inference_defaults(principal=principal, model=model, defaults=None if reset else form.defaults())

    return _save(request, model, form, save, part="answers", shown_as="inference_form")


def _save(
    request: HttpRequest, model: InstalledModel, form: ConfigForm | InferenceForm, save: Callable[..., None], *, part: str, shown_as: str
) -> HttpResponse:
    """Save what a form says, or reset it; what was typed stays in the form when something is wrong with it."""
    require(principal_of(request), Action.CHANGE_DEFAULTS)
    reset = "reset" in request.POST
    if reset or form.is_valid():
        try:
            save(reset=reset)
        except InvalidRequest as error:
            form.fail(error)
        else:
            return _saved(model, part)
    return _page(request, model, status=422, **{shown_as: form})


@require_POST
def template(request: HttpRequest, model_id: int) -> HttpResponse:
    """Try a chat template out, save it, or go back to the file's."""
    model, principal = _model(request, model_id), principal_of(request)
    require(principal, Action.CHANGE_TEMPLATES)
    text = request.POST.get("chat_template", "").replace("\r\n", "\n")
    try:
        if "preview" in request.POST:
            found = services.preview_chat_template(principal=principal, model=model, text=text)
            return _page(request, model, template_text=text, preview=found)
        services.set_chat_template(principal=principal, model=model, text="" if "reset" in request.POST else text)
    except TemplateError as error:
        return _page(request, model, template_text=text, template_error=error.message, status=422)
    return _saved(model, "template")


@require_http_methods(["GET", "POST"])
def verification(request: HttpRequest, model_id: int) -> HttpResponse:
    """Say how the check of a model's files stands, or begin one."""
    model, principal = _model(request, model_id), principal_of(request)
    problem = ""
    if request.method == "POST":
        try:
            verify.request_verification(principal=principal, model=model)
        except (Conflict, ServiceUnavailable) as error:
            problem = error.message
        model.refresh_from_db(fields=["verification"])
    context = {
        "model": model,
        "checking": verify.is_running(model.verification),
        "may_verify": principal.may(Action.IMPORT_MODELS),
        "problem": problem,
    }
    return render(request, "models_app/verification.html", context)


def _saved(model: InstalledModel, part: str) -> HttpResponse:
    return redirect(f"/models/{model.pk}/?saved={part}#{part}")


def _page(request: HttpRequest, model: InstalledModel, *, status: int = 200, **context: Any) -> HttpResponse:
    principal = principal_of(request)
    saved = request.GET.get("saved", "")
    context = {
        "model": model,
        "files": model.files.all(),
        "checking": verify.is_running(model.verification),
        "may_verify": principal.may(Action.IMPORT_MODELS),
        "is_missing": not model.file.is_file(),
        "load_form": ConfigForm(model),
        "inference_form": InferenceForm(model),
        "template_text": model.chat_template_override or model.chat_template,
        "may_change": principal.may(Action.CHANGE_DEFAULTS),
        "may_change_template": principal.may(Action.CHANGE_TEMPLATES),
        "saved": saved if saved in {"loads", "answers", "template"} else "",
        "keys": InstalledModel.objects.visible_to(principal).exclude(pk=model.pk).values_list("key", flat=True)[:500],
        **context,
    }
    return render(request, "models_app/model.html", context, status=status)


def _model(request: HttpRequest, model_id: int) -> InstalledModel:
    model = InstalledModel.objects.visible_to(principal_of(request)).filter(pk=model_id).first()
    if model is None:
        raise NotFound("There is no such model any more.")
    return model
