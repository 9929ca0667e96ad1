"""Every environment variable that lmweb reads, with type, default and meaning. Nothing else reads ``os.environ`` for settings.

``docs/operations.md`` documents the same table; a test compares the two.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Variable:
    """One setting: its default as text (empty: none), what it means, and the only values that it may have, if not any."""

    name: str
    default: str
    meaning: str
    choices: tuple[str, ...] = field(default=(), compare=False)


VARIABLES: dict[str, Variable] = {
    v.name: v
    for v in (
        Variable("LMWEB_HOST", "127.0.0.1", "Address the server listens on once an admin exists; before that always loopback."),
        Variable("LMWEB_PORT", "1234", "Port the server listens on."),
        Variable("LMWEB_DATA_DIR", "", "Where everything is kept. Default: lmweb in the user's data directory."),
        Variable("DATABASE_URL", "", "External PostgreSQL with pgvector; empty starts the embedded one."),
        Variable("REDIS_URL", "", "External Redis or Valkey; empty starts the embedded one."),
        Variable("LMWEB_SECRET_KEY", "", "Signs sessions and tokens; empty keeps a generated one in the data directory."),
        Variable("LMWEB_ALLOWED_HOSTS", "*", "Comma-separated host names that browsers may use."),
        Variable("LMWEB_TRUSTED_ORIGINS", "", "Comma-separated origins of a TLS proxy in front, such as https://lm.example.org."),
        Variable("LMWEB_DEBUG", "false", "Django's debug pages. Never on a shared machine."),
        Variable("LMWEB_LOG_LEVEL", "INFO", "DEBUG, INFO, WARNING or ERROR."),
        Variable("LMWEB_NODE_NAME", "", "Name of this machine among the workers. Default: the host name."),
        Variable("LMWEB_NODE_TOKEN", "", "Join token: of a worker on another machine, needed once; of the server, one that it accepts."),
        Variable(
            "LMWEB_SERVER_URL", "", "Where a worker on another machine fetches model files that it has not; empty: models/ is shared."
        ),
        Variable("LMWEB_LOCAL_WORKER", "false", "Set by 'up' for the worker of its own machine, which joins without a token."),
        Variable(
            "LMWEB_CPU_THREADS", "0", "CPU threads per loaded model; 0 takes the physical cores, less one when there are more than two."
        ),
        Variable(
            "LMWEB_CONTEXT_LENGTH", "8192", "Context length in tokens of a model that is loaded without one, at most the model's own."
        ),
        Variable(
            "LMWEB_MODEL_LOADING_GUARDRAILS",
            "balanced",
            "Memory that a model's load must leave free: off, relaxed (none), balanced (5 %) or strict (15 % of all).",
            ("off", "relaxed", "balanced", "strict"),
        ),
        Variable("LMWEB_MODEL_MEMORY_MB", "0", "Memory that all loaded models together may take, in megabytes; 0: what the machine has."),
        Variable("LMWEB_JIT", "true", "Load a model when a request needs it. Off: requests for models that are not loaded are refused."),
        Variable("LMWEB_JIT_TTL_SECONDS", "3600", "A model that a request loaded is unloaded after so long without use; 0: never."),
        Variable(
            "LMWEB_AUTO_EVICT",
            "on",
            "When a request loads a model, unload others that requests loaded: on (always, language and embedding models apart), needed (if memory is short) or off.",
            ("on", "needed", "off"),
        ),
        Variable(
            "LMWEB_MODEL_TURN_SECONDS",
            "30",
            "A busy model keeps its memory while requests wait for another one for eight times as long as its load took, at most so long; 0: first come, first served.",
        ),
        Variable(
            "LMWEB_USER_RUNNING_LIMIT", "64", "Answers that one person may have running at once on a worker's machine; 0: any number."
        ),
        Variable("LMWEB_USER_WAITING_LIMIT", "1024", "Requests of one person that may wait beside those; more are refused. 0: any number."),
        Variable("LMWEB_MAX_UPLOAD_GB", "200", "Largest model file that may be uploaded in the browser, in gigabytes."),
        Variable("HF_ENDPOINT", "https://huggingface.co", "The Hugging Face Hub, or a mirror of it, where Discover looks for models."),
        Variable("HF_TOKEN", "", "Token of the Hub, for models that ask for one."),
        Variable("HF_HUB_OFFLINE", "false", "Never ask the Hub: Discover says so, and nothing is downloaded."),
        Variable(
            "LMWEB_OUTBOUND_HOSTS",
            "",
            "Comma-separated hosts in private networks that outgoing requests may reach, besides that of HF_ENDPOINT.",
        ),
        Variable("LMWEB_DOWNLOADS_AT_ONCE", "3", "Downloads that run at the same time; more wait."),
        Variable("LMWEB_DOWNLOADS_PER_PERSON", "2", "Of these, downloads of one person."),
        Variable("LMWEB_DOWNLOAD_MBIT", "0", "Bandwidth that all downloads of an io worker share, in megabits per second; 0: no limit."),
        Variable(
            "LMWEB_GPU", "", "What llama.cpp is compiled for: cpu, cuda, metal, vulkan or rocm. Empty keeps what is there, at first cpu."
        ),
        Variable(
            "LMWEB_MLX",
            "false",
            "Install the engine for MLX models too, about 100 MB. Once is enough: it stays; the tests' environment has it.",
        ),
        Variable("CMAKE_ARGS", "", "Further options for compiling llama.cpp. Empty keeps those of the last time."),
        Variable("LMWEB_STEP_LOG", "true", "Keep a bounded log of every engine step under logs/ in the data directory."),
    )
}


def text(name: str) -> str:
    """Return the variable's value or its default. Raises ``KeyError`` for an undeclared name."""
    return os.environ.get(name, "").strip() or VARIABLES[name].default


def flag(name: str) -> bool:
    """Return a yes/no variable. Raises ``ValueError`` for anything but true/false, yes/no, on/off, 1/0."""
    value = text(name).lower()
    if value in {"1", "true", "yes", "on"}:
        return True
    if value in {"0", "false", "no", "off", ""}:
        return False
    raise ValueError(f"{name} must be true or false, not {value!r}")


def number(name: str) -> int:
    """Return a whole number. Raises ``ValueError`` with the variable's name if it is none."""
    try:
        return int(text(name))
    except ValueError:
        raise ValueError(f"{name} must be a whole number, not {text(name)!r}") from None


def items(name: str) -> list[str]:
    """Return a comma-separated list without blanks."""
    return [item.strip() for item in text(name).split(",") if item.strip()]


def check() -> None:
    """Raise ``ValueError`` with a sentence for the first variable whose value is not of its default's kind."""
    for variable in VARIABLES.values():
        if variable.default.isdigit():
            number(variable.name)
        elif variable.default in {"true", "false"}:
            flag(variable.name)
        if variable.choices and text(variable.name).lower() not in variable.choices:
            raise ValueError(f"{variable.name} must be one of {', '.join(variable.choices)}, not {text(variable.name)!r}")


def data_dir() -> Path:
    """Return the absolute data directory; it need not exist yet."""
    configured = text("LMWEB_DATA_DIR")
    if configured:
        return Path(configured).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "lmweb"
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "lmweb"
