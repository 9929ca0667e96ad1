"""``manage.py token``: API tokens from the command line, for everybody's account."""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import CommandParser

from lmweb.errors import NotFound
from lmweb.management.base import PlainCommand
from lmweb.models import ApiToken, Scope, User, default_scopes
from lmweb.tokens import create_token, parse_lifetime, revoke_token


class Command(PlainCommand):
    """Create, list and revoke API tokens."""

    help = "Create, list and revoke API tokens."

    def add_arguments(self, parser: CommandParser) -> None:
        """Define the subcommands."""
        subcommands = self.subcommands(parser)
        create = subcommands.add_parser("create", help="create a token and print its secret once")
        create.add_argument("--user", required=True, metavar="NAME", help="whose token it is")
        create.add_argument("--name", required=True, metavar="LABEL", help="what it is for")
        create.add_argument(
            "--scope",
            action="append",
            metavar="SCOPE",
            help=f"what it may do, more than once for several: {', '.join(Scope.values)} (default: {', '.join(default_scopes())})",
        )
        create.add_argument("--expires", metavar="30d", help="how long it lives, such as 12h, 30d or 8w (default: it does not expire)")
        create.add_argument("--json", action="store_true", help="print JSON instead of the bare secret")
        create.set_defaults(run=self.create)
        listing = subcommands.add_parser("list", help="list tokens, without their secrets")
        listing.add_argument("--user", metavar="NAME", help="only this person's")
        listing.add_argument("--json", action="store_true", help="print JSON")
        listing.set_defaults(run=self.list)
        revoke = subcommands.add_parser("revoke", help="make a token useless from now on")
        revoke.add_argument("id", metavar="ID", help="the token's id, as 'token list' shows it")
        revoke.add_argument("--json", action="store_true", help="print JSON")
        revoke.set_defaults(run=self.revoke)

    def create(self, options: dict[str, Any]) -> None:
        """Create a token."""
        lifetime = parse_lifetime(options["expires"]) if options["expires"] else None
        token, secret = create_token(user=_user(options["user"]), name=options["name"], scopes=options["scope"], lifetime=lifetime)
        if options["json"]:
            self.stdout.write(json.dumps(_description(token) | {"token": secret}))
            return
        self.stdout.write(secret)
        if self.stdout.isatty():
            self.stderr.write("Copy it now: it is not stored and cannot be shown again.")

    def list(self, options: dict[str, Any]) -> None:
        """List tokens."""
        tokens = ApiToken.objects.select_related("user")
        if options["user"]:
            tokens = tokens.filter(user=_user(options["user"]))
        if options["json"]:
            self.stdout.write(json.dumps([_description(token) for token in tokens]))
            return
        for token in tokens:
            about = _description(token)
            self.stdout.write(f"{about['id']}  {about['hint']}…  {about['state']:<8}  {about['user']:<16}  {about['name']}")
        if not tokens:
            self.stdout.write("There are no tokens.")

    def revoke(self, options: dict[str, Any]) -> None:
        """Revoke a token."""
        token = revoke_token(options["id"])
        if options["json"]:
            self.stdout.write(json.dumps(_description(token)))
            return
        self.stdout.write(f"The token '{token.name}' of {token.user.get_username()} is revoked.")


def _user(name: str) -> User:
    user = User.objects.filter(username=name).first() if "\x00" not in name else None
    if user is None:
        raise NotFound(f"There is no person named '{name[:150]}'.")
    return user


def _description(token: ApiToken) -> dict[str, Any]:
    """Return what may be told about a token."""
    return {
        "id": str(token.id),
        "user": token.user.get_username(),
        "name": token.name,
        "hint": token.hint,
        "scopes": token.scopes,
        "state": token.state,
        "created_at": token.created_at.isoformat(),
        "expires_at": token.expires_at.isoformat() if token.expires_at else None,
        "last_used_at": token.last_used_at.isoformat() if token.last_used_at else None,
    }
