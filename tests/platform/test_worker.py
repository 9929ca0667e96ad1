"""``manage.py worker``: another machine joins, or is told clearly why it cannot."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import psycopg
import pytest

from tests.live import REPOSITORY, clean_environment, processes_of
from tests.micro_models import STARTER_GGUF

WORKER = [sys.executable, str(REPOSITORY / "manage.py"), "worker", "--data-dir"]


@pytest.fixture
def joined(live, tmp_path):
    """Return the environment of a second machine that knows the first one's services."""
    facts, token = live.facts, live.manage("node", "token", "--expires", "1h").stdout.strip()
    yield clean_environment(
        DATABASE_URL=facts["database_url"], REDIS_URL=facts["redis_url"], LMWEB_NODE_NAME="second", LMWEB_NODE_TOKEN=token
    )
    forget = "DELETE FROM workers_workernode WHERE name = 'second'; DELETE FROM workers_removednode"
    with psycopg.connect(facts["database_url"], autocommit=True) as connection:
        connection.execute(forget)


def refused(data_dir, environment):
    done = subprocess.run([*WORKER, str(data_dir)], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr


def started(data_dir, environment):
    """Start a worker and wait until it runs models."""
    process = subprocess.Popen([*WORKER, str(data_dir)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines = []
    while not any("runs models as 'second'" in line for line in lines):
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    return process


def test_joins_once_registers_and_leaves_when_removed(live, joined, tmp_path):
    """A worker joins and fetches what it loads; it starts again without its token; removed, it ends for good."""
    process = started(tmp_path / "data", joined | {"LMWEB_SERVER_URL": live.base_url})
    loaded = json.loads(live.manage("load", "lmweb/starter", "--node", "second", "--json").stdout)
    assert (loaded["node"], loaded["status"]) == ("second", "ready")
    (file,) = (tmp_path / "data" / "models").rglob("*.gguf")
    assert file.read_bytes() == STARTER_GGUF.read_bytes()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert processes_of(tmp_path / "data") == []
    process = started(tmp_path / "data", {**joined, "LMWEB_NODE_TOKEN": ""})
    try:
        node = next(node for node in json.loads(live.manage("node", "list", "--json").stdout) if node["name"] == "second")
        assert node["status"] == "active"
        assert node["engines"]
        live.manage("node", "remove", "second")
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "was removed by an admin" in output
    assert processes_of(tmp_path / "data") == []
    assert "was removed as 'second'" in refused(tmp_path / "data", joined)
    assert live.healthy()


def test_no_token_no_entry(live, joined, tmp_path):
    assert "LMWEB_NODE_TOKEN is not set" in refused(tmp_path, {**joined, "LMWEB_NODE_TOKEN": ""})
    assert "none of this installation" in refused(tmp_path, {**joined, "LMWEB_NODE_TOKEN": "lmweb-node-guess"})
    ((reason,),) = live.rows("SELECT reason FROM workers_joinrefusal WHERE name = 'second'")
    assert "none of this installation" in reason, "admins see it too"


def test_a_models_directory_that_is_not_mounted(joined, tmp_path):
    (tmp_path / "models").symlink_to(tmp_path / "not-mounted")
    assert "models" in refused(tmp_path, joined)


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
