"""Bring the database, the static files and the starter model to the state that this release needs."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand
from django.db import connection
from django.urls import reverse

from lmweb import __version__, setup
from lmweb.management.base import reach_services
from models_app import nodes
from workers.models import Installation

#: Any fixed number: several web servers that start at once prepare the database one after the other.
_LOCK = 0x6C6D776562


class Command(BaseCommand):
    """Run by ``manage.py up`` and by the web container before they serve."""

    help = "Migrate the database, collect static files, install the starter model, issue the set-up link."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add ``--base-url``."""
        parser.add_argument("--base-url", default="", help="put in front of the set-up link")

    def handle(self, *args: Any, **options: Any) -> None:
        """Do it."""
        reach_services()
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", [_LOCK])
        call_command("migrate", interactive=False, verbosity=0)
        Installation.objects.update_or_create(pk=1, defaults={"version": __version__})
        nodes.accept_token_of_environment()
        settings.STATIC_ROOT.mkdir(parents=True, exist_ok=True)
        # htmx is vendored in static/; the copy inside django_htmx imports files that it does not ship.
        call_command("collectstatic", interactive=False, verbosity=0, ignore_patterns=["django_htmx"])
        self._install_starter()
        if not setup.admin_exists():
            path = reverse("set-up", args=[setup.issue_setup_token()])
            self.stdout.write(f"Set-up link: {options['base_url'].rstrip('/')}{path}")

    def _install_starter(self) -> None:
        from models_app import services

        services.ensure_starter()
