"""Measures two models that take turns in memory that holds one of them, wanted by six users, against plain first come, first served.

    .venv/bin/python bench/switching.py [--seconds 45] [--write]

Each user asks one thing after the other, each time one of the two models by chance (the same chances in both runs). An
installation runs with ``LMWEB_MODEL_TURN_SECONDS`` at its default, then one at 0. Then every model is loaded alone and unloaded,
to see that its memory returns. ``--write`` replaces the section in bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.make_gguf import CHATML, PRESETS, Vocabulary, write_model  # noqa: E402
from bench.startup import start, stop, write  # noqa: E402
from lmweb.supervisor import discovery  # noqa: E402

HEADING = "## Two models, memory for one"
USERS = 6
MAX_TOKENS = 16
MODELS = ("bench/a", "bench/b")


@dataclass
class Seen:
    """What the users of one run saw: waits for the first text in seconds, by user, and what went wrong."""

    waits: list[list[float]] = field(default_factory=lambda: [[] for _ in range(USERS)])
    failures: list[str] = field(default_factory=list)
    switches: int = 0
    seconds: float = 0.0


class Installation:
    """A running server with two models and memory for one of them."""

    def __init__(self, folder: Path, turn_seconds: int) -> None:
        self.data_dir = folder / f"turn-{turn_seconds}"
        self.folder = folder
        self.turn_seconds = turn_seconds

    def __enter__(self) -> Self:
        """Start without a limit, import, and start again with the memory for one and a half models."""
        running = start(sys.executable, REPOSITORY, self.data_dir)
        for key in MODELS:
            self.manage("import_model", str(self.folder / f"{key[-1]}.gguf"), "--copy", "--user-repo", key)
        needed = max(json.loads(self.manage("estimate", key, "--json"))["neededBytes"] for key in MODELS)
        self.manage("user", "create", "bench", "--role", "admin", "--password-stdin")
        self.token = self.manage("token", "create", "--user", "bench", "--name", "bench").strip()
        stop(running)
        limit = {"LMWEB_MODEL_MEMORY_MB": str(int(1.5 * needed / 1e6)), "LMWEB_AUTO_EVICT": "needed"}
        settings = {**limit, "LMWEB_MODEL_TURN_SECONDS": str(self.turn_seconds)}
        self.running = start(sys.executable, REPOSITORY, self.data_dir, environment=settings)
        self.url = discovery.read(self.data_dir)["url"].removeprefix("http://")
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        stop(self.running)

    def manage(self, *arguments: str) -> str:
        """Run a command and return what it prints."""
        command = [sys.executable, str(REPOSITORY / "manage.py"), *arguments, "--data-dir", str(self.data_dir)]
        return subprocess.run(command, check=True, capture_output=True, text=True, input="a-bench-password-1\n").stdout

    def ask(self, model: str, prompt: str) -> float:
        """Stream one whole answer and return the time to its first text. Raises ``RuntimeError`` for anything but an answer."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True, "max_tokens": MAX_TOKENS}
        connection = http.client.HTTPConnection(self.url, timeout=250)
        began, first, text = time.perf_counter(), 0.0, ""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps({**body, "temperature": 0, "ignore_eos": True}), headers)
        response = connection.getresponse()
        while line := response.readline():
            text = line.decode() if line.strip() and not line.startswith(b":") else text
            if not first and b'"content":"' in line and b'"content":""' not in line:
                first = time.perf_counter() - began
        connection.close()
        if response.status != 200 or not first or "[DONE]" not in text:
            raise RuntimeError(f"{response.status}: {text[:200]}")
        return first

    def switches(self) -> int:
        """Return how often one model had to leave for the other."""
        return (self.data_dir / "logs" / "gpu-worker.log").read_text(errors="replace").count("workers.loader: unloading bench/")


