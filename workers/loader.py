"""The loader: how models come into the memory of this machine (``workers.runners``), and who has to leave for whom.

One thread decides about loads, one after the other: whoever waits longest comes first, and nothing that could take its memory
overtakes it. Policies are LM Studio's: models are loaded when a request needs them (JIT), leave after a time without use (TTL),
and make room for each other (auto-evict).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from django.db import Error as DatabaseError

from lmweb.db import in_short, try_to_store
from lmweb.errors import LmwebError, ModelLoadFailed, ModelNotLoaded
from workers.events import ErrorInfo
from workers.model_fetch import ModelFetch
from workers.protocol import RunnerMessage
from workers.relay import Live
from workers.runner_process import RunnerProcess
from workers.runners import Runners
from workers.store import Instance, ModelFile, Store

logger = logging.getLogger(__name__)

#: How often waiting loads are looked at again; whatever ends or becomes idle is noticed at once.
LOOK_SECONDS = 0.25
#: A model that others wait for may leave when it had no request for so long: its next one is often on its way.
GRACE_SECONDS = 0.5
#: Who waits longer than this is told what for.
TELL_SECONDS = 0.3
#: How often it is asked whether another node has by now what requests wait for here.
MOVE_SECONDS = 5.0


class Listener(Protocol):
    """Who uses the runners that are loaded. The first two are called in the runner's reader thread; see ``RunnerProcess``."""

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
    fetch: ModelFetch | None = None

    @property
    def is_fetching(self) -> bool:
        """Whether it waits for its files, not for memory."""
        return self.fetch is not None and not self.fetch.is_done

    @property
    def waits_for(self) -> str:
        """Return what it waits for, in words; empty: nothing that is worth telling."""
        return self.fetch.note if self.fetch is not None and not self.fetch.is_done else self.reason

    @property
    def is_jit(self) -> bool:
        """Whether only requests want it."""
        return self.before is None and (self.instance is None or self.instance.is_jit)


