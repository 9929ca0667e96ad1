"""Security headers, and the one place where pages turn an ``LmwebError`` into a response.

Works in both modes without touching the body, so that answers of the API stream through it unbuffered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import resolve_url
from django_htmx.http import HttpResponseClientRedirect

from lmweb.errors import LmwebError
from lmweb.views import API_PREFIXES, error_response

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; object-src 'none'"
    ),
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=(), browsing-topics=()",
}


class PageMiddleware:
    """Outermost: headers on everything, no cookies on API paths, sign-in redirects that htmx understands."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        """Pass the request on and finish its response."""
        response = self.get_response(request)
        if isinstance(response, HttpResponseBase):
            return finish(request, response)
        return self._finish_later(request, response)

    async def _finish_later(self, request: HttpRequest, response: Awaitable[HttpResponseBase]) -> HttpResponseBase:
        return finish(request, await response)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Render the project's own errors; anything else is Django's to report."""
        return error_response(request, exception) if isinstance(exception, LmwebError) else None


def finish(request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
    """Add what every response carries."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    if request.path.startswith(API_PREFIXES):
        response.cookies.clear()
    elif response.headers.get("Content-Type", "").startswith("text/html"):
        response.headers.setdefault("Cache-Control", "private, no-cache")
    if response.status_code == 302 and request.headers.get("HX-Request") and _leads_to_sign_in(response):
        return HttpResponseClientRedirect(resolve_url(settings.LOGIN_URL))
    return response


def _leads_to_sign_in(response: HttpResponseBase) -> bool:
    return response.headers.get("Location", "").startswith(resolve_url(settings.LOGIN_URL))
