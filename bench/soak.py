"""Two thousand mixed requests against a fresh installation: does memory stay flat, and is anything left behind?

    .venv/bin/python bench/soak.py [--requests 2000] [--write]

Several people at once stream, ask without streaming, go away in the middle, send long prompts and schemas, repeat conversations and ask
for embeddings. Memory is read at intervals, for each process. At the end nothing may be left: no unfinished generation, no lease, no
sequence in a runner, no stream that does not expire, no connection. Exits with 1 if anything is. ``--write`` replaces the section in
bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import psycopg
import redis

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench import make_bert, make_gguf  # noqa: E402
from bench.loadgen import BadAnswer, Endpoint, chat, post, words  # noqa: E402
from bench.scenarios import SCHEMA  # noqa: E402
from bench.servers import Product  # noqa: E402
from bench.startup import write  # noqa: E402
from lmweb.supervisor import discovery  # noqa: E402
from workers.engines.kv_park import MAX_STATES  # noqa: E402

HEADING = "## Soak"
PEOPLE = 6
SIDE_BY_SIDE = 12
READINGS = 8
SETTLE_SECONDS = 60
#: How much larger than early on, once the runner has about as many parked states as it keeps, a process may be at the end.
GROWTH_BYTES = 24 * 1024 * 1024

#: What people ask for, and how often.
KINDS = {"stream": 30, "at once": 20, "leave": 15, "schema": 10, "long": 10, "conversation": 10, "embeddings": 5}


class Soak:
    """The requests, and what they were."""

    def __init__(self, product: Product, requests: int) -> None:
        self._product = product
        self._requests = requests
        self._random = random.Random(1)
        self.kinds: Counter[str] = Counter()
        self.failures: list[str] = []
        self.readings: list[tuple[int, dict[str, int]]] = []

    async def run(self) -> None:
        """Send all of them."""
        queue = list(range(self._requests))
        due = [self._requests * i // READINGS for i in range(1, READINGS + 1)]

        async def person(user: int) -> None:
            while queue:
                number = queue.pop()
                await self._one(user % PEOPLE)
                if due and self._requests - number >= due[0]:
                    due.pop(0)
                    self.readings.append((self._requests - number, memory(self._product)))

        await asyncio.gather(*(person(user) for user in range(SIDE_BY_SIDE)))

    async def _one(self, user: int) -> None:
        (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
        self.kinds[kind] += 1
        try:
            await self._send(kind, self._product.endpoint("micro"), user)
        except (BadAnswer, OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            self.failures.append(f"{kind}: {type(error).__name__}: {str(error)[:200]}")

    async def _send(self, kind: str, endpoint: Endpoint, user: int) -> None:
        draw = self._random
        messages = [{"role": "user", "content": words(draw.randint(3, 60), draw)}]
        options = {"temperature": draw.choice([0, 0.8]), "ignore_eos": True}
        match kind:
            case "stream":
                await chat(endpoint, messages, max_tokens=draw.randint(1, 80), user=user, options=options)
            case "at once":
                await post(endpoint, "/chat/completions", {"messages": messages, "max_tokens": draw.randint(1, 80), **options}, user=user)
            case "leave":
                leaving = asyncio.create_task(chat(endpoint, messages, max_tokens=1500, user=user, options=options))
                await asyncio.wait({leaving}, timeout=draw.uniform(0.0, 0.5))
                leaving.cancel()
                await asyncio.gather(leaving, return_exceptions=True)
            case "schema":
                response_format = {"type": "json_schema", "json_schema": {"name": "things", "schema": SCHEMA}}
                await chat(endpoint, messages, max_tokens=60, user=user, options={**options, "response_format": response_format})
            case "long":
                await chat(endpoint, [{"role": "user", "content": words(draw.randint(400, 700), draw)}], max_tokens=8, user=user)
            case "conversation":
                for _ in range(3):
                    answer = await chat(endpoint, messages, max_tokens=16, user=user)
                    messages = [*messages, {"role": "assistant", "content": answer.text}, {"role": "user", "content": words(10, draw)}]
            case "embeddings":
                texts = [words(draw.randint(3, 60), draw) for _ in range(draw.randint(1, 20))]
                await post(self._product.endpoint("bert"), "/embeddings", {"input": texts}, user=user)


def memory(product: Product) -> dict[str, int]:
    """Return the resident bytes of each process that an installation consists of; PostgreSQL as the sum of its processes' own pages."""
    found: Counter[str] = Counter()
    names = {pid: name for name, pid in discovery.read(product.data_dir).get("processes", {}).items()}
    root = psutil.Process(product.pid)
    for process in (root, *root.children(recursive=True)):
        try:
            lineage = [process.pid, *(parent.pid for parent in process.parents())]
            name = next((names[pid] for pid in lineage if pid in names), "supervisor")
            if process.name().startswith("python") and "workers.runner" in process.cmdline():
                name = "runners"
            info = process.memory_full_info()
            found[name] += info.uss if name == "postgres" else info.rss
        except psutil.Error:
            continue
    return dict(found)


