"""Measures what a person waits for and what an idle installation costs: start times, memory per process, size on disk.

    .venv/bin/python bench/startup.py            second starts, memory, sizes
    .venv/bin/python bench/startup.py --cold     also from a fresh clone with no environment (minutes: compiles llama.cpp)

Replaces the section "Start and footprint" of bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from lmweb.supervisor import discovery  # noqa: E402

HEADING = "## Start and footprint"
IDLE_SECONDS = 20
#: A first start compiles llama.cpp.
START_SECONDS = 1800


@dataclass
class Running:
    """One ``manage.py up``."""

    process: subprocess.Popen[bytes]
    seconds: float


def start(python: str, repository: Path, data_dir: Path, *, environment: Mapping[str, str] | None = None) -> Running:
    """Start and wait until the page answers and the GPU worker is registered (that is when ``up`` says it is ready).

    ``environment`` are settings of ours; those of the caller's environment do not count.
    """
    began = time.monotonic()
    variables = {name: value for name, value in os.environ.items() if not name.startswith("LMWEB_")} | dict(environment or {})
    with (data_dir.parent / "up.out").open("ab") as output:
        command = [python, str(repository / "manage.py"), "up", "--data-dir", str(data_dir), "--port", "0"]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
    facts: dict[str, Any] = {}
    while facts.get("pid") != process.pid or not facts.get("ready"):
        if process.poll() is not None or time.monotonic() - began > START_SECONDS:
            sys.exit((data_dir.parent / "up.out").read_text())
        time.sleep(0.02)
        facts = discovery.read(data_dir)
    return Running(process, time.monotonic() - began)


def stop(running: Running) -> float:
    """Stop it with Ctrl-C and return how long that took, in seconds."""
    began = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    running.process.wait(60)
    return time.monotonic() - began


def memory(pid: int) -> dict[str, tuple[int, int]]:
    """Return RSS and PSS in bytes of a process and its descendants, by a name for each."""
    found: dict[str, tuple[int, int]] = {}
    pending = [(pid, "supervisor")]
    names = {number: name for name, number in discovery.read(Path(os.environ["BENCH_DATA_DIR"])).get("processes", {}).items()}
    while pending:
        number, inherited = pending.pop()
        name = names.get(number, inherited)
        rollup = Path(f"/proc/{number}/smaps_rollup").read_text()
        sizes = {key: int(value) * 1024 for key, value in re.findall(r"^(Rss|Pss):\s+(\d+)", rollup, re.MULTILINE)}
        rss, pss = found.get(name, (0, 0))
        found[name] = (rss + sizes["Rss"], pss + sizes["Pss"])
        for task in Path(f"/proc/{number}/task").iterdir():
            pending += [(int(child), name) for child in (task / "children").read_text().split()]
    return found


def size(path: Path) -> int:
    """Return the bytes on disk below a directory."""
    return sum(file.lstat().st_blocks * 512 for file in path.rglob("*") if not file.is_dir())


def measure(cold: bool) -> list[str]:
    """Run everything and return the lines of the section."""
    lines = [
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}.",
        "",
    ]
    lines += ["| What | Measured |", "|---|---|"]
    with tempfile.TemporaryDirectory(prefix="lmweb-bench-") as folder:
        repository, python = REPOSITORY, sys.executable
        if cold:
            repository = Path(folder) / "clone"
            subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(repository)], check=True)
            os.environ |= {"PIP_NO_CACHE_DIR": "1", "UV_NO_CACHE": "1"}
            before = os.times()
            running = start(shutil.which("python3") or "python3", repository, Path(folder) / "first")
            lines.append(f"| fresh clone, no environment, to the set-up page | {running.seconds / 60:.1f} min |")
            stop(running)
            after = os.times()
            spent = after.children_user + after.children_system - before.children_user - before.children_system
            lines.append(f"| of which processor time, all cores together | {spent / 60:.1f} min |")
            python = str(repository / ".venv" / "bin" / "python")
            lines.append(f"| the environment on disk | {size(repository / '.venv') / 1e6:.0f} MB |")
        data_dir = Path(folder) / "data"
        os.environ["BENCH_DATA_DIR"] = str(data_dir)
        running = start(python, repository, data_dir)
        lines.append(f"| first start with an environment, empty data directory | {running.seconds:.1f} s |")
        environment = os.environ | {"DJANGO_SUPERUSER_PASSWORD": "bench-startup-word"}
        command = [
            python,
            str(repository / "manage.py"),
            "createsuperuser",
            "--noinput",
            "--username",
            "bench",
            "--email",
            "bench@example.org",
        ]
        subprocess.run([*command, "--data-dir", str(data_dir)], env=environment, check=True, stdout=subprocess.DEVNULL)
        stop(running)
        starts, stops = [], []
        for _ in range(5):
            running = start(python, repository, data_dir)
            starts.append(running.seconds)
            if len(starts) < 5:
                stops.append(stop(running))
        lines.append(f"| second start (median of 5; slowest) | {statistics.median(starts):.1f} s; {max(starts):.1f} s |")
        time.sleep(IDLE_SECONDS)
        used = memory(running.process.pid)
        stops.append(stop(running))
        lines.append(f"| stop on Ctrl-C (median) | {statistics.median(stops):.1f} s |")
        lines.append(f"| memory idle, all processes: PSS; sum of RSS | {megabytes(used, 1)} MB; {megabytes(used, 0)} MB |")
        lines += ["", "| Idle process | PSS MB | RSS MB |", "|---|---|---|"]
        lines += [f"| {name} | {pss / 1e6:.0f} | {rss / 1e6:.0f} |" for name, (rss, pss) in sorted(used.items())]
    return lines


def megabytes(used: dict[str, tuple[int, int]], index: int) -> str:
    """Return the sum of one kind of memory over all processes."""
    return f"{sum(sizes[index] for sizes in used.values()) / 1e6:.0f}"


def write(lines: list[str], heading: str = HEADING, script: str = "bench/startup.py") -> None:
    """Replace a section in RESULTS.md, leaving the others alone."""
    file = REPOSITORY / "bench" / "RESULTS.md"
    text = file.read_text() if file.exists() else "# Measurements\n"
    section = "\n".join([heading, "", f"`{script}`.", *lines, ""])
    pattern = re.compile(rf"^{heading}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    text = pattern.sub(lambda _: section + "\n", text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}"
    file.write_text(text.rstrip() + "\n")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cold", action="store_true", help="also measure a fresh clone")
    lines = measure(parser.parse_args().cold)
    print("\n".join(lines))
    write(lines)


if __name__ == "__main__":
    main()
