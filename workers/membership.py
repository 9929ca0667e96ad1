"""How a machine becomes a node of the installation: what has to match, and by what it proves that it may.

An admin makes a join token; the machine shows it once and is given a key of its own, which it keeps in its data directory. So a
token may expire without stopping who came in with it, and a node that was removed needs a new one. Whoever can write to the database
could do without; the token keeps order among machines, the database's password keeps strangers out.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from django.conf import settings
from django.db import DatabaseError, connection, transaction
from django.db.migrations.executor import MigrationExecutor
from django.db.models import Q
from django.db.models.functions import Now
from django.utils import timezone

from lmweb import __version__
from lmweb.errors import JoinRefused
from lmweb.models import BearerToken
from workers.models import Installation, JoinRefusal, NodeToken, RemovedNode, WorkerNode

#: Leases and heartbeats are compared between machines; they last 15 and 8 seconds.
MAX_CLOCK_OFFSET_SECONDS = 3.0
#: With less than this, not even logs can be written for long.
MIN_FREE_DISK_BYTES = 256 * 1024 * 1024
KEPT_REFUSALS = 50

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def join(name: str, secret: str) -> WorkerNode:
    """Let this machine in under this name, or confirm that it is in already.

    ``secret`` is that of a join token; one that came in before needs none. Raises ``JoinRefused``, which admins see too.
    """
    try:
        check_release()
        _check_machine(name)
        return _admit(name, secret)
    except JoinRefused as error:
        _note_refusal(name, error.message)
        raise


# --- what has to match ------------------------------------------------------------------------------------------------


def check_release() -> None:
    """Raise ``JoinRefused`` unless the database was prepared by this very release."""
    executor = MigrationExecutor(connection)
    missing = executor.migration_plan(executor.loader.graph.leaf_nodes())
    if missing:
        names = ", ".join(f"{migration.app_label}.{migration.name}" for migration, _ in missing)
        raise JoinRefused(f"The database is older than this release: {names} not applied. Start the main machine with this release first.")
    ours = {app for app, _ in executor.loader.graph.nodes}
    applied = executor.loader.applied_migrations
    unknown = sorted(f"{app}.{name}" for app, name in applied if app in ours and (app, name) not in executor.loader.graph.nodes)
    if unknown:
        raise JoinRefused(f"The database is newer than this release ({', '.join(unknown)}). Update lmweb on this machine.")
    theirs = Installation.objects.values_list("version", flat=True).first()
    if theirs != __version__:
        raise JoinRefused(f"The main machine runs lmweb {theirs or 'of an unknown release'}, this one {__version__}. Give both the same.")


def clock_offset() -> float:
    """Return this machine's clock minus the database's, in seconds."""
    with connection.cursor() as cursor:
        before = time.time()
        cursor.execute("SELECT extract(epoch FROM clock_timestamp())::float8")
        (theirs,) = cursor.fetchone()
        after = time.time()
    return float((before + after) / 2 - theirs)


def clock_words(offset_seconds: float) -> str:
    """Return how a clock stands to the database's, in words."""
    return f"{abs(offset_seconds):.1f} s {'ahead of' if offset_seconds > 0 else 'behind'} the database's"


def _check_machine(name: str) -> None:
    """Raise ``JoinRefused`` if this machine is not fit to run models."""
    if not NAME.fullmatch(name):
        raise JoinRefused(
            f"'{name[:100]}' cannot be the name of a node: letters, digits, '.', '_' and '-' only, 100 at most. Set LMWEB_NODE_NAME."
        )
    offset = clock_offset()
    if abs(offset) > MAX_CLOCK_OFFSET_SECONDS:
        raise JoinRefused(
            f"The clock of this machine is {clock_words(offset)}; at most {MAX_CLOCK_OFFSET_SECONDS:.0f} s are allowed, or living and "
            "dead workers could not be told apart. Set it by NTP (on most Linux systems: timedatectl set-ntp true) and start again."
        )
    models = Path(settings.MODELS_DIR)
    if not models.is_dir() or not os.access(models, os.R_OK | os.X_OK):
        raise JoinRefused(
            f"The models directory {models} is not there or cannot be read. Make it, or mount the shared one, and start again."
        )
    free = shutil.disk_usage(models).free
    if free < MIN_FREE_DISK_BYTES:
        raise JoinRefused(f"The disk with {models} is full: {free / 1e6:.0f} MB are free, {MIN_FREE_DISK_BYTES / 1e6:.0f} MB are needed.")


