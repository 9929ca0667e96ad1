"""The Discover page: searching the Hub, a model's variants with a verdict for this installation, its README, and asking for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, cast

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET, require_http_methods, require_POST
from django_htmx.http import trigger_client_event

from lmweb.access import Action, require
from lmweb.errors import HubBusy, HubOffline, InvalidRequest, LmwebError, OutboundFailed
from models_app import catalog, downloads, hub
from models_app.hub import Format, Repository
from models_app.models import Download, InstalledModel
from models_app.variants import Variant, find_variant, variants
from models_app.verdicts import Hardware, Verdict, verdict_of
from models_app.views import principal_of, shows_errors

PAGE_SIZE: Final = 30
MAX_LIMIT: Final = 300
FORMATS: Final = {"gguf": "GGUF", "mlx": "MLX"}


@dataclass(frozen=True)
class Search:
    """What is looked for; anything odd counts as not given."""

    query: str
    format: Format
    sort: str
    limit: int

    @classmethod
    def parse(cls, request: HttpRequest) -> Search:
        """Read it from the address."""
        given = request.GET
        query = " ".join(given.get("q", "").replace("\x00", "").split())[:300]
        kind, sort, limit = given.get("format", ""), given.get("sort", ""), given.get("limit", "")
        number = int(limit) if limit.isascii() and limit.isdigit() and len(limit) < 5 else PAGE_SIZE
        return cls(
            query, cast("Format", kind if kind in FORMATS else "gguf"), sort if sort in hub.SORTS else "trending",
            min(MAX_LIMIT, max(PAGE_SIZE, number)),
        )  # fmt: skip


@dataclass(frozen=True)
class Offer:
    """A variant as the page shows it."""

    variant: Variant
    verdict: Verdict
    is_recommended: bool
    missing_engine: str
    installed: InstalledModel | None
    download: Download | None


@require_GET
def discover(request: HttpRequest) -> HttpResponse:
    """Show the page; what the Hub says is fetched by it afterwards, so that a slow Hub holds up nothing."""
    principal = principal_of(request)
    context = {
        "search": Search.parse(request),
        "sorts": hub.SORTS,
        "formats": FORMATS,
        "model": request.GET.get("model", "")[:300],
        "is_admin": principal.may(Action.DECIDE_REQUESTS),
    }
    return render(request, "discover/page.html", context)


@require_GET
def results(request: HttpRequest) -> HttpResponse:
    """Return the list of results: staff picks and trending models without a query."""
    wanted = Search.parse(request)
    context: dict[str, Any] = {"search": wanted, "picks": [], "found": [], "more": 0, "error": None}
    if not wanted.query and wanted.format == "gguf":
        context["picks"] = catalog.picks()
    try:
        reference = hub.parse_reference(wanted.query) if wanted.query else None
        if reference is not None:
            context["reference"] = reference
        else:
            found = hub.search(wanted.query, model_format=wanted.format, sort=wanted.sort, limit=wanted.limit)
            context["found"] = found
            context["more"] = wanted.limit + PAGE_SIZE if len(found) >= wanted.limit < MAX_LIMIT else 0
    except LmwebError as error:
        context |= _failure(error)
    here = InstalledModel.objects.visible_to(principal_of(request)).values_list("path", flat=True)
    context["here"] = {"/".join(path.split("/")[:2]).lower() for path in here}
    return render(request, "discover/results.html", context)


@require_GET
def model(request: HttpRequest) -> HttpResponse:
    """Return one model's details."""
    text = request.GET.get("model", "").replace("\x00", "")[:300]
    try:
        return _details(request, text)
    except LmwebError as error:
        return render(request, "discover/model-error.html", {"text": text, **_failure(error)})


def _details(request: HttpRequest, text: str) -> HttpResponse:
    principal = principal_of(request)
    require(principal, Action.READ_MODELS)
    pick = catalog.find(text)
    reference = hub.Reference(pick.repos[0]) if pick else hub.parse_reference(text)
    if reference is None:
        raise InvalidRequest("A model on the Hub is named user/repo.")
    repository = hub.repository(reference.repo)
    offered = variants(repository)
    hardware = Hardware.of_installation()
    context = {
        "repository": repository,
        "pick": pick,
        "offers": _offers(request, repository, offered, hardware),
        "hub_address": f"{hub.address()}/{repository.found.repo}",
        "hardware": hardware,
        "may_download": principal.may(Action.DOWNLOAD_MODELS),
        "may_request": principal.may(Action.REQUEST_DOWNLOADS),
    }
    return render(request, "discover/model.html", context)


