"""One supervised process: started, logged, restarted with back-off, stopped in order."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lmweb.errors import JoinRefused, ServiceUnavailable
from lmweb.supervisor.embedded import Service
from lmweb.supervisor.identity import die_with_parent

FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 15.0
STEADY_SECONDS = 30.0
PROBE_SECONDS = 0.03
LOG_BYTES = 10 * 1024 * 1024
MAX_FAILED_STARTS = 4

_LOUD = (" ERROR ", " CRITICAL ", "FATAL:", "PANIC:", "Traceback (most recent call last)")


class Log:
    """A log file that starts anew at ``LOG_BYTES``, keeping one predecessor, and remembers its last lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tail: collections.deque[str] = collections.deque(maxlen=12)
        self._handle = path.open("ab")

    def write(self, line: bytes) -> None:
        """Append one line. A full disk loses lines; it must not stop the reading, or the process would block on its output."""
        self.tail.append(line.decode(errors="replace").rstrip())
        with contextlib.suppress(OSError):
            self._append(line)

    def _append(self, line: bytes) -> None:
        if self._handle.tell() > LOG_BYTES:
            self._handle.close()
            self.path.replace(self.path.with_suffix(".log.1"))
            self._handle = self.path.open("ab")
        self._handle.write(line)
        self._handle.flush()


class Child:
    """Keeps a service running until ``stop``, or until it says itself that it may not run. Use from the thread that runs the event loop: the kernel ties the child to it.

    ``changed`` is called with each new process id, ``report`` with lines that a person should see.
    """

    def __init__(self, service: Service, logs_dir: Path, *, report: Callable[[str], None], changed: Callable[[], None]) -> None:
        self.service = service
        self.pid: int | None = None
        self.ready = asyncio.Event()
        self._log = Log(logs_dir / f"{service.name}.log")
        self._report = report
        self._changed = changed
        self._stopping = asyncio.Event()
        self._ever_ready = False
        self._failed_starts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to run it."""
        self._task = asyncio.create_task(self._keep_running(), name=self.service.name)

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Wait until it answers. Raises ``ServiceUnavailable`` with the end of its log when it does not."""
        assert self._task is not None
        waiting = asyncio.create_task(self.ready.wait())
        await asyncio.wait({waiting, self._task}, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not self.ready.is_set() and not self._stopping.is_set():
            lines = "\n".join(f"    {line}" for line in self._log.tail)
            raise ServiceUnavailable(f"{self.service.name} did not start. The end of {self._log.path}:\n{lines}")

    async def wait_refused(self) -> None:
        """Wait until it has ended because it may not run here. Raises ``ServiceUnavailable`` with its last words then."""
        assert self._task is not None
        await self._task
        if not self._stopping.is_set():
            raise ServiceUnavailable(f"{self.service.name} has ended: {self._log.tail[-1] if self._log.tail else 'its log is empty.'}")

    async def stop(self) -> None:
        """End it in order, or by force after its ``stop_seconds``."""
        self._stopping.set()
        self.signal(self.service.stop_signal)
        if self._task is None:
            return
        done, _ = await asyncio.wait({self._task}, timeout=self.service.stop_seconds)
        if not done:
            self._report(f"{self.service.name} did not stop within {self.service.stop_seconds:.0f} s and is killed")
            self.kill()
            await self._task

    def signal(self, number: signal.Signals) -> None:
        """Send a signal if it runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once. PostgreSQL gets the signal that still lets it clean up its shared memory."""
        self._stopping.set()
        self.signal(signal.SIGQUIT if self.service.name == "postgres" else signal.SIGKILL)

    async def _keep_running(self) -> None:
        delay = FIRST_DELAY_SECONDS
        while not self._stopping.is_set():
            started = time.monotonic()
            code = await self._run_once()
            if self._stopping.is_set():
                return
            if code == JoinRefused.exit_status:
                return
            if time.monotonic() - started > STEADY_SECONDS:
                delay = FIRST_DELAY_SECONDS
            self._failed_starts += 1
            if self.service.essential and not self._ever_ready and self._failed_starts >= MAX_FAILED_STARTS:
                return
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            self._report(f"{self.service.name} {how}; starting it again in {delay:.1f} s (log: {self._log.path})")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            delay = min(delay * 2, LONGEST_DELAY_SECONDS)

    async def _run_once(self) -> int:
        reader, writer = os.pipe()
        try:
            # A pipe of our own: asyncio's would delay the news of the end until every grandchild has closed it.
            self._process = await asyncio.create_subprocess_exec(
                *self.service.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                cwd=self.service.cwd or tempfile.gettempdir(),
                env=os.environ | self.service.environment,
                pass_fds=self.service.pass_fds,
                start_new_session=True,
                preexec_fn=die_with_parent(self.service.death_signal),
            )
        finally:
            os.close(writer)
        self.pid = self._process.pid
        self._changed()
        copying = asyncio.create_task(self._copy_output(reader))
        probing = asyncio.create_task(self._probe(self.pid))
        code = await self._process.wait()
        probing.cancel()
        self.ready.clear()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # what it started must not outlive it
        await asyncio.wait({copying}, timeout=1.0)
        copying.cancel()
        await asyncio.gather(copying, return_exceptions=True)
        self.pid = None
        return code

    async def _probe(self, pid: int) -> None:
        while not await asyncio.to_thread(self.service.ready, pid):  # noqa: ASYNC110  (another process becomes ready)
            await asyncio.sleep(PROBE_SECONDS)
        self._ever_ready = True
        self.ready.set()

    async def _copy_output(self, descriptor: int) -> None:
        stream = asyncio.StreamReader(limit=1 << 20)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(descriptor, "rb", buffering=0)
        )
        try:
            while True:
                try:
                    line = await stream.readline()
                except ValueError:  # a line longer than the limit was dropped
                    continue
                if not line:
                    return
                self._log.write(line)
                text = line.decode(errors="replace").rstrip()
                if self._ever_ready and any(mark in text for mark in _LOUD):
                    self._report(f"{self.service.name}: {text[:400]}")
        finally:
            transport.close()
