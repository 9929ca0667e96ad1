"""``kill -9`` of every part in the middle of streaming answers: each ends complete or with a clear error, and all its text is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.streams import Stream
from tests.live import REPOSITORY, Live, clean_environment, processes_of
from tests.micro_models import make_micro

pytestmark = pytest.mark.timeout(400)

MODEL = "test/slow"
TOKENS = 250


@pytest.fixture(scope="module")
def token(live: Live, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Import a model that writes for several seconds, and return a token to use it with."""
    file = make_micro(tmp_path_factory.mktemp("slow") / "slow.gguf", layers=64, context=4096, name="slow")
    live.create_admin()
    live.manage("import_model", str(file), "--copy", "--user-repo", MODEL)
    return live.create_token()


@pytest.fixture
def streams(fault_live: Live, token: str) -> Iterator[list[Stream]]:
    """Start three answers and wait until all of them stream."""
    names = ["time year people", "way day man thing", "woman life child world"]
    started = [Stream(fault_live, token, name, model=MODEL, max_tokens=TOKENS) for name in names]
    wait_for(lambda: all(len(stream.text) > 100 for stream in started), what="all answers stream")
    yield started
    for stream in started:
        stream.close()


def wait_for(condition: Callable[[], object], *, what: str, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.05)


def runner_pids(live: Live) -> list[int]:
    return [
        child.pid for child in psutil.Process(live.processes["gpu-worker"]).children(recursive=True) if "workers.runner" in child.cmdline()
    ]


def newest_rows(live: Live, n: int) -> list[tuple[str, str, str, int, int]]:
    return live.rows(
        "SELECT status, content, error_code, coalesce(cardinality(output_tokens), 0), resumes FROM models_app_generation ORDER BY created_at DESC LIMIT %s",
        n,
    )[::-1]


def all_ended(live: Live) -> bool:
    return live.rows("SELECT count(*) FROM models_app_generation WHERE status IN ('queued', 'running')")[0][0] == 0


def check_all_kept(live: Live, streams: list[Stream], *, connected: bool = True) -> None:
    """Every answer is complete, the row holds it, and who stayed connected saw all of it once."""
    wait_for(lambda: all_ended(live), what="every generation ended")
    rows = {content for _, content, *_ in newest_rows(live, 3)}
    for status, _content, error_code, n_tokens, _resumes in newest_rows(live, 3):
        assert (status, error_code, n_tokens) == ("completed", "", TOKENS)
    for stream in streams:
        stream.thread.join(30)
        if connected:
            assert stream.done
            assert not stream.lost
            assert stream.finish_reason == "length"
            assert stream.text in rows
        else:
            assert any(row.startswith(stream.text) for row in rows)


def check_next_request(live: Live, token: str) -> None:
    """The system serves again."""
    live.wait_healthy()
    after = Stream(live, token, "hello there", model=MODEL, max_tokens=5)
    after.thread.join(60)
    assert after.done, after.error


def test_the_runner(fault_live: Live, token: str, streams: list[Stream]) -> None:
    psutil.Process(runner_pids(fault_live)[0]).kill()
    check_all_kept(fault_live, streams)
    assert [row[4] for row in newest_rows(fault_live, 3)] == [1, 1, 1]
    check_next_request(fault_live, token)


def test_the_gpu_worker(fault_live: Live, token: str, streams: list[Stream]) -> None:
    runners = runner_pids(fault_live)
    fault_live.kill("gpu-worker")
    check_all_kept(fault_live, streams)
    assert not any(psutil.pid_exists(pid) for pid in runners), "a runner outlives its worker"
    check_next_request(fault_live, token)


def test_valkey(fault_live: Live, token: str, streams: list[Stream]) -> None:
    fault_live.kill("valkey")
    check_all_kept(fault_live, streams)
    check_next_request(fault_live, token)


def test_postgresql(fault_live: Live, token: str, streams: list[Stream]) -> None:
    fault_live.kill("postgres")
    wait_for(fault_live.healthy, what="PostgreSQL is back")
    check_all_kept(fault_live, streams)
    check_next_request(fault_live, token)


def test_the_web_server(fault_live: Live, token: str, streams: list[Stream]) -> None:
    fault_live.kill("web")
    check_all_kept(fault_live, streams, connected=False)
    check_next_request(fault_live, token)


