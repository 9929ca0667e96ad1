"""A whole installation as a person runs it: ``manage.py up`` on a data directory and port of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import psycopg

from lmweb.supervisor import discovery

REPOSITORY = Path(__file__).resolve().parent.parent
PASSWORD = "a-long-test-password"
START_SECONDS = 90
PROCESSES = {"postgres", "valkey", "web", "gpu-worker", "io-worker"}


def clean_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what the tests' own settings put there."""
    ours = {"DJANGO_SETTINGS_MODULE", "DATABASE_URL", "REDIS_URL"}
    return {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("LMWEB_")} | more


class Live:
    """A running installation. ``start`` and ``stop`` may be called again and again on the same data."""

    def __init__(self, data_dir: Path, *, port: int = 0, environment: dict[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self.port = port
        self.environment = clean_environment(LMWEB_NODE_NAME="test-node", LMWEB_DATA_DIR=str(data_dir)) | (environment or {})
        self.output = data_dir.with_name(data_dir.name + ".out")
        self.supervisor: subprocess.Popen[bytes] | None = None

    def spawn(self, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """Start ``manage.py up`` and return without waiting."""
        command = [*prefix, sys.executable, str(REPOSITORY / "manage.py"), "up", "--data-dir", str(self.data_dir), "--port", str(self.port)]
        with self.output.open("wb") as output:
            self.supervisor = subprocess.Popen(
                [*command, *arguments], stdout=output, stderr=output, env=self.environment, cwd=tempfile.gettempdir()
            )
        return self.supervisor

    def start(self, *arguments: str, prefix: tuple[str, ...] = ()) -> Live:
        """Start it and wait until it is ready. Keeps its port over later starts."""
        process = self.spawn(*arguments, prefix=prefix)
        deadline = time.monotonic() + START_SECONDS
        while self.facts.get("pid") != process.pid or not self.facts.get("ready"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"The installation did not start:\n{self.printed}")
            time.sleep(0.05)
        self.port = int(self.base_url.rsplit(":", 1)[1])
        return self

    def stop(self, number: signal.Signals = signal.SIGTERM, *, timeout: float = 45) -> int:
        """Ask it to stop and return its exit status."""
        assert self.supervisor is not None
        if self.supervisor.poll() is None:
            self.supervisor.send_signal(number)
        try:
            return self.supervisor.wait(timeout)
        except subprocess.TimeoutExpired:
            self.supervisor.kill()
            raise

    @property
    def printed(self) -> str:
        """What it has printed to its terminal."""
        return self.output.read_text()

    @property
    def facts(self) -> dict[str, Any]:
        """What the running instance says about itself; empty when nothing runs."""
        return discovery.read(self.data_dir)

    @property
    def base_url(self) -> str:
        """The URL of its first page, without a slash at the end."""
        return str(self.facts["url"])

    @property
    def setup_url(self) -> str | None:
        """The link that makes the first admin, if it printed one."""
        return next((line.strip() for line in self.printed.splitlines() if "/setup/" in line), None)

    @property
    def processes(self) -> dict[str, int]:
        """The process id of each service by name: postgres, valkey, web, gpu-worker, io-worker."""
        return dict(self.facts.get("processes", {}))

    def manage(self, *arguments: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a management command on this installation."""
        command = [sys.executable, str(REPOSITORY / "manage.py"), *arguments, "--data-dir", str(self.data_dir)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False, input=stdin)
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done

    def python(self, code: str) -> Any:
        """Run code with Django set up for this installation and return what it assigned to ``result`` (JSON)."""
        script = f"import json\nresult = None\n{code}\nprint('\\n' + json.dumps(result, default=str))"
        return json.loads(self.manage("shell", "-v", "0", "-c", script).stdout.strip().splitlines()[-1])

    def create_admin(self, name: str = "admin", password: str = PASSWORD) -> str:
        """Make an admin unless there is one of this name, and return the name."""
        self.python(
            "from lmweb.models import User\n"
            f"User.objects.filter(username={name!r}).exists() or User.objects.create_superuser({name!r}, password={password!r})"
        )
        return name

    def create_user(self, name: str, password: str = PASSWORD, role: str = "member") -> str:
        """Make a person unless there is one of this name, and return the name."""
        self.python(
            "from lmweb.models import User\n"
            f"User.objects.filter(username={name!r}).exists() or User.objects.create_user({name!r}, password={password!r}, role={role!r})"
        )
        return name

    def create_token(self, user: str = "admin", name: str = "test", scopes: list[str] | None = None) -> str:
        """Make an API token and return its secret."""
        secret: str = self.python(
            "from lmweb.models import ApiToken, User\n"
            f"result = ApiToken.issue(user=User.objects.get(username={user!r}), name={name!r}, scopes={scopes!r})[1]"
        )
        return secret

    def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Return what a query finds in the installation's database."""
        with psycopg.connect(self.facts["database_url"], autocommit=True) as connection:
            return connection.execute(sql, parameters).fetchall()

    def evidence(self) -> list[tuple[str, str]]:
        """Return titles and texts that explain a failure: what runs, the nodes' heartbeats, and the end of every log."""
        found = [("installation", json.dumps({"facts": self.facts, "left": processes_of(self.data_dir)}, indent=1))]
        with contextlib.suppress(psycopg.OperationalError, KeyError):
            found.append(("nodes", "\n".join(map(str, self.rows("SELECT name, now() - heartbeat_at FROM workers_workernode")))))
            columns = "id, status, node, seq, created_at, lease_until, error_message"
            newest = self.rows(f"SELECT {columns} FROM models_app_generation ORDER BY created_at DESC LIMIT 5")
            found.append(("newest generations", "\n".join(map(str, newest))))
        files = [self.output, *sorted(self.data_dir.glob("logs/*.log"))]
        return found + [(f"end of {file.name}", file.read_text(errors="replace")[-3000:]) for file in files if file.exists()]

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to one of its processes and return the process id it had."""
        pid = self.processes[name]
        os.kill(pid, number)
        return pid

    def wait_healthy(self, timeout: float = 45) -> None:
        """Wait until every process runs, the page answers and the GPU worker is registered."""
        deadline = time.monotonic() + timeout
        while not self.healthy():
            assert time.monotonic() < deadline, f"not healthy again: {self.facts}\n{self.printed}"
            time.sleep(0.1)

    def healthy(self) -> bool:
        """Whether everything runs and answers right now."""
        from lmweb.supervisor.programs import answers

        if set(self.processes) != PROCESSES or not all(map(alive, self.processes.values())):
            return False
        host, port = self.base_url.removeprefix("http://").rsplit(":", 1)
        if not answers(host, int(port)):
            return False
        with contextlib.suppress(psycopg.OperationalError):
            born = psutil.Process(self.processes["gpu-worker"]).create_time()
            beating = "SELECT 1 FROM workers_workernode WHERE heartbeat_at > now() - interval '5 seconds' AND started_at > to_timestamp(%s)"
            return bool(self.rows(beating, born))
        return False


def alive(pid: int) -> bool:
    """Whether a process with this id runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def processes_of(data_dir: Path) -> list[str]:
    """Return the command lines of all processes that belong to an installation: that name it, or carry it in their environment."""
    found = []
    needle = os.fsencode(data_dir)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            if needle in command or b"LMWEB_DATA_DIR=" + needle in (entry / "environ").read_bytes():
                found.append(f"{entry.name} {command.replace(bytes(1), b' ').decode(errors='replace')}")
    return found
