"""Compares this product with ``llama-server`` of the same llama.cpp source: same files, threads, slots and context, taking turns.

    .venv/bin/python bench/compare.py                      everything (about half an hour on two cores)
    .venv/bin/python bench/compare.py --only 'tiny-*'      some scenarios; the others keep their figures
    .venv/bin/python bench/compare.py --quick              one turn each, writes nothing

The product is measured through its HTTP API, with a token per person, in an installation of its own that is removed at the end.
``llama-server`` is compiled at the first run unless ``--llama-server`` names one. Figures are kept in bench/compare.json and
shown in bench/RESULTS.md. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import fnmatch
import math
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench import engine_source, make_bert, make_gguf  # noqa: E402
from bench.scenarios import CONTEXT, PEOPLE, SCENARIOS, WIDTHS, Contest, Row  # noqa: E402
from bench.servers import LlamaServer, Product, Server, build_llama_server, llama_source  # noqa: E402
from bench.startup import write  # noqa: E402
from lmweb import env  # noqa: E402
from workers.memory import kv_bytes_per_token, kv_cells  # noqa: E402

HEADING = "## Against llama-server"
FIGURES = REPOSITORY / "bench" / "compare.json"
SLOTS = 16


class Figures(msgspec.Struct, kw_only=True):
    """What a scenario gave, when, on what."""

    rows: list[Row]
    date: str
    machine: str
    versions: str
    threads: int
    rounds: int


def model_files(names: Iterable[str], cache: Path) -> dict[str, Path]:
    """Return the files of the models, written into the cache where they are missing."""
    files = {}
    for name in names:
        file = cache / f"{name}.gguf"
        files[name] = file
        if name == "starter":
            files[name] = REPOSITORY / "models_app" / "starter" / "lmweb-starter.gguf"
        elif not file.exists():
            fresh = cache / f"{name}.new"
            if name == "bert":
                make_bert.write_bert(fresh, make_bert.PRESETS["minilm"])
            else:
                vocabulary = make_gguf.Vocabulary.read(llama_source(cache) / "models" / "ggml-vocab-qwen2.gguf")
                make_gguf.write_model(fresh, make_gguf.PRESETS[name], vocabulary, name=name)
            fresh.rename(file)
    return files


class Rivals:
    """The ``llama-server`` of each set of flags, started when it is first asked for."""

    def __init__(self, program: Path, files: dict[str, Path], threads: int) -> None:
        self._program, self._files, self._threads = program, files, threads
        self._servers: dict[tuple[str, ...], LlamaServer] = {}

    def __call__(self, *flags: str) -> Server:
        """Return the one with these flags, as many slots as we have, and as long a context in each.

        With ``--kv-unified`` the slots share one KV cache; otherwise each has its own.
        """
        if flags not in self._servers:
            self._servers[flags] = LlamaServer(self._program, self._files, self._threads, lambda model: _rival_flags(model, flags))
        return self._servers[flags]

    def stop(self) -> None:
        """End all of them."""
        for server in self._servers.values():
            server.stop()


def _rival_flags(model: str, flags: tuple[str, ...]) -> tuple[str, ...]:
    cells = SLOTS * CONTEXT
    if "--kv-unified" in flags and (shape := make_gguf.PRESETS.get(model)):
        cells = kv_cells(CONTEXT, SLOTS, kv_bytes_per_token(shape.layers, shape.width, shape.heads, shape.kv_heads))
    return ("-np", str(SLOTS), "-c", str(cells), *flags)


def measure(names: list[str], options: argparse.Namespace) -> dict[str, Figures]:
    """Run scenarios and return what they gave."""
    program = options.llama_server or build_llama_server(options.cache)
    files = model_files(sorted({model for name in names for model in SCENARIOS[name].models}), options.cache)
    found = {}
    product = Product(files, threads=options.threads, context=CONTEXT, people=PEOPLE)
    rivals = Rivals(program, files, options.threads)
    try:
        for name in names:
            scenario = SCENARIOS[name]
            rounds = 1 if options.quick else options.rounds or scenario.rounds
            rows = asyncio.run(_run(name, Contest(product, rivals, rounds=rounds, quick=options.quick)))
            for row in rows:
                print(f"{name}: " + " | ".join([*_cells(row), row.notes]), flush=True)
            found[name] = Figures(
                rows=rows, date=time.strftime("%Y-%m-%d"), machine=machine(), versions=versions(), threads=options.threads, rounds=rounds
            )
    finally:
        rivals.stop()
        product.stop()
    return found


async def _run(name: str, contest: Contest) -> list[Row]:
    return await SCENARIOS[name].run(contest)


def machine() -> str:
    """Return what the figures depend on: processor, cores, memory."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), model)
    return f"{platform.system()} {platform.machine()}, {model}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def versions() -> str:
    """Return the versions of the engine on both sides and of Python."""
    return f"llama.cpp of llama-cpp-python {engine_source.version()}, Python {platform.python_version()}"


