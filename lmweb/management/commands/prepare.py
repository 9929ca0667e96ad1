"""Bring the database, the static files and the starter model to the state that this release needs."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError
from django.db import OperationalError, connection
from django.db.migrations.executor import MigrationExecutor
from django.urls import reverse

from lmweb import __version__, setup
from workers.models import Installation

#: Any fixed number: several web servers that start at once prepare the database one after the other.
_LOCK = 0x6C6D776562


class Command(BaseCommand):
    """Run by ``manage.py up`` and by the web container before they serve."""

    help = "Migrate the database, collect static files, install the starter model, issue the set-up link."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add ``--check`` and ``--base-url``."""
        parser.add_argument("--check", action="store_true", help="change nothing; fail unless database and Redis are reachable and current")
        parser.add_argument("--base-url", default="", help="put in front of the set-up link")

    def handle(self, *args: Any, **options: Any) -> None:
        """Do it."""
        try:
            connection.ensure_connection()
        except OperationalError as error:
            raise CommandError(f"The database cannot be reached: {error}") from error
        self._reach_redis()
        if options["check"]:
            self._compare_migrations()
            return
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", [_LOCK])
        call_command("migrate", interactive=False, verbosity=0)
        Installation.objects.update_or_create(pk=1, defaults={"version": __version__})
        settings.STATIC_ROOT.mkdir(parents=True, exist_ok=True)
        # htmx is vendored in static/; the copy inside django_htmx imports files that it does not ship.
        call_command("collectstatic", interactive=False, verbosity=0, ignore_patterns=["django_htmx"])
        self._install_starter()
        if not setup.admin_exists():
            path = reverse("set-up", args=[setup.issue_setup_token()])
            self.stdout.write(f"Set-up link: {options['base_url'].rstrip('/')}{path}")

    def _reach_redis(self) -> None:
        import redis

        try:
            redis.Redis.from_url(settings.REDIS_URL, socket_timeout=10, socket_connect_timeout=10).ping()
        except (redis.RedisError, OSError) as error:
            raise CommandError(f"Redis cannot be reached: {error}") from error

    def _compare_migrations(self) -> None:
        executor = MigrationExecutor(connection)
        missing = executor.migration_plan(executor.loader.graph.leaf_nodes())
        if missing:
            raise CommandError(
                "The database is older than this release: "
                + ", ".join(str(migration) for migration, _ in missing)
                + " not applied. Start the main machine with this release first."
            )
        ours = {app for app, _ in executor.loader.graph.nodes}
        unknown = sorted(
            f"{app}.{name}"
            for app, name in executor.loader.applied_migrations
            if app in ours and (app, name) not in executor.loader.graph.nodes
        )
        if unknown:
            raise CommandError(f"The database is newer than this release ({', '.join(unknown)}). Update lmweb on this machine.")

    def _install_starter(self) -> None:
        from models_app import services

        services.ensure_starter()
