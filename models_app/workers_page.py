"""The Workers and Runtimes pages, for admins: the machines that run models, and their engines. Every act is a call of ``nodes``."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.template.loader import render_to_string
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_POST
from django_htmx.http import trigger_client_event

from lmweb.access import Action, require
from lmweb.errors import InvalidRequest
from lmweb.tokens import parse_lifetime
from models_app import nodes
from models_app.models import ModelInstance
from models_app.nodes import Node
from models_app.views import principal_of, shows_errors, unless_seen
from workers.engines.card import LABELS, Feature

#: How long a join token can be used: what is sent -> what is shown.
LIFETIMES: Final = {"1h": "1 hour", "1d": "1 day", "7d": "7 days", "30d": "30 days", "": "It does not expire"}
#: Colours of the bar; models beyond take turns.
COLOURS: Final = 5
_BAR_UNITS: Final = 1000


# --- workers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """A part of a memory bar, in thousandths of its length; ``colour`` 0 is everything that is no model."""

    instance: ModelInstance | None
    colour: int
    start: float
    width: float


@dataclass(frozen=True)
class Card:
    """A node as the page shows it."""

    node: Node
    segments: list[Segment]

    @property
    def gpus(self) -> str:
        """Return the names of its GPUs, equal ones counted."""
        counted = Counter(self.node.row.hardware.get("gpu_names") or [])
        return ", ".join(f"{count} × {name}" if count > 1 else name for name, count in counted.items())

    @property
    def models(self) -> list[Segment]:
        """Return the parts of the bar that are models; one that is still loading has no length."""
        return [segment for segment in self.segments if segment.instance is not None]


def _card(node: Node) -> Card:
    return Card(node, list(_segments(node)))


def _segments(node: Node) -> Iterator[Segment]:
    whole = max(1, node.row.total_memory_bytes, node.used_bytes)
    start = 0.0
    parts: list[tuple[ModelInstance | None, int]] = [(instance, instance.memory_bytes or 0) for instance in node.instances]
    for number, (instance, size) in enumerate([*parts, (None, node.other_bytes)]):
        width = min(_BAR_UNITS * size / whole, _BAR_UNITS - start)
        yield Segment(instance, 0 if instance is None else 1 + number % COLOURS, round(start, 1), round(width, 1))
        start += width


@require_GET
def workers(request: HttpRequest) -> HttpResponse:
    """Show the whole page."""
    return render(request, "workers/page.html", {"list": _list_html(request), **_tokens(request)})


@require_GET
def node_list(request: HttpRequest) -> HttpResponse:
    """Return the cards alone; 204 when they are what the page shows already."""
    return unless_seen(request, _list_html(request))


def _list_html(request: HttpRequest) -> str:
    """Render the cards with a fingerprint of their content."""
    principal = principal_of(request)
    found = sorted(nodes.overview(principal), key=lambda node: (not node.is_alive, not node.row.is_local, node.row.name))
    context = {
        "cards": [_card(node) for node in found],
        "refusals": nodes.refusals(principal),
        "unplaced": nodes.waiting_without_node(principal),
        "alive": sum(node.is_alive for node in found),
    }
    cards = render_to_string("workers/cards.html", context, request)
    busy = any(node.running or node.queued or node.status == "draining" or _is_moving(node) for node in found)
    context = {"cards": cards, "seen": hashlib.sha256(cards.encode()).hexdigest()[:32], "busy": busy}
    return render_to_string("workers/list.html", context, request)


def _is_moving(node: Node) -> bool:
    return any(instance.status in {"loading", "unloading"} for instance in node.instances)


@require_POST
@shows_errors
def cordon(request: HttpRequest, name: str) -> HttpResponse:
    """Let a node load nothing new."""
    return _act(request, name, nodes.cordon)


@require_POST
@shows_errors
def uncordon(request: HttpRequest, name: str) -> HttpResponse:
    """Let a node do everything again."""
    return _act(request, name, nodes.uncordon)


@require_POST
@shows_errors
def drain(request: HttpRequest, name: str) -> HttpResponse:
    """Empty a node."""
    return _act(request, name, nodes.drain)


@require_POST
@shows_errors
def remove(request: HttpRequest, name: str) -> HttpResponse:
    """Take a node out."""
    return _act(request, name, nodes.remove)


@require_POST
@shows_errors
def dismiss(request: HttpRequest, name: str) -> HttpResponse:
    """Put the word about a refused machine away."""
    nodes.forget_refusal(principal=principal_of(request), name=name)
    return _changed(request)


def _act(request: HttpRequest, name: str, act: Callable[..., None]) -> HttpResponse:
    principal = principal_of(request)
    act(principal=principal, node=nodes.get(principal, name))
    return _changed(request)


def _changed(request: HttpRequest) -> HttpResponse:
    return trigger_client_event(HttpResponse(_list_html(request)), "clear-alerts")


# --- join tokens ------------------------------------------------------------------------------------------------------


def _tokens(request: HttpRequest, **more: Any) -> dict[str, Any]:
    found = nodes.join_tokens(principal_of(request))
    return {"tokens": sorted(found, key=lambda token: token.state != "active")[:50], "lifetimes": LIFETIMES, **more}


@require_POST
@never_cache
def create_token(request: HttpRequest) -> HttpResponse:
    """Make a join token. Its secret is in this one answer and nowhere else."""
    principal = principal_of(request)
    name, chosen = request.POST.get("name", ""), request.POST.get("expires", "")
    try:
        lifetime = parse_lifetime(chosen) if chosen else None
        token, secret = nodes.create_join_token(principal=principal, name=name, lifetime=lifetime)
    except InvalidRequest as error:
        typed = {"lifetimes": LIFETIMES, "problem": error.message, "name": name, "chosen": chosen}
        response = render(request, "workers/token-form.html", typed, status=422)
        response.headers["HX-Retarget"] = "#join-token-form"
        return response
    made = {"new_token": token, "secret": secret, "renew_form": True, "command": _command(secret), "is_external": _services_are_external()}
    return trigger_client_event(render(request, "workers/tokens.html", _tokens(request, **made)), "token-created", after="settle")


def _command(secret: str) -> str:
    """Return what to type on the other machine; the passwords of the services are not shown to browsers."""
    return f"LMWEB_NODE_TOKEN={secret} python3 manage.py worker"


def _services_are_external() -> bool:
    """Whether other machines can reach the database at all: the embedded one listens on a socket of this machine."""
    host = str(settings.DATABASES["default"]["HOST"])
    return bool(host) and not host.startswith("/")


@require_POST
@shows_errors
def revoke_token(request: HttpRequest, join_token_id: str) -> HttpResponse:
    """Let nobody join with this token any more."""
    nodes.revoke_join_token(principal=principal_of(request), token_id=join_token_id)
    return render(request, "workers/tokens.html", _tokens(request))


# --- runtimes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """An engine over all nodes. ``places`` are the nodes that have it, with version and devices; ``missing`` those that do not."""

    name: str
    formats: list[str]
    places: list[tuple[str, str, list[str]]]
    missing: list[str]
    install: str
    can: list[str]
    cannot: list[tuple[str, str]]


@require_GET
def runtimes(request: HttpRequest) -> HttpResponse:
    """Show the engines, what each supports, and which one each format takes."""
    principal = principal_of(request)
    require(principal, Action.MANAGE_WORKERS)
    found = [node for node in nodes.overview(principal) if node.is_alive]
    engines = _runtimes(found)
    chosen = sorted((format_, engine.name, bool(engine.places)) for engine in engines for format_ in engine.formats)
    return render(request, "workers/runtimes.html", {"runtimes": engines, "chosen": chosen, "several_nodes": len(found) > 1})


def _runtimes(found: list[Node]) -> list[Runtime]:
    """Join what the nodes say about their engines."""
    named: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for node in found:
        for engine in node.row.engines:
            named.setdefault(engine["name"], []).append((node.row.name, engine))
    return [_runtime(name, told) for name, told in sorted(named.items(), key=lambda each: (not _is_there(each[1]), each[0]))]


def _is_there(told: list[tuple[str, dict[str, Any]]]) -> bool:
    return any(engine.get("is_installed") for _, engine in told)


def _runtime(name: str, told: list[tuple[str, dict[str, Any]]]) -> Runtime:
    engine = next((engine for _, engine in told if engine.get("is_installed")), told[0][1])
    supports: dict[str, str] = engine.get("supports", {})
    known = [(LABELS[feature], supports[feature.value]) for feature in Feature if feature.value in supports]
    return Runtime(
        name=name,
        formats=engine.get("formats", []),
        places=[(node, each["version"], each.get("devices", [])) for node, each in told if each.get("is_installed")],
        missing=[node for node, each in told if not each.get("is_installed")],
        install=engine.get("install", ""),
        can=[label for label, reason in known if not reason],
        cannot=[(label, reason) for label, reason in known if reason],
    )
