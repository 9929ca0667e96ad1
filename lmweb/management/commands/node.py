"""``manage.py node``: the machines that run models, and letting others in."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from django.conf import settings
from django.core.management.base import CommandError, CommandParser

from lmweb.errors import LmwebError
from lmweb.management.base import reach_services
from lmweb.tokens import parse_lifetime
from models_app import nodes
from models_app.cli import ModelCommand, size
from workers import membership


class Command(ModelCommand):
    """List, cordon, drain and remove nodes; make join tokens."""

    help = "The machines that run models: list, token, cordon, uncordon, drain, remove."

    def add_arguments(self, parser: CommandParser) -> None:
        """Define the subcommands."""
        commands = parser.add_subparsers(title="subcommands", dest="subcommand", required=True, metavar="SUBCOMMAND")
        self._add(commands, "list", self.list, "list the nodes, their models and work")
        token = self._add(commands, "token", self.token, "make a join token for another machine and print it once")
        token.add_argument("--name", default="node", metavar="LABEL", help="what it is for (default: %(default)s)")
        token.add_argument(
            "--expires", default="1d", metavar="1d", help="how long it can be used: 12h, 30d, or never (default: %(default)s)"
        )
        self._add(commands, "tokens", self.tokens, "list join tokens, without their secrets")
        revoke = self._add(commands, "revoke", self.revoke, "let nobody join with this token any more")
        revoke.add_argument("id", metavar="ID", help="the token's id, as 'node tokens' shows it")
        for name, act, about in (
            ("cordon", nodes.cordon, "let a node load nothing new; it serves what it has in memory"),
            ("uncordon", nodes.uncordon, "let a node do everything again"),
            ("drain", nodes.drain, "let a node finish its answers, take no new ones, and unload its models"),
            ("remove", nodes.remove, "take a node out; it needs a new join token to come back"),
        ):
            command = self._add(commands, name, self.act, about)
            command.add_argument("node", metavar="NODE", help="its name, as 'node list' shows it")
            command.set_defaults(act=act)
        self._add(commands, "join", self.join, "let this machine in; 'worker' does this itself")

    def _add(self, commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        parser.add_argument("--json", action="store_true", help="answer in JSON")
        parser.set_defaults(run=run)
        return parser

    def handle(self, *_: Any, **options: Any) -> None:
        """Run the chosen subcommand."""
        options["run"](options)

    def list(self, options: dict[str, Any]) -> None:
        """List nodes."""
        found = nodes.overview(None)
        if options["json"]:
            return self.print_json([_info(node) for node in found])
        if not found:
            self.stdout.write("No machine runs models yet. Start one with: python3 manage.py up")
            return None
        head = ["NODE", "STATUS", "RUNNING", "QUEUED", "FREE MEMORY", "FREE DISK", "ENGINES", "MODELS"]
        return self.print_table(head, (_line(node) for node in found))

    def token(self, options: dict[str, Any]) -> None:
        """Make a join token."""
        lifetime = None if options["expires"] == "never" else parse_lifetime(options["expires"])
        token, secret = nodes.create_join_token(principal=None, name=options["name"], lifetime=lifetime)
        if options["json"]:
            return self.print_json(_token_info(token) | {"token": secret})
        self.stdout.write(secret)
        if sys.stdout.isatty():
            self.stderr.write("Copy it now, it is not stored. On the other machine: LMWEB_NODE_TOKEN=... python3 manage.py worker")
        return None

    def tokens(self, options: dict[str, Any]) -> None:
        """List join tokens."""
        found = list(nodes.join_tokens(None))
        if options["json"]:
            return self.print_json([_token_info(token) for token in found])
        if not found:
            self.stdout.write("There are no join tokens. Make one with: python3 manage.py node token")
            return None
        rows = ([str(token.pk), f"{token.hint}…", token.state, nodes.expires_words(token.expires_at), token.name] for token in found)
        return self.print_table(["ID", "TOKEN", "STATE", "EXPIRES", "NAME"], rows)

    def revoke(self, options: dict[str, Any]) -> None:
        """Revoke a join token."""
        token = nodes.revoke_join_token(principal=None, token_id=options["id"])
        if options["json"]:
            return self.print_json(_token_info(token))
        self.stdout.write(f"Nobody can join with '{token.name}' any more. Nodes that did stay.")
        return None

    def act(self, options: dict[str, Any]) -> None:
        """Change a node's state, or remove it."""
        node = nodes.get(None, options["node"])
        options["act"](principal=None, node=node)
        name, verb = node.row.name, options["subcommand"]
        if options["json"]:
            return self.print_json({"name": name, "removed": True} if verb == "remove" else _info(nodes.get(None, name)))
        said = {
            "cordon": "loads nothing new from now on; it serves what it has in memory.",
            "uncordon": "takes work again.",
            "drain": "finishes its answers, takes no new ones and unloads its models. 'node list' says when it has drained.",
            "remove": "is removed. It needs a new join token to come back.",
        }
        self.stdout.write(f"{name} {said[verb]}")
        return None

    def join(self, options: dict[str, Any]) -> None:
        """Let this machine in, or say why not; the exit status is then that of a worker that may not run."""
        reach_services()
        try:
            node = membership.join(settings.NODE_NAME, settings.NODE_TOKEN)
        except LmwebError as error:
            raise CommandError(error.message, returncode=getattr(error, "exit_status", 1)) from None
        if options["json"]:
            return self.print_json({"name": node.name, "version": node.version})
        self.stdout.write(f"This machine has joined as '{node.name}'.")
        return None


def _info(node: nodes.Node) -> dict[str, Any]:
    row = node.row
    return {
        "name": row.name,
        "status": node.status,
        "state": row.state,
        "version": row.version,
        "running": node.running,
        "queued": node.queued,
        "freeMemoryBytes": row.free_memory_bytes,
        "totalMemoryBytes": row.total_memory_bytes,
        "freeDiskBytes": row.free_disk_bytes,
        "clockOffsetSeconds": round(row.clock_offset_seconds, 3),
        "hardware": row.hardware,
        "engines": row.engines,
        "models": [{"identifier": i.identifier, "status": i.status, "memoryBytes": i.memory_bytes} for i in node.instances],
        "heartbeatAt": row.heartbeat_at.isoformat(),
    }


def _line(node: nodes.Node) -> list[str]:
    row = node.row
    engines = ", ".join(f"{engine['name']} {engine['version']}" for engine in row.engines if engine.get("version"))
    models = ", ".join(instance.identifier for instance in node.instances)
    free = f"{size(row.free_memory_bytes)} of {size(row.total_memory_bytes)}"
    return [row.name, node.status, str(node.running), str(node.queued), free, size(row.free_disk_bytes), engines, models]


def _token_info(token: Any) -> dict[str, Any]:
    return {
        "id": str(token.pk),
        "name": token.name,
        "hint": token.hint,
        "state": token.state,
        "createdAt": token.created_at.isoformat(),
        "expiresAt": token.expires_at.isoformat() if token.expires_at else None,
        "lastUsedAt": token.last_used_at.isoformat() if token.last_used_at else None,
    }
