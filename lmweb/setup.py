"""The first minute of an installation: a one-time link that makes the first admin."""

from __future__ import annotations

import hashlib
import secrets

from django.contrib.auth.password_validation import validate_password
from django.db import transaction

from lmweb.errors import NotFound
from lmweb.models import Role, SetupToken, User


def admin_exists() -> bool:
    """Return whether anybody administers this installation yet; until then it listens on loopback only."""
    return User.objects.filter(is_active=True, role=Role.ADMIN).exists()


def issue_setup_token() -> str:
    """Replace the set-up link and return its secret. Only of use while no admin exists."""
    secret = secrets.token_urlsafe(24)
    with transaction.atomic():
        SetupToken.objects.all().delete()
        SetupToken.objects.create(digest=_digest(secret))
    return secret


def check_setup_token(secret: str) -> None:
    """Raise ``NotFound`` unless this is the present set-up link and no admin exists."""
    if admin_exists() or not SetupToken.objects.filter(digest=_digest(secret)).exists():
        raise NotFound("This set-up link is not valid any more. The server prints a new one when it starts without an admin.")


def create_first_admin(secret: str, *, username: str, password: str) -> User:
    """Use up the set-up link. Raises ``NotFound`` for a wrong link and Django's ``ValidationError`` for a weak password."""
    with transaction.atomic():
        list(SetupToken.objects.select_for_update())  # two browsers on one link: the second one finds an admin
        check_setup_token(secret)
        user = User(username=username)
        validate_password(password, user)
        user = User.objects.create_superuser(username, password=password)
        SetupToken.objects.all().delete()
    return user


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
