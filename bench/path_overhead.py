"""Measures what the path adds to the first token: ``POST /v1/chat/completions`` against the engine alone, in this process.

    .venv/bin/python bench/path_overhead.py [--requests 200] [--write]

Both use the same micro model, the same settings and prompts that nobody has sent before, and take turns, so that whatever else
the machine does hits both. Run it on an idle machine. ``--write`` replaces the section in bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psycopg

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.make_gguf import CHATML, PRESETS, Vocabulary, write_model  # noqa: E402
from bench.servers import install  # noqa: E402
from bench.startup import start, stop, write  # noqa: E402
from lmweb.supervisor import discovery  # noqa: E402
from workers.engines import registry  # noqa: E402
from workers.engines.base import Engine, Sequence  # noqa: E402
from workers.schemas import ChatMessage, LoadConfig, SamplingParams  # noqa: E402
from workers.templates import ChatTemplate  # noqa: E402

HEADING = "## What the path adds to the first token"
GOAL_MS = 6.0
MAX_TOKENS = 4
WARM_UP = 20
SAMPLING = SamplingParams(temperature=0.0, repeat_penalty=1.0, seed=1, max_tokens=MAX_TOKENS, ignore_eos=True)


@dataclass
class Installation:
    """A running server and how to ask it."""

    connection: http.client.HTTPConnection
    token: str
    database_url: str

    def first_token_seconds(self, prompt: str) -> tuple[float, float, str]:
        """Stream one answer; return the time to its first text, when (epoch) it was sent, and its id."""
        body = json.dumps(
            {
                "model": "bench/micro",
                "messages": [{"role": "user", "content": prompt}],
                "stream": True,
                "max_tokens": MAX_TOKENS,
                "temperature": 0,
                "repeat_penalty": 1,
                "seed": 1,
                "ignore_eos": True,
            }
        )
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        sent_at, began = time.time(), time.perf_counter()
        self.connection.request("POST", "/v1/chat/completions", body, headers)
        response = self.connection.getresponse()
        first = None
        answer_id = ""
        while line := response.readline():
            if line.startswith(b'data: {"id"'):
                delta = json.loads(line[6:])
                answer_id = delta["id"]
                if first is None and delta["choices"][0]["delta"].get("content"):
                    first = time.perf_counter() - began
        if first is None:
            raise RuntimeError(f"no text came: status {response.status}")
        return first, sent_at, answer_id

    def load_config(self) -> LoadConfig:
        """Return how the server loaded the model, so that both engines are alike."""
        with psycopg.connect(self.database_url) as database:
            row = database.execute("SELECT config FROM models_app_modelinstance").fetchone()
        assert row is not None
        return msgspec.convert({name: value for name, value in row[0].items() if name in LoadConfig.__struct_fields__}, LoadConfig)


def bare_first_token_seconds(engine: Engine, template: ChatTemplate, prompt: str, number: int) -> float:
    """Return the time from a prompt as text to its first sampled token; the rest of the answer is computed and thrown away."""
    began = time.perf_counter()
    text = template.render([ChatMessage(role="user", content=prompt)])
    sequence = Sequence(str(number), "bench", engine.tokenize(text, add_bos=False), 0, SAMPLING, MAX_TOKENS)
    engine.add(sequence)
    while not sequence.output:
        engine.step(_go_on)
    first = time.perf_counter() - began
    while engine.has_work and len(sequence.output) < MAX_TOKENS:
        engine.step(_go_on)
    engine.remove(sequence.id)
    return first


def _go_on(_sequence: Sequence, _token: int, _logprob: object) -> bool:
    return True


def prepare(folder: Path) -> Path:
    """Write the model and return its file."""
    vocabulary = Vocabulary.read(REPOSITORY / "models_app" / "starter" / "lmweb-starter.gguf")
    return write_model(folder / "micro.gguf", PRESETS["micro"], vocabulary, name="micro", context=2048, seed=0, chat_template=CHATML)


def measure(requests: int) -> list[str]:
    """Run everything and return the lines of the section."""
    with tempfile.TemporaryDirectory(prefix="lmweb-bench-") as name:
        folder = Path(name)
        model = prepare(folder)
        running = start(sys.executable, REPOSITORY, folder / "data")
        with contextlib.ExitStack() as stack:
            stack.callback(stop, running)
            (token,) = install(folder / "data", {"micro": model})
            facts = discovery.read(folder / "data")
            host, port = facts["url"].removeprefix("http://").rsplit(":", 1)
            connection = stack.enter_context(contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=60)))
            server = Installation(connection, token, facts["database_url"])
            server.first_token_seconds("Load the model.")
            engine = registry.factory("llama.cpp")(str(model), server.load_config(), lambda _fraction: None)
            stack.callback(engine.close)
            return _compare(server, engine, requests)


def _compare(server: Installation, engine: Engine, requests: int) -> list[str]:
    template = ChatTemplate(engine.info.chat_template, bos_token=engine.info.bos_text, eos_token=engine.info.eos_text)
    whole, bare, sent = [], [], {}
    for number in range(WARM_UP + requests):
        prompt = f"{number:05d}: what is a token?"
        alone = bare_first_token_seconds(engine, template, prompt, number)
        first, sent_at, answer_id = server.first_token_seconds(prompt)
        if number >= WARM_UP:
            bare.append(alone)
            whole.append(first)
            sent[answer_id.removeprefix("chatcmpl-")] = (sent_at, first)
    added = [one - other for one, other in zip(whole, bare, strict=True)]
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        f"{machine}, {time.strftime('%Y-%m-%d')}, {requests} requests each, taking turns, micro model.",
        f"Goal: at most {GOAL_MS:g} ms (median).",
        "",
        "| Time to first token | Median ms | p90 ms |",
        "|---|---|---|",
        _row("engine alone", bare),
        _row("over HTTP, streaming", whole),
        _row("**added by the path**", added),
        "",
        "| Where it goes (medians) | ms |",
        "|---|---|",
    ]
    return lines + [f"| {name} | {1000 * statistics.median(values):.2f} |" for name, values in _breakdown(server, sent).items()]


def _row(name: str, seconds: list[float]) -> str:
    return f"| {name} | {1000 * statistics.median(seconds):.2f} | {1000 * statistics.quantiles(seconds, n=10)[8]:.2f} |"


def _breakdown(server: Installation, sent: dict[str, tuple[float, float]]) -> dict[str, list[float]]:
    """Return the stages of each request, from the times in its row (the same clock: everything runs on this machine)."""
    query = "SELECT id, created_at, started_at, stats FROM models_app_generation WHERE id = ANY(%s::uuid[])"
    stages: dict[str, list[float]] = {
        "request parsed and authenticated, row made": [],
        "row stored, task sent, taken by the worker": [],
        "tokenised, queued, first token computed (in the runner)": [],
        "to the runner and back, Redis Stream, chunk to the client": [],
    }
    with psycopg.connect(server.database_url) as database:
        rows: list[tuple[Any, ...]] = database.execute(query, [list(sent)]).fetchall()
    for row_id, created_at, started_at, stats in rows:
        sent_at, first = sent[row_id.hex]
        made = created_at.timestamp() - sent_at
        taken = started_at.timestamp() - created_at.timestamp()
        computed = stats["time_to_first_token_seconds"]
        for values, seconds in zip(stages.values(), (made, taken, computed, first - made - taken - computed), strict=True):
            values.append(seconds)
    return stages


def main() -> None:
    """Measure and print; keep the result if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="replace the section in bench/RESULTS.md")
    options = parser.parse_args()
    lines = measure(options.requests)
    print("\n".join(lines))
    if options.write:
        write(lines, HEADING, "bench/path_overhead.py")


if __name__ == "__main__":
    main()