def leftovers(product: Product) -> list[str]:
    """Return what is still there that should have ended, in words."""
    facts = discovery.read(product.data_dir)
    left = []
    with psycopg.connect(facts["database_url"]) as database:
        queries = {
            "unfinished generations": "SELECT count(*) FROM models_app_generation WHERE status IN ('queued', 'running')",
            "leases": "SELECT count(*) FROM models_app_generation WHERE lease_until IS NOT NULL",
            "inputs of embeddings kept": "SELECT count(*) FROM models_app_generation WHERE request ? 'inputs'",
            "connections in a transaction": "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'",
        }
        for name, query in queries.items():
            row = database.execute(query).fetchone()
            if row and row[0]:
                left.append(f"{row[0]} {name}")
    broker = redis.Redis.from_url(facts["redis_url"])
    streams = list(broker.scan_iter("gen:*"))
    lasting = [key for key in streams if not 0 <= broker.ttl(key) <= 15 * 60]
    left += [f"{len(lasting)} streams that stay"] if lasting else []
    queues = [key for key in broker.scan_iter("gpu.*") if broker.type(key) == b"list" and broker.llen(key)]
    return left + ([f"{len(queues)} queues with messages"] if queues else [])


async def idle_runners(product: Product) -> list[str]:
    """Return the runners that are busy although nobody asks for anything."""
    root = psutil.Process(product.pid)
    runners = [process for process in root.children(recursive=True) if "workers.runner" in process.cmdline()]
    before = [sum(process.cpu_times()[:2]) for process in runners]
    await asyncio.sleep(5)
    spent = [sum(process.cpu_times()[:2]) - earlier for process, earlier in zip(runners, before, strict=True)]
    return [f"a runner that used {seconds:.1f} s of 5 while idle" for seconds in spent if seconds > 0.5]


async def soak(product: Product, requests: int) -> tuple[Soak, list[str]]:
    """Run everything; return it, and what was wrong."""
    await chat(product.endpoint("micro"), [{"role": "user", "content": "Hello"}], max_tokens=8)
    running = Soak(product, requests)
    await running.run()
    for _ in range(SETTLE_SECONDS):
        left = leftovers(product)
        if not left:
            break
        await asyncio.sleep(1)
    left += await idle_runners(product)
    # A slot, or cells, that were lost would be missed now.
    await asyncio.gather(
        *(
            chat(product.endpoint("micro"), [{"role": "user", "content": f"{n} {words(150, random.Random(n))}"}], max_tokens=40)
            for n in range(16)
        )
    )
    running.readings.append((requests, memory(product)))
    early = running.readings[READINGS // 4][1]
    last = running.readings[-1][1]
    for name, size in last.items():
        if size - early.get(name, size) > GROWTH_BYTES:
            left.append(f"{name} grew by {(size - early.get(name, size)) / 1e6:.0f} MB")
    return running, left


def section(running: Soak, wrong: list[str], seconds: float) -> list[str]:
    """Return the lines of the section in RESULTS.md."""
    names = sorted(running.readings[-1][1])
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(running.kinds.items()))
    machine = (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    )
    lines = [
        f"{machine}; micro models, {PEOPLE} people, {SIDE_BY_SIDE} requests side by side, {seconds:.0f} s.",
        f"Requests: {kinds}. Failed: {len(running.failures)}. Left behind: {'; '.join(wrong) or 'nothing'}.",
        f"The runner keeps the KV of at most {MAX_STATES} finished conversations (and at most a tenth of the machine's memory).",
        "",
        "| Requests, memory in MB | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    return lines + [
        f"| {done} | " + " | ".join(f"{sizes.get(name, 0) / 1e6:.0f}" for name in names) + " |" for done, sizes in running.readings
    ]


def main() -> int:
    """Run, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--write", action="store_true", help="replace the section in bench/RESULTS.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lmweb-soak-") as name:
        vocabulary = make_gguf.Vocabulary.read(REPOSITORY / "models_app" / "starter" / "lmweb-starter.gguf")
        files = {
            "micro": make_gguf.write_model(Path(name) / "micro.gguf", make_gguf.PRESETS["micro"], vocabulary, name="micro"),
            "bert": make_bert.write_bert(Path(name) / "bert.gguf", make_bert.PRESETS["micro"]),
        }
        product = Product(files, threads=1, context=2048, people=PEOPLE)
        began = time.monotonic()
        try:
            running, wrong = asyncio.run(soak(product, options.requests))
        finally:
            product.stop()
    lines = section(running, wrong, time.monotonic() - began)
    print("\n".join([*lines, *running.failures[:20]]))
    if options.write:
        write(lines, HEADING, "bench/soak.py")
    return 1 if wrong or running.failures else 0


if __name__ == "__main__":
    sys.exit(main())
