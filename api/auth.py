"""Who calls the API: always a token, never a cookie. Every dialect authenticates here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from django.http import HttpRequest

from api.feed import Begun
from lmweb.access import Principal, authenticate_token, recall_token
from lmweb.db import run_db
from lmweb.errors import LmwebError, NotAuthenticated

MAX_SECRET_LENGTH = 512

T = TypeVar("T")


def secret_of(request: HttpRequest) -> str:
    """Return the token that a request carries as ``Authorization: Bearer`` or ``x-api-key``; the first one wins if it has both.

    Raises ``NotAuthenticated`` if it carries none.
    """
    authorization = request.headers.get("Authorization", "").strip()
    if authorization:
        scheme, _, secret = authorization.partition(" ")
        secret = secret.strip() if scheme.lower() == "bearer" else ""
    else:
        secret = request.headers.get("X-Api-Key", "").strip()
    if not secret or len(secret) > MAX_SECRET_LENGTH:
        raise NotAuthenticated("Send an API token in the header 'Authorization: Bearer sk-lm-...'. Create one in Developer, API tokens.")
    return secret


async def authenticate(request: HttpRequest) -> Principal:
    """Return the principal of a request. Raises ``NotAuthenticated``. The default of every route: an API without it is refused."""
    return await run_db(authenticate_token, secret_of(request))


async def carries_secret(request: HttpRequest) -> bool:
    """Refuse a request without a token, and leave its check to the route, which does it in the same visit to the database as its work.

    Raises ``NotAuthenticated``.
    """
    return bool(secret_of(request))


def principal_of(request: HttpRequest) -> Principal:
    """Return who was authenticated for this request."""
    return cast("Principal", request.auth)  # type: ignore[attr-defined]


def begin(request: HttpRequest, start: Callable[[Principal], Begun[T]]) -> Begun[T]:
    """Authenticate a request and start its generation. Raises ``NotAuthenticated``, and what ``start`` raises.

    Who used a token lately, and which model was asked for, is known here. A generation is begun with that, and its row is stored
    only if both are still as they were, which saves two round trips before the first token. Whatever goes wrong on that short way,
    even an error that has other causes, the request is authenticated anew and begun again.
    """
    secret = secret_of(request)
    if (remembered := recall_token(secret)) is not None:
        try:
            return start(remembered)
        except LmwebError:
            pass
    return start(authenticate_token(secret))