class Loader:
    """See the module. ``complete_config`` fills in a load configuration for this machine (context length, threads).

    ``may_load`` False: an admin lets this node load nothing new. The lock of the runners guards the wishes as well.
    """

    def __init__(
        self,
        runners: Runners,
        *,
        store: Store,
        logs: Path,
        step_log: bool,
        complete_config: Callable[[Instance], Instance],
        listener: Listener,
    ) -> None:
        self.may_load = True
        self._runners = runners
        self._lock = runners.lock
        self._store = store
        self._logs, self._step_log = logs, step_log
        self._complete_config = complete_config
        self._listener = listener
        self._wishes: list[Wish] = []
        self._superfluous: list[int] = []
        self._wake = threading.Event()
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start the thread that decides about loads."""
        threading.Thread(target=self._decide, name="loader", daemon=True).start()

    def stop(self) -> None:
        """Load nothing any more."""
        self._stopping.set()
        self._wake.set()

    # --- asked by the host, under the lock -----------------------------------------------------------------------------

    def want(self, live: Live) -> None:
        """Have the model of a generation loaded; the listener is told how that goes."""
        model = live.claim.model
        wish = next((wish for wish in self._wishes if wish.is_jit and wish.model.id == model.id), None)
        if wish is None:
            ttl = live.claim.request.ttl_seconds or self._runners.policy.jit_ttl_seconds
            wish = Wish(model, ttl_seconds=ttl)
            self._wishes.append(wish)
        wish.lives.append(live)
        self._wake.set()

    def withdraw(self, live: Live) -> None:
        """Let a generation wait no more."""
        for runner in self._runners.by_id.values():
            if live in runner.waiting:
                runner.waiting.remove(live)
        for wish in self._wishes:
            if live in wish.lives:
                wish.lives.remove(live)
                self._wake.set()

    def ended(self, runner: RunnerProcess) -> None:
        """Forget a runner whose process has ended; what left memory for one that could not be loaded comes back."""
        self._runners.by_id.pop(runner.instance.id, None)
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
        with self._lock:
            runner = self._runners.by_id.get(instance_id)
            if runner is not None:  # a generation that came first has started it
                runner.is_jit = False
            elif instance is not None:
                self._wishes.append(Wish(instance.model, instance, ttl_seconds=instance.ttl_seconds))
                self._wake.set()

    def unload(self, instance_id: int) -> None:
        """End a runner and delete its row once its memory is free. What it was generating ends there, its text is kept."""
        with self._lock:
            runner = self._runners.by_id.get(instance_id)
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

    # --- deciding about loads ------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait(LOOK_SECONDS if self._wishes else None)
            self._wake.clear()
            if not self._stopping.is_set():
                self._look()

    def _look(self) -> None:
        """Fulfil wishes in the order of their age, up to the first one that has to wait."""
        with self._lock:
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
                logger.warning("PostgreSQL is away: %s", in_short(error))
                if wish.instance is not None:
                    break  # its row is there, and it is tried again
                self._refuse(wish, LmwebError(f"The model could not be loaded: {error.__class__.__name__}."), code="service_unavailable")
            except Exception as error:  # a model that was deleted at this moment, say: this thread is one for all loads
                logger.exception("%s cannot be loaded", wish.model.key)
                words = f"{wish.model.key} could not be loaded ({type(error).__name__}). The worker's log has the details."
                self._refuse(wish, LmwebError(words), code="model_load_failed")
            if wish in self._wishes and not wish.is_fetching:
                break
        with self._lock:
            self._runners.draining = draining
            superfluous, self._superfluous = self._superfluous, []
        for pk in superfluous:
            try_to_store(lambda pk=pk: self._store.instance_gone(pk))  # type: ignore[misc]
        self._tell_waiting()
        self._move_waiting()

    def _advance(self, wish: Wish) -> set[int]:
        """Bring a wish as far as it goes now; it is fulfilled when it is gone from the list.

        Returns the runners that are to take nothing new on its account. Raises ``ModelLoadFailed`` (of which ``InsufficientMemory``
        is one), ``ModelNotLoaded`` or ``django.db.Error``.
        """
        with self._lock:
            if wish not in self._wishes or self._is_settled(wish):
                return set()
            if any(runner.stopping for runner in self._runners.by_id.values()):
                wish.reason = "Another model is being unloaded."
                return set()
            running = set(self._runners.by_id)
        if wish.is_jit and not self._runners.policy.jit:
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
            wish.needed_bytes = self._runners.needed_bytes(wish.instance)
        leaving = self._runners.leavers(wish.instance, wish.needed_bytes, by_request=wish.is_jit)
        if leaving:
            return self._clear(wish, leaving)
        self._spawn(wish, wish.instance)
        return set()

    def _has_files(self, wish: Wish, instance: Instance) -> bool:
        """Whether the files are here. If not, they are being fetched from now on. Raises what ended that, as ``ModelLoadFailed``."""
        if wish.fetch is None:
            if not self._store.must_fetch(wish.model):
                return True
            wish.fetch = ModelFetch(
                self._store,
                wish.model,
                instance.id,
                is_wanted=lambda: not self._stopping.is_set() and wish in self._wishes,
                on_end=self._wake.set,
            )
        if wish.fetch.error is not None:
            raise ModelLoadFailed(wish.fetch.error.message, details=wish.fetch.error.details)
        return wish.fetch.is_done

    def _require_file(self, model: ModelFile) -> None:
        if not Path(model.path).exists():
            raise ModelLoadFailed(f"The file of {model.key} is not on the worker '{self._store.node_name}'.", param="model")

    def _is_settled(self, wish: Wish) -> bool:
        """Whether nothing has to be loaded for this wish (any more); then it is taken from the list."""
        runner = self._runners.by_id.get(wish.instance.id) if wish.instance else None
        if runner is not None:
            runner.is_jit = runner.is_jit and wish.is_jit
        elif wish.is_jit or wish.before is not None:
            runner = next(iter(self._runners.staying(wish.model)), None)  # draining or not: that was for those who waited longer
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

    def _clear(self, wish: Wish, leaving: list[RunnerProcess]) -> set[int]:
        """Unload these for a wish if they may go, all at once; else return those that are to take nothing new until they may."""
        by_person = not wish.is_jit
        now = time.monotonic()
        with self._lock:
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
        with self._lock:
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
            self._runners.by_id[instance.id] = runner
            self._wishes.remove(wish)
            for live in wish.lives:
                self._listener.on_assigned(runner, live)

    def _turn_away(self, wishes: list[Wish]) -> None:
        """Give up wishes: the generations go elsewhere, a person is told, and what was to come back does not."""
        reason = f"The worker '{self._store.node_name}' is being taken out of service and loads nothing new."
        for wish in wishes:
            with self._lock:
                if wish not in self._wishes or self._is_settled(wish):
                    continue
                self._wishes.remove(wish)
                lives = list(wish.lives)
            if wish.instance is not None and wish.is_jit:
                try_to_store(lambda pk=wish.instance.id: self._store.instance_gone(pk))  # type: ignore[misc]
            elif wish.instance is not None:
                try_to_store(lambda pk=wish.instance.id: self._store.instance_failed(pk, reason))  # type: ignore[misc]
            for live in lives:
                self._listener.on_turned_away(live)

    # --- telling -------------------------------------------------------------------------------------------------------

    def _refuse(self, wish: Wish, error: LmwebError, *, code: str = "") -> None:
        """Give up a wish. Its row says so before its generations are sent elsewhere, so that none of them comes back."""
        info = ErrorInfo(code=code or error.code, message=error.message, param=error.param, details=error.details)
        with self._lock:
            if wish in self._wishes:
                self._wishes.remove(wish)
            self._put_back(wish.left)
        instance = wish.instance
        if instance is not None:
            try_to_store(lambda: self._store.instance_failed(instance.id, error.message, code=info.code, details=error.details))
        self._refuse_all(wish, info, elsewhere=isinstance(error, ModelLoadFailed))

    def _refuse_all(self, wish: Wish, info: ErrorInfo, *, elsewhere: bool = False) -> None:
        for live in wish.lives:
            self._listener.on_refused(live, info, elsewhere=elsewhere)

    def _put_back(self, instances: list[Instance]) -> None:
        """Load again what had left memory for a model that could not be loaded."""
        for instance in instances:
            if self._stopping.is_set() or any(self._runners.staying(instance.model)):
                continue
            logger.info("%s comes back into memory", instance.identifier)
            self._wishes.append(Wish(instance.model, before=instance))
        self._wake.set()

    def _tell_waiting(self) -> None:
        """Tell the generations that wait for memory where they stand, and the rows of loads what they wait for."""
        now = time.monotonic()
        with self._lock:
            wishes = [wish for wish in self._wishes if now - wish.since > TELL_SECONDS]
        for position, wish in enumerate(wishes):
            reason = wish.waits_for if not position or wish.is_fetching else f"{wishes[0].model.key} is loaded first."
            if not reason or wish.told == (position, reason):
                continue
            wish.told = position, reason
            instance = wish.instance
            if instance is not None:
                try_to_store(lambda pk=instance.id, note=reason: self._store.instance_waiting(pk, note))  # type: ignore[misc]
            with self._lock:
                for live in wish.lives:
                    self._listener.on_waiting(live, position, reason)

    def _move_waiting(self) -> None:
        """Send requests that wait for memory to a node where they can be answered by now, if there is one."""
        now = time.monotonic()
        with self._lock:
            stuck = [wish for wish in self._wishes if wish.is_jit and wish.lives and now - wish.asked_at > MOVE_SECONDS]
            waiting = [list(wish.lives) for wish in stuck]
        for wish, lives in zip(stuck, waiting, strict=True):
            wish.asked_at = now
            all(self._listener.on_stuck(live) for live in lives)  # up to the first that stays


def _names(runners: list[RunnerProcess]) -> str:
    return " and ".join(runner.identifier for runner in runners)