def run(installation: Installation, seconds: float) -> Seen:
    """Let the users ask until the time is over, and wait for their last answers."""
    seen = Seen()
    until = time.perf_counter() + seconds

    def user(number: int) -> None:
        chance = random.Random(number)
        while time.perf_counter() < until:
            try:
                seen.waits[number].append(installation.ask(chance.choice(MODELS), f"User {number} asks {chance.random()}"))
            except (RuntimeError, OSError, http.client.HTTPException) as error:
                seen.failures.append(str(error))

    began = time.perf_counter()
    threads = [threading.Thread(target=user, args=(number,)) for number in range(USERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen.seconds = time.perf_counter() - began
    seen.switches = installation.switches()
    return seen


def memory_returns(installation: Installation) -> list[str]:
    """Load and unload each model; return a table of the memory that processes of this installation hold."""
    installation.manage("unload", "--all")
    rows = ["", "| Memory of all processes (PSS) | before MB | loaded MB | unloaded MB |", "|---|---|---|---|"]
    for key in MODELS:
        sizes = [_pss(installation)]
        for command in ("load", "unload"):
            installation.manage(command, key)
            time.sleep(0.5)
            sizes.append(_pss(installation))
        rows.append(f"| {key} | " + " | ".join(f"{size / 1e6:.0f}" for size in sizes) + " |")
    return rows


def _pss(installation: Installation) -> int:
    family = [process for process in psutil.Process(installation.running.process.pid).children(recursive=True) if process.is_running()]
    total = 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return total


def table(results: dict[str, Seen]) -> list[str]:
    """Return the results as Markdown."""
    head = ["| | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]

    def row(name: str, value: Any) -> str:
        return f"| {name} | " + " | ".join(value(seen) for seen in results.values()) + " |"

    def waits(seen: Seen) -> list[float]:
        return sorted(wait for each in seen.waits for wait in each)

    return [
        *head,
        row("answers; failed", lambda s: f"{len(waits(s))}; {len(s.failures)}"),
        row("switches; answers per switch", lambda s: f"{s.switches}; {len(waits(s)) / max(1, s.switches):.1f}"),
        row("answers per second", lambda s: f"{len(waits(s)) / s.seconds:.2f}"),
        row("wait for the first text: median; p95; longest", lambda s: "; ".join(_seconds(waits(s), share) for share in (0.5, 0.95, 1.0))),
        row("answers per user: fewest to most", lambda s: f"{min(map(len, s.waits))} to {max(map(len, s.waits))}"),
    ]


def _seconds(values: list[float], share: float) -> str:
    return f"{values[min(len(values) - 1, int(share * len(values)))]:.1f} s" if values else "-"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--write", action="store_true", help="replace the section in RESULTS.md")
    options = parser.parse_args()
    results: dict[str, Seen] = {}
    with tempfile.TemporaryDirectory(prefix="lmweb-switching-") as temporary:
        folder = Path(temporary)
        vocabulary = Vocabulary.read(REPOSITORY / "models_app" / "starter" / "lmweb-starter.gguf")
        for number, key in enumerate(MODELS):
            file = folder / f"{key[-1]}.gguf"
            write_model(file, PRESETS["small"], vocabulary, architecture="qwen2", name=key, context=4096, seed=number, chat_template=CHATML)
        for name, turn in (("first come, first served", 0), ("turns (default)", 30)):
            with Installation(folder, turn) as installation:
                results[name] = run(installation, options.seconds)
                returned = memory_returns(installation)
    load = " / ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, load {load} at the end.",
        f"{USERS} users, {options.seconds:.0f} s, answers of {MAX_TOKENS} tokens, either model by chance; one switch is one unload and one load.",
        "",
        *table(results),
        *returned,
    ]
    waits = [wait for seen in results.values() for each in seen.waits for wait in each]
    print("\n".join([*lines, f"({statistics.fmean(waits):.2f} s mean wait)"]))
    for seen in results.values():
        for failure in seen.failures[:3]:
            print(failure)
    if options.write:
        write(lines, HEADING, "bench/switching.py")


if __name__ == "__main__":
    main()
