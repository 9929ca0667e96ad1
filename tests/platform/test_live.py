"""The whole installation under its supervisor."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.live import PROCESSES, REPOSITORY, Live, alive, clean_environment, processes_of


def test_every_process_runs_and_the_page_answers(live):
    assert set(live.processes) == PROCESSES
    assert all(alive(pid) for pid in live.processes.values())
    with urllib.request.urlopen(live.base_url, timeout=10) as response:
        assert response.status == 200
    assert live.rows("SELECT name FROM workers_workernode") == [("test-node",)]


def test_commands_find_the_instance_by_data_dir(live):
    name = live.create_user("by-command")
    assert live.rows("SELECT role FROM lmweb_user WHERE username = %s", name) == [("member",)]


def test_second_start_is_refused_with_the_first_ones_process(live):
    command = [sys.executable, str(REPOSITORY / "manage.py"), "up", "--data-dir", str(live.data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=20, check=False)
    assert done.returncode == 1
    assert f"process {live.facts['pid']}" in done.stderr
    assert live.base_url in done.stderr
    assert "Traceback" not in done.stderr
    assert live.healthy()


def test_port_in_use_is_said(live, tmp_path):
    other = Live(tmp_path / "data", port=live.port)
    assert other.spawn().wait(20) == 1
    assert f"Port {live.port} is in use" in other.printed
    assert "Traceback" not in other.printed


@pytest.mark.parametrize("name", ["web", "io-worker", "gpu-worker", "valkey", "postgres"])
def test_killed_child_is_started_again(fault_live, name):
    before = fault_live.kill(name)
    deadline = time.monotonic() + 30
    while fault_live.processes.get(name) in (before, None):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    fault_live.wait_healthy()
    others = {other: pid for other, pid in fault_live.processes.items() if other != name}
    assert all(alive(pid) for pid in others.values())
    assert f"{name} was ended by SIGKILL" in fault_live.printed


def shared_memory_of(pid: int) -> list[Path]:
    return sorted({Path(line.split()[-1]) for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm/" in line})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_clean_stop_leaves_nothing_and_the_next_start_has_everything(fresh_live, number):
    fresh_live.create_admin()
    shared_memory = shared_memory_of(fresh_live.processes["postgres"])
    assert shared_memory
    began = time.monotonic()
    assert fresh_live.stop(number) == 0
    assert time.monotonic() - began < 15
    assert processes_of(fresh_live.data_dir) == []
    assert not [segment for segment in shared_memory if segment.exists()]
    assert [str(path) for path in fresh_live.data_dir.rglob("*") if path.is_socket()] == []
    assert fresh_live.facts == {}
    refused = fresh_live.manage("shell", "-c", "from lmweb.models import User; User.objects.count()", check=False)
    assert refused.returncode == 1
    assert "Nothing runs on" in refused.stderr
    assert "Traceback" not in refused.stderr
    fresh_live.start()
    assert fresh_live.setup_url is None
    assert fresh_live.rows("SELECT username FROM lmweb_user") == [("admin",)]


def test_killed_supervisor_takes_everything_along_and_starts_again(fresh_live):
    fresh_live.create_admin()
    fresh_live.stop(signal.SIGKILL)
    fresh_live.start()
    assert fresh_live.rows("SELECT username FROM lmweb_user") == [("admin",)]
    assert fresh_live.healthy()
    fresh_live.stop(signal.SIGKILL)
    deadline = time.monotonic() + 15
    while processes_of(fresh_live.data_dir):
        assert time.monotonic() < deadline, processes_of(fresh_live.data_dir)
        time.sleep(0.1)
    fresh_live.start()


def test_second_ctrl_c_ends_everything_at_once(fresh_live):
    fresh_live.kill("gpu-worker", signal.SIGSTOP)
    fresh_live.supervisor.send_signal(signal.SIGINT)
    time.sleep(1)
    assert fresh_live.supervisor.poll() is None, "it waits for the worker that does not answer"
    began = time.monotonic()
    fresh_live.supervisor.send_signal(signal.SIGINT)
    fresh_live.supervisor.wait(10)
    assert time.monotonic() - began < 5
    assert processes_of(fresh_live.data_dir) == []


@pytest.mark.parametrize(("name", "value"), [("LMWEB_PORT", "many"), ("LMWEB_DEBUG", "perhaps")])
def test_wrong_variable_is_a_sentence(tmp_path, name, value):
    environment = clean_environment(LMWEB_DATA_DIR=str(tmp_path)) | {name: value}
    for command in ("up", "check"):
        line = [sys.executable, str(REPOSITORY / "manage.py"), command]
        done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=20, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(f"{name} must be")


def test_password_is_not_on_psqls_command_line():
    from lmweb.supervisor import database

    url, password = database._without_password("postgresql://me:p%40ss@db.example.org:5432/lmweb?sslmode=require")
    assert url == "postgresql://me@db.example.org:5432/lmweb?sslmode=require"
    assert password == "p@ss"
    socket_url = "postgresql://lmweb@/lmweb?host=%2Ftmp%2Fx"
    assert database._without_password(socket_url) == (socket_url, "")
