"""``manage.py user``: accounts from the command line."""

from __future__ import annotations

import getpass
import json
import sys
from typing import Any

from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser

from lmweb.errors import InvalidRequest, NotFound
from lmweb.management.base import PlainCommand
from lmweb.models import Role, User

MAX_PASSWORD_LENGTH = 4096
MAX_LIMIT = 1_000_000


class Command(PlainCommand):
    """Create and list accounts, and limit what each may have running."""

    help = "Create and list accounts, and limit what each may have running."

    def add_arguments(self, parser: CommandParser) -> None:
        """Define the subcommands."""
        subcommands = self.subcommands(parser)
        create = subcommands.add_parser("create", help="create an account; asks for its password")
        create.add_argument("name", metavar="NAME", help="the name to sign in with")
        create.add_argument("--role", choices=Role.values, default=Role.MEMBER.value, help="what the person may do (default: member)")
        create.add_argument("--password-stdin", action="store_true", help="read the password from the first line of standard input")
        create.set_defaults(run=self.create)
        downloads = subcommands.add_parser("downloads", help="let a member download models without asking, or not any more")
        downloads.add_argument("name", metavar="NAME", help="whose account")
        downloads.add_argument("allowed", choices=["yes", "no"], help="whether downloads need no request")
        downloads.set_defaults(run=self.downloads)
        listing = subcommands.add_parser("list", help="list accounts")
        listing.set_defaults(run=self.list)
        limits = subcommands.add_parser("limits", help="set how many answers a person may have running and waiting")
        limits.add_argument("name", metavar="NAME", help="whose")
        for kind in ("running", "waiting"):
            limits.add_argument(f"--{kind}", metavar="N", help=f"how many may be {kind}; 0: any number; 'default': the installation's")
        limits.set_defaults(run=self.limits)
        for subcommand in (create, downloads, listing, limits):
            subcommand.add_argument("--json", action="store_true", help="print JSON")

    def create(self, options: dict[str, Any]) -> None:
        """Create an account."""
        user = User(username=options["name"], role=options["role"])
        try:
            user.full_clean(exclude=["password"])
            password = _password_from_stdin() if options["password_stdin"] else _ask_for_password()
            validate_password(password, user)
        except ValidationError as error:
            raise InvalidRequest(" ".join(error.messages)) from None
        user.set_password(password)
        user.save()
        self._say(options, user, f"Created the account '{user.get_username()}' ({user.get_role_display()}).")

    def limits(self, options: dict[str, Any]) -> None:
        """Set a person's limits, or show them."""
        user = _account(options["name"])
        if options["running"] is not None:
            user.running_limit = _limit(options["running"])
        if options["waiting"] is not None:
            user.waiting_limit = _limit(options["waiting"])
        user.save(update_fields=["running_limit", "waiting_limit"])
        shown = [
            f"{kind} {'default' if limit is None else limit or 'any number'}"
            for kind, limit in (("running", user.running_limit), ("waiting", user.waiting_limit))
        ]
        self._say(options, user, f"{user.get_username()}: {', '.join(shown)}.")

    def downloads(self, options: dict[str, Any]) -> None:
        """Give or take the right to download models."""
        user = _account(options["name"])
        user.may_download = options["allowed"] == "yes"
        user.save(update_fields=["may_download"])
        words = "downloads models without asking" if user.may_download else "asks before downloads"
        self._say(options, user, f"{user.get_username()} {words} now.")

    def list(self, options: dict[str, Any]) -> None:
        """List accounts."""
        people = [_person(user) for user in User.objects.order_by("username")]
        if options["json"]:
            self.stdout.write(json.dumps(people))
            return
        for person in people:
            self.stdout.write(f"{person['role']:<8}  {person['name']}{'' if person['active'] else '  (not active)'}")
        if not people:
            self.stdout.write("There are no accounts. The server prints a set-up link when it starts without an admin.")

    def _say(self, options: dict[str, Any], user: User, words: str) -> None:
        """Say what has happened to an account, in words or for programs."""
        self.stdout.write(json.dumps(_person(user)) if options["json"] else words)


def _account(name: str) -> User:
    user = User.objects.filter(username=name).first()
    if user is None:
        raise NotFound(f"There is no account '{name}'.")
    return user


def _person(user: User) -> dict[str, Any]:
    return {
        "name": user.get_username(),
        "role": str(user.role),
        "active": user.is_active,
        "may_download": user.may_download,
        "running_limit": user.running_limit,
        "waiting_limit": user.waiting_limit,
    }


def _limit(text: str) -> int | None:
    if text == "default":
        return None
    if not text.isdecimal() or int(text) > MAX_LIMIT:
        raise InvalidRequest(f"A limit is a whole number up to {MAX_LIMIT}, or 'default', not '{text}'.")
    return int(text)


def _password_from_stdin() -> str:
    return sys.stdin.readline(MAX_PASSWORD_LENGTH + 1).rstrip("\r\n")


def _ask_for_password() -> str:
    if not sys.stdin.isatty():
        raise InvalidRequest("There is no terminal to ask for the password. Use --password-stdin.")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Password again: ") != password:
        raise InvalidRequest("The passwords differ. Nothing was created.")
    return password
