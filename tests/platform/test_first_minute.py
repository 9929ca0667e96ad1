"""Before there is an admin: this machine only, and a link that works once."""

from __future__ import annotations

import re
import shutil
import socket
import tempfile
import time
from pathlib import Path

import pytest

from tests.live import Live


def reachable(address: str, port: int) -> bool:
    with socket.socket() as connection:
        connection.settimeout(2)
        return connection.connect_ex((address, port)) == 0


@pytest.fixture
def open_to_all():
    live = Live(Path(tempfile.mkdtemp(prefix="lmweb-live-")) / "data").start("--host", "0.0.0.0")
    yield live
    live.stop()
    shutil.rmtree(live.data_dir.parent)


def test_loopback_only_until_an_admin_exists(open_to_all):
    live = open_to_all
    assert re.fullmatch(rf"http://127\.0\.0\.1:{live.port}/setup/[\w-]{{32}}", live.setup_url)
    assert reachable("127.0.0.1", live.port)
    assert not reachable("127.0.0.2", live.port), "127.0.0.2 is answered only by a server that listens on every address"
    live.create_admin()
    deadline = time.monotonic() + 20
    while not reachable("127.0.0.2", live.port):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    live.wait_healthy()
    live.stop()
    live.start("--host", "0.0.0.0")
    assert live.setup_url is None
    assert reachable("127.0.0.2", live.port)


def test_question_to_the_database_is_the_one_of_the_application(live):
    from lmweb.supervisor import database

    url = live.facts["database_url"]
    live.create_admin("only-here")
    assert database.admin_exists(url) is live.python("from lmweb.setup import admin_exists; result = admin_exists()") is True
    live.python("from lmweb.models import User; User.objects.filter(role='admin').update(is_active=False)")
    assert database.admin_exists(url) is live.python("from lmweb.setup import admin_exists; result = admin_exists()") is False
    live.python("from lmweb.models import User; User.objects.filter(role='admin').update(is_active=True)")
    assert database.node_alive(url, "test-node", time.time() - 10)
    assert not database.node_alive(url, "'; DROP TABLE x; --", 0)
