"""A node without the models directory fetches what it loads from the server: over HTTP, resumed, checked, and only if it has joined."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.test import override_settings

from lmweb.errors import CorruptDownload, OutboundRefused
from models_app import mirror
from models_app.models import InstalledModel, ModelFile
from workers.models import NodeToken, WorkerNode

if TYPE_CHECKING:
    from django.test import Client
    from pytest_django.live_server_helper import LiveServer

KEY = "lmweb-node-key-of-a-node-that-joined"
pytestmark = pytest.mark.django_db


@pytest.fixture
def model(settings: Any, tmp_path: Path) -> InstalledModel:
    """Return a model of two files whose checksums are known, on the server."""
    settings.MODELS_DIR = tmp_path / "server"
    WorkerNode.objects.create(name="second", incarnation=uuid.uuid4(), key_digest=NodeToken.hash(KEY))
    model = InstalledModel.objects.create(
        key="acme/m", publisher="acme", display_name="M", architecture="llama", size_bytes=1, max_context_length=9, path="acme/m/m-1.gguf"
    )
    for number in (1, 2):
        content = bytes(range(256)) * 1000 * number
        path = f"acme/m/m-{number}.gguf"
        (settings.MODELS_DIR / path).parent.mkdir(parents=True, exist_ok=True)
        (settings.MODELS_DIR / path).write_bytes(content)
        ModelFile.objects.create(model=model, path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return model


def ask(client: Client, file: ModelFile, *, key: str = KEY, range_: str = "bytes=0-") -> Any:
    return client.get(f"/node-files/{file.pk}", headers={"Authorization": f"Bearer {key}", "Range": range_, "Accept": "application/json"})


def test_the_server_answers_nodes_only_and_a_few_megabytes_at_a_time(client: Client, model: InstalledModel, settings: Any) -> None:
    file = model.files.get(path__endswith="m-1.gguf")
    content = file.file.read_bytes()
    assert ask(client, file, key="lmweb-node-guess").status_code == 401
    assert client.get(f"/node-files/{file.pk}").status_code == 401
    found = ask(client, file, range_="bytes=1000-")
    assert (found.status_code, found.content) == (206, content[1000:])
    assert found["Content-Range"] == f"bytes 1000-{len(content) - 1}/{len(content)}"
    assert ask(client, file, range_=f"bytes={len(content)}-").status_code == 400
    assert ask(client, file, range_="lines=1-2").status_code == 400
    assert ask(client, ModelFile(pk=10**6)).status_code == 404
    WorkerNode.objects.all().delete()
    assert ask(client, file).status_code == 401, "a removed node gets nothing"


@pytest.fixture
def elsewhere(
    model: InstalledModel, live_server: LiveServer, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Return what fetches the model into another models directory, as a node does; the server keeps its own and sends 100 kB at a time."""
    server = Path(settings.MODELS_DIR)
    monkeypatch.setattr(mirror, "ANSWER_BYTES", 100_000)
    monkeypatch.setattr(ModelFile, "file", property(lambda file: file.here / file.path))
    monkeypatch.setattr(ModelFile, "here", server, raising=False)

    def fetch(report: Callable[[float, str], None] = lambda _part, _words: None, key: str = KEY) -> Path:
        node = tmp_path / "node"
        settings.SERVER_URL = live_server.url
        settings.MODELS_DIR = node
        files = mirror.missing

        def missing(model_id: int) -> list[ModelFile]:
            monkeypatch.setattr(ModelFile, "here", node, raising=False)
            try:
                return files(model_id)
            finally:
                monkeypatch.setattr(ModelFile, "here", server, raising=False)

        monkeypatch.setattr(mirror, "missing", missing)
        try:
            mirror.fetch_model(model.pk, key=key, report=report)
        finally:
            monkeypatch.setattr(mirror, "missing", files)
        return node

    return fetch


@pytest.mark.django_db(transaction=True)
def test_files_arrive_whole_and_go_with_their_model(model: InstalledModel, elsewhere: Callable[..., Path]) -> None:
    told: list[tuple[float, str]] = []
    node = elsewhere(lambda part, words: told.append((part, words)))
    for file in model.files.all():
        assert (node / file.path).read_bytes() == file.file.read_bytes()
    assert [part for part, _ in told] == sorted(part for part, _ in told)
    assert told[-1][0] == 1.0
    assert not list((node / ".mirror").iterdir())
    other = node / "acme" / "m" / "mine.gguf"
    other.write_bytes(b"put here by hand")
    model.delete()
    with override_settings(MODELS_DIR=node):
        mirror._delete_forgotten()
    assert [path.name for path in node.rglob("*.gguf")] == ["mine.gguf"]


@pytest.mark.django_db(transaction=True)
def test_an_interrupted_fetch_goes_on(model: InstalledModel, elsewhere: Callable[..., Path], settings: Any, tmp_path: Path) -> None:
    """What is on disk is not asked for again: it is wrong here, so the whole is, and that is noticed and thrown away."""
    file = model.files.get(path__endswith="m-2.gguf")
    parts = tmp_path / "node" / ".mirror"
    parts.mkdir(parents=True)
    part = parts / f"{file.pk}-{file.size_bytes}.part"
    part.write_bytes(file.file.read_bytes()[:300_000])
    node = elsewhere()
    assert (node / file.path).read_bytes() == file.file.read_bytes()
    (node / file.path).unlink()
    part.write_bytes(b"x" * 300_000)
    with pytest.raises(CorruptDownload, match="thrown away"):
        elsewhere()
    assert not part.exists()
    assert not (node / file.path).exists()
    assert (elsewhere() / file.path).read_bytes() == file.file.read_bytes()


@pytest.mark.django_db(transaction=True)
def test_a_node_that_was_removed_is_told(model: InstalledModel, elsewhere: Callable[..., Path]) -> None:
    with pytest.raises(OutboundRefused, match="does not know this worker"):
        elsewhere(key="lmweb-node-old")
