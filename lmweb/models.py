"""Identity: people, and the API tokens that act for them."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from datetime import datetime
from typing import Any, ClassVar

from django.contrib.auth.models import AbstractUser, UserManager as DjangoUserManager
from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.utils import timezone

TOKEN_PREFIX = "sk-lm-"


class Role(models.TextChoices):
    """What a person may do in general; ``lmweb.access`` holds the rules."""

    ADMIN = "admin", "Admin"
    MEMBER = "member", "Member"
    VIEWER = "viewer", "Viewer"


class UserManager(DjangoUserManager["User"]):
    """Makes a superuser an admin."""

    def create_superuser(self, username: str, email: str | None = None, password: str | None = None, **extra: Any) -> User:
        """Create an admin, also from ``manage.py createsuperuser``."""
        extra["role"] = Role.ADMIN
        return super().create_superuser(username, email, password, **extra)


class User(AbstractUser):
    """A person of the team."""

    role = models.CharField(max_length=16, choices=Role.choices, default=Role.MEMBER)
    may_download = models.BooleanField(default=False, help_text="Of a member: downloads models without asking. Admins always may.")

    running_limit = models.PositiveIntegerField(
        null=True, blank=True, help_text="Answers at once; empty: LMWEB_USER_RUNNING_LIMIT, 0: any number."
    )
    waiting_limit = models.PositiveIntegerField(
        null=True, blank=True, help_text="Requests that may wait beside them; empty: LMWEB_USER_WAITING_LIMIT, 0: any number."
    )

    objects: ClassVar[UserManager] = UserManager()

    @property
    def is_admin(self) -> bool:
        """Whether this person manages people, tokens and permissions."""
        return self.is_active and (self.role == Role.ADMIN or self.is_superuser)


class Scope(models.TextChoices):
    """What a token may be used for; never more than its owner may."""

    INFERENCE = "inference", "Generate text and embeddings"
    MODELS_READ = "models:read", "List models"
    MODELS_MANAGE = "models:manage", "Load, unload, import, download and delete models"


def default_scopes() -> list[str]:
    """Return the scopes of a token that names none."""
    return [Scope.INFERENCE, Scope.MODELS_READ]


class BearerToken(models.Model):
    """A secret that somebody carries. Only its SHA-256 is stored: 190 random bits cannot be found by guessing."""

    PREFIX: ClassVar[str]

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    name = models.CharField(max_length=100)
    hint = models.CharField(max_length=16, help_text="The first characters, to tell tokens apart.")
    digest = models.CharField(max_length=64, unique=True)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        abstract = True
        ordering: ClassVar[list[str]] = ["-created_at"]

    def __str__(self) -> str:
        return f"{self.name} ({self.hint}…)"

    @property
    def is_valid(self) -> bool:
        """Whether it is neither expired nor revoked."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > timezone.now())

    @property
    def state(self) -> str:
        """Return ``active``, ``expired`` or ``revoked``."""
        if self.revoked_at is not None:
            return "revoked"
        return "active" if self.is_valid else "expired"

    @staticmethod
    def hash(secret: str) -> str:
        """Return the stored form of a token."""
        return hashlib.sha256(secret.encode()).hexdigest()

    @classmethod
    def new_secret(cls) -> str:
        """Return a secret that nobody has."""
        return f"{cls.PREFIX}{secrets.token_urlsafe(24)}"


class ApiToken(BearerToken):
    """What a program shows to act for a person."""

    PREFIX = TOKEN_PREFIX

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="api_tokens")
    scopes = ArrayField(models.CharField(max_length=32, choices=Scope.choices), default=default_scopes)

    @classmethod
    def issue(cls, *, user: User, name: str, scopes: list[str] | None = None, expires_at: datetime | None = None) -> tuple[ApiToken, str]:
        """Create a token and return it with its secret, which is not stored and cannot be shown again."""
        secret = cls.new_secret()
        token = cls.objects.create(
            user=user, name=name, hint=secret[:10], digest=cls.hash(secret), scopes=scopes or default_scopes(), expires_at=expires_at
        )
        return token, secret


class SetupToken(models.Model):
    """The one-time link that makes the first admin. Only its SHA-256 is stored; issuing a new one replaces the old."""

    digest = models.CharField(max_length=64, unique=True)
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return "set-up link"
