"""The page of one model, and what a load would take: in words, keeping what was typed, for whom it is allowed."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import pytest
from django.test import Client

from models_app import services
from models_app.models import InstalledModel, ModelInstance
from models_app.placement import Mode

if TYPE_CHECKING:
    from pathlib import Path

    from django.http import HttpResponse

    from lmweb.models import User
    from workers.models import WorkerNode

pytestmark = pytest.mark.django_db


@pytest.fixture
def model(micro: Path, db: None) -> InstalledModel:
    return services.import_file(principal=None, source=micro, user_repo="a/micro", mode=Mode.COPY)


@pytest.fixture
def page(admin: User) -> Client:
    return client_of(admin)


def client_of(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def text(response: HttpResponse) -> str:
    return html.unescape(response.content.decode())


def test_it_shows_what_there_is(page: Client, model: InstalledModel) -> None:
    shown = text(page.get(f"/models/{model.pk}/"))
    assert str(model.file) in shown
    assert "2,048 tokens" in shown
    assert "im_start" in shown
    assert page.get("/models/999999/").status_code == 404
    model.file.unlink()
    assert "File is missing" in text(page.get(f"/models/{model.pk}/"))


def test_load_defaults_are_saved_kept_when_wrong_and_reset(page: Client, model: InstalledModel) -> None:
    url = f"/models/{model.pk}/load-defaults"
    wrong = page.post(url, {"context_length": "99999", "parallel": "7"})
    assert wrong.status_code == 422
    assert 'value="99999"' in text(wrong)
    assert "at most 2048 tokens" in text(wrong)
    wrong = page.post(url, {"context_length": "512", "flash_attention": "off", "v_cache_type": "q8_0"})
    assert "need flash attention" in text(wrong)
    saved = page.post(url, {"context_length": "512", "parallel": "7", "flash_attention": "on", "cpu_threads": "2"}, follow=True)
    assert "Saved." in text(saved)
    model.refresh_from_db()
    assert model.load_defaults == {"context_length": 512, "parallel": 7, "flash_attention": True, "cpu_threads": 2}
    assert 'value="7"' in text(page.get(f"/models/{model.pk}/load-options"))
    page.post(url, {"reset": "1"})
    model.refresh_from_db()
    assert model.load_defaults == {}


def test_inference_defaults_are_saved_and_reset(page: Client, model: InstalledModel) -> None:
    url = f"/models/{model.pk}/inference-defaults"
    wrong = page.post(url, {"temperature": "99", "system_prompt": "Stay."})
    assert wrong.status_code == 422
    assert "Stay." in text(wrong)
    assert page.post(url, {"stop": "x" * 300}).status_code == 422
    page.post(url, {"temperature": "0.2", "system_prompt": "Be brief.", "stop": "END\r\nSTOP", "top_k": ""})
    model.refresh_from_db()
    assert model.inference_defaults == {"sampling": {"temperature": 0.2, "stop": ["END", "STOP"]}, "system_prompt": "Be brief."}
    page.post(url, {"reset": "1"})
    model.refresh_from_db()
    assert model.inference_defaults == {}


def test_the_template_is_previewed_saved_and_reset(page: Client, model: InstalledModel) -> None:
    url, mine = f"/models/{model.pk}/template", "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tried = page.post(url, {"chat_template": mine, "preview": "1"})
    assert "<user>Hello!" in text(tried)
    model.refresh_from_db()
    assert model.chat_template_override == ""
    wrong = page.post(url, {"chat_template": "{% for %}"})
    assert wrong.status_code == 422
    assert "{% for %}" in text(wrong)
    page.post(url, {"chat_template": mine})
    model.refresh_from_db()
    assert model.chat_template_override == mine
    page.post(url, {"chat_template": mine, "reset": "1"})
    model.refresh_from_db()
    assert model.chat_template_override == ""


@pytest.mark.parametrize("path", ["load-defaults", "inference-defaults", "template"])
def test_only_admins_change_what_holds_for_everybody(owner: User, model: InstalledModel, path: str) -> None:
    client = client_of(owner)
    body = {"context_length": "512", "temperature": "0.5", "chat_template": "{{ messages }}"}
    assert client.post(f"/models/{model.pk}/{path}", body).status_code == 403
    assert client.post(f"/models/{model.pk}/{path}", {"reset": "1"}).status_code == 403
    assert "Admins change" in text(client.get(f"/models/{model.pk}/"))
    assert "remember" not in text(client.get(f"/models/{model.pk}/load-options"))


def estimated(page: Client, model: InstalledModel, **fields: Any) -> str:
    return text(page.post(f"/models/{model.pk}/estimate", {"context_length": "512", **fields}))


def test_the_dialog_says_what_a_load_takes_and_who_has_to_leave(page: Client, model: InstalledModel, node: WorkerNode) -> None:
    assert "Too large" in estimated(page, model)
    type(node).objects.update(free_memory_bytes=4_000_000_000, total_memory_bytes=8_000_000_000)
    assert "Fits" in estimated(page, model)
    assert "once the options are complete" in estimated(page, model, context_length="")
    assert "at most 2048 tokens" in estimated(page, model, context_length="4096")
    assert "context_length must be at most 16777216." in estimated(page, model, context_length="999999999")
    type(node).objects.update(free_memory_bytes=420_000_000)
    old = ModelInstance.objects.create(identifier="old", model=model, node=node, status="ready", memory_bytes=500_000_000)
    shown = estimated(page, model)
    assert "Others have to leave" in shown
    assert "checked" in shown
    assert "checked" not in estimated(page, model, was_asked="on")
    page.post(
        f"/models/{model.pk}/load-options",
        {"context_length": "512", "make_room": "on", "identifier": "new", "ttl_minutes": "5", "remember": "on"},
    )
    new = ModelInstance.objects.get(identifier="new")
    assert (new.replaces, new.ttl_seconds, new.config) == ([old.pk], 300, {"context_length": 512})
    model.refresh_from_db()
    assert model.load_defaults == {"context_length": 512}


def test_files_are_verified(page: Client, owner: User, model: InstalledModel) -> None:
    from models_app import verify

    url = f"/models/{model.pk}/verification"
    for said in ("Checksum noted", "Verified"):
        assert "Checking" in text(page.post(url))
        assert "being checked already" in text(page.post(url)) or "Checking" in text(page.get(url))
        verify.run(model.pk)
        assert said in text(page.get(url))
    with model.file.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"X")
    verify.run(model.pk)
    assert "has changed or is damaged" in text(page.get(url))
    model.file.unlink()
    verify.run(model.pk)
    assert "cannot be read" in text(page.get(f"/models/{model.pk}/"))


def test_pins(page: Client, owner: User, model: InstalledModel, node: WorkerNode) -> None:
    instance = ModelInstance.objects.create(identifier="x", model=model, node=node, status="ready", ttl_seconds=60)
    assert 'aria-pressed="true"' in text(page.post(f"/models/instances/{instance.pk}/pin", {"pinned": "on"}))
    assert client_of(owner).post(f"/models/instances/{instance.pk}/pin", {"pinned": "off"}).status_code == 403
    assert "Pinned" in text(client_of(owner).get("/models/list"))
    assert "60 s idle" in text(page.post(f"/models/instances/{instance.pk}/pin", {"pinned": "off"}))
