"""The threads of a host (``workers.host``), which do what nobody has to ask for: arrivals, the saver and the keeper."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from django.db import Error as DatabaseError

from lmweb.db import in_short, try_to_store
from workers.recent_log import RecentLog
from workers.relay import Live, end_events
from workers.store import NodeState, Outcome, Progress

if TYPE_CHECKING:
    from workers.host import Host

logger = logging.getLogger(__name__)

SAVE_SECONDS = 1.0
KEEP_SECONDS = 0.25
HEARTBEAT_SECONDS = 2.0
TELL_SECONDS = 1.0
#: Between two attempts to reach PostgreSQL.
DATABASE_RETRY_SECONDS = 0.5
#: Without news, the rows are looked at after this time.
ARRIVAL_SECONDS = 2.0


class Arrivals:
    """Takes up what is sent to this node."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="arrivals", daemon=True).start()

    def _run(self) -> None:
        while not self._host.stopping.is_set():
            try:
                self._take_up()
            except DatabaseError as error:
                logger.warning("PostgreSQL is away, nothing new can arrive: %s", in_short(error))
                self._host.stopping.wait(DATABASE_RETRY_SECONDS)

    def _take_up(self) -> None:
        with closing(self._host.store.arrivals(ARRIVAL_SECONDS)) as arrivals:
            for generation_ids in arrivals:
                for generation_id in generation_ids:
                    self._host.take_up(generation_id)
                if self._host.stopping.is_set():
                    return


class Saver:
    """Writes ends at once, partial texts and leases once a second, for as long as the process lives."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._lock = host.lock
        self._ends: list[tuple[Live, Outcome]] = []
        self._wake = threading.Event()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="saver", daemon=True).start()

    def stop(self) -> None:
        """Let the thread see that the host is stopping. What has ended and is not written remains for ``finish_ended``."""
        self._wake.set()

    def end(self, live: Live, outcome: Outcome) -> None:
        """Have the end of a generation written: the row first, then ``chat.end``."""
        with self._lock:
            self._ends.append((live, outcome))
        self._wake.set()

    def ending(self) -> set[str]:
        """Return the generations whose ends are not written yet."""
        with self._lock:
            return {live.id for live, _ in self._ends}

    def finish_ended(self) -> None:
        """Write the ends that are there. Raises ``django.db.Error``; they remain then."""
        with self._lock:
            ends = list(self._ends)
        if not ends:
            return
        writer = self._host.writer
        ours = self._host.store.finish([outcome for _, outcome in ends])
        for live, outcome in ends:
            if live.id in ours:
                with live.lock:
                    live.pending_events += end_events(outcome, live.instance_id)
                    live.close_entry()
        writer.write([live for live, _ in ends if live.id in ours], last=True)
        with self._lock:
            self._ends = self._ends[len(ends) :]
            for live, _ in ends:
                if not writer.is_behind:
                    self._host.lives.pop(live.id, None)

    def _run(self) -> None:
        saved_at = time.monotonic()
        while not self._host.stopping.is_set():
            self._wake.wait(max(0.0, SAVE_SECONDS - (time.monotonic() - saved_at)))
            self._wake.clear()
            try:
                self.finish_ended()
                if time.monotonic() - saved_at >= SAVE_SECONDS:
                    saved_at = time.monotonic()
                    self._save_running()
            except DatabaseError as error:
                logger.warning("PostgreSQL is away, texts are kept until it is back: %s", in_short(error))
                self._host.stopping.wait(DATABASE_RETRY_SECONDS)
                self._wake.set()

    def _save_running(self) -> None:
        host = self._host
        with self._lock:
            lives = [live for live in host.lives.values() if not live.ended]
            used = [runner.instance.id for runner in host.runners.by_id.values() if runner.running]
        progress: list[Progress] = []
        for live in lives:
            with live.lock:
                live.close_entry()
                progress.append(live.progress())
        host.writer.write(lives)
        ours, cancelled = host.store.save(progress) if progress else (set(), set())
        for live in lives:
            if live.id not in ours:
                host.forget(live)
            elif live.id in cancelled:
                host.cancel(live.id)
        if used:
            host.store.instances_used(used)


class Keeper:
    """Refills Redis after it was away, tells who is held back, sends the heartbeat, unloads idle models.

    ``on_removed`` is called when the installation does not know this node any more.
    """

    def __init__(self, host: Host, *, saver: Saver, on_removed: Callable[[], None] | None) -> None:
        self._host = host
        self._saver = saver
        self._on_removed = on_removed
        self._recent_log = RecentLog()
        self._state = NodeState.ACTIVE

    def register(self) -> None:
        """Register this node. Waits for PostgreSQL as long as it takes."""
        logging.getLogger().addHandler(self._recent_log)
        while not self._host.stopping.is_set():
            try:
                self._host.store.register()
            except DatabaseError as error:
                logger.warning("PostgreSQL is away, this node registers when it is back: %s", in_short(error))
                self._host.stopping.wait(DATABASE_RETRY_SECONDS)
            else:
                return

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="keeper", daemon=True).start()

    def stop(self) -> None:
        """Keep no log any more. The thread ends when the host is stopping."""
        logging.getLogger().removeHandler(self._recent_log)

    def _run(self) -> None:
        beat_at = told_at = 0.0
        while not self._host.stopping.wait(KEEP_SECONDS):
            if self._host.writer.is_behind:
                self._refill()
            if time.monotonic() - told_at >= TELL_SECONDS:
                told_at = time.monotonic()
                self._host.tell_held()
            if time.monotonic() - beat_at >= HEARTBEAT_SECONDS:
                beat_at = time.monotonic()
                try_to_store(self._beat)
                try_to_store(self._host.runners.unload_idle)

    def _beat(self) -> None:
        """Send the heartbeat, and act on what comes back: what an admin lets this node do."""
        state = self._host.store.heartbeat(log_lines=self._recent_log.fresh())
        if state is None:
            if self._on_removed is not None:
                logger.error("This node was removed by an admin, or another machine has its name. The worker ends.")
                self._on_removed()
            return
        if state is not self._state:
            logger.info("This node is %s now.", state)
            self._state = state
        self._host.loader.may_load = state is NodeState.ACTIVE
        if state is NodeState.DRAINING:
            self._host.drain()

    def _refill(self) -> None:
        host = self._host
        with host.lock:
            lives = list(host.lives.values())
            ending = self._saver.ending()
        if host.writer.refill(lives):
            logger.info("Redis is back, %d streams refilled", len(lives))
            with host.lock:
                for live in lives:
                    if live.ended and live.id not in ending:
                        host.lives.pop(live.id, None)
