"""``manage.py worker``: another machine joins, or is told clearly why it cannot."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psycopg
import pytest

from tests.live import REPOSITORY, clean_environment, processes_of

WORKER = [sys.executable, str(REPOSITORY / "manage.py"), "worker", "--data-dir"]


@pytest.fixture
def joined(live, tmp_path):
    """Return the environment of a second machine that knows the first one's services."""
    facts = live.facts
    return clean_environment(DATABASE_URL=facts["database_url"], REDIS_URL=facts["redis_url"], LMWEB_NODE_NAME="second")


def refused(data_dir, environment):
    done = subprocess.run([*WORKER, str(data_dir)], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr


def test_joins_registers_and_leaves(live, joined, tmp_path):
    process = subprocess.Popen([*WORKER, str(tmp_path / "data")], stdout=subprocess.PIPE, text=True, env=joined)
    try:
        deadline = time.monotonic() + 60
        while not live.rows("SELECT 1 FROM workers_workernode WHERE name = 'second'"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        lines = []
        while not any("runs models as 'second'" in line for line in lines):
            lines.append(process.stdout.readline())
            assert lines[-1], lines
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert processes_of(tmp_path / "data") == []
    assert live.healthy()


@pytest.mark.parametrize("name", ["DATABASE_URL", "REDIS_URL"])
def test_missing_url_is_named(joined, tmp_path, name):
    del joined[name]
    assert f"{name} is not set" in refused(tmp_path, joined)


def test_unreachable_database_and_redis_are_named(joined, tmp_path):
    assert "Redis cannot be reached" in refused(tmp_path, joined | {"REDIS_URL": "redis://127.0.0.1:9/0"})
    assert "database cannot be reached" in refused(tmp_path, joined | {"DATABASE_URL": "postgresql://x@127.0.0.1:9/x"})


@pytest.mark.parametrize(
    ("change", "undo", "words"),
    [
        (
            "INSERT INTO django_migrations (app, name, applied) VALUES ('lmweb', '9999_from_the_future', now())",
            "DELETE FROM django_migrations WHERE name = '9999_from_the_future'",
            "newer than this release",
        ),
        (
            "UPDATE django_migrations SET app = 'elsewhere' WHERE app = 'chat'",
            "UPDATE django_migrations SET app = 'chat' WHERE app = 'elsewhere'",
            "older than this release",
        ),
    ],
)
def test_other_release_is_refused(live, joined, tmp_path, change, undo, words):
    with psycopg.connect(live.facts["database_url"], autocommit=True) as connection:
        connection.execute(change)
        try:
            assert words in refused(tmp_path, joined)
        finally:
            connection.execute(undo)
