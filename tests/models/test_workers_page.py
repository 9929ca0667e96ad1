"""The Workers and Runtimes pages: what admins see of the machines, and what their buttons do."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from django.utils import timezone

from models_app.models import Generation, InstalledModel, ModelInstance
from workers.engines import registry
from workers.models import JoinRefusal, NodeToken, RemovedNode, WorkerNode

if TYPE_CHECKING:
    from django.test import Client

    from lmweb.models import User

pytestmark = pytest.mark.django_db
GB = 10**9


@pytest.fixture
def page(client: Client, admin: User) -> Client:
    client.force_login(admin)
    return client


@pytest.fixture
def node() -> WorkerNode:
    import dataclasses

    row = WorkerNode.objects.create(
        name="box",
        incarnation=uuid.uuid4(),
        key_digest="d",
        version="0.1.0",
        hardware={"cpu_cores": 8, "cpu_name": "Acme 9000", "gpu_names": ["Acme GPU"], "gpu_memory_bytes": 24 * GB},
        engines=[dataclasses.asdict(engine) for engine in registry.describe()],
        free_memory_bytes=10 * GB,
        total_memory_bytes=16 * GB,
        free_disk_bytes=500 * GB,
        log_lines=["12:00:00 INFO <script>alert(1)</script>"],
    )
    model = InstalledModel.objects.create(
        key="acme/m", publisher="acme", display_name="M", architecture="llama", size_bytes=1, max_context_length=9, path="p"
    )
    ModelInstance.objects.create(identifier="acme/m", model=model, node=row, status="ready", memory_bytes=4 * GB)
    return row


def text(client: Client, path: str = "/workers/") -> str:
    answer = client.get(path)
    assert answer.status_code == 200
    return answer.content.decode()


def test_a_card_says_what_the_machine_is_and_does(page: Client, node: WorkerNode, owner: User) -> None:
    about: dict[str, Any] = {"user": owner, "source": "test", "model_key": "acme/m", "request": {}, "node": "box"}
    Generation.objects.create(**about, status="running")
    Generation.objects.create(**about)
    shown = text(page)
    for words in ("box", "Active", "Acme 9000, 8 cores", "Acme GPU, 24 GB", "10 GB of 16 GB free", "acme/m", "4 GB", "500 GB", "llama.cpp"):
        assert words in shown, words
    assert 'x="0.0" width="250.0"' in shown, "a quarter of the bar"
    assert 'x="250.0" width="125.0"' in shown, "everything else"
    assert "<script>alert" not in shown
    assert "&lt;script&gt;alert" in shown


def test_nobody_and_the_dead(page: Client, node: WorkerNode) -> None:
    WorkerNode.objects.update(heartbeat_at=timezone.now() - timedelta(minutes=2), started_at=timezone.now() - timedelta(hours=1))
    assert "Not answering" in text(page)
    assert "No machine runs models right now" in text(page)
    WorkerNode.objects.update(started_at=timezone.now())
    assert "Stopped" in text(page)
    WorkerNode.objects.all().delete()
    assert "No machine runs models right now" in text(page)


def test_the_buttons(page: Client, node: WorkerNode) -> None:
    for verb, status in (("cordon", "Cordoned"), ("uncordon", "Active"), ("drain", "Draining")):
        answer = page.post(f"/workers/nodes/box/{verb}")
        assert status in answer.content.decode()
    ModelInstance.objects.all().delete()
    assert "Drained" in text(page)
    assert page.post("/workers/nodes/box/remove").status_code == 200
    assert not WorkerNode.objects.exists()
    assert RemovedNode.objects.get().name == "box"
    assert page.post("/workers/nodes/box/drain").status_code == 404


def test_a_node_that_answers_is_not_removed(page: Client, node: WorkerNode, owner: User) -> None:
    Generation.objects.create(user=owner, source="test", model_key="acme/m", request={}, node="box", status="running")
    answer = page.post("/workers/nodes/box/remove")
    assert answer.status_code == 409
    assert b"Drain it first" in answer.content
    assert answer["HX-Retarget"] == "#model-alerts"


def test_an_unchanged_list_is_not_sent_again(page: Client, node: WorkerNode) -> None:
    html = text(page, "/workers/list")
    seen = html.split('data-seen="')[1].split('"')[0]
    assert page.get(f"/workers/list?seen={seen}").status_code == 204
    WorkerNode.objects.update(state="cordoned")
    assert "Cordoned" in text(page, f"/workers/list?seen={seen}")


def test_a_token_is_shown_once_and_revoked(page: Client) -> None:
    answer = page.post("/workers/tokens", {"name": "rack 2", "expires": "1h"}).content.decode()
    token = NodeToken.objects.get()
    secret = answer.split("LMWEB_NODE_TOKEN=")[1].split()[0]
    assert NodeToken.hash(secret) == token.digest
    assert secret not in text(page)
    assert "rack 2" in text(page)
    assert b"Revoked" in page.post(f"/workers/tokens/{token.pk}/revoke").content


@pytest.mark.parametrize(("name", "expires"), [("", "1d"), ("x" * 101, "1d"), ("x", "soon"), ("x", "99999w")])
def test_a_wrong_form_keeps_what_was_typed(page: Client, name: str, expires: str) -> None:
    answer = page.post("/workers/tokens", {"name": name, "expires": expires})
    assert answer.status_code == 422
    assert name in answer.content.decode()
    assert not NodeToken.objects.exists()


def test_refused_machines_are_shown_and_put_away(page: Client) -> None:
    JoinRefusal.objects.create(name="rack-3", reason="The clock of this machine is 47.2 s ahead.")
    assert "47.2 s ahead" in text(page)
    assert "47.2 s ahead" not in page.post("/workers/refusals/rack-3/dismiss").content.decode()


def test_runtimes(page: Client, node: WorkerNode) -> None:
    shown = text(page, "/workers/runtimes")
    for engine in registry.describe():
        assert engine.name in shown
    assert "GGUF" in shown
    assert "Structured output" in shown
    WorkerNode.objects.all().delete()
    assert "No worker has told its engines yet" in text(page, "/workers/runtimes")


def test_only_admins(client: Client, owner: User, node: WorkerNode) -> None:
    client.force_login(owner)
    assert 'href="/workers/"' not in client.get("/models/").content.decode()
    for path in ("/workers/", "/workers/list", "/workers/runtimes"):
        assert client.get(path).status_code == 403
    posts = [f"/workers/nodes/box/{verb}" for verb in ("cordon", "uncordon", "drain", "remove")]
    for path in [*posts, "/workers/tokens", f"/workers/tokens/{uuid.uuid4()}/revoke", "/workers/refusals/x/dismiss"]:
        assert client.post(path, {"name": "x"}).status_code == 403, path
    node.refresh_from_db()
    assert node.state == "active"
    assert not NodeToken.objects.exists()
