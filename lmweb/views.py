"""Account pages, and how every failure of a page looks."""

from __future__ import annotations

import logging
import sys
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.contrib.auth import login, views as auth_views
from django.contrib.auth.decorators import login_not_required
from django.contrib.auth.forms import AuthenticationForm
from django.db import DatabaseError, InterfaceError, OperationalError
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.urls import reverse_lazy
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import requires_csrf_token
from django.views.decorators.http import require_http_methods
from redis.exceptions import RedisError

from lmweb import setup
from lmweb.errors import InvalidRequest, LmwebError, NotFound, PermissionDenied, ServiceUnavailable
from lmweb.forms import SetupForm

logger = logging.getLogger(__name__)

#: Paths of the APIs: no cookies, and errors as JSON even where no view was found.
API_PREFIXES = ("/v1/", "/api/")

TITLES = {
    400: "That request was not understood",
    401: "Please sign in",
    403: "You may not do this",
    404: "Nothing here",
    409: "That is not possible right now",
    413: "Too large",
    429: "Too many tries",
    500: "Something went wrong on the server",
    503: "A part of the server is not reachable",
}


def error_response(request: HttpRequest, error: LmwebError) -> HttpResponse:
    """Render an error: a part for htmx, JSON for API paths and scripts, else a page."""
    if request.path.startswith(API_PREFIXES) or request.headers.get("Accept", "").startswith("application/json"):
        body = {"message": error.message, "type": "invalid_request_error", "param": error.param, "code": error.code}
        return JsonResponse({"error": body}, status=error.status)
    context = {"error": error, "title": TITLES.get(error.status, TITLES[500])}
    template = "errors/part.html" if request.headers.get("HX-Request") else "errors/page.html"
    response = render(request, template, context, status=error.status)
    if isinstance(error, ServiceUnavailable):
        response.headers["Retry-After"] = "5"
    return response


@login_not_required
def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    """Answer for an address that leads nowhere."""
    return error_response(request, NotFound("There is no such page, or it is not yours to see."))


@login_not_required
def forbidden(request: HttpRequest, exception: Exception) -> HttpResponse:
    """Answer for Django's own refusals."""
    return error_response(request, PermissionDenied("Your account may not do this. Ask an admin."))


@login_not_required
def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    """Answer for requests that Django cannot parse."""
    return error_response(request, InvalidRequest("The server could not read this request."))


@login_not_required
@requires_csrf_token
def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    """Answer for a form without a valid token: mostly a page that was open while somebody signed in or out."""
    message = "This page is older than your sign-in. Go back, reload it and send the form again; cookies must be allowed."
    return error_response(request, PermissionDenied(message))


@login_not_required
def server_error(request: HttpRequest) -> HttpResponse:
    """Answer for everything unforeseen. Uses no database, which may be the very thing that failed."""
    cause = sys.exc_info()[1]
    if isinstance(cause, OperationalError | InterfaceError | RedisError):
        return error_response(request, ServiceUnavailable("The database or the message store is restarting. Try again in a few seconds."))
    return error_response(request, LmwebError("The details are in the server's log. Nothing that was saved is lost."))


def _admin_exists() -> bool:
    """Return whether the installation is set up; yes while the database is away, so that sign-in still shows its form."""
    try:
        return setup.admin_exists()
    except DatabaseError:
        return True


class SignInView(auth_views.LoginView):
    """Sign in; before the first admin exists, say where the set-up link is."""

    template_name = "account/sign-in.html"
    redirect_authenticated_user = True

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        """Tell the page whether anybody can sign in yet."""
        return super().get_context_data(admin_exists=_admin_exists(), **kwargs)


def locked_out(request: HttpRequest, *_: Any) -> HttpResponse:
    """Show the sign-in page with the reason, after too many wrong passwords (called by axes)."""
    minutes = round(settings.AXES_COOLOFF_TIME * 60)
    context = {
        "form": AuthenticationForm(request, initial={"username": request.POST.get("username", "")}),
        "locked_minutes": minutes,
        "admin_exists": True,
    }
    return render(request, "account/sign-in.html", context, status=429)


@login_not_required
@never_cache
@require_http_methods(["GET", "POST"])
def set_up(request: HttpRequest, secret: str) -> HttpResponseBase:
    """Make the first admin through the one-time link, and sign in."""
    setup.check_setup_token(secret)
    form = SetupForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        user = setup.create_first_admin(secret, username=form.cleaned_data["username"], password=form.cleaned_data["password"])
        login(request, user, backend="django.contrib.auth.backends.ModelBackend")
        return redirect("chat")
    return render(request, "account/set-up.html", {"form": form}, status=422 if form.errors else 200)


class PasswordView(auth_views.PasswordChangeView):
    """Change one's own password; other browsers of this person are signed out by it."""

    template_name = "account/password.html"
    success_url = reverse_lazy("password")

    def form_valid(self, form: Any) -> HttpResponse:
        """Say that it worked on the page that is shown next."""
        messages.success(self.request, "Your password is changed. Other browsers have been signed out.")
        return super().form_valid(form)
