"""The runners of this machine: which models are in memory, how they come there and how they leave.

What they say and what they generate is the host's business (``workers.host``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from django.db import Error as DatabaseError

from lmweb.errors import InsufficientMemory, InvalidModelFile
from workers.memory import Guardrail, check as check_memory, has_gpu_build, machine_memory
from workers.protocol import RunnerMessage
from workers.runner_process import RunnerProcess
from workers.store import Instance, ModelFile, Store

logger = logging.getLogger(__name__)

#: A model that a request loaded leaves memory after this long without use (LM Studio's default).
JIT_TTL_SECONDS = 60 * 60


class Runners:
    """See the module. ``complete_config`` fills in a load configuration for this machine (context length, threads).

    ``lock`` guards ``by_id`` and every runner's ``waiting`` and ``running``; ``spawning`` makes loads happen one at a time.
    """

    def __init__(
        self,
        *,
        store: Store,
        logs: Path,
        step_log: bool,
        complete_config: Callable[[Instance], Instance],
        guardrail: Guardrail,
    ) -> None:
        self.lock = threading.RLock()
        self.spawning = threading.Lock()
        self.by_id: dict[int, RunnerProcess] = {}
        self._store = store
        self._logs, self._step_log = logs, step_log
        self._complete_config = complete_config
        self._guardrail = guardrail

    def listen(
        self,
        *,
        on_message: Callable[[RunnerProcess, RunnerMessage], float | None],
        on_idle: Callable[[RunnerProcess], None],
        on_exit: Callable[[RunnerProcess], None],
    ) -> None:
        """Set what is called in each runner's reader thread; see ``RunnerProcess``. Comes before the first ``spawn``."""
        self._on_message, self._on_idle, self._on_exit = on_message, on_idle, on_exit

    def find(self, model: ModelFile, identifier: str) -> RunnerProcess | None:
        """Return the best runner of this model that is not ending: ready before loading, fewest generations first."""
        found = [r for r in self.by_id.values() if r.instance.model.id == model.id and not r.stopping and not r.load_error]
        named = [r for r in found if r.identifier == identifier]
        ranked = sorted(named or found, key=lambda r: (not r.ready, len(r.running)))
        return ranked[0] if ranked else None

    def of(self, generation_id: str) -> RunnerProcess | None:
        """Return the runner that works on a generation."""
        return next((runner for runner in self.by_id.values() if generation_id in runner.running), None)

    def load(self, instance_id: int) -> None:
        """Load a model that a person asked for; its row tells how that goes."""
        instance = self._store.get_instance(instance_id)
        with self.spawning:
            if instance_id in self.by_id:  # a generation that came first has started it
                self.by_id[instance_id].jit = False
            elif instance is not None:
                try:
                    self.spawn(instance)
                except InsufficientMemory as error:
                    self._store.instance_failed(instance_id, error.message)

    def unload(self, instance_id: int) -> None:
        """End a runner and delete its row once its memory is free. What it was generating ends there, its text is kept."""
        with self.lock:
            runner = self.by_id.get(instance_id)
        if runner is not None:
            runner.stop()
        else:
            self._store.instance_gone(instance_id)

    def stop(self) -> None:
        """End all runners, at the same time."""
        with self.lock:
            runners = list(self.by_id.values())
        threads = [threading.Thread(target=runner.stop) for runner in runners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def spawn(self, instance: Instance, *, jit: bool = False) -> RunnerProcess:
        """Start a runner. Raises ``InsufficientMemory`` instead where the guardrail forbids it."""
        instance = self._complete_config(instance)
        needed_bytes = self._check_memory(instance)
        with self.lock:
            runner = RunnerProcess(
                instance,
                logs=self._logs,
                step_log=self._step_log,
                on_message=self._on_message,
                on_idle=self._on_idle,
                on_exit=self._on_exit,
            )
            runner.needed_bytes, runner.jit = needed_bytes, jit
            self.by_id[instance.id] = runner
        return runner

    def _check_memory(self, instance: Instance) -> int:
        """Return what the load will take, 0 where nobody can tell. Raises ``InsufficientMemory``."""
        if instance.config.gpu_layers != 0 and has_gpu_build():
            return 0  # most of it goes to memory that only the engine knows
        try:
            found = self._store.memory_estimate(instance)
        except (InvalidModelFile, DatabaseError) as error:
            logger.warning("no estimate for %s: %s", instance.identifier, error)
            return 0
        free, total = machine_memory()
        with self.lock:
            held = {runner.identifier: (runner.memory_bytes(), runner.needed_bytes, runner.ready) for runner in self.by_id.values()}
        free -= sum(max(0, needed - used) for used, needed, ready in held.values() if not ready)
        check_memory(
            instance.identifier,
            found,
            level=self._guardrail,
            free_bytes=free,
            total_bytes=total,
            held_by={name: used for name, (used, _, _) in held.items()},
        )
        return found.needed_bytes

    def unload_idle(self) -> None:
        """Unload what requests loaded and nobody has used for ``JIT_TTL_SECONDS``."""
        now = time.monotonic()
        with self.lock:
            idle = [r for r in self.by_id.values() if r.jit and not r.running and not r.waiting and now - r.last_used_at > JIT_TTL_SECONDS]
        for runner in idle:
            logger.info("unloading %s: not used for an hour", runner.identifier)
            self.unload(runner.instance.id)
