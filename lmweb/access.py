"""All permission rules. Every door (session, bearer token, websocket verb, command) decides through this module.

Two questions, two answers: ``require`` says whether a principal may do a kind of thing at all; which *objects* they may do
it to is decided by the querysets (``visible_to``) that are the only way to fetch one. What a principal may not see is "not
found", never "forbidden".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from django.utils import timezone

from lmweb.db import Lookup, Memory, Version, field_names, mark_of
from lmweb.errors import NotAuthenticated, PermissionDenied
from lmweb.models import ApiToken, Role, Scope, User


class Action(StrEnum):
    """What somebody can want to do."""

    GENERATE = "generate"
    READ_MODELS = "read_models"
    LOAD_MODELS = "load_models"
    IMPORT_MODELS = "import_models"
    IMPORT_FROM_SERVER = "import_from_server"
    DELETE_MODELS = "delete_models"
    DOWNLOAD_MODELS = "download_models"
    REQUEST_DOWNLOADS = "request_downloads"
    DECIDE_REQUESTS = "decide_requests"
    CHANGE_TEMPLATES = "change_templates"
    CHANGE_DEFAULTS = "change_defaults"
    MANAGE_PEOPLE = "manage_people"
    MANAGE_WORKERS = "manage_workers"


_MEMBER = {Action.GENERATE, Action.READ_MODELS, Action.LOAD_MODELS, Action.IMPORT_MODELS, Action.REQUEST_DOWNLOADS}
ROLE_ACTIONS: dict[str, set[Action]] = {
    Role.VIEWER: {Action.READ_MODELS},
    Role.MEMBER: _MEMBER,
    Role.ADMIN: set(Action),
}
SCOPE_ACTIONS: dict[str, set[Action]] = {
    Scope.INFERENCE: {Action.GENERATE},
    Scope.MODELS_READ: {Action.READ_MODELS},
    Scope.MODELS_MANAGE: {
        Action.READ_MODELS,
        Action.LOAD_MODELS,
        Action.IMPORT_MODELS,
        Action.IMPORT_FROM_SERVER,
        Action.DELETE_MODELS,
        Action.DOWNLOAD_MODELS,
        Action.REQUEST_DOWNLOADS,
        Action.DECIDE_REQUESTS,
        Action.CHANGE_TEMPLATES,
        Action.CHANGE_DEFAULTS,
    },
}


@dataclass(frozen=True)
class Principal:
    """Who asks: a person, through a session or through one of their tokens.

    ``unread`` is empty unless this was remembered (``recall_token``): then whatever is done must be proved with it.
    """

    user: User
    token: ApiToken | None = None
    unread: tuple[Version, ...] = ()

    def may(self, action: Action) -> bool:
        """Return whether this principal may do ``action`` to objects that they can see."""
        if not self.user.is_active:
            return False
        role = Role.ADMIN if self.user.is_admin else self.user.role
        actions = ROLE_ACTIONS.get(role, set())
        if role == Role.MEMBER and self.user.may_download:
            actions = actions | {Action.DOWNLOAD_MODELS}
        if action not in actions:
            return False
        return self.token is None or any(action in SCOPE_ACTIONS.get(scope, set()) for scope in self.token.scopes)


def require(principal: Principal, action: Action) -> None:
    """Raise ``PermissionDenied`` unless the principal may do ``action``."""
    if not principal.may(action):
        whom = "this token" if principal.token else "your account"
        raise PermissionDenied(f"The permission '{action.value}' is missing from {whom}. Ask an admin for it.")


_TOKEN_FIELDS = field_names(ApiToken)
_USER_FIELDS = field_names(User)
_by_digest = Lookup(
    lambda digest: ApiToken.objects.filter(digest=digest).values_list(
        mark_of(ApiToken), mark_of(User), *_TOKEN_FIELDS, *(f"user__{name}" for name in _USER_FIELDS)
    )
)
_recent: Memory[Principal] = Memory()

#: How exactly ``last_used_at`` is kept.
LAST_USED_SECONDS = 60


def _find_token(digest: str) -> tuple[ApiToken, tuple[Version, ...]] | None:
    """Return the token with its person in ``user``, and the versions of both."""
    row = _by_digest(digest)
    if row is None:
        return None
    token_mark, user_mark, *values = row
    token = ApiToken.from_db("default", _TOKEN_FIELDS, values[: len(_TOKEN_FIELDS)])
    token.user = User.from_db("default", _USER_FIELDS, values[len(_TOKEN_FIELDS) :])
    return token, (Version.of(token, token_mark), Version.of(token.user, user_mark))


def authenticate_token(secret: str) -> Principal:
    """Return the principal of a bearer token. Raises ``NotAuthenticated`` if it is unknown, expired or revoked."""
    digest = ApiToken.hash(secret)
    found = _find_token(digest)
    if found is None or not found[0].user.is_active:
        raise NotAuthenticated("The API token is not valid. Create one in Developer, API tokens.")
    token, versions = found
    if not token.is_valid:
        raise NotAuthenticated(f"The API token '{token.name}' has {'been revoked' if token.revoked_at else 'expired'}.")
    principal = Principal(token.user, token)
    if _was_used_lately(token):
        _recent[digest] = replace(principal, unread=versions)
    else:
        ApiToken.objects.filter(pk=token.pk).update(last_used_at=timezone.now())
    return principal


def recall_token(secret: str) -> Principal | None:
    """Return who this token stood for when it was read last, without reading it: nothing may be shown or done before it is proved.

    That is ``lmweb.db.insert(unless_changed=principal.unread)``, in the same round trip as the work itself. ``api.auth.begin`` is the
    only caller.
    """
    principal = _recent.get(ApiToken.hash(secret))
    if principal is None or principal.token is None or not principal.token.is_valid or not _was_used_lately(principal.token):
        return None
    return principal


def _was_used_lately(token: ApiToken) -> bool:
    return token.last_used_at is not None and (timezone.now() - token.last_used_at).total_seconds() <= LAST_USED_SECONDS
