"""Celery tasks: thin, named, with ids as arguments. The only module here that knows the applications above it."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import psutil
from celery import signals
from celery.worker.control import control_command
from django.conf import settings
from django.db.backends.signals import connection_created

from lmweb.celery import app
from lmweb.db import visit
from lmweb.errors import JoinRefused
from models_app.reaper import Reaper
from models_app.store import DjangoStore, relax_commits
from workers import membership
from workers.dispatch import CANCEL
from workers.engines import registry
from workers.host import Host
from workers.memory import AutoEvict, Guardrail
from workers.policy import Policy
from workers.store import Instance

logger = logging.getLogger(__name__)

_reaper = Reaper()


@lru_cache(maxsize=1)
def host() -> Host:
    """Return this process's host; made when the GPU worker starts."""
    key = "" if settings.IS_LOCAL_WORKER else membership.read_key(settings.NODE_NAME)
    if not key and not settings.IS_LOCAL_WORKER:
        raise JoinRefused(f"This machine has not joined as '{settings.NODE_NAME}': python3 manage.py node join.")
    return Host(
        store=DjangoStore(settings.NODE_NAME, engines=[dataclasses.asdict(engine) for engine in registry.describe()], key=key),
        redis_url=settings.REDIS_URL,
        logs=settings.LOGS_DIR,
        step_log=settings.STEP_LOG,
        complete_config=complete_config,
        policy=policy(),
        on_removed=end_worker if key else None,
    )


def end_worker() -> None:
    """Stop this worker in order; its supervisor starts it once more, and it is told that it may not run."""
    os.kill(os.getpid(), signal.SIGTERM)


def policy() -> Policy:
    """Return what the settings say about loading."""
    return Policy(
        guardrail=Guardrail(settings.MODEL_LOADING_GUARDRAILS),
        jit=settings.JIT,
        jit_ttl_seconds=settings.JIT_TTL_SECONDS or None,
        auto_evict=AutoEvict(settings.AUTO_EVICT),
        turn_seconds=settings.MODEL_TURN_SECONDS,
        limit_bytes=settings.MODEL_MEMORY_BYTES,
    )


def complete_config(instance: Instance) -> Instance:
    """Fill in what the load left open: the installation's context length and thread count."""
    config = instance.config
    threads = config.cpu_threads or settings.CPU_THREADS or default_threads(_cores(), Path(instance.model.path))
    context = config.context_length or settings.DEFAULT_CONTEXT_LENGTH
    return dataclasses.replace(instance, config=msgspec.structs.replace(config, cpu_threads=threads, context_length=context))


#: Below this, waiting for each other costs threads more than they share out (measured on small models).
BYTES_PER_THREAD = 4 << 20


def default_threads(cores: int, file: Path) -> int:
    """Return the threads for a model on a machine that also serves the web: all cores up to two, else one less; few for small files."""
    useful = 1 + (file.stat().st_size // BYTES_PER_THREAD if file.exists() else 0)
    return min(useful, cores if cores <= 2 else cores - 1)


def _cores() -> int:
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


@app.task(name="workers.tasks.load_model")
def load_model(instance_id: int) -> None:
    """Load the model of a ``ModelInstance`` row."""
    host().load(instance_id)


@app.task(name="workers.tasks.unload_model")
def unload_model(instance_id: int) -> None:
    """Unload it; the row is deleted once its memory is free."""
    host().unload(instance_id)


@app.task(name="workers.tasks.reap")
def reap() -> None:
    """Send lost work again (io worker, every few seconds)."""
    visit(_reaper.run)


@control_command(name=CANCEL, args=[("generation_id", str)])
def cancel_generation(_state: Any, generation_id: str) -> None:
    """Stop a generation, if this node has it. Arrives as a broadcast within milliseconds."""
    if host.cache_info().currsize:
        threading.Thread(target=host().cancel, args=(generation_id,), daemon=True).start()


def _is_gpu_worker(consumer: Any) -> bool:
    return any(name.startswith("gpu.") for name in consumer.app.amqp.queues)


@signals.worker_ready.connect
def start_host(sender: Any, **_: Any) -> None:
    """Register the node and take up what was left lying. A worker that cannot must end, not stay and look alive."""
    if not _is_gpu_worker(sender):
        return
    connection_created.connect(relax_commits)
    try:
        host().start()
    except JoinRefused as error:
        logger.error("%s", error.message)
        raise SystemExit(error.exit_status) from None
    except Exception:  # Celery would log it and go on
        logger.exception("the GPU worker could not start")
        raise SystemExit(1) from None


@signals.worker_shutting_down.connect
def stop_host(**_: Any) -> None:
    """Give unfinished work back before Celery waits for its threads."""
    if host.cache_info().currsize:
        host().stop()
