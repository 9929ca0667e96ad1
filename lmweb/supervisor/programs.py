"""The Python processes of an installation: web server, GPU worker and io worker.

``python -m lmweb.supervisor.programs NAME`` becomes one of them, for containers and other supervisors; ``--healthy NAME`` probes it.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from lmweb import env
from lmweb.supervisor import database, discovery
from lmweb.supervisor.embedded import Service

REPOSITORY = Path(__file__).resolve().parent.parent.parent

#: A worker holds many threads; glibc would otherwise keep an arena of memory for each.
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "MALLOC_ARENA_MAX": "2", "DJANGO_SETTINGS_MODULE": "lmweb.settings"}

_QUIET_CELERY = ("--without-gossip", "--without-mingle", "--without-heartbeat")


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, so that connections wait while the web server starts or restarts. Raises ``OSError``."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def web(listener: socket.socket) -> Service:
    """Return the web server (Daphne) on a socket that is listened on already."""
    host, port = listener.getsockname()[:2]
    inherited: tuple[int, ...]
    if listener.family == socket.AF_INET6:  # Daphne adopts IPv4 sockets only
        listener.close()
        escaped = host.replace(":", r"\:")
        endpoint, inherited = f"tcp6:{port}:interface={escaped}", ()
    else:
        endpoint, inherited = f"fd:fileno={listener.fileno()}", (listener.fileno(),)
    if host in {"0.0.0.0", "::"}:  # noqa: S104  (compared, not bound)
        host = "::1" if host == "::" else "127.0.0.1"
    return Service(
        name="web",
        argv=(sys.executable, "-m", "daphne", "-v", "0", "--no-server-name", "-e", endpoint, "lmweb.asgi:application"),
        ready=lambda _pid: answers(host, port),
        stop_signal=signal.SIGTERM,
        stop_seconds=5.0,
        environment=_ENVIRONMENT,
        cwd=REPOSITORY,
        pass_fds=inherited,
    )


def gpu_worker(node: str, *, local: bool) -> Service:
    """Return the worker that runs models on this machine. Its tasks load and unload; generations do not pass through them.

    ``local``: it belongs to the installation of this very machine; others have joined one elsewhere.
    """
    service = _celery("gpu-worker", f"gpu.{node}", f"gpu@{node}", threads=8)
    return replace(service, environment={**service.environment, "LMWEB_LOCAL_WORKER": str(local).lower()})


def io_worker(node: str) -> Service:
    """Return the worker for everything but models; it also runs the periodic tasks. A download holds a thread as long as it runs."""
    return _celery("io-worker", "io", f"io@{node}", threads=4 + max(1, env.number("LMWEB_DOWNLOADS_AT_ONCE")))


def answers(host: str, port: int) -> bool:
    """Return whether a web server gives any answer but a failure of its own to a request for its first page."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def manage(*arguments: str) -> tuple[str, ...]:
    """Return the command line of a management command in this environment."""
    return (sys.executable, str(REPOSITORY / "manage.py"), *arguments)


def environment() -> dict[str, str]:
    """Return the variables of every Python process of ours."""
    return os.environ | _ENVIRONMENT


def _celery(name: str, queue: str, hostname: str, *, threads: int) -> Service:
    command = (sys.executable, "-m", "celery", "-A", "lmweb.celery", "worker", "--pool=threads", "-c", str(threads))
    return Service(
        name=name,
        argv=(*command, "-Q", queue, "-n", hostname, "-l", env.text("LMWEB_LOG_LEVEL").upper(), *_QUIET_CELERY),
        ready=lambda _pid: True,
        stop_signal=signal.SIGTERM,
        stop_seconds=10.0,
        environment=_ENVIRONMENT,
        cwd=REPOSITORY,
        essential=False,
    )


CONTAINER_PORT = 1234
HEARTBEAT_SECONDS = 15.0


def main(arguments: list[str]) -> None:
    """Become the named process, or end with status 0 if it is healthy."""
    names = {"web", "gpu-worker", "io-worker"}
    if not arguments or arguments[-1] not in names or arguments[:-1] not in ([], ["--healthy"]):
        sys.exit(f"usage: python -m lmweb.supervisor.programs [--healthy] {'|'.join(sorted(names))}")
    name, node = arguments[-1], env.text("LMWEB_NODE_NAME") or discovery.host_name()
    if arguments[0] == "--healthy":
        sys.exit(0 if healthy(name, node) else 1)
    if name == "web":
        listener = listen("0.0.0.0", CONTAINER_PORT)  # noqa: S104  (the container's own network; docker-compose.yml publishes it)
        listener.set_inheritable(True)
        service = web(listener)
    else:
        service = gpu_worker(node, local=False) if name == "gpu-worker" else io_worker(node)
    os.chdir(REPOSITORY)
    if name == "gpu-worker" and (code := subprocess.call(manage("node", "join"), env=environment())):
        sys.exit(code)
    os.execve(service.argv[0], service.argv, environment() | service.environment)


def healthy(name: str, node: str) -> bool:
    """Whether the web server answers, the GPU worker's heartbeat is recent, or the io worker answers Celery."""
    if name == "web":
        return answers("127.0.0.1", CONTAINER_PORT)
    if name == "gpu-worker":
        return database.node_alive(discovery.service_urls(env.data_dir())[0], node, time.time() - HEARTBEAT_SECONDS)
    command = (sys.executable, "-m", "celery", "-A", "lmweb.celery", "inspect", "ping", "-t", "5", "-d", f"io@{node}")
    return subprocess.call(command, stdout=subprocess.DEVNULL, cwd=REPOSITORY, env=environment()) == 0


if __name__ == "__main__":
    main(sys.argv[1:])
