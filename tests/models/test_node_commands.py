"""``manage.py node``: what admins see and do at the command line."""

from __future__ import annotations

import io
import json
import uuid
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from models_app.models import Generation, InstalledModel, ModelInstance
from workers.models import NodeToken, WorkerNode

pytestmark = pytest.mark.django_db


def run(*arguments: str) -> str:
    output = io.StringIO()
    call_command("node", *arguments, stdout=output)
    return output.getvalue().strip()


def answer(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json"))


@pytest.fixture
def node() -> WorkerNode:
    engines = [{"name": "llama.cpp", "version": "1.2", "formats": ["gguf"]}]
    return WorkerNode.objects.create(
        name="box", incarnation=uuid.uuid4(), key_digest="d", engines=engines, free_memory_bytes=3 * 10**9, total_memory_bytes=8 * 10**9
    )


def test_tokens_are_shown_once() -> None:
    secret = run("token", "--name", "rack 2", "--expires", "12h")
    token = NodeToken.objects.get()
    assert token.digest == NodeToken.hash(secret)
    assert (token.name, token.state) == ("rack 2", "active")
    assert 11 < (token.expires_at - timezone.now()).total_seconds() / 3600 < 12  # type: ignore[operator]
    assert secret not in run("tokens")
    assert "rack 2" in run("tokens")
    run("revoke", str(token.pk))
    assert answer("tokens")[0]["state"] == "revoked"
    assert answer("token", "--expires", "never")["expiresAt"] is None


@pytest.mark.parametrize("arguments", [("token", "--expires", "soon"), ("token", "--name", " "), ("revoke", "x"), ("drain", "nobody")])
def test_odd_input_is_one_line(arguments: tuple[str, ...]) -> None:
    with pytest.raises(CommandError):
        run(*arguments)


def test_list_and_states(node: WorkerNode) -> None:
    assert "box" in run("list")
    assert "3 GB of 8 GB" in run("list")
    assert answer("list")[0]["status"] == "active"
    for verb, state in (("cordon", "cordoned"), ("uncordon", "active"), ("drain", "draining")):
        assert "box" in run(verb, "box")
        node.refresh_from_db()
        assert node.state == state
    assert answer("list")[0]["status"] == "drained"
    assert answer("remove", "box") == {"name": "box", "removed": True}
    assert run("list").startswith("No machine runs models yet")


def test_what_waits_for_a_draining_node_goes_elsewhere(node: WorkerNode, owner: Any) -> None:
    model = InstalledModel.objects.create(
        key="acme/m", publisher="acme", display_name="M", architecture="llama", size_bytes=1, max_context_length=9, path="p"
    )
    ModelInstance.objects.create(identifier="acme/m", model=model, node=node, status="ready", memory_bytes=5)
    about = {"user": owner, "source": "test", "model": model, "model_key": model.key, "request": {}, "node": "box"}
    running = Generation.objects.create(**about, status="running")
    queued = Generation.objects.create(**about, lease_until=timezone.now())
    with pytest.raises(CommandError, match="Drain it first"):
        run("remove", "box")
    found = answer("drain", "box")
    assert (found["status"], found["running"], found["queued"]) == ("draining", 1, 0)
    queued.refresh_from_db()
    running.refresh_from_db()
    assert (queued.node, queued.lease_until, running.node) == ("", None, "box")
