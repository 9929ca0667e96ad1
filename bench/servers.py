"""The two servers that ``bench/compare.py`` compares: ``llama-server``, built from our engine's own source, and this product."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from bench import engine_source, startup
from bench.loadgen import Endpoint
from lmweb.supervisor import discovery

REPOSITORY = Path(__file__).resolve().parent.parent
READY_SECONDS = 120.0


class Server(Protocol):
    """A running server."""

    def endpoint(self, model: str) -> Endpoint:
        """Return how to ask a model of ours by its short name; it is in memory then."""

    def cpu_seconds(self) -> float:
        """Return the processor time that all its processes have taken so far."""

    def stop(self) -> None:
        """End it."""


# --- llama-server -----------------------------------------------------------------------------------------------------


def llama_source(cache: Path) -> Path:
    """Return llama.cpp's source as llama-cpp-python's source distribution carries it, downloaded and checked by hash at the first call."""
    folder = cache / f"llama_cpp_python-{engine_source.version()}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as name:
            with tarfile.open(engine_source.download(Path(name))) as archive:
                archive.extractall(name, filter="data")
            (Path(name) / folder.name).rename(folder)
    return folder / "vendor" / "llama.cpp"


def build_llama_server(cache: Path) -> Path:
    """Return ``llama-server``, compiled at the first call (minutes) as our engine is: a release for this very processor."""
    source = llama_source(cache)
    build = cache / f"build-{engine_source.version()}"
    program = build / "bin" / "llama-server"
    if not program.exists():
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"]
        options += ["-DLLAMA_BUILD_UI=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF"]
        options.append(f"-DCMAKE_PROJECT_INCLUDE={REPOSITORY / 'requirements' / 'amx.cmake'}")
        subprocess.run(["cmake", "-S", str(source), "-B", str(build), *options, *os.environ.get("CMAKE_ARGS", "").split()], check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--target", "llama-server", "-j", jobs], check=True)
    return program


@dataclass
class LlamaServer:
    """One ``llama-server`` per model, started when it is first asked for, with the ``flags`` for that model."""

    program: Path
    files: Mapping[str, Path]
    threads: int
    flags: Callable[[str], Sequence[str]]
    _running: dict[str, tuple[subprocess.Popen[bytes], int]] = field(default_factory=dict)

    def endpoint(self, model: str) -> Endpoint:
        """Return how to ask a model."""
        if model not in self._running:
            port = _free_port()
            command = [str(self.program), "-m", str(self.files[model]), "--host", "127.0.0.1", "--port", str(port)]
            command += ["-t", str(self.threads), "-tb", str(self.threads), *self.flags(model)]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self._running[model] = process, port
            _wait_until_healthy(process, port)
        return Endpoint("127.0.0.1", self._running[model][1], model)

    def cpu_seconds(self) -> float:
        """Return the processor time of all of them."""
        return sum(_cpu_seconds(psutil.Process(process.pid)) for process, _ in self._running.values())

    def stop(self) -> None:
        """End all of them."""
        for process, _ in self._running.values():
            process.terminate()
            process.wait(30)
        self._running.clear()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"llama-server did not start (exit code {process.poll()})")


# --- this product -----------------------------------------------------------------------------------------------------


class Product:
    """A fresh installation in a temporary directory, with people, their tokens and the models imported."""

    def __init__(self, files: Mapping[str, Path], *, threads: int, context: int, people: int) -> None:
        """Start it. ``context`` is in tokens per request, ``threads`` per model."""
        self._folder = Path(tempfile.mkdtemp(prefix="lmweb-bench-"))
        self.data_dir = self._folder / "data"
        settings = {"LMWEB_CPU_THREADS": str(threads), "LMWEB_CONTEXT_LENGTH": str(context)}
        self._running = startup.start(sys.executable, REPOSITORY, self.data_dir, environment=settings)
        self._tokens = install(self.data_dir, files, people=people)
        facts = discovery.read(self.data_dir)
        host, port = facts["url"].removeprefix("http://").rsplit(":", 1)
        self._host, self._port = host, int(port)

    @property
    def pid(self) -> int:
        """Return the supervisor's process id."""
        return self._running.process.pid

    def endpoint(self, model: str) -> Endpoint:
        """Return how to ask a model."""
        return Endpoint(self._host, self._port, f"bench/{model}", self._tokens)

    def cpu_seconds(self) -> float:
        """Return the processor time of the supervisor and all that it has started."""
        return _cpu_seconds(psutil.Process(self.pid))

    def stop(self) -> None:
        """End it and remove its data."""
        startup.stop(self._running)
        shutil.rmtree(self._folder, ignore_errors=True)


def install(data_dir: Path, files: Mapping[str, Path], *, people: int = 1) -> list[str]:
    """Import models as ``bench/NAME`` into a running installation, make people, and return a token of each."""
    code = ["from pathlib import Path", "from lmweb.models import ApiToken, User", "from models_app import services"]
    for name, file in files.items():
        code.append(
            f"services.import_file(principal=None, source=Path({str(file)!r}), user_repo='bench/{name}', mode=services.Mode.SYMBOLIC_LINK)"
        )
    code.append(f"people = [User.objects.create_user(f'bench{{number}}') for number in range({people})]")
    code.append("for person in people: print('token ' + ApiToken.issue(user=person, name='bench')[1])")
    command = [sys.executable, str(REPOSITORY / "manage.py"), "shell", "-v", "0", "-c", "\n".join(code), "--data-dir", str(data_dir)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.split()[1] for line in printed.splitlines() if line.startswith("token ")]


def _cpu_seconds(process: psutil.Process) -> float:
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        try:
            times = each.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
