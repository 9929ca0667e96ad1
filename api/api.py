"""The HTTP APIs for programs. One ``NinjaAPI`` per dialect, because each renders errors in its own format."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

from django.core.exceptions import RequestDataTooBig
from django.db.utils import InterfaceError, OperationalError
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.http.response import HttpResponseBase
from django.urls import URLPattern
from ninja import NinjaAPI, Router
from ninja.errors import AuthenticationError, HttpError, ValidationError

from api.auth import authenticate
from api.body import json_response
from api.openai import routes as openai_routes
from api.openai.translate import error_response
from api.rest_v1 import routes as rest_v1_routes
from api.rest_v1.translate import error_response as rest_v1_error_response
from lmweb.errors import InvalidRequest, LmwebError, NotAuthenticated, NotFound, PayloadTooLarge, ServiceUnavailable

logger = logging.getLogger(__name__)

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

Render = Callable[[LmwebError], HttpResponse]


class MethodNotAllowed(InvalidRequest):
    """The route exists, with another method."""

    code: ClassVar[str] = "method_not_allowed"
    status: ClassVar[int] = 405


def as_lmweb_error(error: Exception) -> LmwebError:
    """Return the error that a client is told for any exception that left a route. Unforeseen ones are logged, not shown."""
    match error:
        case LmwebError():
            return error
        case AuthenticationError():
            return NotAuthenticated("The API token is not valid.")
        case Http404():
            return NotFound("There is no such route.")
        case RequestDataTooBig():
            return PayloadTooLarge("The request body is too large.")
        case ValidationError():
            return InvalidRequest("The request is malformed.")
        case HttpError(status_code=status) if status < 500:
            return InvalidRequest(error.message)
        case OperationalError() | InterfaceError():
            logger.warning("the database is away: %s", type(error).__name__)
            return ServiceUnavailable("The database cannot be reached right now. Please try again in a moment.")
    logger.error("unforeseen error in an API route", exc_info=error)
    return LmwebError("Something went wrong on the server. The log has the details.")


def openai_error(error: LmwebError) -> HttpResponse:
    """Return an error as OpenAI's clients expect it."""
    return _error(json_response(error_response(error), status=error.status), error)


def rest_v1_error(error: LmwebError) -> HttpResponse:
    """Return an error as clients of REST v1 expect it."""
    return _error(json_response(rest_v1_error_response(error), status=error.status), error)


def _error(response: HttpResponse, error: LmwebError) -> HttpResponse:
    """Add the headers that tell clients what to do about an error."""
    if error.status == 401:
        response["WWW-Authenticate"] = "Bearer"
    if error.retryable:
        response["Retry-After"] = str(error.retry_after_seconds)
    return response


def build_api(name: str, router: Router, render: Render) -> NinjaAPI:
    """Return the API of one dialect: every route needs a token, every error has the dialect's format."""
    api = NinjaAPI(title=name, urls_namespace=name, auth=authenticate, openapi_url=None, docs_url=None)
    router.api_operation(list(METHODS), "/{path:unknown}")(_not_found)
    api.add_router("", router)

    def handle(request: HttpRequest, error: Any) -> HttpResponse:
        return render(as_lmweb_error(error))

    for kind in (LmwebError, AuthenticationError, ValidationError, HttpError, Http404, Exception):
        api.add_exception_handler(kind, handle)
    return api


async def _not_found(request: HttpRequest, unknown: str) -> None:
    raise NotFound(f"There is no route {request.method} {request.path[:200]}.")


def routes(api: NinjaAPI, render: Render) -> list[URLPattern]:
    """Return the API's routes; each answers a wrong method in the dialect's format too."""
    found: list[URLPattern] = []
    for pattern in api.urls[0]:
        if isinstance(pattern, URLPattern) and pattern.name != "api-root":
            pattern.callback = _with_rendered_405(pattern.callback, render)
            found.append(pattern)
    return found


def _with_rendered_405(view: Callable[..., Awaitable[HttpResponseBase]], render: Render) -> Callable[..., Awaitable[HttpResponseBase]]:
    async def rendered(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        response = await view(request, *args, **kwargs)
        if not isinstance(response, HttpResponseNotAllowed):
            return response
        refusal = render(MethodNotAllowed(f"{request.method} is not allowed on this route."))
        refusal["Allow"] = response["Allow"]
        return refusal

    return rendered


openai_api = build_api("openai", openai_routes.router, openai_error)
rest_v1_api = build_api("rest_v1", rest_v1_routes.router, rest_v1_error)
