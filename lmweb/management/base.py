"""What our commands share: every expected failure is one clear line and exit status 1."""

from __future__ import annotations

import argparse
from typing import Any

import redis
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import connection
from django.db.utils import OperationalError, ProgrammingError

from lmweb.errors import LmwebError


class PlainCommand(BaseCommand):
    """A command with subcommands. A subclass names its parsers' functions with ``set_defaults(run=...)``."""

    requires_system_checks: list[str] = []  # noqa: RUF012  (as the base class declares it)

    def handle(self, *args: Any, **options: Any) -> None:
        """Run the chosen subcommand."""
        try:
            options["run"](options)
        except LmwebError as error:
            raise CommandError(error.message) from None
        except OperationalError:
            raise CommandError("The database cannot be reached. Start the server first: python3 manage.py up") from None
        except ProgrammingError:
            raise CommandError("The database has no tables yet. Start the server first: python3 manage.py up") from None

    def subcommands(self, parser: argparse.ArgumentParser) -> Any:
        """Return where to add subcommands."""
        return parser.add_subparsers(title="subcommands", dest="subcommand", required=True, metavar="SUBCOMMAND")


def reach_services() -> None:
    """Raise ``CommandError``, in the service's own words, unless database and Redis answer."""
    try:
        connection.ensure_connection()
    except OperationalError as error:
        raise CommandError(f"The database cannot be reached: {error}") from error
    try:
        redis.Redis.from_url(settings.REDIS_URL, socket_timeout=10, socket_connect_timeout=10).ping()
    except (redis.RedisError, OSError) as error:
        raise CommandError(f"Redis cannot be reached: {error}") from error
