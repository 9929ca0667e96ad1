"""One runner as the host sees it: the child process, its channel and its reader thread."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from workers.engines.registry import FORMATS
from workers.protocol import Cancel, Channel, Embed, HostMessage, Load, RunnerMessage, Shutdown, Submit
from workers.relay import Live
from workers.store import Instance

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0
#: What a runner may see of our environment: nothing that holds a secret.
ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LLAMA_CPP_LIB_PATH")
ENVIRONMENT_PREFIXES = ("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "HSA_", "GGML_", "OMP_", "VK_", "MTL_")

WRONG_PROCESSOR = (
    "The engine was compiled for another processor than this machine's. Remove .venv in lmweb's directory there and start it again, "
    "so that it is compiled anew."
)


class RunnerProcess:
    """A started runner, with two callbacks that run in its reader thread.

    ``on_message`` gets each message; ``on_exit`` is called once at the end.

    ``waiting`` are generations that want the model once it is loaded, ``running`` those that it works on, by id. ``is_jit`` says
    that a request loaded it, not a person; ``ttl_seconds`` how long it stays without use (None: for ever); ``turn_until`` until when
    it need not make room for others; ``replaced`` what left memory for it. Times are ``time.monotonic``.
    """

    def __init__(
        self,
        instance: Instance,
        *,
        logs: Path,
        step_log: bool,
        on_message: Callable[[RunnerProcess, RunnerMessage], None],
        on_exit: Callable[[RunnerProcess], None],
    ) -> None:
        self.instance = instance
        self.ready = False
        self.stopping = False
        self.started_at = time.monotonic()
        self.last_used_at = time.monotonic()
        self.load_error = ""
        self.needed_bytes = 0
        self.is_jit = False
        self.ttl_seconds: int | None = None
        self.turn_until = math.inf
        self.replaced: list[Instance] = []
        self.draft = instance.draft.key if instance.draft else ""
        self.waiting: list[Live] = []
        self.running: dict[str, Live] = {}
        self._on_message, self._on_exit = on_message, on_exit
        self._send_lock = threading.Lock()
        logs.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._channel = Channel(ours, RunnerMessage)
        name = "".join(c if c.isalnum() or c in "-._@" else "-" for c in instance.identifier)[:100]
        with theirs, (logs / f"runner-{name}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "workers.runner", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_environment(),
                cwd=Path(__file__).resolve().parent.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        steps = str(logs / f"steps-{name}.jsonl") if step_log else ""
        draft_path = instance.draft.path if instance.draft else ""
        load = Load(
            engine=FORMATS[instance.model.format], path=instance.model.path, config=instance.config, draft_path=draft_path, step_log=steps
        )
        threading.Thread(target=self._read, args=(load,), name=f"runner-{instance.id}", daemon=True).start()

    @property
    def identifier(self) -> str:
        """Return the instance's identifier."""
        return self.instance.identifier

    @property
    def is_busy(self) -> bool:
        """Whether it is being loaded, or has something to do."""
        return not self.ready or bool(self.running or self.waiting)

    def submit(self, message: Submit | Embed) -> None:
        """Hand over a generation. A runner that has just died is noticed by its reader thread, so errors are dropped."""
        self._send(message)

    def cancel(self, generation_id: str) -> None:
        """Ask for the end of a generation."""
        self._send(Cancel(generation_id=generation_id))

    def stop(self) -> None:
        """End the process: ask, then kill after a bound. Returns once its memory is free."""
        self.stopping = True
        self._send(Shutdown())
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def memory_bytes(self) -> int:
        """Return the resident memory of the process, 0 if it is gone."""
        try:
            return int(psutil.Process(self.process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def _send(self, message: HostMessage) -> None:
        try:
            with self._send_lock:
                self._channel.send(message)
        except OSError as error:
            logger.info("runner %s does not take messages any more: %s", self.identifier, error)

    def _read(self, load: Load) -> None:
        """Relay the runner's messages until it ends. The load is sent here, because it must not block a task."""
        self._send(load)
        try:
            while True:
                for message in self._channel.receive():
                    self._on_message(self, message)  # type: ignore[arg-type]
        except (EOFError, OSError):
            pass
        except Exception:
            logger.exception("runner %s is ended: what it sent is no message, or could not be handled", self.identifier)
        self.process.kill()
        self.process.wait()
        self._channel.close()
        self._on_exit(self)

    def load_failure(self) -> str:
        """Say why the model is not in memory, for people, once the process has ended before it was."""
        code = self.process.returncode or 0
        if self.load_error:
            return self.load_error
        if -code == signal.SIGKILL:
            return (
                "The process that read the model was killed, most likely because the machine ran out of memory. Unload other models first."
            )
        if -code == signal.SIGILL:
            return WRONG_PROCESSOR
        if code < 0:
            return (
                f"The engine crashed while it read the file (signal {-code}). The file is damaged, or of a kind that this version of the "
                "engine does not know."
            )
        return f"The model could not be loaded. {self.exit_reason()}"

    def exit_reason(self) -> str:
        """Say how the process ended, in a sentence for people."""
        code = self.process.returncode
        if code == -signal.SIGILL:
            return WRONG_PROCESSOR
        return f"Its process was killed by signal {-code}." if code is not None and code < 0 else f"Its process exited with code {code}."


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ENVIRONMENT or name.startswith(ENVIRONMENT_PREFIXES)}
    return {"OMP_WAIT_POLICY": "PASSIVE", "GGML_NO_BACKTRACE": "1", **kept, "PYTHONUNBUFFERED": "1"}
