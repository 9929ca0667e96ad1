"""The routes of programs. They are apart from the pages' routes, so that no page can be reached without the pages' middleware."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.urls import include, path

from api.api import openai_api, openai_error, routes
from lmweb.errors import InvalidRequest, LmwebError, NotFound

urlpatterns = [path("v1/", include(routes(openai_api, openai_error)))]


def handler400(request: HttpRequest, exception: Exception) -> HttpResponse:
    """Answer what Django refuses before any route is chosen."""
    return openai_error(InvalidRequest("The request is malformed."))


def handler404(request: HttpRequest, exception: Exception) -> HttpResponse:
    """Answer for a path outside every dialect."""
    return openai_error(NotFound("There is no such route."))


def handler500(request: HttpRequest) -> HttpResponse:
    """Answer for an error outside every route."""
    return openai_error(LmwebError("Something went wrong on the server. The log has the details."))
