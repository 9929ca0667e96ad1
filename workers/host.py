"""The host: all generations that this worker owns, on the runners of this machine (``workers.runners``).

Celery tasks only hand work in and return; from then on a generation is driven by the reader thread of its runner (tokens to
Redis), by the loader while its model is not there (``workers.loader``), and by the host's own threads (``workers.host_threads``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from django.db import Error as DatabaseError

from lmweb.db import in_short, try_to_store
from workers.events import (
    AnyEvent,
    ChatStart,
    ErrorInfo,
    ModelLoadEnd,
    ModelLoadProgress,
    ModelLoadStart,
    QueueUpdate,
    Stats,
)
from workers.fairness import Hold, PersonalLimits
from workers.host_threads import Arrivals, Keeper, Saver
from workers.loader import Loader
from workers.policy import Policy
from workers.protocol import Embed, Loaded, LoadFailed, LoadProgress, Output, RunnerMessage, Step, Submit
from workers.relay import Live, StreamWriter, interrupted
from workers.runner_process import RunnerProcess
from workers.runners import Runners
from workers.schemas import EmbeddingRequest, GenerationRequest
from workers.store import Claim, Instance, Outcome, Store

logger = logging.getLogger(__name__)

MAX_RESUMES = 2
#: What people are told of a fault that nobody foresaw.
BROKEN = ErrorInfo(code="internal_error", message="The server could not work on this request. The log has the details.")


class Host:
    """See the module; ``complete_config`` is that of ``Loader``, whose ``Listener`` this is, and ``on_removed`` that of ``Keeper``.

    ``lock``, which is that of the runners, guards ``lives``: the generations that this worker owns, by id.
    """

    def __init__(
        self,
        *,
        store: Store,
        redis_url: str,
        logs: Path,
        step_log: bool,
        complete_config: Callable[[Instance], Instance],
        policy: Policy | None = None,
        on_removed: Callable[[], None] | None = None,
    ) -> None:
        self.store = store
        self.runners = Runners(store=store, policy=policy or Policy())
        self.loader = Loader(self.runners, store=store, logs=logs, step_log=step_log, complete_config=complete_config, listener=self)
        self.writer = StreamWriter(redis_url)
        self.lock = self.runners.lock
        self.lives: dict[str, Live] = {}
        self.stopping = threading.Event()
        self._arrivals = Arrivals(self)
        self._saver = Saver(self)
        self._keeper = Keeper(self, saver=self._saver, on_removed=on_removed)
        self._limits = PersonalLimits()
        self._told: dict[str, Hold] = {}

    # --- entry points, called by tasks -------------------------------------------------------------------------------

    def start(self) -> None:
        """Register this node and start the threads: from now on it takes what is sent to it.

        Waits for PostgreSQL as long as it takes: whatever killed the worker may have killed that as well.
        """
        self._keeper.register()
        self._saver.start()
        self._keeper.start()
        self.loader.start()
        self._arrivals.start()

    def generate(self, generation_id: str) -> None:
        """Claim a generation and put it to work. Returns at once; what somebody has claimed already is left alone."""
        if self.stopping.is_set():
            return
        claim = self.store.claim(generation_id)
        if claim is None:
            return
        live = self.writer.catch_up(claim)
        with self.lock:
            self.lives[live.id] = live
        if claim.cancelled:
            self._end(live, status="cancelled", stats=Stats(stop_reason="userStopped"))
        elif claim.resumes > MAX_RESUMES:
            self._fail(live, interrupted("The answer was interrupted too often. What had been written is kept."))
        else:
            self._admit(live)

    def cancel(self, generation_id: str) -> None:
        """Stop a generation if it is ours; waiting ones end at once, running ones with the next step."""
        with self.lock:
            live = self.lives.get(generation_id)
            if live is None or live.ended or live.cancelled:
                return
            live.cancelled = True
            runner = self.runners.of(generation_id)
            self.loader.withdraw(live)
        if runner is not None:
            runner.cancel(generation_id)
        else:
            self._end(live, status="cancelled", stats=Stats(stop_reason="userStopped"))

    def load(self, instance_id: int) -> None:
        """Load a model that a person asked for; its row tells how that goes."""
        self.loader.load(instance_id)

    def unload(self, instance_id: int) -> None:
        """End a runner and delete its row once its memory is free. What it was generating ends there, its text is kept."""
        self.loader.unload(instance_id)

    def stop(self) -> None:
        """End all runners and give unfinished generations back to the queue, so that the next worker goes on with them."""
        self.stopping.set()
        self._keeper.stop()
        self._saver.stop()
        self.loader.stop()
        self.runners.stop()
        with self.lock:
            unfinished = [live for live in self.lives.values() if not live.ended]
        self._write(unfinished)
        try:
            self.store.unregister()
            self._saver.finish_ended()
            self.store.give_back([live.progress() for live in unfinished])
        except DatabaseError as error:
            logger.warning("could not give generations back, the reaper will find them: %s", error)

    # --- placing -------------------------------------------------------------------------------------------------------

    def _admit(self, live: Live) -> None:
        """Place a generation, or hold it back while its person has as many running as they may."""
        with self.lock:
            if live.ended:
                return
            claim = live.claim
            if self._limits.enter(claim.owner, live.id, lane=claim.request.lane, limit=claim.running_limit):
                self._place(live)
            else:
                self.tell_held()

    def _leave(self, live: Live) -> None:
        """Give the place of a generation that has ended to what its person has waiting. Called under the lock."""
        if self.stopping.is_set():
            return
        seconds = time.monotonic() - live.running_since
        for generation_id in self._limits.leave(live.claim.owner, live.id, seconds=seconds):
            self._told.pop(generation_id, None)
            freed = self.lives[generation_id]
            freed.running_since = time.monotonic()
            self._place(freed)

    def tell_held(self) -> None:
        """Tell those that are held back by their person's limit where they stand, if that has changed."""
        with self.lock:
            holds = self._limits.holds()
            changed = {generation_id: hold for generation_id, hold in holds.items() if self._told.get(generation_id) != hold}
            self._told = holds
            lives = [self.lives[generation_id] for generation_id in changed]
            for live in lives:
                hold = changed[live.id]
                with live.lock:
                    update = QueueUpdate(position=hold.position, reason=hold.reason, eta_seconds=hold.eta_seconds)
                    live.add([*self._begin(live), update])
        self._write(lives)

    def _place(self, live: Live) -> None:
        """Give a generation to a runner of its model, or let it wait until there is one."""
        claim = live.claim
        with self.lock:
            if live.ended:
                return
            runner = self.runners.find(claim.model, claim.identifier)
            if runner is not None:
                self.on_assigned(runner, live)
            else:
                live.started_at = time.monotonic()
                self.loader.want(live)

    def on_assigned(self, runner: RunnerProcess, live: Live) -> None:
        """Submit a generation to a model that is ready, or let it wait for the end of its load."""
        live.instance_id = runner.identifier
        if runner.ready:
            self._submit(runner, live)
            return
        runner.waiting.append(live)
        self._publish(live, [*self._begin(live), ModelLoadStart(model_instance_id=runner.identifier)])

    def on_waiting(self, live: Live, position: int, reason: str) -> None:
        """Tell the viewers what a generation waits for."""
        self._publish(live, [*self._begin(live), QueueUpdate(position=position, reason=reason)])

    def on_stuck(self, live: Live) -> bool:
        """Give a generation that waits for memory to a node that can begin with it, if there is one."""
        return self._hand_over(live, at_once=True)

    def on_refused(self, live: Live, error: ErrorInfo, *, elsewhere: bool) -> None:
        """End a generation whose model cannot be loaded, unless another node takes it."""
        if not (elsewhere and self._hand_over(live)):
            self._fail(live, error)

    def on_turned_away(self, live: Live) -> None:
        """Give a generation to another node, or let it wait for one: this one loads nothing new."""
        self._hand_over(live, or_wait=True)

    def _hand_over(self, live: Live, *, at_once: bool = False, or_wait: bool = False) -> bool:
        """Give a generation to another node. Returns whether there is one; what ended meanwhile counts as given."""
        if live.ended:
            return True
        self._write([live])
        with live.lock:
            progress = live.progress()
        try:
            given = self.store.hand_over(progress, at_once=at_once, or_wait=or_wait)
        except DatabaseError as error:
            logger.warning("%s cannot go to another node, PostgreSQL is away: %s", live.id, in_short(error))
            return False
        if given:
            self.forget(live)
        return given

    @staticmethod
    def _begin(live: Live) -> list[AnyEvent]:
        return [] if live.seq else [ChatStart(model_instance_id=live.instance_id)]

    def _submit(self, runner: RunnerProcess, live: Live) -> None:
        """Hand a generation to its runner. What cannot be sent is the end of this one, not of the thread that brought it here."""
        try:
            self._hand_in(runner, live)
        except Exception:
            logger.exception("generation %s cannot be handed to %s", live.id, runner.identifier)
            runner.running.pop(live.id, None)
            self._fail(live, BROKEN)

    def _hand_in(self, runner: RunnerProcess, live: Live) -> None:
        runner.last_used_at = time.monotonic()
        runner.running[live.id] = live
        with live.lock:
            tokens = list(live.tokens)
            live.add(self._begin(live))  # leaves with the first token, not before it
        claim = live.claim
        if isinstance(claim.request, EmbeddingRequest):
            runner.submit(Embed(generation_id=live.id, request=claim.request, owner=claim.owner))
        else:
            self._submit_chat(runner, claim, tokens)

    def _submit_chat(self, runner: RunnerProcess, claim: Claim, tokens: list[int]) -> None:
        assert isinstance(claim.request, GenerationRequest)
        draft = claim.draft if claim.draft and self.runners.has_room_for_draft(runner, claim.draft) else None
        message = Submit(
            generation_id=claim.id,
            request=claim.request,
            owner=claim.owner,
            output_tokens=tokens,
            chat_template=claim.model.chat_template,
            draft_path=draft.path if draft else "",
        )
        runner.submit(message)

    # --- what runners say ----------------------------------------------------------------------------------------------

    def on_message(self, runner: RunnerProcess, message: RunnerMessage) -> None:
        """Handle one message."""
        if isinstance(message, Step):
            self._on_step(runner, message.outputs)
        elif isinstance(message, LoadProgress):
            self._on_load_progress(runner, message.progress)
        elif isinstance(message, Loaded):
            self._on_loaded(runner, message)
        elif isinstance(message, LoadFailed):
            runner.load_error = message.error.message

    def _on_step(self, runner: RunnerProcess, outputs: list[Output]) -> None:
        running = runner.running
        now = time.monotonic()
        going_on: list[Live] = []
        ended: list[tuple[Live, Output]] = []
        for output in outputs:
            live = running.get(output.generation_id)
            if live is None:
                continue
            with live.lock:
                live.add(output.events, output.tokens)
            if output.stats is not None:
                ended.append((live, output))
            else:
                going_on.append(live)
        if going_on:
            self._write(going_on)
        for live, output in ended:
            with self.lock:
                running.pop(live.id, None)
            runner.last_used_at = now
            self._on_ended(live, output)
        if ended and not running:
            self.loader.has_news()

    def _on_ended(self, live: Live, output: Output) -> None:
        assert output.stats is not None
        if output.error is not None:
            self._fail(live, output.error, stats=output.stats)
        else:
            status = "cancelled" if output.stats.stop_reason == "userStopped" else "completed"
            self._end(live, status=status, stats=output.stats)

    def _on_load_progress(self, runner: RunnerProcess, progress: float) -> None:
        with self.lock:
            waiting = list(runner.waiting)
        for live in waiting:
            self._publish(live, [ModelLoadProgress(model_instance_id=runner.identifier, progress=progress)])
        try_to_store(lambda: self.store.instance_loading(runner.instance.id, progress))

    def _on_loaded(self, runner: RunnerProcess, loaded: Loaded) -> None:
        seconds = time.monotonic() - runner.started_at
        with self.lock:
            waiting, runner.waiting = runner.waiting, []
            runner.ready = True
            runner.last_used_at = time.monotonic()
            runner.turn_until = runner.last_used_at + self.runners.policy.turn(seconds)
            for live in waiting:
                live.load_seconds = round(time.monotonic() - live.started_at, 4)
                self._publish(live, [ModelLoadEnd(model_instance_id=runner.identifier, load_time_seconds=round(seconds, 4))])
                self._submit(runner, live)
        config = msgspec.structs.replace(
            runner.instance.config, context_length=loaded.context_length, parallel=loaded.parallel, eval_batch_size=loaded.eval_batch_size
        )
        memory = runner.memory_bytes()
        try_to_store(lambda: self.store.instance_ready(runner.instance.id, config=config, memory_bytes=memory, load_seconds=seconds))

    def on_exit(self, runner: RunnerProcess) -> None:
        """Clean up after a runner: waiting generations fail with the reason of the load, running ones go on elsewhere."""
        pk = runner.instance.id
        with self.lock:
            self.loader.ended(runner)
            waiting, running = runner.waiting, list(runner.running.values())
            runner.waiting, runner.running = [], {}
        if self.stopping.is_set():
            try_to_store(lambda: self.store.instance_gone(pk))
            return
        if not runner.ready and not runner.stopping:
            reason = runner.load_failure()
            try_to_store(lambda: self.store.instance_failed(pk, reason))
            for live in waiting:
                self._fail(live, ErrorInfo(code="model_load_failed", message=reason))
        else:
            try_to_store(lambda: self.store.instance_gone(pk))
            for live in waiting:
                self._place(live)
        reason = runner.exit_reason()
        if running:
            logger.warning("runner %s ended with %d generations: %s", runner.identifier, len(running), reason)
        for live in running:
            if runner.stopping:
                self._fail(live, interrupted("The model was unloaded while it answered. What had been written is kept."))
            else:
                self._resume(live, reason)

    def _resume(self, live: Live, reason: str) -> None:
        """Go on with a generation whose runner crashed, from its last token; ``reason`` is how."""
        with live.lock:
            live.close_entry()
            live.resumes += 1
        if live.cancelled:
            self._end(live, status="cancelled", stats=self._partial_stats(live, "userStopped"))
        elif live.resumes > MAX_RESUMES:
            crashed = "The model crashed repeatedly on this request. What had been written is kept."
            self._fail(live, interrupted(f"{crashed} {reason}"))
        else:
            self._place(live)

    # --- publishing and ending -----------------------------------------------------------------------------------------

    def _publish(self, live: Live, events: list[AnyEvent]) -> None:
        with live.lock:
            live.add(events)
        self._write([live])

    def _write(self, lives: list[Live]) -> None:
        for live in lives:
            with live.lock:
                live.close_entry()
        self.writer.write(lives)

    def _fail(self, live: Live, error: ErrorInfo, *, stats: Stats | None = None) -> None:
        self._end(live, status="failed", stats=stats or self._partial_stats(live, "failed"), error=error)

    @staticmethod
    def _partial_stats(live: Live, reason: str) -> Stats:
        return Stats(total_output_tokens=len(live.tokens), stop_reason=reason)

    def _end(self, live: Live, *, status: str, stats: Stats, error: ErrorInfo | None = None) -> None:
        """Queue the end for the saver: the row first, then ``chat.end``."""
        if live.load_seconds is not None:
            stats = msgspec.structs.replace(stats, model_load_time_seconds=live.load_seconds)
        with self.lock:
            if live.ended:
                return
            live.ended = True
            self._leave(live)
        self._write([live])
        with live.lock:
            outcome = Outcome(live.progress(), status, stats, error, drop_inputs=live.is_embedding)
        self._saver.end(live, outcome)

    # --- asked by its threads ------------------------------------------------------------------------------------------

    def take_up(self, generation_id: str) -> None:
        """Put a generation to work. A fault that nobody foresaw is the end of this one, not of the thread that takes up all others."""
        try:
            self.generate(generation_id)
        except DatabaseError:
            raise
        except Exception:
            logger.exception("generation %s cannot be worked on", generation_id)
            if live := self.lives.get(generation_id):
                self._fail(live, BROKEN)

    def forget(self, live: Live) -> None:
        """Drop a generation that is not ours any more (deleted, or taken over while we could not renew its lease)."""
        with self.lock:
            live.ended = True
            self.lives.pop(live.id, None)
            self._leave(live)
            runner = self.runners.of(live.id)
            self.loader.withdraw(live)
            if runner is not None:
                del runner.running[live.id]
        if runner is not None:
            runner.cancel(live.id)

    def drain(self) -> None:
        """Hand over what has not begun, and unload what has nothing to do; called with every heartbeat until nothing is left."""
        with self.lock:
            begun = {generation_id for runner in self.runners.by_id.values() for generation_id in runner.running}
            waiting = [live for live in self.lives.values() if not live.ended and live.id not in begun]
            for live in waiting:
                self.loader.withdraw(live)
        for live in waiting:
            self.on_turned_away(live)
        self.runners.unload_free()
