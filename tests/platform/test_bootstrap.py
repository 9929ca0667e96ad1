"""Making the environment: decided from the marker, real venv and pip, with small wheels made here instead of the real packages."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from lmweb import bootstrap

REAL_BUNDLED_PIP = bootstrap.bundled_pip


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> str:
    """Write a wheel and return its entry in a lock file."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip('=')},{len(text)}\n"
        for path, text in files.items()
    )
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in files.items():
            archive.writestr(inner, text)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n    # via test\n"


TRANSFORMERS = {f"transformers/models/{name}": "" for name in ("__init__.py", "auto/__init__.py", "bert/__init__.py", "bert/model.py")}


class Checkout:
    """A repository with a lock file of two packages, one of them called like the compiled one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.wheels = root / "wheels"
        self.venv = root / ".venv"
        self.wheels.mkdir(parents=True)
        (root / "requirements").mkdir()
        self.engine = wheel(
            self.wheels, "llama-cpp-python", "0.1", {"llama_cpp/__init__.py": "", "lib/libggml.so": "copy", "include/ggml.h": "header"}
        )
        self.lock("1.0")
        (root / "requirements" / "dev.txt").write_text(wheel(self.wheels, "tool", "1.0", {"tool.py": ""}))
        (root / "requirements" / "mlx.txt").write_text(wheel(self.wheels, "mlx-lm", "1.0", {"mlx_lm.py": "", **TRANSFORMERS}))

    def lock(self, version: str) -> None:
        small = wheel(self.wheels, "small", version, {"small.py": f"version = {version!r}\n"})
        (self.root / "requirements" / "runtime.txt").write_text(self.engine + small)

    def make(self, *, dev: bool = False) -> None:
        bootstrap.make(self.root, self.venv, dev=dev)

    def complete(self, *, dev: bool = False) -> bool:
        return not bootstrap.missing(self.venv, bootstrap.wanted(self.root, self.venv, dev=dev))

    def python(self, code: str) -> str:
        return subprocess.run([self.venv / "bin" / "python", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="session")
def unpacked_pip(tmp_path_factory):
    """Unpack the pip that came with Python: started from its wheel it takes seconds each time."""
    found = bootstrap.bundled_pip()
    if found is None:
        return None
    folder = tmp_path_factory.mktemp("pip")
    with zipfile.ZipFile(found) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def checkout(tmp_path, monkeypatch, unpacked_pip):
    for name in ("LMWEB_GPU", "LMWEB_MLX", "CMAKE_ARGS", "PIP_INDEX_URL", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    made = Checkout(tmp_path / "check out")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", made.wheels.as_uri())
    if unpacked_pip is not None:
        monkeypatch.setattr(bootstrap, "bundled_pip", lambda: unpacked_pip)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name, which=shutil.which: None if name == "uv" else which(name))
    return made


def test_from_nothing_to_complete_then_nothing_to_do(checkout, capsys):
    assert not checkout.complete()
    checkout.make()
    assert checkout.complete()
    assert checkout.python("import small, llama_cpp; print(small.version)") == "1.0"
    printed = capsys.readouterr().out
    assert "packages" in printed
    assert "complete after" in printed
    marker = (checkout.venv / bootstrap.MARKER).stat().st_mtime_ns
    checkout.make()
    assert (checkout.venv / bootstrap.MARKER).stat().st_mtime_ns == marker


def test_second_copies_and_headers_are_removed(checkout):
    checkout.make()
    packages = next(checkout.venv.glob("lib/python*/site-packages"))
    assert (packages / "llama_cpp" / "__init__.py").exists()
    assert not (packages / "lib").exists()
    assert not (packages / "include").exists()


def test_changed_lock_file_and_tools_are_followed(checkout):
    checkout.make()
    checkout.lock("2.0")
    assert not checkout.complete()
    checkout.make()
    assert checkout.python("import small; print(small.version)") == "2.0"
    assert not checkout.complete(dev=True)
    checkout.make(dev=True)
    assert checkout.python("import tool, mlx_lm; print('there')") == "there"
    assert checkout.complete(dev=False), "the tools do no harm to other commands"


def test_the_mlx_engine_comes_when_asked_for_and_stays(checkout, monkeypatch):
    checkout.make()
    monkeypatch.setenv("LMWEB_MLX", "on")
    assert not checkout.complete()
    checkout.make()
    assert checkout.python("import mlx_lm, transformers.models.auto; print('there')") == "there"
    models = next(checkout.venv.glob("lib/python*/site-packages/transformers/models"))
    assert not (models / "bert").exists(), "the models of transformers are not run"
    monkeypatch.delenv("LMWEB_MLX")
    assert checkout.complete(), "once is enough"
    checkout.lock("2.0")
    checkout.make()
    assert bootstrap.read_state(checkout.venv).mlx


def test_interrupted_one_is_made_anew(checkout):
    checkout.make()
    (checkout.venv / bootstrap.UNFINISHED).touch()
    (checkout.venv / "rubbish").touch()
    assert not checkout.complete()
    checkout.make()
    assert checkout.complete()
    assert not (checkout.venv / "rubbish").exists()


def test_wrong_hash_is_refused_with_the_log_named(checkout):
    wheel(checkout.wheels, "small", "1.0", {"small.py": "raise SystemExit('not the locked one')"})
    with pytest.raises(bootstrap.BootstrapError, match=bootstrap.LOG):
        checkout.make()
    assert not checkout.complete()


def test_gpu_is_rebuilt_when_asked_and_kept_when_not(checkout, monkeypatch):
    checkout.make()
    ran = []
    original = bootstrap.run

    def record(command, variables, log, progress):
        ran.append((command, variables.get("CMAKE_ARGS", "")))
        return original(command, variables, log, progress)

    monkeypatch.setattr(bootstrap, "run", record)
    monkeypatch.setenv("LMWEB_GPU", "vulkan")
    assert not checkout.complete()
    checkout.make()
    command, flags = ran[-1]
    assert flags.split()[-1] == "-DGGML_VULKAN=on"
    assert {"--force-reinstall", "--no-cache-dir"} <= set(command)
    monkeypatch.delenv("LMWEB_GPU")
    assert checkout.complete()
    monkeypatch.setenv("LMWEB_GPU", "toaster")
    with pytest.raises(bootstrap.BootstrapError, match="cpu, cuda, metal, vulkan, rocm"):
        checkout.complete()


def test_the_engine_is_compiled_anew_for_another_processor_and_by_another_recipe(checkout, monkeypatch):
    """An environment, or an installer's cache, that came from another machine may hold instructions that this one lacks."""
    checkout.make()
    commands = []
    original = bootstrap.run
    monkeypatch.setattr(bootstrap, "run", lambda command, *rest: commands.append(command) or original(command, *rest))
    monkeypatch.setattr(bootstrap, "processor", lambda: "x86_64 avx2")
    assert not checkout.complete()
    checkout.make()
    first, again = commands[-1], bootstrap.engine_cache(bootstrap.read_state(checkout.venv))
    assert "--force-reinstall" in first
    assert again in first, "its wheel is kept apart from those of other processors"
    changed = checkout.root / "amx.h"
    changed.write_text("// another one\n")
    monkeypatch.setattr(bootstrap, "RECIPE", (*bootstrap.RECIPE[:2], changed))
    assert not checkout.complete()
    assert bootstrap.engine_cache(bootstrap.wanted(checkout.root, checkout.venv, dev=False)) != again


