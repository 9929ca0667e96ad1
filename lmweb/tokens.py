"""Making and revoking tokens: the rules that pages and commands share."""

from __future__ import annotations

import re
import uuid
from datetime import datetime, timedelta
from typing import TypeVar

from django.db.models import QuerySet
from django.utils import timezone

from lmweb.errors import InvalidRequest, NotFound
from lmweb.models import ApiToken, BearerToken, Scope, User

T = TypeVar("T", bound=BearerToken)

MAX_LIFETIME = timedelta(days=3650)

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_lifetime(text: str) -> timedelta:
    """Return the duration of a text such as ``30d`` (units m, h, d, w). Raises ``InvalidRequest``."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})([mhdw])", text.strip())
    if not match:
        raise InvalidRequest(f"'{text[:20]}' is no duration. Write a number and a unit: 45m, 12h, 30d or 8w.", param="expires")
    lifetime = timedelta(**{_UNITS[match[2]]: int(match[1])})
    if lifetime > MAX_LIFETIME:
        raise InvalidRequest(
            f"A token lives {MAX_LIFETIME.days} days at most. Leave the expiry out for one that does not expire.", param="expires"
        )
    return lifetime


def create_token(*, user: User, name: str, scopes: list[str] | None = None, lifetime: timedelta | None = None) -> tuple[ApiToken, str]:
    """Create a token for a person and return it with its secret, which cannot be shown again. Raises ``InvalidRequest``."""
    name = check_name(name)
    if scopes is not None:
        unknown = sorted(set(scopes) - set(Scope.values))
        if unknown or not scopes:
            what = f"There is no scope '{unknown[0][:40]}'." if unknown else "A token without scopes is of no use."
            raise InvalidRequest(f"{what} Choose from: {', '.join(Scope.values)}.", param="scopes")
    if not user.is_active:
        raise InvalidRequest(f"The account '{user.get_username()}' is not active.", param="user")
    return ApiToken.issue(user=user, name=name, scopes=sorted(set(scopes)) if scopes else None, expires_at=expiry(lifetime))


def check_name(name: str) -> str:
    """Return what a token is to be called. Raises ``InvalidRequest``."""
    name = " ".join(name.replace("\x00", "").split())
    if not name:
        raise InvalidRequest("Give the token a name, so that you know later where it is used.", param="name")
    if len(name) > 100:
        raise InvalidRequest("The name of a token has 100 characters at most.", param="name")
    return name


def expiry(lifetime: timedelta | None) -> datetime | None:
    """Return when a token that is made now expires; None: never."""
    return timezone.now() + lifetime if lifetime else None


def revoke_token(token_id: str | uuid.UUID, *, owner: User | None = None) -> ApiToken:
    """Make a token useless from now on and return it; one that is revoked already stays as it is.

    ``owner`` limits it to one person's tokens. Raises ``NotFound``.
    """
    tokens = ApiToken.objects.select_related("user")
    return revoke(tokens.filter(user=owner) if owner is not None else tokens, token_id)


def revoke(tokens: QuerySet[T], token_id: str | uuid.UUID) -> T:
    """Make one of these tokens useless from now on and return it. Raises ``NotFound``."""
    try:
        token = tokens.filter(pk=uuid.UUID(str(token_id))).first()
    except ValueError:
        token = None
    if token is None:
        raise NotFound("There is no such token.")
    if token.revoked_at is None:
        token.revoked_at = timezone.now()
        token.save(update_fields=["revoked_at"])
    return token
