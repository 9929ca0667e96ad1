"""How any process finds the services of an installation: from the environment, else from the data directory.

The supervisor writes ``run/services.json`` in the data directory once its embedded PostgreSQL and Valkey run; commands,
workers and the web server read it. Standard library only: ``manage.py`` uses it before the environment exists.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from pathlib import Path
from typing import Any

from lmweb import env

#: What the settings hold while nothing runs, so that commands without a database (``lint``, ``--help``) still start.
NO_DATABASE = "postgresql://lmweb@localhost:1/lmweb"
NO_REDIS = "redis://localhost:1/0"


def services_file(data_dir: Path) -> Path:
    """Return the file that names the running services of this data directory."""
    return data_dir / "run" / "services.json"


def service_urls(data_dir: Path) -> tuple[str, str]:
    """Return the database URL and the Redis URL; placeholders that refuse connections when nothing runs."""
    found = read(data_dir)
    database = env.text("DATABASE_URL") or found.get("database_url") or NO_DATABASE
    redis = env.text("REDIS_URL") or found.get("redis_url") or NO_REDIS
    return database, redis


def read(data_dir: Path) -> dict[str, Any]:
    """Return what the running instance says about itself; empty when nothing runs."""
    try:
        found = json.loads(services_file(data_dir).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(data_dir: Path, facts: dict[str, Any]) -> None:
    """Replace what the running instance says about itself, in one step and readable by nobody else."""
    file = services_file(data_dir)
    fresh = file.with_suffix(".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        json.dump(facts, handle, indent=1)
    fresh.replace(file)


def secret_key(data_dir: Path) -> str:
    """Return the configured secret key, or the one kept in the data directory, made on first use (mode 0600).

    Without a data directory a random key is returned that lasts for this process, so that reading settings writes nothing.
    """
    configured = env.text("LMWEB_SECRET_KEY")
    if configured:
        return configured
    if not data_dir.is_dir():
        return secrets.token_urlsafe(50)
    file = data_dir / "secret-key"
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return file.read_text().strip()
    with os.fdopen(descriptor, "w") as handle:
        key = secrets.token_urlsafe(50)
        handle.write(key)
    return key


def host_name() -> str:
    """Return this machine's short name, used as the node's name by default."""
    return socket.gethostname().split(".")[0] or "node"
