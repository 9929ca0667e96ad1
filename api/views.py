"""The Developer page: where programs connect, with which tokens, to which models."""

from __future__ import annotations

from typing import Any, cast

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_POST
from django_htmx.http import trigger_client_event

from api.forms import TokenForm
from lmweb.access import Principal
from lmweb.models import ApiToken, User
from lmweb.tokens import create_token, revoke_token
from models_app.models import InstalledModel, ModelInstance

MAX_MODELS = 500


def _principal(request: HttpRequest) -> Principal:
    return Principal(cast("User", request.user))


def _tokens(request: HttpRequest, **more: Any) -> dict[str, Any]:
    """Return what the list of tokens shows: those that work first."""
    mine = ApiToken.objects.filter(user=_principal(request).user)
    return {"tokens": sorted(mine, key=lambda token: token.state != "active"), **more}


def _instances(request: HttpRequest) -> dict[str, Any]:
    visible = InstalledModel.objects.visible_to(_principal(request))
    return {"instances": ModelInstance.objects.filter(model__in=visible).select_related("model").order_by("identifier", "node_id")}


def _snippets(request: HttpRequest) -> dict[str, Any]:
    """Return what the examples need: this server's address as the browser knows it, and a model that exists."""
    visible = InstalledModel.objects.visible_to(_principal(request)).filter(type=InstalledModel.Type.LLM)
    keys = list(visible.values_list("key", flat=True)[:MAX_MODELS])
    wanted = request.GET.get("model", "")
    loaded = next((key for key in visible.filter(instances__status="ready").values_list("key", flat=True)), None)
    model = wanted if wanted in keys else loaded or (keys[0] if keys else "publisher/model")
    return {"base_url": _base_url(request), "keys": keys, "model": model}


def _base_url(request: HttpRequest) -> str:
    return f"{request.scheme}://{request.get_host()}/v1"


@require_GET
def developer(request: HttpRequest) -> HttpResponse:
    """Show the whole page."""
    name = request.get_host().rpartition(":")[0] or request.get_host()
    context = {
        **_tokens(request),
        **_instances(request),
        **_snippets(request),
        "form": TokenForm(_principal(request)),
        "is_local": name in {"localhost", "127.0.0.1", "[::1]"},
    }
    return render(request, "api/developer.html", context)


@require_GET
def instances(request: HttpRequest) -> HttpResponse:
    """Show the models in memory, for the page that refreshes them."""
    return render(request, "api/instances.html", _instances(request))


@require_GET
def snippets(request: HttpRequest) -> HttpResponse:
    """Show the examples for another model."""
    return render(request, "api/snippets.html", _snippets(request))


@require_POST
@never_cache
def create(request: HttpRequest) -> HttpResponse:
    """Create a token. Its secret is in this one answer and nowhere else."""
    principal = _principal(request)
    form = TokenForm(principal, request.POST)
    if not form.is_valid():
        response = render(request, "api/token-form.html", {"form": form}, status=422)
        response.headers["HX-Retarget"] = "#token-form"
        return response
    data = form.cleaned_data
    token, secret = create_token(user=principal.user, name=data["name"], scopes=data["scopes"], lifetime=form.lifetime())
    new_form = TokenForm(principal)
    response = render(request, "api/tokens.html", _tokens(request, new_token=token, secret=secret, form=new_form, renew_form=True))
    return trigger_client_event(response, "token-created", after="settle")


@require_POST
def revoke(request: HttpRequest, token_id: str) -> HttpResponse:
    """Make one's own token useless."""
    revoke_token(token_id, owner=_principal(request).user)
    return render(request, "api/tokens.html", _tokens(request))
