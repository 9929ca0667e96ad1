"""The routes of programs. They are apart from the pages' routes, so that no page can be reached without the pages' middleware."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.urls import include, path

from api.api import openai_api, openai_error, rest_v1_api, rest_v1_error, routes
from lmweb.errors import InvalidRequest, LmwebError, NotFound

urlpatterns = [
    path("v1/", include(routes(openai_api, openai_error))),
    path("api/v1/", include(routes(rest_v1_api, rest_v1_error))),
]


def _error(request: HttpRequest, error: LmwebError) -> HttpResponse:
    render = rest_v1_error if request.path.startswith("/api") else openai_error
    return render(error)


def handler400(request: HttpRequest, exception: Exception) -> HttpResponse:
    """Answer what Django refuses before any route is chosen."""
    return _error(request, InvalidRequest("The request is malformed."))


def handler404(request: HttpRequest, exception: Exception) -> HttpResponse:
    """Answer for a path outside every dialect."""
    return _error(request, NotFound("There is no such route."))


def handler500(request: HttpRequest) -> HttpResponse:
    """Answer for an error outside every route."""
    return _error(request, LmwebError("Something went wrong on the server. The log has the details."))
