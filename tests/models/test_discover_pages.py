"""Discover and Activity through the test client: what they show to whom, and how they word what the Hub does not do."""

from __future__ import annotations

import re
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from django.core.cache import cache
from django.test import Client

from lmweb.access import Principal
from lmweb.errors import InvalidRequest
from lmweb.models import User
from models_app import catalog, downloads, transfer
from models_app.models import Download
from tests.hub.server import Hub, Repo
from tests.micro_models import make_micro
from workers.models import WorkerNode

if TYPE_CHECKING:
    from pytest_django import Settings

pytestmark = pytest.mark.django_db

REPO = "acme/Tiny-GGUF"


@pytest.fixture(autouse=True)
def repo(hub: Hub, settings: Settings, tmp_path: Path) -> Repo:
    settings.HF_ENDPOINT, settings.DATA_DIR = hub.url, tmp_path
    cache.clear()
    micro = make_micro(tmp_path / "x.gguf").read_bytes()
    files = {"Tiny-Q4_K_M.gguf": micro, "Tiny-Q8_0.gguf": micro + b"x", "README.md": b"---\nx: y\n---\n# Hi <script>alert(1)</script>"}
    return hub.add(Repo(REPO, files, likes=7, downloads=1234, gguf={"total": 260_000, "architecture": "qwen2", "context_length": 2048}))


def client_of(user: User) -> Client:
    client = Client(raise_request_exception=False)
    client.force_login(user)
    return client


def text(response: object) -> str:
    return re.sub(r"\s+", " ", response.content.decode())  # type: ignore[attr-defined]


def test_results_and_picks(admin: User, repo: Repo) -> None:
    page = client_of(admin)
    shown = text(page.get("/discover/results"))
    assert "Staff picks" in shown
    assert "gpt-oss-20b" in shown
    assert "Tiny-GGUF" in shown
    assert "1,234" in text(page.get("/discover/results", {"q": "tiny"}))
    assert "Nothing found" in text(page.get("/discover/results", {"q": "absent"}))
    assert "Named exactly" in text(page.get("/discover/results", {"q": f"https://huggingface.co/{REPO}"}))
    assert "Only addresses on the Hugging Face Hub" in text(page.get("/discover/results", {"q": "https://evil.example/a/b"}))


@pytest.mark.parametrize(("memory", "word"), [(64 * 10**9, "Fits"), (60 * 10**6, "Too large"), (0, "No worker runs")])
def test_a_model_with_its_verdicts(admin: User, node: WorkerNode, memory: int, word: str) -> None:
    WorkerNode.objects.filter(pk=node.pk).update(total_memory_bytes=memory)
    if not memory:
        WorkerNode.objects.all().delete()
    shown = text(client_of(admin).get("/discover/model", {"model": REPO}))
    assert word in shown
    assert "Licence: apache-2.0" in shown
    assert ("Recommended" in shown) == (word != "Too large")
    assert shown.count("Download Q") == 2


def test_offload_needs_a_gpu(admin: User, node: WorkerNode) -> None:
    WorkerNode.objects.filter(pk=node.pk).update(total_memory_bytes=64 * 10**9, hardware={"gpu_memory_bytes": 10**6})
    assert "Fits with offload" in text(client_of(admin).get("/discover/model", {"model": REPO}))


def test_what_no_installed_engine_reads_is_shown_with_what_to_install(
    admin: User, hub: Hub, node: WorkerNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"x" * 5000, "tokenizer.json": b"{}", "run.py": b"evil", "pytorch_model.bin": b"x"}
    hub.add(Repo("acme/Tiny-4bit", files, tags=["mlx"]))
    page = client_of(admin)
    assert "Tiny-4bit" in text(page.get("/discover/results", {"format": "mlx"}))
    shown = text(page.get("/discover/model", {"model": "acme/Tiny-4bit"}))
    assert "3 files" in shown  # neither code nor pickles
    assert "Download 4bit" in shown
    monkeypatch.setattr("workers.engines.card.version_of", lambda package: "" if package.startswith("mlx") else "1")
    shown = text(page.get("/discover/model", {"model": "acme/Tiny-4bit"}))
    assert "No engine here" in shown
    assert "LMWEB_MLX=on" in shown
    assert "Download 4bit" not in shown
    refused = page.post("/discover/download", {"repo": "acme/Tiny-4bit", "variant": "4bit"})
    assert refused.status_code == 400
    assert "LMWEB_MLX=on" in text(refused)