# --- who may ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Key:
    """The key of this machine under one name."""

    file: Path
    secret: str

    @property
    def digest(self) -> str:
        return BearerToken.hash(self.secret) if self.secret else ""


def read_key(name: str) -> str:
    """Return the key that this machine was given when it joined under this name; empty if it did not."""
    return _key(name).secret


def _key(name: str) -> _Key:
    file = Path(settings.DATA_DIR) / "node-keys" / name  # by name: containers share a data directory
    try:
        return _Key(file, file.read_text().strip())
    except OSError:
        return _Key(file, "")


def _admit(name: str, secret: str) -> WorkerNode:
    key = _key(name)
    with transaction.atomic():
        node = WorkerNode.objects.select_for_update().filter(pk=name).first()
        if node is not None and key.digest and node.key_digest == key.digest:
            JoinRefusal.objects.filter(pk=name).delete()
            return node
        token = _valid_token(secret)
        _check_not_removed(name, key.digest, token)
        if node is not None:
            _check_name_is_free(node)
        fresh = BearerToken.hash(new := NodeToken.new_secret())
        node, _ = WorkerNode.objects.update_or_create(
            name=name,
            defaults={
                "key_digest": fresh,
                "joined_with": token,
                "joined_at": Now(),
                "incarnation": uuid.uuid4(),
                "heartbeat_at": timezone.now() - timedelta(days=1),  # it lives from its first heartbeat on
                "version": __version__,
                "state": WorkerNode.State.ACTIVE,
            },
        )
        RemovedNode.objects.filter(pk=name).delete()
        JoinRefusal.objects.filter(pk=name).delete()
        NodeToken.objects.filter(pk=token.pk).update(last_used_at=Now())
        _write_key(key.file, new)
    return node


def _valid_token(secret: str) -> NodeToken:
    how = "An admin makes one on the server: python3 manage.py node token, or on the page Workers."
    if not secret:
        raise JoinRefused(f"This machine has not joined yet and LMWEB_NODE_TOKEN is not set. {how}")
    token = NodeToken.objects.filter(digest=NodeToken.hash(secret)).first()
    if token is None:
        raise JoinRefused(f"The join token in LMWEB_NODE_TOKEN is none of this installation. {how}")
    if not token.is_valid:
        raise JoinRefused(f"The join token '{token.name}' {'was revoked' if token.revoked_at else 'has expired'}. {how}")
    return token


def _check_not_removed(name: str, digest: str, token: NodeToken) -> None:
    same = Q(name=name) | Q(key_digest=digest) if digest else Q(name=name)
    removed = RemovedNode.objects.filter(same).order_by("-removed_at").first()
    if removed is not None and token.created_at <= removed.removed_at:
        raise JoinRefused(
            f"This machine was removed as '{removed.name}' on {removed.removed_at:%Y-%m-%d %H:%M} UTC. "
            "It can come back with a join token that is made after that: python3 manage.py node token."
        )


def _check_name_is_free(node: WorkerNode) -> None:
    if node.is_local:
        raise JoinRefused(f"'{node.name}' is the name of the server's own machine. Give this one another by LMWEB_NODE_NAME.")
    if WorkerNode.objects.alive().filter(pk=node.pk).exists():
        raise JoinRefused(f"Another machine runs as '{node.name}'. Give this one another name by LMWEB_NODE_NAME.")


def _write_key(file: Path, secret: str) -> None:
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = file.with_name(f".{file.name}.new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as handle:
            handle.write(f"{secret}\n")
        fresh.replace(file)
    except OSError as error:
        raise JoinRefused(f"The key of this node cannot be written to {file}: {error.strerror}.") from None


def _note_refusal(name: str, reason: str) -> None:
    """Leave a word for the admins, if the database can take it: that of another release may not."""
    try:
        with transaction.atomic():
            JoinRefusal.objects.update_or_create(name=name[:100].replace("\x00", ""), defaults={"reason": reason, "refused_at": Now()})
            kept = JoinRefusal.objects.order_by("-refused_at").values("pk")[:KEPT_REFUSALS]
            JoinRefusal.objects.exclude(pk__in=list(kept.values_list("pk", flat=True))).delete()
    except DatabaseError:
        return
