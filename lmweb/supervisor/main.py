"""``manage.py up`` and ``manage.py worker``: one foreground process that starts, watches and stops all the others.

Django is not imported here: this process lives as long as the installation and stays small.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from lmweb import env
from lmweb.errors import LmwebError, ServiceUnavailable
from lmweb.supervisor import database, discovery, embedded, programs
from lmweb.supervisor.child import Child
from lmweb.supervisor.embedded import Service
from lmweb.supervisor.fingerprint import fingerprint
from lmweb.supervisor.identity import die_with_parent

START_SECONDS = 60.0
WORKER_START_SECONDS = 30.0
ADMIN_POLL_SECONDS = 2.0
SETUP_LINK = "Set-up link: "


class AlreadyRunning(LmwebError):
    """Another process serves this data directory."""

    code, status = "already_running", 409


@dataclass(frozen=True)
class Options:
    """What the command line and the environment ask for."""

    data_dir: Path
    host: str
    port: int
    join: bool = False


def run(command: str, arguments: list[str]) -> int:
    """Run ``up`` or ``worker`` until it is stopped and return its exit status."""
    options = parse(command, arguments)
    say(f"lmweb · data in {options.data_dir}")
    try:
        make_data_dir(options.data_dir)
        with sole_instance(options.data_dir):
            discovery.services_file(options.data_dir).unlink(missing_ok=True)  # a killed predecessor left it
            return asyncio.run(Supervisor(options).run())
    except LmwebError as error:
        print(f"\n{error.message}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        print(f"\n{error}", file=sys.stderr, flush=True)
        return 1


def parse(command: str, arguments: list[str]) -> Options:
    """Read the command line; what it does not say comes from the environment."""
    about = {"up": "Start everything.", "worker": "Run models on this machine for the installation that DATABASE_URL and REDIS_URL name."}
    parser = argparse.ArgumentParser(
        prog=f"manage.py {command}", description=about[command], epilog="docs/operations.md lists all variables."
    )
    parser.add_argument("--data-dir", type=Path, default=env.data_dir(), help="where everything is kept (default: %(default)s)")
    if command == "up":
        parser.add_argument(
            "--host", default=env.text("LMWEB_HOST"), help="address to listen on once an admin exists (default: %(default)s)"
        )
        parser.add_argument("--port", type=int, default=env.number("LMWEB_PORT"), help="port to listen on (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    data_dir: Path = chosen.data_dir.expanduser().absolute()
    os.environ["LMWEB_DATA_DIR"] = str(data_dir)
    if command == "worker":
        return Options(data_dir, "", 0, join=True)
    if not 0 <= chosen.port <= 65535:
        parser.error("--port must be between 0 (any free one) and 65535")
    return Options(data_dir, chosen.host, chosen.port)


def say(line: str) -> None:
    """Print a line for the person at the terminal."""
    print(line, flush=True)


def make_data_dir(data_dir: Path) -> None:
    """Make the data directory and what is always in it. Raises ``OSError``."""
    # Root's PostgreSQL runs as another user, who has to pass through; everything inside has its own mode.
    data_dir.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
    for name in ("logs", "models"):
        (data_dir / name).mkdir(mode=0o700, exist_ok=True)
    (data_dir / "run").mkdir(mode=0o711, exist_ok=True)


@contextlib.contextmanager
def sole_instance(data_dir: Path) -> Iterator[None]:
    """Hold the data directory's lock. Raises ``AlreadyRunning`` with the other process's id."""
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = handle.read().strip() or "unknown"
            url = discovery.read(data_dir).get("url")
            where = f" It serves {url}." if url else ""
            raise AlreadyRunning(
                f"lmweb already runs on {data_dir} (process {pid}).{where} Stop it first, or choose another --data-dir and --port."
            ) from None
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        yield
        handle.seek(0)
        handle.truncate(0)


class Supervisor:
    """Runs the services of one data directory."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.data_dir = options.data_dir
        self.node = env.text("LMWEB_NODE_NAME") or discovery.host_name()
        self._children: list[Child] = []
        self._facts: dict[str, object] = {"pid": os.getpid(), "ready": False}
        self._stop = asyncio.Event()
        self._listener: socket.socket | None = None
        self._address = ("", 0)
        self._preparing: asyncio.subprocess.Process | None = None
        self._setup_path = ""

    async def run(self) -> int:
        """Start everything, wait for a signal or a failure, stop everything. Returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupt, number)
        work = asyncio.create_task(self._serve())
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        stopped.cancel()
        try:
            await work
        except asyncio.CancelledError:
            failed = False
        except LmwebError as error:
            failed = not self._stop.is_set()
            if failed:
                print(f"\n{error.message}", file=sys.stderr, flush=True)
        else:
            failed = True
        finally:
            await self._shut_down()
        return 1 if failed else 0

    # --- starting -----------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        began = time.monotonic()
        gpu: Child | None = None
        if self.options.join:
            gpu = await self._join()
            say(f"Ready after {time.monotonic() - began:.1f} s: this machine runs models as '{self.node}'. Stop with Ctrl-C.")
        else:
            await self._start_all()
            self._announce(time.monotonic() - began)
        self._facts["ready"] = True
        self._publish()
        if gpu is not None:
            await gpu.wait_refused()
            return
        await self._open_up_with_first_admin()
        await asyncio.Event().wait()

    async def _start_all(self) -> None:
        self._listener = self._bind(self.options.port)
        await self._start_services()
        admin = await asyncio.to_thread(database.admin_exists, self._database_url)
        if admin and self._wants_other_address():
            self._rebind()
        self._facts["url"] = self._url()
        self._publish()
        await self._prepare(admin=admin)
        web, gpu, io = self._add(programs.web(self._listener)), self._add(self._gpu_worker()), self._add(programs.io_worker(self.node))
        for child in (web, gpu, io):
            child.start()
        began = time.monotonic()
        await web.wait_ready(START_SECONDS)
        say(f"  web         ready after {time.monotonic() - began:.1f} s")
        await self._wait_for_worker(gpu)
        say(f"  gpu-worker  {'ready' if gpu.ready.is_set() else 'waited for'} after {time.monotonic() - began:.1f} s")

    async def _start_services(self) -> None:
        """Start the embedded services that no URL replaces, both at once."""
        started = []
        for name, make in (("database_url", embedded.postgres), ("redis_url", embedded.valkey)):
            given = env.text(name.upper())
            if given:
                self._facts[name] = given
                continue
            began = time.monotonic()
            service, self._facts[name] = await asyncio.to_thread(make, self.data_dir)
            if name == "database_url":
                await self._await_old_postgres()
            child = self._add(service)
            child.start()
            started.append((child, began))
        for child, began in started:
            await child.wait_ready(START_SECONDS)
            say(f"  {child.service.name:<11} ready after {time.monotonic() - began:.1f} s")
        self._publish()

    async def _await_old_postgres(self) -> None:
        """Let a PostgreSQL whose supervisor was killed finish its own stop."""
        pid = embedded.running_postgres(self.data_dir)
        if pid is None:
            return
        say("  waiting for the previous PostgreSQL to stop")
        for attempt in range(300):
            if embedded.running_postgres(self.data_dir) != pid:
                return
            if attempt == 100:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGQUIT)
            await asyncio.sleep(0.1)
        raise ServiceUnavailable(f"The previous PostgreSQL (process {pid}) does not stop. End it by hand and start again.")

    async def _prepare(self, *, admin: bool) -> None:
        """Bring database, static files and starter model up to date, unless this code did so before and an admin exists."""
        done = self.data_dir / "run" / "prepared"
        now = fingerprint(env.text("DATABASE_URL"), str(self.data_dir))
        with contextlib.suppress(FileNotFoundError):
            if admin and done.read_text() == now:
                return
        began = time.monotonic()
        say("  database    preparing")
        await self._run_to_end(programs.manage("prepare"))
        done.write_text(now)
        say(f"  database    prepared in {time.monotonic() - began:.1f} s")

    async def _join(self) -> Child:
        """Become a node, or end with the reason why not; then run the worker."""
        for name in ("DATABASE_URL", "REDIS_URL"):
            if not env.text(name):
                raise ServiceUnavailable(
                    f"{name} is not set. A worker joins an installation by its DATABASE_URL and REDIS_URL; docs/operations.md has an example."
                )
        self._facts |= {"database_url": env.text("DATABASE_URL"), "redis_url": env.text("REDIS_URL")}
        await self._run_to_end(programs.manage("node", "join"))
        self._publish()
        gpu = self._add(self._gpu_worker())
        gpu.start()
        await self._wait_for_worker(gpu)
        return gpu

    async def _run_to_end(self, command: tuple[str, ...]) -> None:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=programs.environment(),
            cwd=programs.REPOSITORY,
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
        self._preparing = process
        output, _ = await process.communicate()
        self._preparing = None
        lines = output.decode(errors="replace").splitlines()
        for line in lines:
            if line.startswith(SETUP_LINK):
                self._setup_path = line.removeprefix(SETUP_LINK)
        if process.returncode:
            raise ServiceUnavailable("\n".join(lines[-30:]))

    async def _wait_for_worker(self, gpu: Child) -> None:
        try:
            await gpu.wait_ready(WORKER_START_SECONDS)
        except ServiceUnavailable as error:
            if self.options.join:
                raise
            # The pages work without it, and it is started again for as long as it takes.
            say(f"  {error.message}\n  The pages work; models do not until the GPU worker runs.")

    def _gpu_worker(self) -> Service:
        since = time.time()
        url = self._database_url
        return replace(
            programs.gpu_worker(self.node, local=not self.options.join), ready=lambda _pid: database.node_alive(url, self.node, since)
        )

    def _add(self, service: Service) -> Child:
        child = Child(service, self.data_dir / "logs", report=lambda line: say(f"  {line}"), changed=self._publish)
        self._children.append(child)
        return child

    # --- address ------------------------------------------------------------------------------------------------------

    def _bind(self, port: int, host: str = "127.0.0.1") -> socket.socket:
        try:
            listener = programs.listen(host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServiceUnavailable(f"Port {port} is in use by another program. Stop it, or choose another --port.") from None
            raise ServiceUnavailable(f"Cannot listen on {host} port {port}: {error.strerror or error}.") from None
        self._address = listener.getsockname()[:2]
        return listener

    def _wants_other_address(self) -> bool:
        return self.options.host not in {"127.0.0.1", "localhost"}

    def _rebind(self) -> socket.socket:
        assert self._listener is not None
        self._listener.close()
        self._listener = self._bind(self._address[1], self.options.host)
        return self._listener

    def _url(self) -> str:
        host, port = self._address
        if host in {"0.0.0.0", "::"}:  # noqa: S104  (compared, not bound)
            host = socket.gethostname()
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _announce(self, seconds: float) -> None:
        url = str(self._facts["url"])
        say(f"\nReady after {seconds:.1f} s. Stop with Ctrl-C.\n")
        if self._setup_path:
            say(f"  Make the first admin here (the link works once):\n\n    {url}{self._setup_path}\n")
        else:
            say(f"    {url}\n")

    async def _open_up_with_first_admin(self) -> None:
        """Listen on the wanted address as soon as somebody administers this installation; before that only this machine gets in."""
        if not self._setup_path:
            return
        while not await asyncio.to_thread(database.admin_exists, self._database_url):  # noqa: ASYNC110  (another process makes the admin)
            await asyncio.sleep(ADMIN_POLL_SECONDS)
        self._setup_path = ""
        if not self._wants_other_address():
            return
        old = next(child for child in self._children if child.service.name == "web")
        await old.stop()
        self._children.remove(old)
        web = self._add(programs.web(self._rebind()))
        web.start()
        await web.wait_ready(START_SECONDS)
        self._facts["url"] = self._url()
        self._publish()
        say(f"  An admin exists: now listening on {self.options.host}. Open {self._facts['url']}")

    # --- state and end ------------------------------------------------------------------------------------------------

    @property
    def _database_url(self) -> str:
        return str(self._facts["database_url"])

    def _publish(self) -> None:
        """Write down how other processes find this instance. URLs that the environment gave stay there."""
        given = {name for name in ("database_url", "redis_url") if env.text(name.upper())}
        facts = {name: value for name, value in self._facts.items() if name not in given}
        facts["processes"] = {child.service.name: child.pid for child in self._children if child.pid}
        try:
            discovery.write(self.data_dir, facts)
        except OSError as error:  # a full disk must not end what runs
            say(f"  {error}")

    def _interrupt(self, number: int) -> None:
        if self._stop.is_set() and number == signal.SIGINT:
            say("\nEnding everything at once")
            for child in self._children:
                child.kill()
            return
        self._stop.set()

    async def _shut_down(self) -> None:
        """Stop in the order of dependence: those who use the services first."""
        say("Stopping")
        if self._preparing is not None:
            with contextlib.suppress(ProcessLookupError):
                self._preparing.kill()
            await self._preparing.wait()
        services = [child for child in self._children if child.service.name in {"postgres", "valkey"}]
        users = [child for child in self._children if child not in services]
        await asyncio.gather(*(child.stop() for child in users))
        await asyncio.gather(*(child.stop() for child in services))
        if self._listener is not None:
            self._listener.close()
        discovery.services_file(self.data_dir).unlink(missing_ok=True)
        sockets = embedded.run_dir(self.data_dir)
        (sockets / "valkey.sock").unlink(missing_ok=True)
        if self.data_dir not in sockets.parents:  # a directory in /tmp, made for this run
            shutil.rmtree(sockets, ignore_errors=True)
        say("Stopped")


def describe_services() -> str:
    """Return a clear sentence for a command that finds no database: what runs, or how to start it."""
    data_dir = env.data_dir()
    if env.text("DATABASE_URL"):
        where = urlsplit(env.text("DATABASE_URL"))
        return f"The database that DATABASE_URL names ({where.hostname or 'local'}) cannot be reached."
    return f"Nothing runs on {data_dir}. Start lmweb with 'python3 manage.py up', or name its data directory with --data-dir."
