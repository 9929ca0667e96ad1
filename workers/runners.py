"""The runners of this machine: which models are in memory, how they come there, and who has to leave for whom.

What runners say and generate is the host's business (``workers.host``). One thread decides about loads, one after the other:
whoever waits longest comes first, and nothing that could take its memory overtakes it. Policies are LM Studio's: models are
loaded when a request needs them (JIT), leave after a time without use (TTL), and make room for each other (auto-evict).
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from django.db import Error as DatabaseError

from lmweb.errors import InvalidModelFile, LmwebError, ModelLoadFailed, ModelNotLoaded
from workers.events import ErrorInfo
from workers.memory import AutoEvict, Guardrail, Resident, has_gpu_build, leavers_for_request, machine_memory, refusal, reserve
from workers.protocol import RunnerMessage
from workers.relay import Live
from workers.runner_process import RunnerProcess
from workers.store import DraftFile, Instance, ModelFile, Store

logger = logging.getLogger(__name__)

#: How often waiting loads are looked at again; whatever ends or becomes idle is noticed at once.
LOOK_SECONDS = 0.25
#: A model that others wait for may leave when it had no request for so long: its next one is often on its way.
GRACE_SECONDS = 0.5
#: A turn lasts so many times as long as the load took, up to a limit, so that most of the time goes to answers.
TURN_PER_LOAD = 8.0
#: Who waits longer than this is told what for.
TELL_SECONDS = 0.3
#: How often it is asked whether another node has by now what requests wait for here.
MOVE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Policy:
    """What a node does by itself.

    ``turn_seconds`` is the longest turn, 0 means first come, first served. ``limit_bytes`` is what models may take together, 0: no limit but the
    machine's memory.
    """

    guardrail: Guardrail = Guardrail.BALANCED
    jit: bool = True
    jit_ttl_seconds: int | None = 60 * 60
    auto_evict: AutoEvict = AutoEvict.ON
    turn_seconds: float = 30.0
    limit_bytes: int = 0

    def turn(self, load_seconds: float) -> float:
        """Return how long a model whose load took this long keeps its memory while requests wait for another one, in seconds."""
        return min(self.turn_seconds, TURN_PER_LOAD * load_seconds)

    @property
    def is_unlimited(self) -> bool:
        """Whether loads are not checked against memory."""
        return self.guardrail is Guardrail.OFF and not self.limit_bytes


class Listener(Protocol):
    """Who uses the runners. The first two are called in the runner's reader thread; see ``RunnerProcess``."""

    def on_message(self, runner: RunnerProcess, message: RunnerMessage) -> None:
        """Take a message."""

    def on_exit(self, runner: RunnerProcess) -> None:
        """The process has ended."""

    def on_assigned(self, runner: RunnerProcess, live: Live) -> None:
        """The model of a waiting generation is in memory or on its way. Called under the lock."""

    def on_waiting(self, live: Live, position: int, reason: str) -> None:
        """A generation waits for memory."""

    def on_turned_away(self, live: Live) -> None:
        """A waiting generation needs a model that is not loaded, and this node loads nothing new."""

    def on_stuck(self, live: Live) -> bool:
        """A generation waits for memory for long; returns whether another node took it."""

    def on_refused(self, live: Live, error: ErrorInfo, *, elsewhere: bool) -> None:
        """The model of a waiting generation cannot be loaded; ``elsewhere``: another node may be able to."""


@dataclass(eq=False, slots=True)
class Fetching:
    """The files of a model on their way to this machine; others may be loaded meanwhile."""

    is_done: bool = False
    error: LmwebError | None = None


@dataclass(eq=False, slots=True)
class Wish:
    """A model that is to come into memory: for the generations ``lives``, because a person said so, or again, as it was before.

    ``left`` is what has left memory for it, ``asked_at`` the last time that it was asked whether another node has it.
    """

    model: ModelFile
    instance: Instance | None = None
    before: Instance | None = None
    ttl_seconds: int | None = None
    since: float = field(default_factory=time.monotonic)
    lives: list[Live] = field(default_factory=list)
    needed_bytes: int | None = None
    left: list[Instance] = field(default_factory=list)
    reason: str = ""
    asked_at: float = field(default_factory=time.monotonic)
    told: tuple[int, str] = (-1, "")
    fetching: Fetching | None = None

    @property
    def is_fetching(self) -> bool:
        """Whether it waits for its files, not for memory."""
        return self.fetching is not None and not self.fetching.is_done

    @property
    def is_jit(self) -> bool:
        """Whether only requests want it."""
        return self.before is None and (self.instance is None or self.instance.is_jit)


