"""What all tests share: real PostgreSQL and Valkey in a temporary data directory, people, and the starter model."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import django
import pytest

from lmweb.supervisor import discovery, embedded
from lmweb.supervisor.identity import die_with_parent
from tests.hub.server import Hub
from tests.live import PASSWORD, Live

if TYPE_CHECKING:
    from lmweb.models import User

REPOSITORY = Path(__file__).resolve().parent.parent

_processes: list[tuple[embedded.Service, subprocess.Popen[bytes]]] = []
_data_dir: Path | None = None


def pytest_configure(config: pytest.Config) -> None:
    """Start the services and point the settings at them, before pytest-django reads the settings."""
    global _data_dir
    if config.option.dist != "no" and not hasattr(config, "workerinput"):
        return  # the tests run in processes of their own, which must not inherit any of this
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    if config.option.help or config.option.version or config.option.collectonly:
        django.setup()
        return
    _data_dir = Path(tempfile.mkdtemp(prefix="lmweb-test-"))
    for name in ("DATABASE_URL", "REDIS_URL", "LMWEB_SECRET_KEY"):
        os.environ.pop(name, None)
    os.environ["LMWEB_DATA_DIR"] = str(_data_dir)
    urls = []
    for make in (embedded.postgres, embedded.valkey):
        service, url = make(_data_dir, durable=False)
        _start(service, _data_dir)
        urls.append(url)
    discovery.write(_data_dir, {"database_url": urls[0], "redis_url": urls[1]})
    django.setup()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the services and remove their data."""
    for service, process in reversed(_processes):
        process.send_signal(signal.SIGQUIT if service.name == "postgres" else signal.SIGKILL)
        process.wait(20)
    _processes.clear()
    if _data_dir is not None:
        shutil.rmtree(_data_dir, ignore_errors=True)


def _start(service: embedded.Service, data_dir: Path) -> None:
    with (data_dir / f"{service.name}.log").open("wb") as log:
        process = subprocess.Popen(
            service.argv, stdout=log, stderr=log, cwd=tempfile.gettempdir(), preexec_fn=die_with_parent(service.death_signal)
        )
    _processes.append((service, process))
    deadline = time.monotonic() + 30
    while not service.ready(process.pid):
        if process.poll() is not None or time.monotonic() > deadline:
            raise pytest.UsageError(f"{service.name} did not start:\n{(data_dir / f'{service.name}.log').read_text()}")
        time.sleep(0.02)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests on whole installations and browsers another try: they wait for real processes on a machine with other work.

    A failure that repeats still fails, and every rerun is shown in the summary.
    """
    whole = {"live", "fault_live", "fresh_live", "page", "bench"}
    for item in items:
        if whole & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what a whole installation wrote down beside the failure of a test that used it."""
    report = yield
    if report.failed:
        used = {value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Live)}
        report.sections += [section for live in used for section in live.evidence()]
    return report


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None) -> Iterator[None]:
    """Close the connections of threads that outlive the tests, so that the test database can be dropped."""
    yield
    from asgiref.sync import SyncToAsync
    from django.db import connections

    from lmweb import db

    db._executor.shutdown()  # waits for whoever is still asking
    SyncToAsync.single_thread_executor.submit(connections.close_all).result()  # where async tests and async code use the ORM


@pytest.fixture(autouse=True)
def new_look_at_the_nodes() -> None:
    """Let no test send requests to the nodes of the one before: what is known about them holds for a second."""
    if routing := sys.modules.get("models_app.routing"):
        routing.forget()


@pytest.fixture(scope="session")
def services_dir() -> Path:
    """Return the data directory of this test run."""
    assert _data_dir is not None
    return _data_dir


@pytest.fixture(scope="session")
def starter_gguf() -> Path:
    """Return the starter model that ships with the product."""
    return REPOSITORY / "models_app" / "starter" / "lmweb-starter.gguf"


def _person(name: str, role: str) -> User:
    from lmweb.models import User

    return User.objects.create_user(name, password=PASSWORD, role=role)


@pytest.fixture
def admin(db: None) -> User:
    """Return somebody who manages the installation."""
    from lmweb.models import User

    return User.objects.create_superuser("admin", password=PASSWORD)


@pytest.fixture
def owner(db: None) -> User:
    """Return the member whose things a test makes."""
    return _person("owner", "member")


@pytest.fixture
def teammate(db: None) -> User:
    """Return another member, who may see what is shared and nothing else."""
    return _person("teammate", "member")


@pytest.fixture
def stranger(db: None) -> User:
    """Return somebody with an account and no rights beyond looking at models."""
    return _person("stranger", "viewer")


@pytest.fixture(scope="session")
def hub_server() -> Iterator[Hub]:
    """Run a server that speaks the Hub's API."""
    server = Hub()
    yield server
    server.close()


@pytest.fixture
def hub(hub_server: Hub) -> Hub:
    """Return that server without repositories and faults."""
    hub_server.reset()
    return hub_server


@pytest.fixture(scope="session")
def live(hub_server: Hub) -> Iterator[Live]:
    """Run one whole installation for all tests that only use it: nobody is in it but those whom the tests make."""
    installation = Live(_short_dir(), environment={"HF_ENDPOINT": hub_server.url}).start()
    yield installation
    _end(installation)


@pytest.fixture
def fault_live(live: Live) -> Iterator[Live]:
    """Lend the shared installation to a test that breaks parts of it, and wait afterwards until all is well again."""
    live.wait_healthy()
    yield live
    live.wait_healthy()


@pytest.fixture
def fresh_live(hub_server: Hub) -> Iterator[Live]:
    """Run an installation of the test's own (about three seconds), with its set-up link still unused."""
    installation = Live(_short_dir(), environment={"HF_ENDPOINT": hub_server.url}).start()
    yield installation
    _end(installation)


def _short_dir() -> Path:
    return Path(tempfile.mkdtemp(prefix="lmweb-live-")) / "data"


def _end(installation: Live) -> None:
    installation.stop()
    shutil.rmtree(installation.data_dir.parent, ignore_errors=True)
