"""What the GPU worker needs of the database, as an interface.

``models_app.store`` implements it, so that nothing in this package knows the tables of the applications above it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from workers.events import ErrorInfo, Stats
from workers.memory import MemoryEstimate
from workers.schemas import AnyRequest, LoadConfig, ToolCall


class NodeState(StrEnum):
    """What an admin lets a node do: everything; serve what it has in memory; finish what it has begun, then unload."""

    ACTIVE = "active"
    CORDONED = "cordoned"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model that can be loaded: row id, key, format, absolute path, and the chat template in place of the file's (empty: none).

    ``named_id`` is the row that the request named, a virtual model on this one perhaps; its defaults hold for the load.
    ``is_embedding``: it turns texts into vectors and does not chat.
    """

    id: int
    key: str
    format: str
    path: str
    chat_template: str = ""
    named_id: int = 0
    is_embedding: bool = False


@dataclass(frozen=True, slots=True)
class DraftFile:
    """A model that is to guess ahead for another: key, absolute path, and the memory it takes beside that one in bytes."""

    key: str
    path: str
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class Instance:
    """A row of a model in memory (or about to be): which file, how it is to be loaded, and with which draft model.

    ``ttl_seconds`` is how long it stays without use, None for ever. ``is_jit`` says that a request loads it, not a person.
    ``replaces`` are the rows that the person agreed to have unloaded for it.
    """

    id: int
    identifier: str
    model: ModelFile
    config: LoadConfig
    ttl_seconds: int | None = None
    is_jit: bool = False
    replaces: tuple[int, ...] = ()
    draft: DraftFile | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A generation that this worker owns now, with what an earlier worker got done of it.

    ``running_limit`` is how many its owner may have running at once, 0 for any number.
    """

    id: str
    owner: str
    model: ModelFile
    identifier: str
    request: AnyRequest
    resumes: int = 0
    seq: int = 0
    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    cancelled: bool = False
    draft: DraftFile | None = None
    running_limit: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a generation at one moment; all fields belong together."""

    id: str
    seq: int
    content: str
    reasoning: str
    tool_calls: list[ToolCall]
    output_tokens: list[int]
    resumes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a generation. What was embedded is not kept: ``drop_inputs``."""

    progress: Progress
    status: str
    stats: Stats
    error: ErrorInfo | None = None
    drop_inputs: bool = False


class Store(Protocol):
    """The database, as the worker sees it. Every method may raise ``django.db.Error`` while PostgreSQL is away."""

    @property
    def node_name(self) -> str:
        """Return the name of this node."""

    def register(self) -> None:
        """Register this node under a new incarnation; what its dead predecessor had is queued again."""

    def arrivals(self, seconds: float) -> Generator[list[str]]:
        """Yield the generations that wait for this node: all, then new ones as they come. Goes on until it is closed.

        After so many seconds without any it yields all again.
        """

    def heartbeat(self, *, log_lines: list[str] | None = None) -> NodeState | None:
        """Say that this node lives, with the end of its log if that has changed; returns what an admin lets it do.

        None: the node was removed, or another process has its name now.
        """

    def claim(self, generation_id: str) -> Claim | None:
        """Take a queued generation; None if somebody else has it, or if it could not start (then its row says why)."""

    def save(self, progress: list[Progress]) -> tuple[set[str], set[str]]:
        """Save partial texts and renew the leases; returns the ids that are still ours, and those whose end was asked for."""

    def finish(self, outcomes: list[Outcome]) -> set[str]:
        """Write the ends; returns the ids that were still ours."""

    def unregister(self) -> None:
        """Say that this node has stopped, so that nothing is sent to it any more."""

    def give_back(self, progress: list[Progress]) -> None:
        """Save and queue again what this worker could not finish before its shutdown."""

    def hand_over(self, progress: Progress, *, at_once: bool = False, or_wait: bool = False) -> bool:
        """Save, and give to another node what this one cannot do; returns whether there is one that may be able to.

        ``at_once``: only if it would not have to wait for memory there. ``or_wait``: without one it waits until there is, and that
        counts as given.
        """

    def must_fetch(self, model: ModelFile) -> bool:
        """Return whether files of a model have to be fetched before it can be loaded here."""

    def fetch(self, model: ModelFile, report: Callable[[float, str], None]) -> None:
        """Fetch them. ``report`` is told how far that is (0 to 1), with a sentence, and may raise. Raises ``LmwebError``."""

    def create_instance(self, model: ModelFile, *, ttl_seconds: int | None, running: set[int]) -> Instance:
        """Make the row of a model that a request loads just in time, with the model's defaults.

        ``running`` are the rows whose runners are there; other rows of the same name are leftovers, or wait for their load.
        """

    def restore_instance(self, instance: Instance) -> Instance:
        """Make a row like this one, which had to leave memory, to load it again."""

    def get_instance(self, instance_id: int) -> Instance | None:
        """Return the row of a load that a person asked for; None if it is gone or belongs to another node."""

    def memory_estimate(self, instance: Instance) -> MemoryEstimate:
        """Return what loading this takes. Raises ``InvalidModelFile`` if the file is gone or broken."""

    def pinned(self) -> set[int]:
        """Return the rows of this node that must stay in memory until a person unloads them."""

    def instance_waiting(self, instance_id: int, note: str) -> None:
        """Note what a load waits for."""

    def instance_loading(self, instance_id: int, progress: float) -> None:
        """Note how far the load is."""

    def instance_ready(self, instance_id: int, *, config: LoadConfig, memory_bytes: int, load_seconds: float) -> None:
        """Note that the model can be used, with the configuration in force."""

    def instance_failed(self, instance_id: int, error: str, *, code: str = "", details: dict[str, Any] | None = None) -> None:
        """Note why a load failed; ``code`` and ``details`` are those of the error, for programs."""

    def instance_gone(self, instance_id: int) -> None:
        """Delete the row: the runner has ended and its memory is free."""

    def instances_used(self, instance_ids: list[int]) -> None:
        """Note that these are in use now."""