class Runners:
    """See the module. ``complete_config`` fills in a load configuration for this machine (context length, threads).

    ``may_load`` False: an admin lets this node load nothing new. ``lock`` guards ``by_id``, the wishes, and every runner's ``waiting`` and ``running``.
    """

    def __init__(
        self,
        *,
        store: Store,
        logs: Path,
        step_log: bool,
        complete_config: Callable[[Instance], Instance],
        policy: Policy,
        listener: Listener,
    ) -> None:
        self.lock = threading.RLock()
        self.by_id: dict[int, RunnerProcess] = {}
        self.policy = policy
        self.may_load = True
        self._store = store
        self._logs, self._step_log = logs, step_log
        self._complete_config = complete_config
        self._listener = listener
        self._wishes: list[Wish] = []
        self._draining: set[int] = set()
        self._superfluous: list[int] = []
        self._wake = threading.Event()
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start the thread that decides about loads."""
        threading.Thread(target=self._decide, name="loader", daemon=True).start()

    def stop(self) -> None:
        """End all runners, at the same time, and load nothing any more."""
        self._stopping.set()
        self._wake.set()
        with self.lock:
            runners = list(self.by_id.values())
        threads = [threading.Thread(target=runner.stop) for runner in runners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # --- asked by the host, under the lock -----------------------------------------------------------------------------

    def find(self, model: ModelFile, identifier: str) -> RunnerProcess | None:
        """Return the best runner of this model that is there to stay: ready before loading, fewest generations first."""
        found = [runner for runner in self._staying(model) if runner.instance.id not in self._draining]
        named = [runner for runner in found if runner.identifier == identifier]
        ranked = sorted(named or found, key=lambda runner: (not runner.ready, len(runner.running)))
        return ranked[0] if ranked else None

    def of(self, generation_id: str) -> RunnerProcess | None:
        """Return the runner that works on a generation."""
        return next((runner for runner in self.by_id.values() if generation_id in runner.running), None)

    def want(self, live: Live) -> None:
        """Have the model of a generation loaded; the listener is told how that goes."""
        model = live.claim.model
        wish = next((wish for wish in self._wishes if wish.is_jit and wish.model.id == model.id), None)
        if wish is None:
            ttl = live.claim.request.ttl_seconds or self.policy.jit_ttl_seconds
            wish = Wish(model, ttl_seconds=ttl)
            self._wishes.append(wish)
        wish.lives.append(live)
        self._wake.set()

    def withdraw(self, live: Live) -> None:
        """Let a generation wait no more."""
        for runner in self.by_id.values():
            if live in runner.waiting:
                runner.waiting.remove(live)
        for wish in self._wishes:
            if live in wish.lives:
                wish.lives.remove(live)
                self._wake.set()

    def ended(self, runner: RunnerProcess) -> None:
        """Forget a runner whose process has ended; what left memory for one that could not be loaded comes back."""
        self.by_id.pop(runner.instance.id, None)
        if not runner.ready and not runner.stopping:
            self._put_back(runner.replaced)
        self._wake.set()

    def has_news(self) -> None:
        """Look at the waiting loads: a model was loaded, or has nothing to do."""
        if self._wishes:
            self._wake.set()

    # --- asked by people -----------------------------------------------------------------------------------------------

    def load(self, instance_id: int) -> None:
        """Load a model that a person asked for; its row tells how that goes."""
        instance = self._store.get_instance(instance_id)
        with self.lock:
            runner = self.by_id.get(instance_id)
            if runner is not None:  # a generation that came first has started it
                runner.is_jit = False
            elif instance is not None:
                self._wishes.append(Wish(instance.model, instance, ttl_seconds=instance.ttl_seconds))
                self._wake.set()

    def unload(self, instance_id: int) -> None:
        """End a runner and delete its row once its memory is free. What it was generating ends there, its text is kept."""
        with self.lock:
            runner = self.by_id.get(instance_id)
            wish = next((wish for wish in self._wishes if wish.instance is not None and wish.instance.id == instance_id), None)
            if wish is not None and runner is None:
                self._wishes.remove(wish)
                self._refuse_all(wish, ErrorInfo(code="model_load_failed", message="Somebody stopped the load of this model."))
                self._put_back(wish.left)
            if runner is not None:
                runner.stopping = True
        if runner is not None:
            runner.stop()
        else:
            self._store.instance_gone(instance_id)

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

    # --- deciding about loads ------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait(LOOK_SECONDS if self._wishes else None)
            self._wake.clear()
            if not self._stopping.is_set():
                self._look()

    def _look(self) -> None:
        """Fulfil wishes in the order of their age, up to the first one that has to wait."""
        with self.lock:
            self._wishes.sort(key=lambda wish: wish.since)
            wishes = list(self._wishes)
        draining: set[int] = set()
        if not self.may_load:
            self._turn_away(wishes)
        for wish in wishes if self.may_load else []:
            try:
                draining = self._advance(wish)
            except LmwebError as error:
                self._refuse(wish, error)
            except DatabaseError as error:
                logger.warning("PostgreSQL is away: %s", str(error).strip().splitlines()[0])
                if wish.instance is not None:
                    break  # its row is there, and it is tried again
                self._refuse(wish, LmwebError(f"The model could not be loaded: {error.__class__.__name__}."), code="service_unavailable")
            except Exception as error:  # a model that was deleted at this moment, say: this thread is one for all loads
                logger.exception("%s cannot be loaded", wish.model.key)
                words = f"{wish.model.key} could not be loaded ({type(error).__name__}). The worker's log has the details."
                self._refuse(wish, LmwebError(words), code="model_load_failed")
            if wish in self._wishes and not wish.is_fetching:
                break
        with self.lock:
            self._draining = draining
            superfluous, self._superfluous = self._superfluous, []
        for pk in superfluous:
            self._try_store(lambda pk=pk: self._store.instance_gone(pk))  # type: ignore[misc]
        self._tell_waiting()
        self._move_waiting()

    def _advance(self, wish: Wish) -> set[int]:
        """Bring a wish as far as it goes now; it is fulfilled when it is gone from the list.

        Returns the runners that are to take nothing new on its account. Raises ``ModelLoadFailed`` (of which ``InsufficientMemory``
        is one), ``ModelNotLoaded`` or ``django.db.Error``.
        """
        with self.lock:
            if wish not in self._wishes or self._is_settled(wish):
                return set()
            if any(runner.stopping for runner in self.by_id.values()):
                wish.reason = "Another model is being unloaded."
                return set()
            running = set(self.by_id)
        if wish.is_jit and not self.policy.jit:
            raise ModelNotLoaded(f"{wish.model.key} is not loaded, and loading by request (JIT) is off. Load it first.", param="model")
        if wish.instance is None and wish.before is not None:
            wish.instance = self._store.restore_instance(wish.before)
        elif wish.instance is None:
            wish.instance = self._store.create_instance(wish.model, ttl_seconds=wish.ttl_seconds, running=running)
        if wish.needed_bytes is None:
            if not self._has_files(wish, wish.instance):
                return set()
            self._require_file(wish.model)
            wish.instance = self._complete_config(wish.instance)
            wish.needed_bytes = self._needed_bytes(wish.instance)
        leaving = self._leavers(wish, wish.instance, wish.needed_bytes)
        if leaving:
            return self._clear(wish, leaving)
        self._spawn(wish, wish.instance)
        return set()

    def _has_files(self, wish: Wish, instance: Instance) -> bool:
        """Whether the files are here. If not, they are being fetched from now on. Raises what ended that, as ``ModelLoadFailed``."""
        if wish.fetching is None and not self._store.must_fetch(wish.model):
            return True
        if wish.fetching is None:
            wish.fetching = Fetching()
            threading.Thread(target=self._fetch, args=(wish, instance, wish.fetching), name=f"fetch-{instance.id}", daemon=True).start()
        if wish.fetching.error is not None:
            raise ModelLoadFailed(wish.fetching.error.message, details=wish.fetching.error.details)
        return wish.fetching.is_done

    def _fetch(self, wish: Wish, instance: Instance, fetching: Fetching) -> None:
        def report(progress: float, what: str) -> None:
            if self._stopping.is_set() or wish not in self._wishes:
                raise ModelLoadFailed(f"Nobody waits for {wish.model.key} any more.")
            wish.reason = f"{what} {progress:.0%}"
            self._try_store(lambda: self._store.instance_loading(instance.id, progress))

        try:
            self._store.fetch(wish.model, report)
        except LmwebError as error:
            fetching.error = error
        except DatabaseError as error:
            fetching.error = ModelLoadFailed(f"The files could not be fetched: {error.__class__.__name__}.")
        fetching.is_done = True
        self._wake.set()

    def _require_file(self, model: ModelFile) -> None:
        if not Path(model.path).exists():
            raise ModelLoadFailed(f"The file of {model.key} is not on the worker '{self._store.node_name}'.", param="model")

    def _is_settled(self, wish: Wish) -> bool:
        """Whether nothing has to be loaded for this wish (any more); then it is taken from the list."""
        runner = self.by_id.get(wish.instance.id) if wish.instance else None
        if runner is not None:
            runner.is_jit = runner.is_jit and wish.is_jit
        elif wish.is_jit or wish.before is not None:
            runner = next(iter(self._staying(wish.model)), None)  # draining or not: that was for those who waited longer
            if runner is None and (wish.lives or wish.before is not None):
                return False
            if wish.instance is not None:
                self._superfluous.append(wish.instance.id)
        else:
            return False
        self._wishes.remove(wish)
        for live in wish.lives:
            assert runner is not None
            self._listener.on_assigned(runner, live)
        return True

    def _staying(self, model: ModelFile) -> Iterable[RunnerProcess]:
        return [r for r in self.by_id.values() if r.instance.model.id == model.id and not r.stopping and not r.load_error]

    def _leavers(self, wish: Wish, instance: Instance, needed_bytes: int) -> list[RunnerProcess]:
        """Return the runners that have to leave memory for a wish. Raises ``InsufficientMemory`` if that is not enough."""
        free, total = self._free_memory()
        with self.lock:
            runners = list(self.by_id.values())
        pinned = self._store.pinned() if runners else set()
        others = [runner for runner in runners if runner.instance.id not in pinned]
        leaving = [runner for runner in others if runner.instance.id in instance.replaces]
        movable = {r.instance.id: r for r in others if wish.is_jit and r.is_jit and r not in leaving}
        available = sys.maxsize if self.policy.is_unlimited else free - reserve(self.policy.guardrail, total)
        missing = needed_bytes - available - sum(runner.memory_bytes() for runner in leaving)
        now = time.monotonic()
        residents = [
            Resident(pk, max(r.memory_bytes(), r.needed_bytes), r.is_busy, now - r.last_used_at, r.instance.model.is_embedding)
            for pk, r in movable.items()
        ]
        chosen = leavers_for_request(missing, residents, self.policy.auto_evict, is_embedding=wish.model.is_embedding)
        if chosen is None:
            held_by = {runner.identifier: runner.memory_bytes() for runner in runners}
            level = self.policy.guardrail
            raise refusal(instance.identifier, needed_bytes, level=level, free_bytes=free, total_bytes=total, held_by=held_by)
        return leaving + [movable[resident.id] for resident in chosen]

    def _clear(self, wish: Wish, leaving: list[RunnerProcess]) -> set[int]:
        """Unload these for a wish if they may go, all at once; else return those that are to take nothing new until they may."""
        by_person = not wish.is_jit
        now = time.monotonic()
        with self.lock:
            staying = [r for r in leaving if r.is_busy or (not by_person and now < min(r.turn_until, r.last_used_at + GRACE_SECONDS))]
            if staying:
                wish.reason = f"Waiting until {_names(staying)} has finished."
                return {runner.instance.id for runner in staying if by_person or now >= runner.turn_until}
            for runner in leaving:
                runner.stopping = True
        wish.left += [runner.instance for runner in leaving]
        for runner in leaving:
            logger.info("unloading %s for %s", runner.identifier, wish.model.key)
            threading.Thread(target=runner.stop, name=f"unload-{runner.instance.id}", daemon=True).start()
        return set()

    def _spawn(self, wish: Wish, instance: Instance) -> None:
        with self.lock:
            if self._stopping.is_set() or wish not in self._wishes:
                return
            runner = RunnerProcess(
                instance,
                logs=self._logs,
                step_log=self._step_log,
                on_message=self._listener.on_message,
                on_exit=self._listener.on_exit,
            )
            runner.needed_bytes, runner.is_jit, runner.replaced = wish.needed_bytes or 0, instance.is_jit, wish.left
            runner.ttl_seconds = instance.ttl_seconds
            self.by_id[instance.id] = runner
            self._wishes.remove(wish)
            for live in wish.lives:
                self._listener.on_assigned(runner, live)

    def _needed_bytes(self, instance: Instance) -> int:
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

    def _turn_away(self, wishes: list[Wish]) -> None:
        """Give up wishes: the generations go elsewhere, a person is told, and what was to come back does not."""
        reason = f"The worker '{self._store.node_name}' is being taken out of service and loads nothing new."
        for wish in wishes:
            with self.lock:
                if wish not in self._wishes or self._is_settled(wish):
                    continue
                self._wishes.remove(wish)
                lives = list(wish.lives)
            if wish.instance is not None and wish.is_jit:
                self._try_store(lambda pk=wish.instance.id: self._store.instance_gone(pk))  # type: ignore[misc]
            elif wish.instance is not None:
                self._try_store(lambda pk=wish.instance.id: self._store.instance_failed(pk, reason))  # type: ignore[misc]
            for live in lives:
                self._listener.on_turned_away(live)

    # --- telling -------------------------------------------------------------------------------------------------------

    def _refuse(self, wish: Wish, error: LmwebError, *, code: str = "") -> None:
        """Give up a wish. Its row says so before its generations are sent elsewhere, so that none of them comes back."""
        info = ErrorInfo(code=code or error.code, message=error.message, param=error.param, details=error.details)
        with self.lock:
            if wish in self._wishes:
                self._wishes.remove(wish)
            self._put_back(wish.left)
        instance = wish.instance
        if instance is not None:
            self._try_store(lambda: self._store.instance_failed(instance.id, error.message, code=info.code, details=error.details))
        self._refuse_all(wish, info, elsewhere=isinstance(error, ModelLoadFailed))

    def _refuse_all(self, wish: Wish, info: ErrorInfo, *, elsewhere: bool = False) -> None:
        for live in wish.lives:
            self._listener.on_refused(live, info, elsewhere=elsewhere)

    def _put_back(self, instances: list[Instance]) -> None:
        """Load again what had left memory for a model that could not be loaded."""
        for instance in instances:
            if self._stopping.is_set() or any(self._staying(instance.model)):
                continue
            logger.info("%s comes back into memory", instance.identifier)
            self._wishes.append(Wish(instance.model, before=instance))
        self._wake.set()

    def _tell_waiting(self) -> None:
        """Tell the generations that wait for memory where they stand, and the rows of loads what they wait for."""
        now = time.monotonic()
        with self.lock:
            wishes = [wish for wish in self._wishes if now - wish.since > TELL_SECONDS]
        for position, wish in enumerate(wishes):
            reason = wish.reason if not position or wish.is_fetching else f"{wishes[0].model.key} is loaded first."
            if not reason or wish.told == (position, reason):
                continue
            wish.told = position, reason
            instance = wish.instance
            if instance is not None:
                self._try_store(lambda pk=instance.id, note=reason: self._store.instance_waiting(pk, note))  # type: ignore[misc]
            with self.lock:
                for live in wish.lives:
                    self._listener.on_waiting(live, position, reason)

    def _move_waiting(self) -> None:
        """Send requests that wait for memory to a node where they can be answered by now, if there is one."""
        now = time.monotonic()
        with self.lock:
            stuck = [wish for wish in self._wishes if wish.is_jit and wish.lives and now - wish.asked_at > MOVE_SECONDS]
            waiting = [list(wish.lives) for wish in stuck]
        for wish, lives in zip(stuck, waiting, strict=True):
            wish.asked_at = now
            all(self._listener.on_stuck(live) for live in lives)  # up to the first that stays

    @staticmethod
    def _try_store(action: Callable[[], None]) -> None:
        try:
            action()
        except DatabaseError as error:
            logger.warning("PostgreSQL is away: %s", str(error).strip().splitlines()[0])


def _is_free(runner: RunnerProcess) -> bool:
    """Whether it has nothing to do; one that is still loading counts only until somebody waits for it."""
    return not (runner.stopping or runner.running or runner.waiting)


def _is_expired(runner: RunnerProcess) -> bool:
    unused = time.monotonic() - runner.last_used_at
    return not runner.stopping and not runner.is_busy and runner.ttl_seconds is not None and unused > runner.ttl_seconds


def _names(runners: list[RunnerProcess]) -> str:
    return " and ".join(runner.identifier for runner in runners)
