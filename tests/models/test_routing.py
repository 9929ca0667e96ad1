"""Requests and loads over several nodes, on real rows: what the router is told, and what comes of its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from django.test import Client
from django.utils import timezone

from lmweb.access import Principal
from lmweb.errors import Conflict, ServiceUnavailable
from lmweb.models import User
from models_app import loading, routing, services
from models_app.generations import start_generation
from models_app.models import Generation, InstalledModel, ModelInstance
from models_app.placement import Mode
from models_app.reaper import Reaper
from tests.models.test_page import client_of
from workers.models import WorkerNode
from workers.schemas import ChatMessage, EmbeddingRequest, GenerationRequest, LoadConfig

pytestmark = pytest.mark.django_db(transaction=True)

GB = 1000**3
Nodes = Callable[..., WorkerNode]


@pytest.fixture
def model(micro: Path, db: None) -> InstalledModel:
    return services.import_file(principal=None, source=micro, user_repo="a/micro", mode=Mode.COPY)


@pytest.fixture
def join(db: None) -> Nodes:
    """Return what makes a node appear."""

    def join(name: str, **fields: Any) -> WorkerNode:
        routing.forget()
        values = {"incarnation": uuid4(), "free_memory_bytes": 8 * GB, "total_memory_bytes": 16 * GB, **fields}
        return WorkerNode.objects.create(name=name, **values)

    return join


def put(model: InstalledModel, node: WorkerNode, status: str = "ready", **fields: Any) -> ModelInstance:
    routing.forget()
    return ModelInstance.objects.create(**{"identifier": model.key, "model": model, "node": node, "status": status, **fields})


def ask(person: Principal, model: InstalledModel, *texts: str, name: str = "") -> Generation:
    """Send a conversation of these turns."""
    roles = ("user", "assistant")
    messages = [ChatMessage(role=roles[number % 2], content=text) for number, text in enumerate(texts)]
    request = GenerationRequest(model=name or model.key, messages=messages)
    return start_generation(principal=person, request=request, source="test")


# --- requests -----------------------------------------------------------------------------------------------------------------


def test_requests_spread_over_replicas_and_a_conversation_stays(member: Principal, model: InstalledModel, join: Nodes) -> None:
    for name in "abc":
        put(model, join(name))
    join("d", free_memory_bytes=15 * GB)
    first = {text: ask(member, model, text).node for text in map(str, range(12))}
    assert Counter(first.values()) == {"a": 4, "b": 4, "c": 4}
    routing.forget()
    assert first == {text: ask(member, model, text, "answer", "and then?").node for text in first}


def test_what_waits_and_runs_counts_and_ended_does_not(member: Principal, model: InstalledModel, join: Nodes) -> None:
    put(model, join("a"))
    put(model, join("b"))
    where = [ask(member, model, str(number)).node for number in range(4)]
    Generation.objects.filter(node="a").update(status="completed")
    routing.forget()
    assert Counter(where) == {"a": 2, "b": 2}
    assert [ask(member, model, f"more {number}").node for number in range(2)] == ["a", "a"]


def test_an_instance_is_found_by_its_name(member: Principal, model: InstalledModel, join: Nodes) -> None:
    put(model, join("a"))
    put(model, join("b"), identifier="mine")
    assert {ask(member, model, str(number), name="mine").node for number in range(5)} == {"b"}


def test_dead_nodes_and_failed_loads_are_avoided_for_a_while(member: Principal, model: InstalledModel, join: Nodes) -> None:
    gone = timezone.now() - timedelta(seconds=30)
    put(model, join("dead", heartbeat_at=gone))
    failed = put(model, join("roomy", free_memory_bytes=15 * GB), "failed")
    join("other")
    assert ask(member, model, "one").node == "other"
    Generation.objects.all().delete()
    ModelInstance.objects.filter(pk=failed.pk).update(last_used_at=gone - timedelta(minutes=1))
    routing.forget()
    assert ask(member, model, "two").node == "roomy"


def test_large_models_go_where_they_fit(member: Principal, model: InstalledModel, join: Nodes) -> None:
    join("small", free_memory_bytes=10**6, total_memory_bytes=GB)
    join("large", free_memory_bytes=GB)
    assert [ask(member, model, str(number)).node for number in range(3)] == ["large"] * 3


def test_virtual_models_run_where_their_weights_are(member: Principal, model: InstalledModel, join: Nodes) -> None:
    virtual = InstalledModel.objects.create(
        key="a/virtual", path="a/virtual/model.yaml", base=model, architecture="x", size_bytes=1, max_context_length=2048
    )
    join("a", free_memory_bytes=15 * GB)
    put(model, join("b"))
    assert ask(member, virtual, "hello").node == "b"
    assert ask(member, model, "hello").node == "b"


def test_a_node_with_an_engine_for_it_comes_first(member: Principal, model: InstalledModel, join: Nodes) -> None:
    engines = [{"name": "llama.cpp", "formats": ["gguf"], "is_installed": True}, {"name": "mlx", "formats": ["mlx"], "is_installed": False}]
    join("a", engines=[{**engines[1], "is_installed": True}], free_memory_bytes=15 * GB)
    join("b", engines=engines)
    assert ask(member, model, "hello").node == "b"
    InstalledModel.objects.update(format="mlx")
    assert ask(member, InstalledModel.objects.get(), "hello", name="a/micro").node == "b", "where others wait for it"
    Generation.objects.all().delete()
    routing.forget()
    assert ask(member, model, "hello").node == "a"


def test_without_a_worker_requests_wait_for_one(member: Principal, model: InstalledModel, join: Nodes) -> None:
    generation = ask(member, model, "hello")
    assert (generation.status, generation.node) == ("queued", "")
    Reaper().run()
    join("a")
    Reaper().run()
    generation.refresh_from_db()
    assert generation.node == "a"


def test_what_a_dead_node_left_waiting_spreads_over_the_others(member: Principal, model: InstalledModel, join: Nodes) -> None:
    dead = join("dead")
    put(model, dead)
    waiting = [ask(member, model, str(number)) for number in range(6)]
    past = timezone.now() - timedelta(minutes=1)
    WorkerNode.objects.filter(pk="dead").update(heartbeat_at=past)
    Generation.objects.update(lease_until=past)
    for name in "ab":
        put(model, join(name))
    Reaper().run()
    nodes = Generation.objects.filter(pk__in=[each.pk for each in waiting]).values_list("node", flat=True)
    assert Counter(nodes) == {"a": 3, "b": 3}


def test_embeddings_have_no_home(member: Principal, model: InstalledModel, join: Nodes) -> None:
    put(model, join("a"))
    put(model, join("b"))
    request = EmbeddingRequest(model=model.key, inputs=["the same"])
    nodes = [start_generation(principal=member, request=request, source="test").node for _ in range(4)]
    assert Counter(nodes) == {"a": 2, "b": 2}


# --- loads ----------------------------------------------------------------------------------------------------------------------


def test_a_further_load_makes_a_replica_on_another_node(member: Principal, model: InstalledModel, join: Nodes) -> None:
    join("a")
    join("b")
    loaded = [loading.request_load(principal=member, model=model) for _ in range(3)]
    assert {(each.identifier, each.node_id) for each in loaded[:2]} == {("a/micro", "a"), ("a/micro", "b")}
    assert loaded[2].identifier == "a/micro:2"


def test_a_person_names_the_node(member: Principal, model: InstalledModel, join: Nodes, micro: Path) -> None:
    join("a")
    join("b", free_memory_bytes=0)
    named = loading.request_load(principal=member, model=model, identifier="mine", node="b")
    replica = loading.request_load(principal=member, model=model, identifier="mine", node="a")
    assert [(each.identifier, each.node_id) for each in (named, replica)] == [("mine", "b"), ("mine", "a")]
    with pytest.raises(Conflict, match="'mine' is loading already"):
        loading.request_load(principal=member, model=model, identifier="mine", node="a")
    other = services.import_file(principal=None, source=micro, user_repo="a/other", mode=Mode.COPY)
    with pytest.raises(Conflict, match="'mine' is loading already"):
        loading.request_load(principal=member, model=other, identifier="mine")
    with pytest.raises(Conflict, match=r"No worker of the name 'c' is running. These do: a, b."):
        loading.request_load(principal=member, model=model, node="c")


def test_without_room_anywhere_the_plan_is_for_the_roomiest(member: Principal, model: InstalledModel, join: Nodes) -> None:
    join("a", free_memory_bytes=0)
    join("b", free_memory_bytes=10**6)
    plan = loading.plan_load(principal=member, model=model, config=LoadConfig())
    assert (plan.node.name, plan.verdict) == ("b", "too_large")
    assert loading.plan_load(principal=member, model=model, config=LoadConfig(), node="a").node.name == "a"
    WorkerNode.objects.all().delete()
    with pytest.raises(ServiceUnavailable, match="No worker is running"):
        loading.plan_load(principal=member, model=model, config=LoadConfig())


def test_the_page_offers_the_nodes_where_there_are_several(model: InstalledModel, join: Nodes, admin: User) -> None:
    page: Client = client_of(admin)
    join("alpha")
    assert 'name="node"' not in page.get(f"/models/{model.pk}/load-options").content.decode()
    join("beta", free_memory_bytes=4 * GB)
    assert 'name="node"' in page.get(f"/models/{model.pk}/load-options").content.decode()
    form = {"context_length": "256", "node": "beta"}
    assert "beta has" in page.post(f"/models/{model.pk}/estimate", form).content.decode()
    assert page.post(f"/models/{model.pk}/load-options", {**form, "node": "gamma"}).status_code == 422
    shown = page.post(f"/models/{model.pk}/load-options", form)
    assert shown.status_code == 200
    assert "on beta" in shown.content.decode()
    assert ModelInstance.objects.get().node_id == "beta"