def _offers(request: HttpRequest, repository: Repository, offered: list[Variant], hardware: Hardware | None) -> list[Offer]:
    best = downloads.recommended_of(repository, offered)
    marks = {downloads.fingerprint(repository.found.repo, variant): variant.label for variant in offered}
    visible = Download.objects.visible_to(principal_of(request))
    open_ones = visible.filter(fingerprint__in=marks, status__in=[*Download.UNFINISHED, Download.Status.REQUESTED])
    under_way = {marks[download.fingerprint]: download for download in open_ones}
    return [
        Offer(
            variant=variant,
            verdict=verdict_of(repository, variant, hardware),
            is_recommended=variant is best and not missing,
            missing_engine=missing,
            installed=downloads.installed(repository, variant),
            download=under_way.get(variant.label),
        )
        for variant in offered
        for missing in (downloads.missing_engine(variant),)
    ]


@require_GET
def readme(request: HttpRequest) -> HttpResponse:
    """Return a README as Markdown; the page renders and cleans it as it does answers of models."""
    repo, revision = request.GET.get("repo", ""), request.GET.get("revision", "")
    context: dict[str, Any] = {"text": "", "error": None}
    try:
        require(principal_of(request), Action.READ_MODELS)
        if not (hub.is_repo(repo) and hub.is_revision(revision)):
            raise InvalidRequest("There is no such README.")
        context["text"] = hub.readme(repo, revision)
    except LmwebError as error:
        context["error"] = error
    return render(request, "discover/readme.html", context)


@require_POST
@shows_errors
def download(request: HttpRequest) -> HttpResponse:
    """Download a variant, or ask for it."""
    repo, label = request.POST.get("repo", ""), request.POST.get("variant", "")
    repository = hub.repository(repo)
    variant = find_variant(variants(repository), label)
    if variant is None:
        raise InvalidRequest("This variant is not there any more. Look at the model again.")
    asked = downloads.ask(principal=principal_of(request), repository=repository, variant=variant)
    response = _details(request, repo)
    response = trigger_client_event(response, "activity-changed", {})
    return trigger_client_event(response, "toast", {"text": _said(asked, repository), "kind": "good"})


def _said(asked: downloads.Asked, repository: Repository) -> str:
    name = repository.found.name
    if asked.download is None:
        return f"{name} is here already."
    if asked.download.status == Download.Status.REQUESTED:
        return f"Your request for {name} is sent. An admin decides; Activity shows it."
    return f"{name} is being downloaded. Activity shows how far it is."


@require_http_methods(["GET", "POST"])
@shows_errors
def edit_catalog(request: HttpRequest) -> HttpResponse:
    """Show the file of staff picks to admins, and put another one in force; what was typed stays when something is wrong with it."""
    principal = principal_of(request)
    require(principal, Action.DECIDE_REQUESTS)
    content, error = "", None
    if request.method == "POST":
        content = request.POST.get("catalog", "")
        try:
            if "reset" in request.POST:
                catalog.reset(principal=principal)
            else:
                catalog.save(content, principal=principal)
        except InvalidRequest as refused:
            error = refused
        else:
            response = HttpResponse(status=204)
            response.headers["HX-Trigger"] = '{"close-dialog": true, "catalog-changed": true}'
            return response
    context = {"catalog": content if error else catalog.text(), "is_own": catalog.is_own(), "error": error}
    return render(request, "discover/catalog.html", context, status=422 if error else 200)


def _failure(error: LmwebError) -> dict[str, Any]:
    kind = "offline" if isinstance(error, HubOffline) else "busy" if isinstance(error, HubBusy) else "away"
    return {"error": error, "kind": kind if isinstance(error, OutboundFailed) else "refused"}
