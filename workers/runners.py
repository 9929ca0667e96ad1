"""The runners of this machine: which models are in memory, what they take of it, and which of them could leave.

How models come into memory is the loader's business (``workers.loader``), what runners say and generate the host's (``workers.host``).
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from lmweb.errors import InvalidModelFile
from workers.memory import Resident, has_gpu_build, leavers_for_request, machine_memory, refusal, reserve
from workers.policy import Policy
from workers.runner_process import RunnerProcess
from workers.store import DraftFile, Instance, ModelFile, Store

logger = logging.getLogger(__name__)


class Runners:
    """See the module. ``draining`` are the ids of those that are to take nothing new, because others wait for their memory.

    ``lock`` guards ``by_id``, ``draining``, every runner's ``waiting`` and ``running``, and what the loader and the host keep. Who calls ``find``,
    ``of`` or ``staying`` holds it.
    """

    def __init__(self, *, store: Store, policy: Policy) -> None:
        self.lock = threading.RLock()
        self.by_id: dict[int, RunnerProcess] = {}
        self.draining: set[int] = set()
        self.policy = policy
        self._store = store

    def stop(self) -> None:
        """End all runners, at the same time."""
        with self.lock:
            runners = list(self.by_id.values())
        threads = [threading.Thread(target=runner.stop) for runner in runners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def find(self, model: ModelFile, identifier: str) -> RunnerProcess | None:
        """Return the best runner of this model that is there to stay: ready before loading, fewest generations first."""
        found = [runner for runner in self.staying(model) if runner.instance.id not in self.draining]
        named = [runner for runner in found if runner.identifier == identifier]
        ranked = sorted(named or found, key=lambda runner: (not runner.ready, len(runner.running)))
        return ranked[0] if ranked else None

    def of(self, generation_id: str) -> RunnerProcess | None:
        """Return the runner that works on a generation."""
        return next((runner for runner in self.by_id.values() if generation_id in runner.running), None)

    def staying(self, model: ModelFile) -> list[RunnerProcess]:
        """Return the runners of this model that will not leave by themselves."""
        return [r for r in self.by_id.values() if r.instance.model.id == model.id and not r.stopping and not r.load_error]

    # --- leaving -------------------------------------------------------------------------------------------------------

    def unload_idle(self) -> None:
        """Unload what nobody has used for the time that it was to stay."""
        due = [runner for runner in list(self.by_id.values()) if _is_expired(runner)]
        if due:
            pinned = self._store.pinned()
            self._unload_all([runner for runner in due if runner.instance.id not in pinned], _is_expired)

    def unload_free(self) -> None:
        """Unload all that has nothing to do: this node is being emptied."""
        self._unload_all(list(self.by_id.values()), _is_free)

    def _unload_all(self, runners: list[RunnerProcess], is_due: Callable[[RunnerProcess], bool]) -> None:
        for runner in runners:
            with self.lock:  # no request may come in between
                if not is_due(runner):
                    continue
                runner.stopping = True
            logger.info("unloading %s: not used for %d s", runner.identifier, time.monotonic() - runner.last_used_at)
            runner.stop()

    # --- memory --------------------------------------------------------------------------------------------------------

    def leavers(self, instance: Instance, needed_bytes: int, *, by_request: bool) -> list[RunnerProcess]:
        """Return the runners that have to leave memory for a model, which only requests want or a person as well.

        Raises ``InsufficientMemory`` if that is not enough.
        """
        free, total = self._free_memory()
        with self.lock:
            runners = list(self.by_id.values())
        pinned = self._store.pinned() if runners else set()
        others = [runner for runner in runners if runner.instance.id not in pinned]
        leaving = [runner for runner in others if runner.instance.id in instance.replaces]
        movable = {r.instance.id: r for r in others if by_request and r.is_jit and r not in leaving}
        available = sys.maxsize if self.policy.is_unlimited else free - reserve(self.policy.guardrail, total)
        missing = needed_bytes - available - sum(runner.memory_bytes() for runner in leaving)
        now = time.monotonic()
        residents = [
            Resident(pk, max(r.memory_bytes(), r.needed_bytes), r.is_busy, now - r.last_used_at, r.instance.model.is_embedding)
            for pk, r in movable.items()
        ]
        chosen = leavers_for_request(missing, residents, self.policy.auto_evict, is_embedding=instance.model.is_embedding)
        if chosen is None:
            held_by = {runner.identifier: runner.memory_bytes() for runner in runners}
            level = self.policy.guardrail
            raise refusal(instance.identifier, needed_bytes, level=level, free_bytes=free, total_bytes=total, held_by=held_by)
        return leaving + [movable[resident.id] for resident in chosen]

    def needed_bytes(self, instance: Instance) -> int:
        """Return what the load will take, 0 where nobody can tell."""
        if instance.model.format == "gguf" and instance.config.gpu_layers != 0 and has_gpu_build():
            return 0  # most of it goes to memory that only the engine knows
        try:
            return self._store.memory_estimate(instance).needed_bytes
        except InvalidModelFile as error:
            logger.warning("no estimate for %s: %s", instance.identifier, error)
            return 0

    def _free_memory(self) -> tuple[int, int]:
        """Return the free and all memory for models, in bytes; what is being loaded counts in full."""
        free, total = machine_memory()
        with self.lock:
            used = [(runner.memory_bytes(), 0 if runner.ready else runner.needed_bytes) for runner in self.by_id.values()]
        free -= sum(max(0, needed - now) for now, needed in used)
        if self.policy.limit_bytes:
            free = min(free, self.policy.limit_bytes - sum(max(now, needed) for now, needed in used))
            total = min(total, self.policy.limit_bytes)
        return free, total

    def has_room_for_draft(self, runner: RunnerProcess, draft: DraftFile) -> bool:
        """Whether a runner may load this draft model (or has it): a request that names one goes on without it rather than fail."""
        if runner.draft == draft.key:
            return True
        free, total = self._free_memory()
        if not self.policy.is_unlimited and draft.needed_bytes > free - reserve(self.policy.guardrail, total):
            logger.warning("no memory for the draft model %s beside %s", draft.key, runner.identifier)
            return False
        runner.draft = draft.key
        return True


def _is_free(runner: RunnerProcess) -> bool:
    """Whether it has nothing to do; one that is still loading counts only until somebody waits for it."""
    return not (runner.stopping or runner.running or runner.waiting)


def _is_expired(runner: RunnerProcess) -> bool:
    unused = time.monotonic() - runner.last_used_at
    return not runner.stopping and not runner.is_busy and runner.ttl_seconds is not None and unused > runner.ttl_seconds
