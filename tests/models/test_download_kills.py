"""A download on a whole installation, killed again and again: byte-identical in the end, and hardly anything fetched twice.

``LMWEB_TEST_DOWNLOAD_MB`` sets its size (default 12, which takes seconds; the full measure is 200).
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.hub.server import Hub, Repo
from tests.micro_models import make_micro

if TYPE_CHECKING:
    from tests.live import Live

MEGABYTES = int(os.environ.get("LMWEB_TEST_DOWNLOAD_MB", "12"))


def wait_for(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_killed_five_times(fresh_live: Live, hub: Hub, tmp_path: Path) -> None:
    live = fresh_live
    content = make_micro(tmp_path / "k.gguf", name="Killed").read_bytes()
    content += os.urandom(MEGABYTES * 1_000_000 - len(content))  # bytes after the weights are allowed
    hub.add(Repo("acme/Killed-GGUF", {"Killed-F32.gguf": content}))
    hub.bytes_per_second = max(1_500_000, len(content) // 12)
    live.create_admin()
    live.manage("get", "acme/Killed-GGUF", "--no-wait")
    target = live.data_dir / "models" / "acme" / "Killed-GGUF" / "Killed-F32.gguf"
    parts = live.data_dir / "models" / ".downloads"

    def here() -> int:
        return sum(file.stat().st_size for file in parts.rglob("*.part"))

    def reached(share: float) -> None:
        wait_for(lambda: here() >= share * len(content), f"{share:.0%} never arrived: {here()}", 180)

    reached(0.1)
    live.kill("io-worker")
    reached(0.25)
    hub.cut_after = [0, 0]  # the network
    live.kill("web")
    reached(0.4)
    assert live.supervisor is not None
    live.supervisor.kill()  # all of it at once
    live.supervisor.wait()
    wait_for(lambda: not live_processes(live), "processes outlived their supervisor")
    kept = here()
    live.start()
    assert here() >= kept
    reached(0.55)
    hub.down = True  # the Hub itself
    wait_for(lambda: live.rows("SELECT note FROM models_app_download WHERE note <> ''"), "no word about the lost Hub")
    hub.down = False
    reached(0.7)
    live.kill("io-worker", signal.SIGTERM)
    reached(0.85)
    live.kill("io-worker")
    wait_for(lambda: live.rows("SELECT 1 FROM models_app_download WHERE status = 'completed'"), "it never ended", 180)
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(content).digest()
    assert not here()
    twice = hub.sent["Killed-F32.gguf"] - len(content)
    print(f"{len(content)} bytes, {twice} sent twice ({twice / len(content):.2%})")
    # What was on its way in sockets when a process died is lost: a few hundred kB each time, whatever the size of the file.
    assert twice <= max(0.1 * len(content), 3_000_000)
    assert live.rows("SELECT key FROM models_app_installedmodel WHERE publisher = 'acme'") == [("acme/killed",)]


def live_processes(live: Live) -> list[str]:
    from tests.live import processes_of

    return [line for line in processes_of(live.data_dir) if "postgres" not in line]