def test_valkey_and_the_gpu_worker_together(fault_live: Live, token: str, streams: list[Stream]) -> None:
    """The worst case: the stream and the process that could refill it are both gone; the row's last second remains."""
    fault_live.kill("valkey")
    fault_live.kill("gpu-worker")
    wait_for(lambda: all_ended(fault_live), what="every generation ended")
    for status, content, _code, n_tokens, _resumes in newest_rows(fault_live, 3):
        assert status == "completed"
        assert n_tokens == TOKENS
        assert content
    check_next_request(fault_live, token)


def test_postgresql_and_the_gpu_worker_together(fault_live: Live, token: str, streams: list[Stream]) -> None:
    """The new worker is there before PostgreSQL has recovered, and has to wait for it."""
    fault_live.kill("postgres")
    fault_live.kill("gpu-worker")
    wait_for(fault_live.healthy, what="both are back")
    check_all_kept(fault_live, streams)
    check_next_request(fault_live, token)


def test_a_client_that_hangs_up_frees_its_slot(fault_live: Live, token: str, streams: list[Stream]) -> None:
    streams[0].close()
    wait_for(lambda: min(row[0] for row in newest_rows(fault_live, 3)) == "cancelled", what="its generation is cancelled", seconds=5)
    for stream in streams[1:]:
        stream.thread.join(60)
        assert stream.done
    kept = [row for row in newest_rows(fault_live, 3) if row[0] == "cancelled"]
    assert len(kept) == 1
    assert kept[0][1].startswith(streams[0].text[:100])


# --- a whole machine --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def second(fault_live: Live, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a second machine that shares the first one's models directory and services."""
    data_dir = tmp_path / "second"
    data_dir.mkdir()
    (data_dir / "models").symlink_to(fault_live.data_dir / "models")
    urls = {"DATABASE_URL": fault_live.facts["database_url"], "REDIS_URL": fault_live.facts["redis_url"]}
    urls["LMWEB_NODE_TOKEN"] = fault_live.manage("node", "token", "--expires", "1h").stdout.strip()
    command = [sys.executable, str(REPOSITORY / "manage.py"), "worker", "--data-dir", str(data_dir)]
    process = subprocess.Popen(command, env=clean_environment(LMWEB_NODE_NAME="second", **urls))
    wait_for(lambda: fault_live.rows("SELECT 1 FROM workers_workernode WHERE name = 'second'"), what="the second machine is there")
    yield process
    process.kill()
    process.wait()
    wait_for(lambda: not processes_of(data_dir), what="the second machine is gone", seconds=20)
    fault_live.manage("shell", "-v", "0", "-c", "from workers.models import WorkerNode; WorkerNode.objects.filter(name='second').delete()")


def test_a_machine_that_shares_the_work(fault_live: Live, token: str, second: subprocess.Popen[bytes]) -> None:
    """Its answers go on elsewhere from their last token: no character is lost or doubled."""
    for node in ("test-node", "second"):
        fault_live.manage("load", MODEL, "--node", node, "-y")
    counted = " ".join(map(str, range(1, 90)))
    only = {"type": "json_schema", "json_schema": {"name": "count", "strict": True, "schema": {"const": counted}}}
    streams = [Stream(fault_live, token, f"count {n}", model=MODEL, max_tokens=1000, response_format=only) for n in range(6)]
    wait_for(lambda: all(len(stream.text) > 30 or stream.error or stream.lost for stream in streams), what="all answers stream")
    assert [(stream.error, stream.lost) for stream in streams] == [(None, False)] * 6
    rows = "SELECT node, resumes FROM models_app_generation ORDER BY created_at DESC LIMIT 6"
    shares = Counter(fault_live.rows(rows))
    assert set(shares) == {("test-node", 0), ("second", 0)}
    second.kill()
    for stream in streams:
        stream.thread.join(60)
        assert stream.done, stream.error
        assert json.loads(stream.text) == counted
    assert Counter(fault_live.rows(rows)) == {("test-node", 0): shares["test-node", 0], ("test-node", 1): shares["second", 0]}
    fault_live.manage("unload", MODEL, "--node", "test-node")
