"""The host: all generations that this worker owns, on the runners of this machine (``workers.runners``).

Celery tasks only hand work in and return; from then on a generation is driven by the reader thread of its runner (tokens to
Redis), one saver thread (partial texts, leases, ends) and one keeper thread (heartbeat, idle models, Redis coming back).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
from django.db import Error as DatabaseError

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
from workers.protocol import Embed, Loaded, LoadFailed, LoadProgress, Output, RunnerMessage, Step, Submit
from workers.recent_log import RecentLog
from workers.relay import Live, StreamWriter, end_events, interrupted
from workers.runner_process import RunnerProcess
from workers.runners import Policy, Runners
from workers.schemas import EmbeddingRequest, GenerationRequest
from workers.store import Claim, Instance, NodeState, Outcome, Progress, Store

logger = logging.getLogger(__name__)

MAX_RESUMES = 2
SAVE_SECONDS = 1.0
KEEP_SECONDS = 0.25
HEARTBEAT_SECONDS = 2.0
TELL_SECONDS = 1.0
#: Between two attempts to reach PostgreSQL.
DATABASE_RETRY_SECONDS = 0.5
#: Without news, the rows are looked at after this time.
ARRIVAL_SECONDS = 2.0
#: What people are told of a fault that nobody foresaw.
BROKEN = ErrorInfo(code="internal_error", message="The server could not work on this request. The log has the details.")


class Host:
    """See the module; ``complete_config`` and ``policy`` are those of ``Runners``, whose ``Listener`` this is.

    ``on_removed`` is called when the installation does not know this node any more.
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
        self._on_removed = on_removed
        self._recent_log = RecentLog()
        self._state = NodeState.ACTIVE
        self.runners = Runners(
            store=store, logs=logs, step_log=step_log, complete_config=complete_config, policy=policy or Policy(), listener=self
        )
        self._writer = StreamWriter(redis_url)
        self._lock = self.runners.lock
        self._lives: dict[str, Live] = {}
        self._limits = PersonalLimits()
        self._told: dict[str, Hold] = {}
        self._ends: list[tuple[Live, Outcome]] = []
        self._wake_saver = threading.Event()
        self._stopping = threading.Event()

    # --- entry points, called by tasks -------------------------------------------------------------------------------

    def start(self) -> None:
        """Register this node and start the threads: from now on it takes what is sent to it.

        Waits for PostgreSQL as long as it takes: whatever killed the worker may have killed that as well.
        """
        logging.getLogger().addHandler(self._recent_log)
        self._register()
        threading.Thread(target=self._save_loop, name="saver", daemon=True).start()
        threading.Thread(target=self._keep_loop, name="keeper", daemon=True).start()
        self.runners.start()
        threading.Thread(target=self._arrival_loop, name="arrivals", daemon=True).start()

    def _register(self) -> None:
        while not self._stopping.is_set():
            try:
                self.store.register()
            except DatabaseError as error:
                logger.warning("PostgreSQL is away, this node registers when it is back: %s", str(error).strip().splitlines()[0])
                self._stopping.wait(DATABASE_RETRY_SECONDS)
            else:
                return

    def generate(self, generation_id: str) -> None:
        """Claim a generation and put it to work. Returns at once; what somebody has claimed already is left alone."""
        if self._stopping.is_set():
            return
        claim = self.store.claim(generation_id)
        if claim is None:
            return
        live = self._writer.catch_up(claim)
        with self._lock:
            self._lives[live.id] = live
        if claim.cancelled:
            self._end(live, status="cancelled", stats=Stats(stop_reason="userStopped"))
        elif claim.resumes > MAX_RESUMES:
            self._fail(live, interrupted("The answer was interrupted too often. What had been written is kept."))
        else:
            self._admit(live)

    def cancel(self, generation_id: str) -> None:
        """Stop a generation if it is ours; waiting ones end at once, running ones with the next step."""
        with self._lock:
            live = self._lives.get(generation_id)
            if live is None or live.ended or live.cancelled:
                return
            live.cancelled = True
            runner = self.runners.of(generation_id)
            self.runners.withdraw(live)
        if runner is not None:
            runner.cancel(generation_id)
        else:
            self._end(live, status="cancelled", stats=Stats(stop_reason="userStopped"))

    def load(self, instance_id: int) -> None:
        """Load a model that a person asked for; its row tells how that goes."""
        self.runners.load(instance_id)

    def unload(self, instance_id: int) -> None:
        """End a runner and delete its row once its memory is free. What it was generating ends there, its text is kept."""
        self.runners.unload(instance_id)

    def stop(self) -> None:
        """End all runners and give unfinished generations back to the queue, so that the next worker goes on with them."""
        self._stopping.set()
        logging.getLogger().removeHandler(self._recent_log)
        self._wake_saver.set()
        self.runners.stop()
        with self._lock:
            unfinished = [live for live in self._lives.values() if not live.ended]
        self._write(unfinished)
        try:
            self.store.unregister()
            self._finish_ended()
            self.store.give_back([live.progress() for live in unfinished])
        except DatabaseError as error:
            logger.warning("could not give generations back, the reaper will find them: %s", error)

    # --- placing -------------------------------------------------------------------------------------------------------

    def _admit(self, live: Live) -> None:
        """Place a generation, or hold it back while its person has as many running as they may."""
        with self._lock:
            if live.ended:
                return
            claim = live.claim
            if self._limits.enter(claim.owner, live.id, lane=claim.request.lane, limit=claim.running_limit):
                self._place(live)
            else:
                self._tell_held()

    def _leave(self, live: Live) -> None:
        """Give the place of a generation that has ended to what its person has waiting. Called under the lock."""
        if self._stopping.is_set():
            return
        seconds = time.monotonic() - live.running_since
        for generation_id in self._limits.leave(live.claim.owner, live.id, seconds=seconds):
            self._told.pop(generation_id, None)
            freed = self._lives[generation_id]
            freed.running_since = time.monotonic()
            self._place(freed)

    def _tell_held(self) -> None:
        """Tell those that are held back by their person's limit where they stand, if that has changed."""
        with self._lock:
            holds = self._limits.holds()
            changed = {generation_id: hold for generation_id, hold in holds.items() if self._told.get(generation_id) != hold}
            self._told = holds
            lives = [self._lives[generation_id] for generation_id in changed]
            for live in lives:
                hold = changed[live.id]
                with live.lock:
                    update = QueueUpdate(position=hold.position, reason=hold.reason, eta_seconds=hold.eta_seconds)
                    live.add([*self._begin(live), update])
        self._write(lives)

    def _place(self, live: Live) -> None:
        """Give a generation to a runner of its model, or let it wait until there is one."""
        claim = live.claim
        with self._lock:
            if live.ended:
                return
            runner = self.runners.find(claim.model, claim.identifier)
            if runner is not None:
                self.on_assigned(runner, live)
            else:
                live.started_at = time.monotonic()
                self.runners.want(live)

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
            logger.warning("%s cannot go to another node, PostgreSQL is away: %s", live.id, str(error).strip().splitlines()[0])
            return False
        if given:
            self._forget(live)
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
            with self._lock:
                running.pop(live.id, None)
            runner.last_used_at = now
            self._on_ended(live, output)
        if ended and not running:
            self.runners.has_news()

    def _on_ended(self, live: Live, output: Output) -> None:
        assert output.stats is not None
        if output.error is not None:
            self._fail(live, output.error, stats=output.stats)
        else:
            status = "cancelled" if output.stats.stop_reason == "userStopped" else "completed"
            self._end(live, status=status, stats=output.stats)

    def _on_load_progress(self, runner: RunnerProcess, progress: float) -> None:
        with self._lock:
            waiting = list(runner.waiting)
        for live in waiting:
            self._publish(live, [ModelLoadProgress(model_instance_id=runner.identifier, progress=progress)])
        self._try_store(lambda: self.store.instance_loading(runner.instance.id, progress))

    def _on_loaded(self, runner: RunnerProcess, loaded: Loaded) -> None:
        seconds = time.monotonic() - runner.started_at
        with self._lock:
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
        self._try_store(lambda: self.store.instance_ready(runner.instance.id, config=config, memory_bytes=memory, load_seconds=seconds))

    def on_exit(self, runner: RunnerProcess) -> None:
        """Clean up after a runner: waiting generations fail with the reason of the load, running ones go on elsewhere."""
        pk = runner.instance.id
        with self._lock:
            self.runners.ended(runner)
            waiting, running = runner.waiting, list(runner.running.values())
            runner.waiting, runner.running = [], {}
        if self._stopping.is_set():
            self._try_store(lambda: self.store.instance_gone(pk))
            return
        if not runner.ready and not runner.stopping:
            reason = runner.load_failure()
            self._try_store(lambda: self.store.instance_failed(pk, reason))
            for live in waiting:
                self._fail(live, ErrorInfo(code="model_load_failed", message=reason))
        else:
            self._try_store(lambda: self.store.instance_gone(pk))
            for live in waiting:
                self._place(live)
        if running:
            logger.warning("runner %s ended with %d generations: %s", runner.identifier, len(running), runner.exit_reason())
        for live in running:
            if runner.stopping:
                self._fail(live, interrupted("The model was unloaded while it answered. What had been written is kept."))
            else:
                self._resume(live)

    def _resume(self, live: Live) -> None:
        """Go on with a generation whose runner crashed, from its last token."""
        with live.lock:
            live.close_entry()
            live.resumes += 1
        if live.cancelled:
            self._end(live, status="cancelled", stats=self._partial_stats(live, "userStopped"))
        elif live.resumes > MAX_RESUMES:
            self._fail(live, interrupted("The model crashed repeatedly on this request. What had been written is kept."))
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
        self._writer.write(lives)

    def _fail(self, live: Live, error: ErrorInfo, *, stats: Stats | None = None) -> None:
        self._end(live, status="failed", stats=stats or self._partial_stats(live, "failed"), error=error)

    @staticmethod
    def _partial_stats(live: Live, reason: str) -> Stats:
        return Stats(total_output_tokens=len(live.tokens), stop_reason=reason)

    def _end(self, live: Live, *, status: str, stats: Stats, error: ErrorInfo | None = None) -> None:
        """Queue the end for the saver: the row first, then ``chat.end``."""
        if live.load_seconds is not None:
            stats = msgspec.structs.replace(stats, model_load_time_seconds=live.load_seconds)
        with self._lock:
            if live.ended:
                return
            live.ended = True
            self._leave(live)
        self._write([live])
        with live.lock:
            outcome = Outcome(live.progress(), status, stats, error, drop_inputs=live.is_embedding)
        with self._lock:
            self._ends.append((live, outcome))
        self._wake_saver.set()

    # --- threads ---------------------------------------------------------------------------------------------------------

    def _arrival_loop(self) -> None:
        """Take up what is sent to this node."""
        while not self._stopping.is_set():
            try:
                self._take_up_arrivals()
            except DatabaseError as error:
                logger.warning("PostgreSQL is away, nothing new can arrive: %s", str(error).strip().splitlines()[0])
                self._stopping.wait(DATABASE_RETRY_SECONDS)

    def _take_up_arrivals(self) -> None:
        with closing(self.store.arrivals(ARRIVAL_SECONDS)) as arrivals:
            for generation_ids in arrivals:
                for generation_id in generation_ids:
                    self._take_up(generation_id)
                if self._stopping.is_set():
                    return

    def _take_up(self, generation_id: str) -> None:
        """Put a generation to work. A fault that nobody foresaw is the end of this one, not of the thread that takes up all others."""
        try:
            self.generate(generation_id)
        except DatabaseError:
            raise
        except Exception:
            logger.exception("generation %s cannot be worked on", generation_id)
            if live := self._lives.get(generation_id):
                self._fail(live, BROKEN)

    def _save_loop(self) -> None:
        """Write ends at once, partial texts and leases once a second, for as long as the process lives."""
        saved_at = time.monotonic()
        while not self._stopping.is_set():
            self._wake_saver.wait(max(0.0, SAVE_SECONDS - (time.monotonic() - saved_at)))
            self._wake_saver.clear()
            try:
                self._finish_ended()
                if time.monotonic() - saved_at >= SAVE_SECONDS:
                    saved_at = time.monotonic()
                    self._save_running()
            except DatabaseError as error:
                logger.warning("PostgreSQL is away, texts are kept until it is back: %s", str(error).strip().splitlines()[0])
                self._stopping.wait(0.5)
                self._wake_saver.set()

    def _finish_ended(self) -> None:
        with self._lock:
            ends = list(self._ends)
        if not ends:
            return
        ours = self.store.finish([outcome for _, outcome in ends])
        for live, outcome in ends:
            if live.id in ours:
                with live.lock:
                    live.pending_events += end_events(outcome, live.instance_id)
                    live.close_entry()
        self._writer.write([live for live, _ in ends if live.id in ours], last=True)
        with self._lock:
            self._ends = self._ends[len(ends) :]
            for live, _ in ends:
                if not self._writer.is_behind:
                    self._lives.pop(live.id, None)

    def _save_running(self) -> None:
        with self._lock:
            lives = [live for live in self._lives.values() if not live.ended]
            used = [runner.instance.id for runner in self.runners.by_id.values() if runner.running]
        progress: list[Progress] = []
        for live in lives:
            with live.lock:
                live.close_entry()
                progress.append(live.progress())
        self._writer.write(lives)
        ours, cancelled = self.store.save(progress) if progress else (set(), set())
        for live in lives:
            if live.id not in ours:
                self._forget(live)
            elif live.id in cancelled:
                self.cancel(live.id)
        if used:
            self.store.instances_used(used)

    def _forget(self, live: Live) -> None:
        """Drop a generation that is not ours any more (deleted, or taken over while we could not renew its lease)."""
        with self._lock:
            live.ended = True
            self._lives.pop(live.id, None)
            self._leave(live)
            runner = self.runners.of(live.id)
            self.runners.withdraw(live)
            if runner is not None:
                del runner.running[live.id]
        if runner is not None:
            runner.cancel(live.id)

    def _keep_loop(self) -> None:
        """Refill Redis after it was away, tell who is held back, send the heartbeat, unload idle models."""
        beat_at = told_at = 0.0
        while not self._stopping.wait(KEEP_SECONDS):
            if self._writer.is_behind:
                self._refill()
            if time.monotonic() - told_at >= TELL_SECONDS:
                told_at = time.monotonic()
                self._tell_held()
            if time.monotonic() - beat_at >= HEARTBEAT_SECONDS:
                beat_at = time.monotonic()
                self._try_store(self._beat)
                self._try_store(self.runners.unload_idle)

    def _beat(self) -> None:
        """Send the heartbeat, and act on what comes back: what an admin lets this node do."""
        state = self.store.heartbeat(log_lines=self._recent_log.fresh())
        if state is None:
            if self._on_removed is not None:
                logger.error("This node was removed by an admin, or another machine has its name. The worker ends.")
                self._on_removed()
            return
        if state is not self._state:
            logger.info("This node is %s now.", state)
            self._state = state
        self.runners.may_load = state is NodeState.ACTIVE
        if state is NodeState.DRAINING:
            self._drain()

    def _drain(self) -> None:
        """Hand over what has not begun, and unload what has nothing to do; called with every heartbeat until nothing is left."""
        with self._lock:
            begun = {generation_id for runner in self.runners.by_id.values() for generation_id in runner.running}
            waiting = [live for live in self._lives.values() if not live.ended and live.id not in begun]
            for live in waiting:
                self.runners.withdraw(live)
        for live in waiting:
            self.on_turned_away(live)
        self.runners.unload_free()

    def _refill(self) -> None:
        with self._lock:
            lives = list(self._lives.values())
            ending = {live.id for live, _ in self._ends}
        if self._writer.refill(lives):
            logger.info("Redis is back, %d streams refilled", len(lives))
            with self._lock:
                for live in lives:
                    if live.ended and live.id not in ending:
                        self._lives.pop(live.id, None)

    @staticmethod
    def _try_store(action: Callable[[], object]) -> None:
        """Do something that the database should know but that must not stop tokens when it is away."""
        try:
            action()
        except DatabaseError as error:
            logger.warning("PostgreSQL is away: %s", str(error).strip().splitlines()[0])