def test_members_request_and_viewers_look(admin: User, owner: User, teammate: User, stranger: User) -> None:
    assert "Request Q4_K_M" in text(client_of(owner).get("/discover/model", {"model": REPO}))
    shown = text(client_of(stranger).get("/discover/model", {"model": REPO}))
    assert "Request Q" not in shown
    assert client_of(stranger).post("/discover/download", {"repo": REPO, "variant": "Q4_K_M"}).status_code == 403
    answer = client_of(owner).post("/discover/download", {"repo": REPO, "variant": "q4_k_m"})
    assert "Requested" in text(answer)
    request = Download.objects.get()
    assert text(client_of(owner).get("/activity/list")).count("Withdraw") == 1
    assert REPO not in text(client_of(teammate).get("/activity/list"))
    shown = text(client_of(admin).get("/activity/list"))
    assert "Needs attention" in shown
    assert "Approve" in shown
    assert client_of(admin).get("/activity/badge").json() == {"running": 0, "attention": 1}
    assert client_of(owner).post(f"/activity/{request.pk}/approve").status_code == 403
    assert client_of(teammate).post(f"/activity/{request.pk}/cancel").status_code == 404
    assert client_of(admin).post(f"/activity/{request.pk}/decline", {"reason": ""}).status_code == 400
    client_of(admin).post(f"/activity/{request.pk}/decline", {"reason": "Too <big>"})
    shown = text(client_of(owner).get("/activity/list"))
    assert "Too &lt;big&gt;" in shown
    assert "Declined by admin" in shown


def test_a_failure_is_shown_to_whom_it_concerns(admin: User, owner: User, repo: Repo) -> None:
    repo.wrong_hash = {"Tiny-Q4_K_M.gguf"}
    found = downloads.find(REPO, "Q4_K_M")
    asked = downloads.ask(principal=Principal(admin), repository=found.repository, variant=found.chosen)
    assert asked.download
    transfer.run(asked.download.pk, transfer.Worker("n", uuid.uuid4(), threading.Event()))
    assert "Try again" in text(client_of(admin).get("/activity/list"))
    shown = text(client_of(owner).get("/activity/list"))
    assert "has another Tiny-Q4_K_M.gguf now" in shown
    assert "Needs attention" not in shown
    assert "Record" in shown
    assert client_of(owner).post(f"/activity/{asked.download.pk}/resume").status_code == 403
    assert client_of(owner).get("/activity/badge").json() == {"running": 0, "attention": 0}


@pytest.mark.parametrize(
    ("switch", "words"),
    [("offline", "does not ask the Hugging Face Hub"), ("away", "cannot be reached"), ("busy", "allows no more requests")],
)
def test_states_without_the_hub(admin: User, hub: Hub, settings: Settings, switch: str, words: str) -> None:
    if switch == "offline":
        settings.HF_HUB_OFFLINE = True
    elif switch == "away":
        settings.HF_ENDPOINT = "http://127.0.0.1:9"
    else:
        hub.fail = [("GET", 429, {"RateLimit": '"api";r=0;t=99'})] * 3
    page = client_of(admin)
    for path in ("/discover/results?q=x", f"/discover/model?model={REPO}"):
        response = page.get(path)
        assert response.status_code == 200
        assert words in text(response), path
    assert page.post("/discover/download", {"repo": REPO, "variant": "F32"}).status_code >= 400


def test_readme_is_text_until_the_browser_cleans_it(admin: User, repo: Repo) -> None:
    revision = downloads.find(REPO).repository.revision
    shown = text(client_of(admin).get("/discover/readme", {"repo": REPO, "revision": revision}))
    assert "# Hi &lt;script&gt;" in shown
    assert "x: y" not in shown
    for repository, commit in (("../..", revision), (REPO, "../x"), ("", "")):
        assert "could not be fetched" in text(client_of(admin).get("/discover/readme", {"repo": repository, "revision": commit}))


def test_staff_picks_are_edited_by_admins(admin: User, owner: User) -> None:
    page = client_of(admin)
    assert "qwen/qwen3-8b" in text(page.get("/discover/staff-picks"))
    assert client_of(owner).get("/discover/staff-picks").status_code == 403
    entry = f"model: team/ours\nbase:\n- key: x\n  sources:\n  - {{type: huggingface, user: {REPO.split('/', maxsplit=1)[0]}, repo: {REPO.split('/')[1]}}}\n"
    assert page.post("/discover/staff-picks", {"catalog": entry}).status_code == 204
    assert [pick.model for pick in catalog.picks()] == ["team/ours"]
    assert downloads.find("Team/Ours@q8_0").chosen.label == "Q8_0"
    broken = page.post("/discover/staff-picks", {"catalog": entry + "---\nmodel: ["})
    assert (broken.status_code, "line" in text(broken), "model: [" in text(broken)) == (422, True, True)
    assert page.post("/discover/staff-picks", {"reset": "1"}).status_code == 204
    assert len(catalog.picks()) > 5


@pytest.mark.parametrize(
    "content",
    ["- a", "model: x", "model: a/b", "model: a/b\nbase: 5", "!!python/object/apply:os.system [ls]", "a: &x [1]\nb: *x", "model: ../..\n", "\t",
     "x" * 300_000, "model: a/b\nmetadataOverrides: []\nbase: [{sources: [{type: huggingface, user: .., repo: ..}]}]", "[" * 3000],
)  # fmt: skip
def test_catalogues_that_are_none(content: str) -> None:
    with pytest.raises(InvalidRequest):
        catalog.parse(content)


def test_the_shipped_catalogue() -> None:
    picks = catalog.parse(catalog.SHIPPED.read_text())
    assert len(picks) == len({pick.model for pick in picks}) >= 10
    assert all(pick.description and pick.params for pick in picks)
