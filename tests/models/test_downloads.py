"""Downloads through the real ``huggingface-hub`` package from a local server that speaks the Hub's API, with all that can go wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core.cache import cache

from lmweb.access import Principal
from lmweb.errors import (
    Conflict,
    CorruptDownload,
    GatedModel,
    HubOffline,
    InvalidRequest,
    NotFound,
    OutboundFailed,
    OutboundRefused,
    PermissionDenied,
)
from lmweb.models import User
from models_app import downloads, fetching, hub as the_hub, placement, services, transfer
from models_app.models import Download, InstalledModel, ModelFile
from models_app.transfer import Worker
from models_app.variants import variants
from tests.hub.server import TOKEN, Hub, Repo
from tests.micro_models import make_micro
from tests.models.conftest import stored_files

if TYPE_CHECKING:
    from pytest_django import Settings

pytestmark = pytest.mark.django_db

REPO = "acme/Tiny-GGUF"
FILE = "Tiny-F32.gguf"


@pytest.fixture(autouse=True)
def endpoint(hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.HF_ENDPOINT = hub.url
    settings.HF_TOKEN = ""
    monkeypatch.setattr(transfer.Transfer, "_wait", _no_wait)
    cache.clear()


def _no_wait(self: transfer.Transfer, error: Exception, tries: int, done: int) -> None:
    """Report as the real one does, without the waiting."""
    self._progress.rest()
    self._report(done, force=True, note=fetching.words(error))
    WAITS.append(error)


WAITS: list[Exception] = []


@pytest.fixture
def tiny(tmp_path: Path) -> bytes:
    """Return a loadable model of 1.1 MB."""
    return make_micro(tmp_path / "source.gguf", name="Tiny").read_bytes()


@pytest.fixture
def repo(hub: Hub, tiny: bytes) -> Repo:
    WAITS.clear()
    return hub.add(Repo(REPO, {FILE: tiny, "README.md": b"---\nlicense: mit\n---\n# Tiny"}, likes=3))


@pytest.fixture
def worker() -> Worker:
    return Worker("test-node", uuid.uuid4(), threading.Event())


def ask(principal: Principal | None, text: str = REPO, quantization: str = "") -> Download:
    found = downloads.find(text, quantization)
    asked = downloads.ask(principal=principal, repository=found.repository, variant=found.chosen)
    assert asked.download is not None
    return asked.download


def run(download: Download, worker: Worker) -> Download:
    transfer.run(download.pk, worker)
    download.refresh_from_db()
    return download


def test_a_download_becomes_a_model(repo: Repo, boss: Principal, worker: Worker, models_dir: Path, tiny: bytes, hub: Hub) -> None:
    download = run(ask(boss), worker)
    assert (download.status, download.error_message) == ("completed", "")
    assert download.model == InstalledModel.objects.get(key="acme/tiny")
    assert (models_dir / REPO / FILE).read_bytes() == tiny
    assert download.done_bytes == download.total_bytes == download.fetched_bytes == len(tiny)
    file = ModelFile.objects.get(model=download.model)
    assert (file.path, file.size_bytes, len(file.sha256)) == (f"{REPO}/{FILE}", len(tiny), 64)
    assert download.model.imported_by == boss.user
    assert not (models_dir / ".downloads" / download.pk).exists()
    found = downloads.find(REPO)
    assert downloads.ask(principal=boss, repository=found.repository, variant=found.chosen).installed == download.model
    credentials = [headers for _, path, headers in hub.requests if path.startswith("/blob/") and "Authorization" in headers]
    assert not credentials


@pytest.mark.parametrize(
    "text",
    [REPO, f"https://huggingface.co/{REPO}", f"https://huggingface.co/{REPO}/tree/main", f"hf.co/{REPO}", f"{REPO}@f32", f"{REPO}:F32",
     f"https://huggingface.co/{REPO}/resolve/main/{FILE}?download=true"],
)  # fmt: skip
def test_what_names_a_model(repo: Repo, text: str) -> None:
    assert downloads.find(text).chosen.files[0].path == FILE


@pytest.mark.parametrize("text", ["tiny", "https://evil.example/acme/tiny", "https://huggingface.co/datasets", "a/b/c", "../..", ""])
def test_what_names_none(repo: Repo, text: str) -> None:
    with pytest.raises(InvalidRequest):
        downloads.find(text)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_cut_connections_lose_nothing(repo: Repo, boss: Principal, worker: Worker, models_dir: Path, tiny: bytes, hub: Hub) -> None:
    hub.cut_after = [300_000, 200_000, 0, 100_000]
    download = run(ask(boss), worker)
    assert download.status == "completed", download.error_message
    assert (models_dir / REPO / FILE).read_bytes() == tiny
    assert hub.sent[FILE] == len(tiny)
    assert len(WAITS) == 4


def test_a_stall_ends_and_the_rest_is_fetched(
    repo: Repo, boss: Principal, worker: Worker, models_dir: Path, tiny: bytes, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmweb.egress.READ_SECONDS", 0.3)
    hub.stall_after = [400_000]
    download = run(ask(boss), worker)
    assert download.status == "completed", download.error_message
    assert (models_dir / REPO / FILE).read_bytes() == tiny
    assert len(WAITS) == 1


def test_a_server_without_ranges(repo: Repo, boss: Principal, worker: Worker, models_dir: Path, tiny: bytes, hub: Hub) -> None:
    hub.cut_after, hub.ignore_range = [500_000], True
    download = run(ask(boss), worker)
    assert download.status == "completed", download.error_message
    assert (models_dir / REPO / FILE).read_bytes() == tiny


@pytest.mark.parametrize("status", [429, 500, 502, 503, 408])
def test_passing_failures_of_the_hub(repo: Repo, boss: Principal, worker: Worker, hub: Hub, status: int) -> None:
    download = ask(boss)
    hub.fail = [("GET .*/resolve/", status, {"Retry-After": "17"})] * 2 + [("GET /blob/", status, {})]
    download = run(download, worker)
    assert download.status == "completed", download.error_message
    assert len(WAITS) == 3
    if status == 429:
        assert WAITS[0].details["retry_after_seconds"] == 17  # type: ignore[attr-defined]


def test_a_hub_that_is_away_for_good(repo: Repo, boss: Principal, worker: Worker, hub: Hub) -> None:
    download = ask(boss)
    hub.cut_after = [100_000]
    hub.fail = [("GET .*/resolve/", 503, {})] * 50
    hub.fail[0:1] = []
    hub.fail.insert(0, ("GET nothing", 503, {}))
    download = run(download, worker)
    assert (download.status, download.error_code) == ("failed", "outbound_failed")
    assert "12 tries" in download.error_message
    hub.fail = []
    downloads.resume(principal=boss, download=download)
    assert run(download, worker).status == "completed"


def test_wrong_bytes_are_thrown_away(repo: Repo, boss: Principal, worker: Worker, models_dir: Path, hub: Hub) -> None:
    hub.corrupt = True
    download = run(ask(boss), worker)
    assert (download.status, download.error_code) == ("failed", "corrupt_download")
    assert "checksum" in download.error_message
    assert InstalledModel.objects.count() == 0
    assert not list(models_dir.rglob("*.gguf"))
    hub.corrupt = False
    downloads.resume(principal=boss, download=download)
    assert run(download, worker).status == "completed"


def test_a_hash_that_the_hub_got_wrong(repo: Repo, boss: Principal, worker: Worker) -> None:
    repo.wrong_hash = {FILE}
    assert run(ask(boss), worker).error_code == "corrupt_download"


@pytest.mark.parametrize("lie", [1, 500_000, 1_132_000, 3_000_000])
def test_sizes_that_are_lies(repo: Repo, boss: Principal, worker: Worker, models_dir: Path, lie: int) -> None:
    repo.lies = {FILE: lie}
    download = run(ask(boss), worker)
    assert (download.status, download.error_code) == ("failed", "corrupt_download")
    assert "announced" in download.error_message
    assert not list(models_dir.rglob("*.gguf"))


def test_a_size_beyond_all_disks(repo: Repo, boss: Principal) -> None:
    repo.lies = {FILE: 2**42}
    with pytest.raises(Conflict, match="space on the disk"):
        ask(boss)
    for impossible in (2**60, 0, -1):
        repo.lies = {FILE: impossible}
        cache.clear()
        with pytest.raises(InvalidRequest, match="no complete model"):
            ask(boss)


def test_a_disk_that_fills_up(
    repo: Repo, boss: Principal, worker: Worker, models_dir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = ask(boss)
    written = os.pwrite

    def full(descriptor: int, data: bytes, at: int) -> int:
        if at >= 500_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    download = run(download, worker)
    assert (download.status, download.error_code) == ("failed", "conflict")
    assert "disk is full" in download.error_message
    monkeypatch.setattr(os, "pwrite", written)
    fetched = hub.sent[FILE]
    downloads.resume(principal=boss, download=download)
    assert run(download, worker).status == "completed"
    assert hub.sent[FILE] - fetched < 700_000  # what was there was kept


def test_no_space_from_the_start(repo: Repo, boss: Principal, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    download = ask(boss)
    monkeypatch.setattr(placement, "RESERVED_BYTES", 2**60)
    download = run(download, worker)
    assert (download.status, download.error_code) == ("failed", "conflict")
    with pytest.raises(Conflict, match="not enough space"):
        ask(boss, f"{REPO}@F32") if Download.objects.all().delete() else None


def test_what_is_no_model_is_refused(hub: Hub, boss: Principal, worker: Worker, models_dir: Path) -> None:
    hub.add(Repo("evil/Fake-GGUF", {"Fake-Q4_K_M.gguf": b"GGUF" + random.Random(1).randbytes(200_000)}))
    download = run(ask(boss, "evil/Fake-GGUF"), worker)
    assert (download.status, download.error_code) == ("failed", "invalid_model_file")
    assert not list(models_dir.rglob("*.gguf"))


# --- gates ------------------------------------------------------------------------------------------------------------


def test_gated_models(repo: Repo, boss: Principal, worker: Worker, settings: Settings, hub: Hub) -> None:
    repo.gated = "manual"
    download = run(ask(boss), worker)
    assert (download.status, download.error_code) == ("failed", "gated_model")
    assert "accept" in download.error_message
    settings.HF_TOKEN = "hf_wrong"
    cache.clear()
    with pytest.raises(GatedModel, match="HF_TOKEN"):
        the_hub.repository(REPO)
    settings.HF_TOKEN = TOKEN
    repo.accepted = False
    downloads.resume(principal=boss, download=download)
    assert run(download, worker).error_code == "gated_model"
    repo.accepted = True
    downloads.resume(principal=boss, download=download)
    assert run(download, worker).status == "completed"
    assert not [path for _, path, headers in hub.requests if path.startswith("/blob/") and "Authorization" in headers]


def test_what_the_hub_does_not_have(repo: Repo, boss: Principal, worker: Worker) -> None:
    with pytest.raises(NotFound, match="no model acme/none"):
        the_hub.repository("acme/none")
    download = ask(boss)
    content = repo.files.pop(FILE)
    assert run(download, worker).error_code == "not_found"
    repo.files[FILE] = content
    repo.files[FILE] = content[:-1] + b"x"  # somebody changed it meanwhile
    downloads.resume(principal=boss, download=download)


def test_redirects_into_private_networks_are_not_followed(repo: Repo, boss: Principal, worker: Worker, hub: Hub) -> None:
    port = hub.bytes.server_port
    for target in (
        f"http://localhost:{port}/x",
        f"http://[::ffff:127.0.0.1]:{port}/x",
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
    ):
        hub.redirect_to = target
        download = run(ask(boss), worker)
        assert download.status == "failed"
        assert download.error_code in {"outbound_refused", "outbound_failed"}, download.error_message
        assert not hub.sent["x"]
        downloads.cancel(principal=boss, download=download)


def test_redirects_without_end(repo: Repo, boss: Principal, worker: Worker, hub: Hub) -> None:
    hub.redirect_to = f"{hub.url}/{REPO}/resolve/main/{FILE}"
    assert run(ask(boss), worker).error_code == "outbound_failed"


def test_offline(repo: Repo, settings: Settings) -> None:
    settings.HF_HUB_OFFLINE = True
    with pytest.raises(HubOffline):
        downloads.find(REPO)
    settings.HF_HUB_OFFLINE = False
    settings.HF_ENDPOINT = "http://127.0.0.1:9"
    with pytest.raises(OutboundFailed, match="cannot be reached"):
        the_hub.search("x")


# --- people -----------------------------------------------------------------------------------------------------------


def test_asking_and_deciding(repo: Repo, member: Principal, boss: Principal, teammate: User, stranger: User, worker: Worker) -> None:
    request = ask(member)
    assert request.status == "requested"
    assert run(request, worker).status == "requested"
    assert not Download.objects.visible_to(Principal(teammate)).exists()
    with pytest.raises(PermissionDenied):
        ask(Principal(stranger))
    with pytest.raises(PermissionDenied):
        downloads.approve(principal=member, download=request)
    with pytest.raises(InvalidRequest):
        downloads.decline(principal=boss, download=request, reason="  ")
    downloads.decline(principal=boss, download=request, reason="Too large for us")
    assert (request.status, request.reason, request.decided_by) == ("declined", "Too large for us", boss.user)
    assert Download.objects.visible_to(member).get() == request
    with pytest.raises(Conflict):
        downloads.approve(principal=boss, download=request)
    again = ask(member)
    downloads.approve(principal=boss, download=again, always=True)
    assert run(again, worker).status == "completed"
    member.user.refresh_from_db()
    assert member.user.may_download


def test_the_same_download_is_joined(repo: Repo, member: Principal, boss: Principal, teammate: User, worker: Worker) -> None:
    other = Principal(teammate)
    request = ask(member)
    assert ask(other) == request
    assert ask(boss) == request  # which grants it
    request.refresh_from_db()
    assert request.status == "queued"
    assert request.people.count() == 3
    teammate.may_download = True
    downloads.cancel(principal=other, download=request)  # only leaves
    request.refresh_from_db()
    assert (request.status, request.people.count()) == ("queued", 2)
    with pytest.raises(PermissionDenied):
        downloads.pause(principal=other, download=request)
    downloads.cancel(principal=boss, download=request)
    assert request.status == "cancelled"


def test_pause_resume_cancel(
    repo: Repo, boss: Principal, worker: Worker, models_dir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "REPORT_SECONDS", 0.0)
    download = ask(boss)
    original = transfer.Transfer._report

    def at(count: int, act: Callable[..., None]) -> Callable[..., None]:
        def report(self: transfer.Transfer, done: int, **options: Any) -> None:
            if done >= count and Download.objects.get(pk=download.pk).status == "downloading":
                act(principal=boss, download=download)
            original(self, done, **options)

        return report

    monkeypatch.setattr(transfer.Transfer, "_report", at(400_000, downloads.pause))
    assert run(download, worker).status == "paused"
    part = models_dir / ".downloads" / download.pk / "0000.part"
    kept = part.stat().st_size
    assert kept >= 400_000
    monkeypatch.setattr(transfer.Transfer, "_report", at(700_000, downloads.cancel))
    downloads.resume(principal=boss, download=download)
    assert run(download, worker).status == "cancelled"
    assert not part.parent.exists()
    assert stored_files(models_dir) in ([], [".downloads"])
    with pytest.raises(Conflict):
        downloads.resume(principal=boss, download=download)


def test_limits_and_lost_workers(hub: Hub, boss: Principal, member: Principal, tiny: bytes, worker: Worker, settings: Settings) -> None:
    settings.DOWNLOADS_AT_ONCE, settings.DOWNLOADS_PER_PERSON = 2, 1
    member.user.may_download = True
    for number in range(3):
        hub.add(Repo(f"acme/m{number}-GGUF", {f"m{number}-F32.gguf": tiny + bytes([number])}))
    first, second = ask(boss, "acme/m0-GGUF"), ask(boss, "acme/m1-GGUF")
    third = ask(member, "acme/m2-GGUF")
    assert transfer.claim(first.pk, worker) is not None
    assert transfer.claim(first.pk, worker) is None
    assert transfer.claim(second.pk, worker) is None  # one of each person
    assert transfer.claim(third.pk, worker) is not None
    settings.DOWNLOADS_PER_PERSON = 5
    assert transfer.claim(second.pk, worker) is None  # two at all
    assert transfer.release_lost(node="other", incarnation=uuid.uuid4()) == 0
    assert transfer.release_lost(node="test-node", incarnation=uuid.uuid4()) == 2
    assert set(Download.objects.values_list("status", flat=True)) == {"queued"}


def test_a_stopping_worker_gives_its_work_back(repo: Repo, boss: Principal, worker: Worker) -> None:
    worker.stopping.set()
    download = run(ask(boss), worker)
    assert (download.status, download.incarnation) == ("queued", None)


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_variants_of_a_repository(hub: Hub) -> None:
    big = b"x" * 2000
    names = [
        "M-Q4_K_M.gguf", "M-UD-Q4_K_XL.gguf", "BF16/M-BF16-00001-of-00002.gguf", "BF16/M-BF16-00002-of-00002.gguf", "M-Q8_0-00001-of-00002.gguf",
        "mmproj-F32.gguf", "mmproj-F16.gguf", "imatrix.gguf", "M-Q4_K_M.gguf.part", "M-lora-f16.gguf",
    ]  # fmt: skip
    hub.add(Repo(REPO, dict.fromkeys(names, big)))
    offered = {variant.label: variant for variant in variants(the_hub.repository(REPO))}
    assert set(offered) == {"Q4_K_M", "UD-Q4_K_XL", "BF16"}  # of Q8_0 a part is missing
    assert [file.name for file in offered["BF16"].all_files][-1] == "mmproj-F16.gguf"
    assert len(offered["BF16"].all_files) == 3
    assert downloads.find(REPO).chosen.label == "UD-Q4_K_XL"


HOSTILE = [
    "../evil.gguf", "/etc/evil.gguf", "a/../../evil.gguf", "evil\x00.gguf", "evil\n.gguf", "e" * 300 + ".gguf", "\u0435vil.gguf", ".hidden.gguf",
    "a//b.gguf", "evil\u202eFFUG.gguf", "C:\\evil.gguf", "-rf.gguf", "~/x.gguf", "a/.git/x.gguf", "x\u2215y.gguf", "CON .gguf",
]  # fmt: skip


def test_hostile_names_are_never_offered(hub: Hub, boss: Principal, worker: Worker, models_dir: Path, tiny: bytes) -> None:
    hub.add(Repo("evil/Names-GGUF", {**dict.fromkeys(HOSTILE, b"x" * 2000), "Good-F32.gguf": tiny}))
    repository = the_hub.repository("evil/Names-GGUF")
    labels = [variant.label for variant in variants(repository)]
    assert "F32" in labels
    assert repository.hidden_files >= len(HOSTILE) - 1
    for variant in variants(repository):
        found = downloads.ask(principal=boss, repository=repository, variant=variant).download
        assert found
        run(found, worker)
    root = models_dir.parent
    assert not [path for path in root.rglob("*evil*") if not path.is_relative_to(models_dir)]
    assert (models_dir / "evil/Names-GGUF/Good-F32.gguf").exists()


@pytest.mark.parametrize("name", ["..", "a/..", "../b", "a/b/c", "a/" + "b" * 200, "a/b\x00", "\u0430/b", "a/-b", "", "a/b--c"])
def test_hostile_repositories_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        the_hub.repository(name)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'"x"', b'{"id": 5}', b"[" * 5000, b'{"id":"acme/x","sha":"../.."}', b"\xff\xfe"])
def test_answers_that_are_none(hub: Hub, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    def nonsense(self: Any, *_: Any) -> None:
        self.answer(200, body)

    monkeypatch.setattr("tests.hub.server._ApiHandler.route", nonsense)
    for look in (lambda: the_hub.search("x"), lambda: the_hub.repository("acme/x")):
        with contextlib.suppress(OutboundFailed, CorruptDownload, InvalidRequest):
            assert look() == []


def test_addresses() -> None:
    from lmweb.egress import client

    for address in ("http://127.0.0.1:9/", "http://[::1]:9/", "http://[::ffff:10.0.0.1]/", "http://[64:ff9b::7f00:1]/", "http://0.0.0.0/",
                    "http://169.254.169.254/", "http://[fe80::1]/", "http://localhost/", "http://2130706433/", "ftp://example.org/"):  # fmt: skip
        with client() as http, pytest.raises((OutboundRefused, OutboundFailed)) as failure:
            http.get(address)
        assert isinstance(failure.value, OutboundRefused) or "found" in failure.value.message, address


def projector(path: Path) -> bytes:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_tensor("v.patch_embd.weight", np.zeros((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_split_models_and_projectors_are_one_download(
    hub: Hub, boss: Principal, worker: Worker, models_dir: Path, tmp_path: Path, tiny: bytes
) -> None:
    make_micro(tmp_path / "Vision-F32.gguf", name="Vision", split_tensors=10)
    parts = {f"F32/{path.name}": path.read_bytes() for path in sorted(tmp_path.glob("Vision-F32-*.gguf"))}
    assert len(parts) == 3
    files = {**parts, "Vision-Q8_0.gguf": tiny, "mmproj-F16.gguf": projector(tmp_path / "mmproj")}
    hub.add(Repo("acme/Vision-GGUF", files))
    download = run(ask(boss, "acme/Vision-GGUF", "F32"), worker)
    assert download.status == "completed", download.error_message
    folder = models_dir / "acme/Vision-GGUF"
    names = ["Vision-F32-00001-of-00003.gguf", "Vision-F32-00002-of-00003.gguf", "Vision-F32-00003-of-00003.gguf", "mmproj-F16.gguf"]
    assert sorted(path.name for path in folder.iterdir()) == names
    model = download.model
    assert model
    assert model.size_bytes == sum(len(content) for path, content in files.items() if path != "Vision-Q8_0.gguf")
    assert model.capabilities["vision"]
    assert [file.role for file in model.files.all()] == ["weights"] * 3 + ["projector"]
    other = run(ask(boss, "acme/Vision-GGUF", "Q8_0"), worker)
    assert other.status == "completed", other.error_message
    assert other.model
    assert other.model.key == "acme/vision@q8_0"
    services.delete_model(principal=None, model=model)
    assert sorted(path.name for path in folder.iterdir()) == ["Vision-Q8_0.gguf", "mmproj-F16.gguf"]
    services.delete_model(principal=None, model=other.model)
    assert not folder.exists()


def test_a_split_model_lacks_a_part_or_has_a_foreign_one(hub: Hub, boss: Principal, worker: Worker, tmp_path: Path, tiny: bytes) -> None:
    make_micro(tmp_path / "S-F32.gguf", name="S", split_tensors=10)
    parts = [path.read_bytes() for path in sorted(tmp_path.glob("S-F32-*.gguf"))]
    for contents in ([parts[0], parts[0], parts[2]], [parts[0], tiny, parts[2]], [parts[1], parts[0], parts[2]]):
        hub.add(Repo("acme/S-GGUF", {f"S-F32-{number:05}-of-00003.gguf": content for number, content in enumerate(contents, 1)}))
        cache.clear()
        assert run(ask(boss, "acme/S-GGUF"), worker).error_code == "invalid_model_file"


def test_killed_between_the_files_and_the_row(
    repo: Repo, boss: Principal, worker: Worker, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill in the middle of the registration leaves (a file in its place, no row) is taken over by the next try."""
    download = ask(boss)

    def killed(*_: Any, **__: Any) -> None:
        raise _LostError

    from models_app.transfer import _LostError

    monkeypatch.setattr(services, "register_download", killed)
    transfer.run(download.pk, worker)
    part = models_dir / ".downloads" / download.pk / "0000.part"
    target = models_dir / REPO / FILE
    target.parent.mkdir(parents=True)
    os.link(part, target)
    monkeypatch.undo()
    transfer.release_lost(node="test-node", incarnation=uuid.uuid4())
    assert run(download, worker).status == "completed"
    assert target.exists()
    assert not part.exists()


def test_a_split_model_is_imported_by_its_first_part(tmp_path: Path, models_dir: Path) -> None:
    make_micro(tmp_path / "P-F32.gguf", name="P", split_tensors=20)
    model = services.import_file(principal=None, source=tmp_path / "P-F32-00001-of-00002.gguf", user_repo="me/p")
    assert model.files.count() == 2
    assert sorted(path.name for path in (models_dir / "me/p").iterdir()) == ["P-F32-00001-of-00002.gguf", "P-F32-00002-of-00002.gguf"]
    assert not list(tmp_path.glob("P-F32-*"))