def merge(found: dict[str, Figures]) -> dict[str, dict[str, Any]]:
    """Add to the figures that are kept, and return all of them, by scenario and number of threads."""
    kept: dict[str, dict[str, Any]] = msgspec.json.decode(FIGURES.read_bytes()) if FIGURES.exists() else {}
    kept |= {f"{name} {figures.threads}": msgspec.to_builtins(figures) for name, figures in found.items()}
    FIGURES.write_bytes(msgspec.json.format(msgspec.json.encode(kept, order="sorted"), indent=1) + b"\n")
    return kept


def section(kept: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the section in RESULTS.md."""
    all_figures = {key: msgspec.convert(value, Figures) for key, value in kept.items()}
    lines = [
        f"`llama-server` of the same source as it comes, with the same file, threads, {SLOTS} slots and {CONTEXT} tokens per request. Its slots",
        "have a KV cache each, or share one where it says so. Our own build of the engine differs for CPUs (`requirements/attention.cmake`). Both",
        "servers run, and take turns; the product is asked over HTTP with a token per person. Medians; a ratio is that of each turn, then the",
        "median.",
        "Every answer has the number of tokens that was asked for, and both sides read the same prompts.",
    ]
    for threads in sorted({figures.threads for figures in all_figures.values()}):
        chosen = {name: all_figures[key] for name in SCENARIOS if (key := f"{name} {threads}") in all_figures}
        lines += ["", f"### {threads} engine {'thread' if threads == 1 else 'threads'}", ""]
        lines += sorted({f"{figures.machine}; {figures.versions}; {figures.date}." for figures in chosen.values()})
        lines += ["", "| Scenario | lmweb | llama-server | Ratio | Bar | |", "|---|---|---|---|---|---|"]
        for row in _with_means(chosen):
            lines.append("| " + " | ".join(_cells(row)) + " |")
        notes = [f"* {row.case}: {row.notes}." for figures in chosen.values() for row in figures.rows if row.notes]
        lines += ["", *notes]
    return lines


def _with_means(chosen: dict[str, Figures]) -> list[Row]:
    """Return all rows, with the geometric mean of the widths of a model after the widest."""
    rows: list[Row] = []
    for name, figures in chosen.items():
        rows += figures.rows
        model, _, width = name.partition("-")
        if width == str(WIDTHS[-1]) and all(f"{model}-{n}" in chosen for n in WIDTHS):
            speeds = [chosen[f"{model}-{n}"].rows[0] for n in WIDTHS]
            ours, theirs, ratio = (statistics.geometric_mean(getattr(row, side) for row in speeds) for side in ("ours", "theirs", "ratio"))
            bar, met = (">= 1x", ratio >= 1.0) if model == "small" else ("", None)
            case = f"{model}, geometric mean of the widths"
            rows.append(Row(case=case, unit="tokens/s", ours=ours, theirs=theirs, ratio=ratio, bar=bar, met=met))
    return rows


def _cells(row: Row) -> list[str]:
    verdict = {True: "reached", False: "**missed**", None: ""}[row.met]
    return [row.case, f"{_number(row.ours)} {row.unit}", f"{_number(row.theirs)} {row.unit}", f"{row.ratio:.3g}x", row.bar, verdict]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{max(0, 2 - int(math.log10(max(value, 1e-3))))}f}"


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="SCENARIO", help=f"with wildcards, more than once: {', '.join(SCENARIOS)}")
    parser.add_argument("--quick", action="store_true", help="one turn, keeps nothing")
    parser.add_argument("--rounds", type=int, help="turns, instead of each scenario's own number")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="of each engine (default: cores less one)")
    parser.add_argument("--llama-server", type=Path, help="one that is there already, of the same source")
    parser.add_argument("--cache", type=Path, default=env.data_dir() / "bench", help="where the source, the build and the models are kept")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    names = [name for name in SCENARIOS if any(fnmatch.fnmatch(name, wanted) for wanted in options.only or ["*"])]
    if not names:
        parser.error(f"no such scenario; there are {', '.join(SCENARIOS)}")
    if not options.llama_server and not shutil.which("cmake"):
        parser.error("cmake is needed to compile llama-server; or name one with --llama-server")
    found = measure(names, options)
    if not options.quick:
        write(section(merge(found)), HEADING, "bench/compare.py")


if __name__ == "__main__":
    main()
