"""Who may become a node, and what the others are told."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from django.utils import timezone

from lmweb import __version__
from lmweb.errors import Conflict, InvalidRequest, JoinRefused, NotFound
from models_app import nodes
from models_app.store import DjangoStore
from workers import membership
from workers.models import Installation, JoinRefusal, NodeToken, WorkerNode


@pytest.fixture
def secret(db: None, settings: object, tmp_path: Path) -> str:
    """Return a join token for this machine, which has an empty data directory."""
    settings.DATA_DIR = tmp_path  # type: ignore[attr-defined]
    settings.MODELS_DIR = tmp_path / "models"  # type: ignore[attr-defined]
    (tmp_path / "models").mkdir()
    Installation.objects.update_or_create(pk=1, defaults={"version": __version__})
    return nodes.create_join_token(principal=None, name="test")[1]


def refused(name: str, secret: str) -> str:
    with pytest.raises(JoinRefused) as caught:
        membership.join(name, secret)
    assert JoinRefusal.objects.get(pk=name).reason == caught.value.message
    return caught.value.message


@pytest.mark.django_db(transaction=True)  # the store closes connections
def test_a_machine_shows_its_token_once(secret: str, tmp_path: Path) -> None:
    node = membership.join("second", secret)
    key = membership.read_key("second")
    assert node.key_digest == NodeToken.hash(key)
    assert (tmp_path / "node-keys" / "second").stat().st_mode & 0o777 == 0o600
    assert NodeToken.objects.get().last_used_at is not None
    NodeToken.objects.update(revoked_at=timezone.now())
    assert membership.join("second", "").pk == "second", "it is in, whatever became of the token"
    DjangoStore("second", engines=[], key=key).register()
    assert nodes.get(None, "second").status == "active"


def test_many_machines_may_share_a_token(secret: str) -> None:
    for name in ("one", "two", "three"):
        membership.join(name, secret)
    assert WorkerNode.objects.count() == 3
    assert nodes.join_tokens(None).get().node_count == 3


def test_wrong_expired_revoked_and_missing_tokens(secret: str) -> None:
    assert "LMWEB_NODE_TOKEN is not set" in refused("second", "")
    assert "none of this installation" in refused("second", "lmweb-node-guess")
    NodeToken.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    assert "has expired" in refused("second", secret)
    NodeToken.objects.update(expires_at=None, revoked_at=timezone.now())
    assert "was revoked" in refused("second", secret)
    assert not WorkerNode.objects.exists()


def test_another_release_is_refused(secret: str) -> None:
    Installation.objects.update(version="0.0.1")
    assert "runs lmweb 0.0.1" in refused("second", secret)


@pytest.mark.parametrize(("seconds", "words"), [(7.5, "7.5 s ahead of"), (-3600, "3600.0 s behind")])
def test_a_wrong_clock_is_refused(secret: str, monkeypatch: pytest.MonkeyPatch, seconds: float, words: str) -> None:
    real = time.time
    monkeypatch.setattr(membership.time, "time", lambda: real() + seconds)
    assert words in refused("second", secret)


def test_no_disk_and_no_models_directory(secret: str, settings: object, tmp_path: Path) -> None:
    settings.MODELS_DIR = Path("/proc")  # type: ignore[attr-defined]  (a file system without any space)
    assert "is full: 0 MB are free" in refused("second", secret)
    settings.MODELS_DIR = tmp_path / "not-mounted"  # type: ignore[attr-defined]
    assert "not-mounted is not there" in refused("second", secret)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", "x" * 101, "näh"])
def test_names_that_are_none(secret: str, name: str) -> None:
    with pytest.raises(JoinRefused, match="LMWEB_NODE_NAME"):
        membership.join(name, secret)


@pytest.mark.django_db(transaction=True)  # the store closes connections
def test_names_that_are_taken(secret: str) -> None:
    DjangoStore("server", engines=[]).register()
    assert "server's own machine" in refused("server", secret)
    WorkerNode.objects.create(name="other", incarnation=uuid.uuid4(), key_digest="f" * 64)
    assert "Another machine runs as 'other'" in refused("other", secret)
    WorkerNode.objects.filter(pk="other").update(heartbeat_at=timezone.now() - timedelta(minutes=1))
    membership.join("other", secret)  # the same machine, set up anew
    assert not JoinRefusal.objects.filter(pk="other").exists()


@pytest.mark.django_db(transaction=True)  # the store closes connections
def test_a_removed_node_needs_a_new_token(secret: str) -> None:
    membership.join("second", secret)
    key = membership.read_key("second")
    nodes.remove(principal=None, node=nodes.get(None, "second"))
    with pytest.raises(JoinRefused, match="was removed by an admin"):
        DjangoStore("second", engines=[], key=key).register()
    assert "was removed as 'second'" in refused("second", secret)
    file = membership._key("second").file
    file.rename(file.with_name("third"))
    assert "was removed as 'second'" in refused("third", secret), "the same machine under another name"
    fresh = nodes.create_join_token(principal=None, name="again")[1]
    assert membership.join("second", fresh).state == "active"


@pytest.mark.django_db(transaction=True)  # the store closes connections
def test_removal_waits_for_answers_and_spares_the_server(secret: str, owner: object) -> None:
    DjangoStore("server", engines=[]).register()
    with pytest.raises(Conflict, match="server's own machine"):
        nodes.remove(principal=None, node=nodes.get(None, "server"))
    WorkerNode.objects.update(heartbeat_at=timezone.now() - timedelta(minutes=1))
    nodes.remove(principal=None, node=nodes.get(None, "server"))
    with pytest.raises(NotFound):
        nodes.get(None, "server")


@pytest.mark.django_db(transaction=True)  # the store closes connections
def test_the_heartbeat_brings_the_state_and_notices_a_removal() -> None:
    store = DjangoStore("server", engines=[])
    store.register()
    assert store.heartbeat() == "active"
    nodes.cordon(principal=None, node=nodes.get(None, "server"))
    assert store.heartbeat(log_lines=["one", "two"]) == "cordoned"
    assert store.heartbeat() == "cordoned"
    row = WorkerNode.objects.get()
    assert row.log_lines == ["one", "two"]
    assert abs(row.clock_offset_seconds) < 1
    DjangoStore("server", engines=[]).register()
    assert store.heartbeat() is None, "another process has the name"


def test_the_server_accepts_the_token_of_its_environment(secret: str, settings: object) -> None:
    settings.NODE_TOKEN = "short"  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequest, match="24"):
        nodes.accept_token_of_environment()
    settings.NODE_TOKEN = "a-long-random-word-for-all-containers"  # type: ignore[attr-defined]
    nodes.accept_token_of_environment()
    nodes.accept_token_of_environment()
    membership.join("container-1", settings.NODE_TOKEN)  # type: ignore[attr-defined]
    NodeToken.objects.filter(name__contains="environment").update(revoked_at=timezone.now())
    nodes.accept_token_of_environment()
    assert "was revoked" in refused("container-2", settings.NODE_TOKEN)  # type: ignore[attr-defined]
