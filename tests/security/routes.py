"""All routes of the server, found in its URL configuration, so that a new one cannot be forgotten."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.urls import URLPattern, URLResolver, get_resolver
from django.urls.resolvers import RoutePattern

SAMPLES: dict[str, Any] = {"int": 999_999, "uuid": uuid.UUID(int=1), "str": "x", "path": "x", "slug": "x"}


PARAMETER = re.compile(r"<(?:(\w+):)?(\w+)>")


@dataclass(frozen=True)
class Route:
    """One route, such as ``developer/tokens/<uuid:token_id>/revoke``."""

    template: str

    @property
    def parameters(self) -> set[str]:
        """The names of its parameters."""
        return {name for _, name in PARAMETER.findall(self.template)}

    def path(self, **values: Any) -> str:
        """Return an address: the given values, samples for the rest."""
        return "/" + PARAMETER.sub(lambda found: str(values.get(found[2], SAMPLES[found[1] or "str"])), self.template)


def routes(urlconf: str) -> list[Route]:
    """Return the routes of a URL configuration."""
    return list(_walk(get_resolver(urlconf).url_patterns, ""))


def _walk(patterns: list[Any], prefix: str) -> Iterator[Route]:
    for pattern in patterns:
        assert isinstance(pattern.pattern, RoutePattern), f"{pattern} is no plain route; teach this walk about it"
        template = prefix + str(pattern.pattern)
        if isinstance(pattern, URLResolver):
            yield from _walk(pattern.url_patterns, template)
        elif isinstance(pattern, URLPattern):
            yield Route(template)
