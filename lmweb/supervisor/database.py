"""The three questions that the supervisor has for the database, asked through ``psql`` so that it needs no driver in memory."""

from __future__ import annotations

import os
import subprocess
from urllib.parse import unquote, urlsplit, urlunsplit

from lmweb.errors import ServiceUnavailable
from lmweb.supervisor.embedded import postgres_program

_ADMIN = "SELECT EXISTS (SELECT 1 FROM lmweb_user WHERE is_active AND role = 'admin')"
_NODE = "SELECT EXISTS (SELECT 1 FROM workers_workernode WHERE name = :'node' AND heartbeat_at >= to_timestamp(:since))"


def query(url: str, sql: str, **variables: str) -> str:
    """Return the single value of a query. Raises ``ServiceUnavailable`` with the database's words when it fails."""
    url, password = _without_password(url)
    command = [str(postgres_program("psql")), "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", url]
    environment = os.environ | ({"PGPASSWORD": password} if password else {})
    for name, value in variables.items():
        command += ["-v", f"{name}={value}"]
    try:
        # Through standard input: variables are not replaced in ``-c``.
        done = subprocess.run(command, input=sql, env=environment, capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        raise ServiceUnavailable("The database does not answer.") from None
    if done.returncode:
        raise ServiceUnavailable(done.stderr.strip() or "The database cannot be reached.")
    return done.stdout.strip()


def _without_password(url: str) -> tuple[str, str]:
    """Split the password off: everybody on this machine can read a command line."""
    parts = urlsplit(url)
    if parts.password is None:
        return url, ""
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}@{host}")), unquote(parts.password)


def admin_exists(url: str) -> bool:
    """Return whether anybody administers this installation yet; False while its tables are missing. See ``lmweb.setup``."""
    try:
        return query(url, _ADMIN) == "t"
    except ServiceUnavailable:
        return False


def node_alive(url: str, node: str, since: float) -> bool:
    """Return whether the GPU worker of this node has registered after ``since`` (seconds of the epoch)."""
    try:
        return query(url, _NODE, node=node, since=repr(since)) == "t"
    except ServiceUnavailable:
        return False
