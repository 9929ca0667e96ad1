"""The My Models page through the test client: what it shows to whom, its acts, and how it words failures."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

import pytest
from django.test import Client

from lmweb.models import User
from models_app import services, virtual
from models_app.models import Generation, InstalledModel, ModelInstance
from models_app.placement import Mode
from tests.micro_models import make_micro
from workers.models import WorkerNode

pytestmark = pytest.mark.django_db


def client_of(user: User) -> Client:
    client = Client(raise_request_exception=False)
    client.force_login(user)
    return client


@pytest.fixture
def page(admin: User) -> Client:
    return client_of(admin)


@pytest.fixture
def model(micro: Path, db: None) -> InstalledModel:
    return services.import_file(principal=None, source=micro, user_repo="team/micro", mode=Mode.COPY)


def text(response: object) -> str:
    return re.sub(r"\s+", " ", response.content.decode())  # type: ignore[attr-defined]


def test_empty_page_offers_the_import(page: Client, stranger: User) -> None:
    assert "No models yet" in text(page.get("/models/"))
    assert 'id="import-panel"' in text(page.get("/models/"))
    shown = text(client_of(stranger).get("/models/"))
    assert "No models yet" in shown
    assert "import-panel" not in shown


def test_an_empty_chat_page_leads_to_discover(page: Client, models_dir: Path) -> None:
    shown = text(page.get("/"))
    assert "No model installed" in shown
    assert re.search(r'<a class="button primary" href="/discover/">.*Discover models</a>', shown)


def test_table_shows_the_facts(page: Client, model: InstalledModel) -> None:
    shown = text(page.get("/models/"))
    for fact in ("Micro Test", "team/micro", "qwen2", "261K", "F32", "1.13 MB", "2,048", "Not loaded"):
        assert fact in shown


def test_a_virtual_model_has_the_size_of_its_weights_and_no_file_to_delete(page: Client, model: InstalledModel) -> None:
    virtual.install(principal=None, text="model: team/brief\nbase: team/micro\n")
    made = InstalledModel.objects.get(key="team/brief")
    assert (made.size_bytes, made.weights_bytes) == (0, model.size_bytes)
    assert "1.13 MB" in text(page.get(f"/models/{made.pk}/"))
    shown = text(page.get("/models/"))
    assert "Virtual" in shown
    assert "The name and its settings are removed, for everybody; team/micro stays." in shown


def test_buttons_follow_the_permissions(model: InstalledModel, admin: User, owner: User, stranger: User) -> None:
    seen = {user.username: text(client_of(user).get("/models/")) for user in (admin, owner, stranger)}
    assert [f"/models/{model.pk}/load" in seen[name] for name in ("admin", "owner", "stranger")] == [True, True, False]
    assert [f"/models/{model.pk}/delete" in seen[name] for name in ("admin", "owner", "stranger")] == [True, False, False]


def test_states(page: Client, model: InstalledModel, node: WorkerNode) -> None:
    instance = ModelInstance.objects.create(identifier=model.key, model=model, node=node, status="loading", progress=0.43)
    shown = text(page.get("/models/list"))
    assert "Loading 43 %" in shown
    assert "data-busy" in shown
    ModelInstance.objects.filter(pk=instance.pk).update(status="ready")
    shown = text(page.get("/models/list"))
    assert "Loaded" in shown
    assert "data-busy" not in shown
    ModelInstance.objects.filter(pk=instance.pk).update(memory_bytes=105_000_000)
    user = User.objects.get()
    Generation.objects.create(user=user, source="openai", model=model, model_key=model.key, request={}, status="running", node=node.name)
    shown = text(page.get("/models/list"))
    assert "105 MB" in shown
    assert "1 answering" in shown
    assert "It is answering 1 request right now." in shown
    unloaded = page.post(f"/models/instances/{instance.pk}/unload")
    assert "105 MB of memory come back" in unloaded.headers["HX-Trigger"]
    ModelInstance.objects.filter(pk=instance.pk).update(status="failed", error="Out of <memory>")
    shown = text(page.get("/models/list"))
    assert "Out of &lt;memory&gt;" in shown
    assert "Try again" in shown
    model.file.unlink()
    assert "File is missing" in text(page.get("/models/list"))


def test_unchanged_list_is_not_sent_again(page: Client, model: InstalledModel, node: WorkerNode) -> None:
    seen = re.search(r'data-seen="(\w+)"', page.get("/models/list").content.decode())
    assert seen
    assert page.get("/models/list", {"seen": seen[1]}).status_code == 204
    ModelInstance.objects.create(identifier=model.key, model=model, node=node)
    assert page.get("/models/list", {"seen": seen[1]}).status_code == 200


def test_search_and_sort(page: Client, tmp_path: Path) -> None:
    for name, context, layers in (("alpha", 64, 1), ("beta", 512, 3), ("gamma", 256, 2)):
        services.import_file(
            principal=None,
            source=make_micro(tmp_path / f"{name}.gguf", name=name.title(), context=context, layers=layers),
            user_repo=f"t/{name}",
        )

    def names(**query: str) -> list[str]:
        return re.findall(r'class="name" href="[^"]*" title="(\w+)"', page.get("/models/list", query).content.decode())

    assert names() == ["Alpha", "Beta", "Gamma"]
    assert names(sort="size") == ["Beta", "Gamma", "Alpha"]
    assert names(sort="context") == ["Beta", "Gamma", "Alpha"]
    assert names(sort="added") == ["Gamma", "Beta", "Alpha"]
    assert names(q="BET qwen") == ["Beta"]
    assert names(q="t/al") == ["Alpha"]
    assert names(q="nothing%_") == []
    assert "No model matches" in text(page.get("/models/list", {"q": "<script>"}))
    assert "<script>x" not in text(page.get("/models/list", {"q": "<script>x"}))


@pytest.mark.parametrize(
    "query", [{"sort": "'; drop"}, {"limit": "-1"}, {"limit": "9" * 50}, {"limit": "１"}, {"q": "\x00"}, {"q": "x" * 5000}, {"seen": "<"}]
)
def test_odd_queries_are_harmless(page: Client, model: InstalledModel, query: dict[str, str]) -> None:
    assert page.get("/models/", query).status_code == 200
    assert page.get("/models/list", query).status_code == 200


def test_many_models_are_paged(page: Client, models_dir: Path) -> None:
    InstalledModel.objects.bulk_create(
        InstalledModel(
            key=f"t/m{n:04}",
            publisher="t",
            display_name=f"Model {n:04}",
            architecture="x",
            size_bytes=1,
            max_context_length=1,
            path=f"t/m{n}/f",
        )
        for n in range(350)
    )
    assert page.get("/models/").content.decode().count("<tr id=") == 100
    shown = page.get("/models/list", {"limit": "300"}).content.decode()
    assert shown.count("<tr id=") == 300
    assert "limit=400" in shown


def test_hostile_texts_are_escaped(page: Client, model: InstalledModel) -> None:
    evil = "<img src=x onerror=alert(1)>\"'{{ 7*7 }}"
    InstalledModel.objects.update(display_name=evil, description=evil, architecture=evil[:60])
    shown = page.get("/models/").content.decode()
    assert "<img src=x" not in shown
    assert "49" not in re.findall(r'class="name"[^<]*', shown)[0]


def test_load_and_unload(page: Client, model: InstalledModel, node: WorkerNode) -> None:
    response = page.post(f"/models/{model.pk}/load", {"q": "micro", "sort": "size", "limit": "100"})
    assert response.status_code == 200
    assert response.headers["HX-Retarget"] == "#model-list"
    assert "Loading 0 %" in text(response)
    instance = ModelInstance.objects.get()
    assert "Unloading" in text(page.post(f"/models/instances/{instance.pk}/unload"))
    ModelInstance.objects.all().delete()
    assert "Not loaded" in text(page.post(f"/models/instances/{instance.pk}/unload"))  # gone already is fine


def test_failures_are_alerts_and_leave_the_list(page: Client, model: InstalledModel) -> None:
    response = page.post(f"/models/{model.pk}/load")
    assert response.status_code == 503
    assert response.headers["HX-Retarget"] == "#model-alerts"
    assert 'role="alert"' in text(response)
    assert "No worker is running" in text(response)
    assert page.post("/models/999999/load").status_code == 404


def test_load_options_keep_what_was_typed(page: Client, model: InstalledModel, node: WorkerNode) -> None:
    shown = text(page.get(f"/models/{model.pk}/load-options"))
    assert 'value="2048"' in shown
    bad = {"context_length": "999999", "parallel": "3", "gpu_layers": "-1", "identifier": "my name"}
    response = page.post(f"/models/{model.pk}/load-options", bad)
    assert response.status_code == 422
    shown = text(response)
    assert 'value="999999"' in shown
    assert "at most 2048 tokens" in shown
    response = page.post(f"/models/{model.pk}/load-options", {**bad, "context_length": "256"})
    assert "An identifier has" in text(response)
    assert page.post(f"/models/{model.pk}/load-options", {"context_length": "x"}).status_code == 422
    assert "is no mixture of experts" in text(
        page.post(f"/models/{model.pk}/load-options", {**bad, "context_length": "256", "num_experts": "2"})
    )
    response = page.post(f"/models/{model.pk}/load-options", {**bad, "context_length": "256", "identifier": "mine"})
    assert response.status_code == 200
    assert "close-dialog" in response.headers["HX-Trigger"]
    assert ModelInstance.objects.get().config == {"context_length": 256, "parallel": 3}


def test_defaults_that_the_file_cannot_have_leave_the_pages_that_mend_them(page: Client, model: InstalledModel, node: WorkerNode) -> None:
    InstalledModel.objects.update(load_defaults={"num_experts": 2})
    assert page.get(f"/models/{model.pk}/").status_code == page.get(f"/models/{model.pk}/load-options").status_code == 200
    assert "is no mixture of experts" in text(page.post(f"/models/{model.pk}/load"))


def test_delete(page: Client, owner: User, model: InstalledModel) -> None:
    assert client_of(owner).post(f"/models/{model.pk}/delete").status_code == 403
    generation = Generation.objects.create(
        id=uuid.uuid4(), user=owner, source="openai", model=model, model_key=model.key, request={}, status="queued"
    )
    assert "1 from openai" in text(page.post(f"/models/{model.pk}/delete"))
    generation.delete()
    assert "No models yet" in text(page.post(f"/models/{model.pk}/delete"))
    assert not model.file.exists()


@pytest.mark.parametrize("path", ["load", "delete", "load-options"])
def test_viewers_cannot_act(stranger: User, model: InstalledModel, node: WorkerNode, path: str) -> None:
    assert client_of(stranger).post(f"/models/{model.pk}/{path}").status_code == 403
    assert not ModelInstance.objects.exists()


def test_methods_and_sign_in(page: Client, model: InstalledModel) -> None:
    assert page.get(f"/models/{model.pk}/delete").status_code == 405
    assert Client().get("/models/").status_code == 302
    forged = Client(enforce_csrf_checks=True)
    forged.force_login(User.objects.get(username="admin"))
    assert forged.post(f"/models/{model.pk}/delete").status_code == 403