def test_an_engine_for_any_processor_stays_on_another_one(checkout, monkeypatch):
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
    checkout.make()
    monkeypatch.delenv("CMAKE_ARGS")
    monkeypatch.setattr(bootstrap, "processor", lambda: "x86_64 avx2")
    assert checkout.complete()


def test_missing_compiler_and_cmake_are_named_before_anything_is_done(checkout, monkeypatch):
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(bootstrap.BootstrapError, match=r"a C/C\+\+ compiler and cmake"):
        checkout.make()
    assert not checkout.venv.exists()


def test_failing_uv_falls_back_to_pip(checkout, monkeypatch, tmp_path, capsys):
    broken = tmp_path / "uv"
    broken.write_text("#!/bin/sh\necho broken\nexit 2\n")
    broken.chmod(0o755)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name, which=shutil.which: str(broken) if name == "uv" else which(name))
    checkout.make()
    assert checkout.complete()
    assert "uv failed" in capsys.readouterr().out


def test_without_any_pip_the_pinned_one_is_fetched(checkout, monkeypatch):
    bundled = REAL_BUNDLED_PIP()
    if bundled is None:
        pytest.skip("this Python brings no pip to serve")
    page = checkout.root / "index" / "pip"
    page.mkdir(parents=True)
    shutil.copy(bundled, page / bundled.name)
    (page / "index.html").write_text(f'<a href="{bundled.name}#sha256=x">{bundled.name}</a>')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(page.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setattr(bootstrap, "bundled_pip", lambda: None)
        monkeypatch.setattr(bootstrap, "host_pip_version", lambda: ())
        monkeypatch.setattr(bootstrap, "PIP_WHEEL", bundled.name)
        with pytest.raises(bootstrap.BootstrapError, match="not the one that was expected"):
            checkout.make()
        monkeypatch.setattr(bootstrap, "PIP_SHA256", hashlib.sha256(bundled.read_bytes()).hexdigest())
        checkout.make()
        server.shutdown()
    assert checkout.complete()


def _make(root: str) -> None:
    here = Path(root)
    with bootstrap.locked(here):
        bootstrap.make(here, here / ".venv", dev=False)


def test_two_at_once_make_one(checkout):
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_make, args=(str(checkout.root),)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(90)
    assert [process.exitcode for process in both] == [0, 0]
    assert checkout.complete()
    assert (checkout.venv / bootstrap.LOG).read_text().count("llama_cpp_python-0.1") >= 1


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        (["[1/200] Building C object", "noise", "[50/200] Building CXX object"], " 25 %"),
        (["[ 12%] Building C object", "[ 88%] Linking"], " 88 %"),
        (["[200/200] Linking", "[1/3] something later"], "100 %"),
    ],
)
def test_progress_reads_what_the_compilers_say(lines, shown):
    out: list[str] = []
    progress = bootstrap.Progress("compiling", out=out.append)
    for line in lines:
        progress.line(line)
    progress.end(succeeded=False)
    assert shown in out[-1]


def test_locked_packages_with_several_versions_are_kept_together():
    entries = bootstrap.requirements(Path(bootstrap.__file__).parent.parent / "requirements" / "runtime.txt")
    assert entries["numpy"].count("numpy==") == 2
    assert "# via" not in "".join(entries.values())
    assert all("--hash=sha256:" in entry for entry in entries.values())


def test_marker_of_another_format_counts_as_none(checkout):
    (checkout.venv / "bin").mkdir(parents=True)
    (checkout.venv / "bin" / "python").touch()
    (checkout.venv / bootstrap.MARKER).write_text(json.dumps({"version": 9}))
    assert not checkout.complete()


def test_old_python_gets_a_sentence(tmp_path):
    source = (Path(bootstrap.__file__).parent.parent / "manage.py").read_text()
    file = tmp_path / "manage.py"
    file.write_text(source.replace("sys.version_info < (3, 11)", "True", 1))
    done = subprocess.run([sys.executable, file, "up"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr
