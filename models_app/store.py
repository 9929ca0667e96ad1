"""The GPU worker's view of the database: ``workers.store.Store`` on our tables."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from django.conf import settings
from django.db import close_old_connections, connection, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import F
from django.db.models.expressions import RawSQL
from django.db.models.functions import Now
from django.utils import timezone
from psycopg import sql

from lmweb import __version__
from lmweb.db import drop_dead_connections
from lmweb.decoding import convert, decode_json
from lmweb.errors import JoinRefused, ModelLoadFailed
from models_app import fetching, mirror, routing
from models_app.drafts import draft_file
from models_app.memory import estimate_model, note_measurement
from models_app.models import Generation, InstalledModel, ModelInstance
from models_app.naming import free_identifier
from workers.events import Stats
from workers.machine import free_disk, hardware
from workers.memory import MemoryEstimate, machine_memory
from workers.models import NodeToken, WorkerNode
from workers.router import Refuse, Wait
from workers.schemas import GenerationRequest, LoadConfig, ToolCall, request_from_json
from workers.store import Claim, Instance, ModelFile, NodeState, Outcome, Progress

logger = logging.getLogger(__name__)

LEASE_SECONDS = 15

S = ModelInstance.Status

_SAVE = """
UPDATE models_app_generation AS g
SET seq = v.seq, content = v.content, reasoning = v.reasoning, tool_calls = v.calls, output_tokens = v.tokens, resumes = v.resumes,
    lease_until = %s
FROM (VALUES {rows}) AS v (id, seq, content, reasoning, calls, tokens, resumes)
WHERE g.id = v.id AND g.incarnation = %s AND g.status = 'running'
RETURNING g.id, g.cancel_requested
"""

#: Dated by the database's clock, like everything that is compared between machines.
_HEARTBEAT = """
UPDATE workers_workernode
SET heartbeat_at = statement_timestamp(), free_memory_bytes = %s, free_disk_bytes = %s,
    clock_offset_seconds = %s::float8 - extract(epoch FROM clock_timestamp())::float8, log_lines = COALESCE(%s::text[], log_lines)
WHERE name = %s AND incarnation = %s
RETURNING state
"""

#: What waits for this node, and, if it may load models, what waits for any.
_WAITING = """
SELECT g.id FROM models_app_generation g
WHERE g.status = 'queued' AND (g.node = %s OR g.node = '' AND EXISTS (SELECT FROM workers_workernode WHERE name = %s AND state = 'active'))
ORDER BY g.created_at
"""

_CLAIM_COLUMNS = (
    "id", "user_id", "request", "resumes", "seq", "content", "reasoning", "output_tokens", "tool_calls", "cancel_requested",
    "model_id", "model_key", "model_format", "model_path", "chat_template", "named_id", "is_embedding", "running_limit",
)  # fmt: skip
_CLAIM = """
UPDATE models_app_generation AS g
SET status = 'running', node = %s, incarnation = %s, lease_until = %s, started_at = %s
FROM models_app_installedmodel AS m LEFT JOIN models_app_installedmodel AS b ON b.id = m.base_id, lmweb_user AS u
WHERE g.id = %s AND g.status = 'queued' AND m.id = g.model_id AND u.id = g.user_id
AND EXISTS (SELECT FROM workers_workernode AS w WHERE w.name = %s AND w.incarnation = %s AND w.state <> 'draining')
RETURNING g.id, g.user_id, g.request, g.resumes, g.seq, g.content, g.reasoning, g.output_tokens, g.tool_calls, g.cancel_requested,
          COALESCE(b.id, m.id), COALESCE(b.key, m.key), m.format, COALESCE(b.path, m.path), m.chat_template_override, m.id,
          m.type = 'embedding', COALESCE(u.running_limit, %s)
"""


@contextmanager
def _brief(*, durable: bool) -> Iterator[None]:
    """A short use of a live connection. Not ``durable``: may be lost if PostgreSQL dies in the next half second."""
    drop_dead_connections()
    try:
        if durable:
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute("SET LOCAL synchronous_commit TO on")
                yield
        else:
            yield
    finally:
        close_old_connections()


def relax_commits(connection: BaseDatabaseWrapper, **_: Any) -> None:
    """Do not wait for the disk on this connection: what a worker notes down every second may be lost with PostgreSQL's last half."""
    with connection.cursor() as cursor:
        cursor.execute("SET synchronous_commit TO off")


class DjangoStore:
    """See ``workers.store.Store``. One object per worker process; safe to use from several threads."""

    def __init__(self, node_name: str, *, engines: list[dict[str, Any]], key: str = "") -> None:
        """``key`` is that of a node that joined (``workers.membership``); the server's own machine has none."""
        self.node_name = node_name
        self._key = key
        self._key_digest = NodeToken.hash(key) if key else ""
        self.incarnation = uuid.uuid4()
        self._engines = engines
        self._channel = f"gpu_{hashlib.md5(node_name.encode(), usedforsecurity=False).hexdigest()}"
        self._listener: psycopg.Connection[Any] | None = None

    def register(self) -> None:
        """Register this node, and queue again what its dead predecessor had. Raises ``JoinRefused`` if an admin has removed it."""
        free, total = machine_memory()
        facts = {
            "incarnation": self.incarnation,
            "started_at": Now(),
            "heartbeat_at": Now(),
            "hardware": hardware(),
            "engines": self._engines,
            "total_memory_bytes": total,
            "free_memory_bytes": free,
            "free_disk_bytes": free_disk(),
            "version": __version__,
            "log_lines": [],
        }
        with _brief(durable=True):
            if not self._key_digest:
                WorkerNode.objects.update_or_create(name=self.node_name, defaults={**facts, "key_digest": ""})
            elif not WorkerNode.objects.filter(name=self.node_name, key_digest=self._key_digest).update(**facts):
                raise JoinRefused(f"The node '{self.node_name}' was removed by an admin. It needs a new join token to come back.")
            ModelInstance.objects.filter(node_id=self.node_name).delete()
            orphans = Generation.objects.filter(node=self.node_name, status=Generation.Status.RUNNING).exclude(incarnation=self.incarnation)
            orphans.update(status=Generation.Status.QUEUED, resumes=F("resumes") + 1)

    def arrivals(self, seconds: float) -> Generator[list[str]]:
        """Yield generations when the notice that a row's commit sends comes (trigger ``models_app_generation_arrives``).

        The connection is one of its own: what looks after the others takes unasked data for the end of their server. Who is
        iterating claims on it, too: its server process and its pages are awake, which saves half of the time.
        """
        parameters = connection.get_connection_params() | {"cursor_factory": psycopg.Cursor, "autocommit": True}
        with connection.wrap_database_errors, closing(psycopg.connect(**parameters)) as listener, ExitStack() as afterwards:
            listener.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))
            listener.execute("SET synchronous_commit TO off")
            self._listener = listener
            afterwards.callback(setattr, self, "_listener", None)
            while True:
                yield [str(pk) for (pk,) in listener.execute(_WAITING, [self.node_name, self.node_name])]
                while notices := list(listener.notifies(timeout=seconds, stop_after=1)):
                    yield [notice.payload for notice in notices]

    def heartbeat(self, *, log_lines: list[str] | None = None) -> NodeState | None:
        """Say that this node lives, and what is free on it."""
        values = [machine_memory()[0], free_disk(), time.time(), log_lines, self.node_name, self.incarnation]
        with _brief(durable=False), connection.cursor() as cursor:
            cursor.execute(_HEARTBEAT, values)
            row = cursor.fetchone()
        return NodeState(row[0]) if row else None

    def claim(self, generation_id: str) -> Claim | None:
        """Take a queued generation by a conditional update, so that a second delivery finds nothing."""
        now = timezone.now()
        lease = now + timedelta(seconds=LEASE_SECONDS)
        me = [self.node_name, self.incarnation]
        values: list[Any] = [*me, lease, now, generation_id, *me, settings.USER_RUNNING_LIMIT]
        if self._listener is not None:
            with connection.wrap_database_errors:
                row = self._listener.execute(_CLAIM, values).fetchone()
        else:
            with _brief(durable=False), connection.cursor() as cursor:
                cursor.execute(_CLAIM, values)
                row = cursor.fetchone()
        if row is None:
            with _brief(durable=False):
                self._refuse_without_model(generation_id)
            return None
        try:
            return _claim(dict(zip(_CLAIM_COLUMNS, row, strict=True)))
        except msgspec.MsgspecError:
            logger.exception("the request of generation %s cannot be read", generation_id)
            with _brief(durable=False):
                self._refuse_unreadable(generation_id)
            return None

    def save(self, progress: list[Progress]) -> tuple[set[str], set[str]]:
        """Save all partial texts of a second, and the leases with them, in one statement."""
        rows = ", ".join(["(%s::uuid, %s::int, %s, %s, %s::jsonb, %s::int[], %s::int)"] * len(progress))
        values: list[Any] = [timezone.now() + timedelta(seconds=LEASE_SECONDS)]
        for p in progress:
            values += [p.id, p.seq, p.content, p.reasoning, msgspec.json.encode(p.tool_calls).decode(), p.output_tokens, p.resumes]
        with _brief(durable=False), connection.cursor() as cursor:
            cursor.execute(_SAVE.format(rows=rows), [*values, self.incarnation])
            found = cursor.fetchall()
        return {str(pk) for pk, _ in found}, {str(pk) for pk, cancelled in found if cancelled}

    def finish(self, outcomes: list[Outcome]) -> set[str]:
        """Write the ends, durably: ``chat.end`` is published after this."""
        ours = set()
        with _brief(durable=True):
            for outcome in outcomes:
                p, error = outcome.progress, outcome.error
                request = RawSQL("request - 'inputs'", ()) if outcome.drop_inputs else F("request")
                updated = (
                    self._mine()
                    .filter(pk=p.id)
                    .update(
                        status=outcome.status,
                        seq=p.seq,
                        content=p.content,
                        reasoning=p.reasoning,
                        tool_calls=msgspec.to_builtins(p.tool_calls),
                        output_tokens=p.output_tokens,
                        resumes=p.resumes,
                        stats=msgspec.to_builtins(outcome.stats),
                        request=request,
                        error_code=error.code if error else "",
                        error_message=_storable(error.message) if error else "",
                        lease_until=None,
                        finished_at=timezone.now(),
                    )
                )
                if updated:
                    ours.add(p.id)
        return ours

    def unregister(self) -> None:
        """Forget this node's models and its heartbeat; the row stays, for its history."""
        with _brief(durable=True):
            ModelInstance.objects.filter(node_id=self.node_name).delete()
            gone = timezone.now() - timedelta(days=1)
            WorkerNode.objects.filter(name=self.node_name, incarnation=self.incarnation).update(heartbeat_at=gone)
            with connection.cursor() as cursor:  # whoever waits in ``arrivals`` is to see that this is the end
                cursor.execute("SELECT pg_notify(%s, '')", [self._channel])

    def give_back(self, progress: list[Progress]) -> None:
        """Save and queue again, at once available to any worker."""
        if not progress:
            return
        self.save(progress)
        with _brief(durable=True):
            self._mine().filter(pk__in=[p.id for p in progress]).update(status=Generation.Status.QUEUED, lease_until=None)

    def hand_over(self, progress: Progress, *, at_once: bool = False, or_wait: bool = False) -> bool:
        """Save and queue again for another node that has not failed at this model lately, if there is one, or for any to come."""
        if progress.id not in self.save([progress])[0]:
            return False
        with _brief(durable=True):
            mine = self._mine().filter(pk=progress.id)
            row = mine.select_related("model__base").first()
            if row is None or row.model is None:
                return False
            found = routing.reroute(row.model, row.request["model"], excluded={self.node_name})
            if at_once and isinstance(found, Wait):
                return False
            if isinstance(found, Refuse):
                return or_wait and bool(mine.update(status=Generation.Status.QUEUED, node="", lease_until=None))
            logger.info("generation %s goes to %s", progress.id, found.node)
            lease = timezone.now() + timedelta(seconds=routing.DISPATCH_SECONDS)
            return bool(mine.update(status=Generation.Status.QUEUED, node=found.node, lease_until=lease))

    def must_fetch(self, model: ModelFile) -> bool:
        """Return whether this node mirrors models and lacks files of this one."""
        if not self._key or not settings.SERVER_URL:
            return False
        with _brief(durable=False):
            return bool(mirror.missing(model.id))

    def fetch(self, model: ModelFile, report: Callable[[float, str], None]) -> None:
        """Fetch a model's files from the server, in words for every failure."""
        try:
            with _brief(durable=False):
                mirror.fetch_model(model.id, key=self._key, report=report)
        except OSError as error:
            raise ModelLoadFailed(f"The files of {model.key} cannot be written on '{self.node_name}': {error.strerror}.") from None
        except fetching.BusyError:
            raise ModelLoadFailed(f"Another process on '{self.node_name}' fetches {model.key} already.") from None

    def create_instance(self, model: ModelFile, *, ttl_seconds: int | None, running: set[int]) -> Instance:
        """Make the row of a just-in-time load, or take that of a load whose task is on its way; leftovers give way."""
        with _brief(durable=False):
            there = ModelInstance.objects.filter(node_id=self.node_name)
            asked = there.filter(status=S.LOADING, model_id=model.id).exclude(pk__in=running).order_by("pk").first()
            if asked is not None:
                return _instance(asked, model)
            there.filter(identifier=model.key).exclude(pk__in=running).exclude(status=S.LOADING).delete()
            defaults = InstalledModel.objects.values_list("load_defaults", flat=True).get(pk=model.named_id or model.id)
            row = ModelInstance.objects.create(
                identifier=free_identifier(model.key, set(there.values_list("identifier", flat=True))),
                model_id=model.id,
                node_id=self.node_name,
                config=defaults,
                jit=True,
                ttl_seconds=ttl_seconds,
            )
            return _instance(row, model)

    def restore_instance(self, instance: Instance) -> Instance:
        """Make a row like this one under its old name."""
        with _brief(durable=False):
            there = ModelInstance.objects.filter(node_id=self.node_name)
            there.filter(identifier=instance.identifier, status__in=[S.FAILED, S.UNLOADING]).delete()
            row = ModelInstance.objects.create(
                identifier=free_identifier(instance.identifier, set(there.values_list("identifier", flat=True))),
                model_id=instance.model.id,
                node_id=self.node_name,
                config=msgspec.to_builtins(instance.config),
                jit=instance.is_jit,
                ttl_seconds=instance.ttl_seconds,
            )
            return _instance(row, instance.model)

    def get_instance(self, instance_id: int) -> Instance | None:
        """Return a row that waits for its load on this node."""
        with _brief(durable=False):
            row = ModelInstance.objects.select_related("model").filter(pk=instance_id, node_id=self.node_name).first()
            if row is None or row.status != ModelInstance.Status.LOADING:
                return None
            return _instance(row, _model_file(row.model))

    def memory_estimate(self, instance: Instance) -> MemoryEstimate:
        """Return what loading this takes."""
        with _brief(durable=False):
            found = estimate_model(InstalledModel.objects.get(pk=instance.model.id), instance.config)
        return found if instance.draft is None else dataclasses.replace(found, draft_bytes=instance.draft.needed_bytes)

    def pinned(self) -> set[int]:
        """Return the rows that must stay."""
        with _brief(durable=False):
            return set(ModelInstance.objects.filter(node_id=self.node_name, pinned=True).values_list("pk", flat=True))

    def instance_waiting(self, instance_id: int, note: str) -> None:
        """Note what a load waits for."""
        self._update_instance(instance_id, note=note[:300])

    def instance_loading(self, instance_id: int, progress: float) -> None:
        """Note how far the load is."""
        self._update_instance(instance_id, progress=progress, note="")

    def instance_ready(self, instance_id: int, *, config: LoadConfig, memory_bytes: int, load_seconds: float) -> None:
        """Note that the model can be used, and what it takes."""
        with _brief(durable=False):
            for model_id in ModelInstance.objects.filter(pk=instance_id).values_list("model_id", flat=True):
                note_measurement(model_id, config, memory_bytes)
        self._update_instance(
            instance_id,
            status=ModelInstance.Status.READY,
            progress=1.0,
            error="",
            note="",
            load_seconds=load_seconds,
            config=msgspec.to_builtins(config),
            memory_bytes=memory_bytes,
            last_used_at=timezone.now(),
        )

    def instance_failed(self, instance_id: int, error: str, *, code: str = "", details: dict[str, Any] | None = None) -> None:
        """Note why a load failed."""
        self._update_instance(
            instance_id,
            status=ModelInstance.Status.FAILED,
            error=_storable(error),
            error_code=code,
            error_details=details or {},
            note="",
            last_used_at=timezone.now(),
        )

    def instance_gone(self, instance_id: int) -> None:
        """Delete the row."""
        with _brief(durable=False):
            ModelInstance.objects.filter(pk=instance_id).delete()

    def instances_used(self, instance_ids: list[int]) -> None:
        """Note that these are in use now."""
        with _brief(durable=False):
            ModelInstance.objects.filter(pk__in=instance_ids).update(last_used_at=timezone.now())

    def _mine(self) -> Any:
        return Generation.objects.filter(incarnation=self.incarnation, status=Generation.Status.RUNNING)

    @staticmethod
    def _update_instance(instance_id: int, **values: Any) -> None:
        with _brief(durable=False):
            ModelInstance.objects.filter(pk=instance_id).update(**values)

    @staticmethod
    def _refuse_without_model(generation_id: str) -> None:
        """End a generation whose model was deleted before anybody could take it."""
        waiting = Generation.objects.filter(pk=generation_id, status=Generation.Status.QUEUED, model=None)
        waiting.update(**_failure("model_not_found", "The model was deleted before it could answer."))

    @staticmethod
    def _refuse_unreadable(generation_id: str) -> None:
        """End a generation whose stored request this release cannot read: it would be claimed again and again."""
        words = "This request was stored by another release of the server, which this one cannot read. Please send it again."
        Generation.objects.filter(pk=generation_id).update(**_failure("generation_interrupted", words))


def _storable(text: str) -> str:
    """Return a text without NUL, which PostgreSQL does not take: an error may quote what a request said."""
    return text.replace("\x00", "\ufffd")


def _failure(code: str, message: str) -> dict[str, Any]:
    """Return the columns of a generation that has failed before it began."""
    return {
        "status": Generation.Status.FAILED,
        "error_code": code,
        "error_message": message,
        "stats": msgspec.to_builtins(Stats(stop_reason="failed")),
        "finished_at": timezone.now(),
    }


def _claim(row: dict[str, Any]) -> Claim:
    """Return what ``_CLAIM`` returned as the worker knows it; JSON columns arrive as text."""
    request = request_from_json(row["request"])
    return Claim(
        id=str(row["id"]),
        owner=str(row["user_id"]),
        model=ModelFile(
            id=row["model_id"],
            key=row["model_key"],
            format=row["model_format"],
            path=str(Path(settings.MODELS_DIR) / row["model_path"]),
            chat_template=row["chat_template"],
            named_id=row["named_id"],
            is_embedding=row["is_embedding"],
        ),
        identifier=request.model,
        running_limit=row["running_limit"],
        request=request,
        resumes=row["resumes"],
        seq=row["seq"],
        content=row["content"],
        reasoning=row["reasoning"],
        tool_calls=decode_json(row["tool_calls"], list[ToolCall]),
        output_tokens=row["output_tokens"],
        cancelled=row["cancel_requested"],
        draft=draft_file(request.draft_model) if isinstance(request, GenerationRequest) else None,
    )


def _instance(row: ModelInstance, model: ModelFile) -> Instance:
    config = convert(row.config, LoadConfig)
    return Instance(
        row.pk,
        row.identifier,
        model,
        config,
        ttl_seconds=row.ttl_seconds,
        is_jit=row.jit,
        replaces=tuple(row.replaces),
        draft=draft_file(config.draft_model),
    )


def _model_file(model: InstalledModel) -> ModelFile:
    return ModelFile(model.pk, model.key, model.format, str(model.file), is_embedding=model.type == InstalledModel.Type.EMBEDDING)
