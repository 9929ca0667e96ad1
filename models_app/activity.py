"""The Activity page: downloads that run, that need somebody, and that have ended. Every act is a call of ``downloads``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final

from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.template.loader import render_to_string
from django.utils.cache import patch_cache_control
from django.views.decorators.http import require_GET, require_POST

from lmweb.access import Action, Principal
from models_app import downloads
from models_app.models import Download
from models_app.views import principal_of, shows_errors, unless_seen

PAGE_SIZE: Final = 50
MAX_LIMIT: Final = 5_000

Status = Download.Status


@dataclass(frozen=True)
class Job:
    """A download as somebody sees it."""

    row: Download
    people: list[str]
    may_change: bool
    may_decide: bool
    is_mine: bool

    @property
    def done(self) -> float:
        """Return how much of the present phase is done, from 0 to 1."""
        return min(1.0, self.row.done_bytes / max(1, self.row.total_bytes))

    @property
    def speed(self) -> int:
        """Return whole bytes per second."""
        return round(self.row.bytes_per_second)

    @property
    def left(self) -> str:
        """Return the time that is left, in words; empty while nobody can tell."""
        seconds = self.row.seconds_left
        if seconds is None or seconds > 30 * 86_400:
            return ""
        if seconds < 60:
            return f"{max(1, round(seconds))} s left"
        minutes = round(seconds / 60)
        return f"{minutes} min left" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min left"


@require_GET
def activity(request: HttpRequest) -> HttpResponse:
    """Show the whole page."""
    return render(request, "activity/page.html", {"list": _list_html(request)})


@require_GET
def activity_list(request: HttpRequest) -> HttpResponse:
    """Return the list alone; 204 when it is what the page shows already (``seen``)."""
    return unless_seen(request, _list_html(request))


@require_GET
def badge(request: HttpRequest) -> HttpResponse:
    """Return how many downloads run or wait, and how many need this person, for the rail of every page."""
    principal = principal_of(request)
    visible = Download.objects.visible_to(principal)
    running = visible.filter(status__in=(Status.QUEUED, *Download.RUNNING)).count()
    response = JsonResponse({"running": running, "attention": _attention(principal, visible).count()})
    patch_cache_control(response, no_store=True)
    return response


def _attention(principal: Principal, visible: QuerySet[Download]) -> QuerySet[Download]:
    """Return what waits for this person: failures of their downloads, and for admins everybody's, with the requests."""
    if principal.may(Action.DECIDE_REQUESTS):
        return visible.filter(status__in=[Status.FAILED, Status.REQUESTED])
    return visible.filter(status=Status.FAILED, pk__in=principal.user.joined_downloads.values("pk"))


def _list_html(request: HttpRequest) -> str:
    """Render the list with a fingerprint of its content, so that an unchanged one need not be sent again."""
    principal = principal_of(request)
    given = request.POST if request.method == "POST" else request.GET
    text = given.get("limit", "")
    limit = min(MAX_LIMIT, max(PAGE_SIZE, int(text))) if text.isascii() and text.isdigit() and len(text) < 6 else PAGE_SIZE
    visible = Download.objects.visible_to(principal).select_related("model", "requested_by", "decided_by").prefetch_related("people")
    mine = _attention(principal, visible)
    attention = _jobs(principal, mine.order_by("created_at")[:MAX_LIMIT])
    going_on = visible.filter(status__in=[*Download.UNFINISHED, Status.REQUESTED]).exclude(pk__in=mine.values("pk"))
    progress = _jobs(principal, going_on.order_by("created_at")[:MAX_LIMIT])
    ended = visible.filter(status__in=[Status.COMPLETED, Status.CANCELLED, Status.DECLINED, Status.FAILED]).exclude(
        pk__in=mine.values("pk")
    )
    record = list(ended.order_by("-finished_at")[: limit + 1])
    context = {
        "progress": progress,
        "attention": attention,
        "record": _jobs(principal, record[:limit]),
        "more": limit + PAGE_SIZE if len(record) > limit else 0,
        "limit": limit,
        "may_download": principal.may(Action.DOWNLOAD_MODELS),
        "may_request": principal.may(Action.REQUEST_DOWNLOADS),
    }
    rows = render_to_string("activity/rows.html", context, request)
    busy = any(job.row.status not in {Status.PAUSED, Status.REQUESTED} for job in progress)
    context |= {"rows": rows, "seen": hashlib.sha256(rows.encode()).hexdigest()[:32], "busy": busy}
    return render_to_string("activity/list.html", context, request)


def _jobs(principal: Principal, rows: Any) -> list[Job]:
    is_admin, may_download = principal.may(Action.DECIDE_REQUESTS), principal.may(Action.DOWNLOAD_MODELS)
    jobs = []
    for row in rows:
        people = list(row.people.all())
        mine = any(person.pk == principal.user.pk for person in people)
        names = [person.get_username() for person in people] or ["the command line"]
        jobs.append(Job(row, names, is_admin or (mine and may_download), is_admin, mine))
    return jobs


# --- acts -------------------------------------------------------------------------------------------------------------


@require_POST
@shows_errors
def pause(request: HttpRequest, download_id: str) -> HttpResponse:
    """Stop for now."""
    return _act(request, download_id, downloads.pause)


@require_POST
@shows_errors
def resume(request: HttpRequest, download_id: str) -> HttpResponse:
    """Go on, also after a failure."""
    return _act(request, download_id, downloads.resume)


@require_POST
@shows_errors
def cancel(request: HttpRequest, download_id: str) -> HttpResponse:
    """End it and delete what is there; withdraw a request; put a failure away."""
    return _act(request, download_id, downloads.cancel)


@require_POST
@shows_errors
def approve(request: HttpRequest, download_id: str) -> HttpResponse:
    """Grant a request."""
    return _act(request, download_id, downloads.approve, always=request.POST.get("always") == "on")


@require_POST
@shows_errors
def decline(request: HttpRequest, download_id: str) -> HttpResponse:
    """Refuse a request, with a reason."""
    return _act(request, download_id, downloads.decline, reason=request.POST.get("reason", ""))


def _act(request: HttpRequest, download_id: str, act: Any, **options: Any) -> HttpResponse:
    principal = principal_of(request)
    act(principal=principal, download=downloads.get(principal, download_id), **options)
    response = HttpResponse(_list_html(request))
    response.headers["HX-Retarget"] = "#activity-list"
    response.headers["HX-Reswap"] = "outerHTML"
    response.headers["HX-Trigger"] = json.dumps({"clear-alerts": True, "activity-changed": True})
    return response
