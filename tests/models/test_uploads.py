"""Uploads through the routes that the browser uses: in pieces, resumable, private, and gone without a trace when they fail."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from pytest_django import Settings

from lmweb.models import User
from models_app import placement, uploads
from models_app.models import InstalledModel
from tests.micro_models import make_micro
from tests.models.conftest import stored_files
from tests.models.hostile import VALID, hostile_files, mutants

pytestmark = pytest.mark.django_db
HOSTILE = hostile_files()


@pytest.fixture
def browser(owner: User) -> Client:
    client = Client(raise_request_exception=False)
    client.force_login(owner)
    return client


def call(client: Client, method: str, url: str, body: Any = None) -> Any:
    kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
    data = body if isinstance(body, bytes) else json.dumps(body or {})
    return client.generic(method, url, data, content_type=kind)


def begin(client: Client, size: int, name: str = "Micro-Test-F32.gguf") -> str:
    response = call(client, "POST", "/models/uploads", {"file_name": name, "size": size})
    assert response.status_code == 201, response.content
    return str(response.json()["id"])


def put(client: Client, upload_id: str, offset: int | str, data: bytes) -> Any:
    return call(client, "PUT", f"/models/uploads/{upload_id}?offset={offset}", data)


def finish(client: Client, upload_id: str, user_repo: str = "team/model") -> Any:
    return call(client, "POST", f"/models/uploads/{upload_id}/finish", {"user_repo": user_repo})


def refused(response: Any, status: int, code: str, words: str = "") -> dict[str, Any]:
    assert response.status_code == status, response.content
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == code
    assert words in error["message"]
    return error


def test_upload_in_pieces(browser: Client, owner: User, micro: Path, models_dir: Path) -> None:
    data = micro.read_bytes()
    upload = begin(browser, len(data))
    for offset in range(0, len(data), 300_000):
        state = put(browser, upload, offset, data[offset : offset + 300_000]).json()
    assert state["received"] == len(data)
    response = finish(browser, upload)
    assert response.status_code == 201
    assert response.json()["key"] == "team/model"
    model = InstalledModel.objects.get()
    assert model.file.read_bytes() == data
    assert model.imported_by == owner
    assert stored_files(models_dir) == ["team", "team/model", "team/model/Micro-Test-F32.gguf"]


def test_upload_goes_on_where_it_stands(browser: Client, micro: Path) -> None:
    data = micro.read_bytes()
    upload = begin(browser, len(data))
    put(browser, upload, 0, data[:100_000])
    error = refused(put(browser, upload, 0, data[:100_000]), 409, "conflict")  # the answer was lost, the piece is sent again
    assert error["details"] == {"received": 100_000}
    refused(put(browser, upload, 200_000, data[200_000:]), 409, "conflict")
    assert call(browser, "GET", f"/models/uploads/{upload}").json()["received"] == 100_000
    refused(finish(browser, upload), 409, "conflict", "not complete")
    assert put(browser, upload, 100_000, data[100_000:]).status_code == 200
    assert finish(browser, upload).status_code == 201


def test_name_that_is_taken_loses_nothing(browser: Client, micro: Path) -> None:
    data = micro.read_bytes()
    for _ in range(2):
        upload = begin(browser, len(data))
        put(browser, upload, 0, data)
        response = finish(browser, upload)
    refused(response, 409, "conflict", "already installed as team/model")
    refused(finish(browser, upload, "../../etc"), 400, "invalid_request")
    refused(finish(browser, upload, "team/.hidden"), 400, "invalid_request")
    assert finish(browser, upload, "team/other").json()["key"] == "team/other"


def test_without_a_name_it_is_guessed(browser: Client, micro: Path) -> None:
    data = micro.read_bytes()
    upload = begin(browser, len(data))
    put(browser, upload, 0, data)
    assert finish(browser, upload, "").json()["key"] == "local/micro-test"


@pytest.mark.parametrize("name", sorted(set(HOSTILE) - {"empty"}))
def test_hostile_upload_leaves_nothing(browser: Client, models_dir: Path, name: str) -> None:
    data = HOSTILE[name]
    upload = begin(browser, len(data), "evil.gguf")
    middle = len(data) // 2
    responses = [put(browser, upload, 0, data[:middle])]
    if responses[-1].status_code == 200:
        responses.append(put(browser, upload, middle, data[middle:]))
    refused(responses[-1], 400, "invalid_model_file")
    refused(finish(browser, upload), 404, "not_found")
    assert stored_files(models_dir) == []
    assert not InstalledModel.objects.exists()


def test_mutated_headers_through_the_browser(browser: Client, models_dir: Path, tmp_path: Path) -> None:
    """Each is stored or refused in words, in whatever piece it is noticed; nothing is left of those that were refused."""
    micro = make_micro(tmp_path / "m.gguf", layers=1, quantization="q4_0").read_bytes()
    statuses = set()
    for number, data in enumerate(mutants([VALID.encode(), micro], 100, seed=5)):
        upload, middle = begin(browser, len(data), f"mutant-{number}.gguf"), len(data) // 2
        response = put(browser, upload, 0, data[:middle])
        if response.status_code == 200:
            response = put(browser, upload, middle, data[middle:])
        if response.status_code == 200:
            response = finish(browser, upload, f"mutants/number-{number}")
        statuses.add(response.status_code)
        assert response.status_code == 201 or refused(response, 400, "invalid_model_file")
    assert statuses == {201, 400}
    files = [path for path in stored_files(models_dir) if (models_dir / path).is_file()]
    assert files == sorted(InstalledModel.objects.values_list("path", flat=True))


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("../../../etc/passwd.gguf", "passwd.gguf"),
        ("/etc/cron.d/evil.gguf", "evil.gguf"),
        ("C:\\Windows\\System32\\evil.gguf", "evil.gguf"),
        ("..\\..\\evil.gguf", "evil.gguf"),
        ("evil\x1b[2J\x00\n.gguf", "evil-2J.gguf"),
        ("x" * 300 + ".gguf", None),
        ("\u0435vil\u2215\u2024\u2024\u2215x\u202efugg.gguf", None),
        ("..gguf", "model.gguf"),
        (" .gguf", "model.gguf"),
    ],
)
def test_hostile_file_names_of_uploads(browser: Client, micro: Path, models_dir: Path, name: str, stored: str | None) -> None:
    """Whatever a file is called, it is stored under a plain name in the folder that was asked for, or refused in words."""
    data = micro.read_bytes()
    begun = call(browser, "POST", "/models/uploads", {"file_name": name, "size": len(data)})
    if begun.status_code != 201:
        refused(begun, 400, "invalid_request")
        assert stored_files(models_dir) == []
        return
    upload = begun.json()["id"]
    put(browser, upload, 0, data)
    assert finish(browser, upload).status_code == 201
    model = InstalledModel.objects.get()
    folder, _, file = model.path.rpartition("/")
    assert (folder, file.isascii(), len(file) < 170) == ("team/model", True, True)
    assert stored is None or file == stored
    assert stored_files(models_dir) == ["team", "team/model", model.path]


def test_foreign_file_is_refused_after_its_first_piece(browser: Client, models_dir: Path) -> None:
    upload = begin(browser, 50_000_000_000)
    refused(put(browser, upload, 0, b"PK\x03\x04" + bytes(1000)), 400, "invalid_model_file", "not a GGUF")
    assert stored_files(models_dir) == []


def test_weights_that_are_missing_are_noticed_with_the_header(browser: Client, micro: Path) -> None:
    data = micro.read_bytes()
    upload = begin(browser, len(data) - 1000)
    refused(put(browser, upload, 0, data[:500_000]), 400, "invalid_model_file", "truncated")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "POST"])
def test_strangers_find_nothing(browser: Client, teammate: User, admin: User, micro: Path, method: str) -> None:
    upload = begin(browser, micro.stat().st_size)
    for person in (teammate, admin):
        other = Client()
        other.force_login(person)
        url = f"/models/uploads/{upload}" + {"PUT": "?offset=0", "POST": "/finish"}.get(method, "")
        refused(call(other, method, url, b"GGUF" if method == "PUT" else {}), 404, "not_found")
    assert call(browser, "GET", f"/models/uploads/{upload}").status_code == 200


def test_viewers_may_not_upload(stranger: User, micro: Path) -> None:
    client = Client()
    client.force_login(stranger)
    refused(call(client, "POST", "/models/uploads", {"file_name": "a.gguf", "size": 10}), 403, "permission_denied")
    refused(call(client, "GET", f"/models/uploads/{uuid.uuid4().hex}"), 403, "permission_denied")


def test_permission_counts_for_every_piece(browser: Client, owner: User, micro: Path) -> None:
    data = micro.read_bytes()
    upload = begin(browser, len(data))
    put(browser, upload, 0, data[:1000])
    User.objects.filter(pk=owner.pk).update(role="viewer")
    refused(put(browser, upload, 1000, data[1000:]), 403, "permission_denied")
    refused(finish(browser, upload), 403, "permission_denied")


def test_signed_out_browsers_are_sent_away(db: None) -> None:
    assert Client().post("/models/uploads").status_code == 302


def test_forged_requests_are_refused(owner: User) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(owner)
    assert client.post("/models/uploads", b"{}", content_type="application/json").status_code == 403


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"\xff", b'{"file_name": 3, "size": 1}', b'{"file_name": "a.gguf"}', b'{"file_name": "a.gguf", "size": "many"}',
     b'{"file_name": "a.gguf", "size": 1.5}', b'{"file_name": "a.gguf", "size": 1, "path": "/etc"}', b'{"file_name": "a.gguf", "size": -1}',
     b'{"file_name": "a.bin", "size": 5}', b'{"file_name": "", "size": 5}', b'{"file_name": "a.gguf", "size": 0}'],
)  # fmt: skip
def test_bad_beginnings(browser: Client, models_dir: Path, body: bytes) -> None:
    refused(browser.generic("POST", "/models/uploads", body, content_type="application/json"), 400, "invalid_request")
    assert stored_files(models_dir) == []


@pytest.mark.parametrize("offset", ["", "-1", "x", "1e3", "９", "9" * 30])
def test_bad_offsets(browser: Client, offset: str) -> None:
    refused(put(browser, begin(browser, 100), offset, b"GGUF"), 400, "invalid_request")


@pytest.mark.parametrize("upload_id", ["x", "..", "0" * 31, "%2e%2e", "a" * 500, "{00000000-0000-0000-0000-000000000000}"])
def test_ids_that_are_none(browser: Client, upload_id: str) -> None:
    response = call(browser, "GET", f"/models/uploads/{upload_id}")
    assert response.status_code == 404


def test_pieces_have_their_limits(browser: Client) -> None:
    upload = begin(browser, 100)
    refused(put(browser, upload, 0, b"GGUF" + bytes(97)), 400, "invalid_request", "larger than what is missing")
    refused(put(browser, upload, 0, b""), 400, "invalid_request")
    large = begin(browser, 100_000_000)
    refused(put(browser, large, 0, bytes(uploads.MAX_CHUNK_BYTES + 1)), 413, "payload_too_large")


def test_limits_at_the_beginning(browser: Client, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.MAX_UPLOAD_BYTES = 1000
    refused(call(browser, "POST", "/models/uploads", {"file_name": "a.gguf", "size": 1001}), 413, "payload_too_large")
    for _ in range(uploads.MAX_UPLOADS_PER_PERSON):
        begin(browser, 1000)
    refused(call(browser, "POST", "/models/uploads", {"file_name": "a.gguf", "size": 10}), 409, "conflict", "unfinished uploads")


def test_disk_space_counts_what_is_on_its_way(browser: Client, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.MAX_UPLOAD_BYTES = 10**18
    free = placement.shutil.disk_usage("/").free
    refused(call(browser, "POST", "/models/uploads", {"file_name": "a.gguf", "size": free * 2}), 409, "conflict", "not enough space")
    begin(browser, free // 3)
    refused(call(browser, "POST", "/models/uploads", {"file_name": "a.gguf", "size": int(free * 0.8)}), 409, "conflict", "not enough space")


def test_cancel(browser: Client, models_dir: Path) -> None:
    upload = begin(browser, 100_000)
    put(browser, upload, 0, b"GGUF")
    assert call(browser, "DELETE", f"/models/uploads/{upload}").status_code == 204
    assert stored_files(models_dir) == []
    refused(put(browser, upload, 4, b"x"), 404, "not_found")


def test_stale_uploads_are_discarded(browser: Client, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = begin(browser, 1000)
    (models_dir / ".incoming").mkdir(exist_ok=True)
    (models_dir / ".incoming" / "left-behind").write_bytes(b"x")
    now = time.time()
    monkeypatch.setattr(placement.time, "time", lambda: now + uploads.STALE_SECONDS + 60)
    uploads.remove_stale()
    assert call(browser, "GET", f"/models/uploads/{old}").status_code == 404
    assert stored_files(models_dir) == []


def test_two_pieces_at_once(browser: Client, micro: Path, models_dir: Path) -> None:
    data = micro.read_bytes()
    upload = begin(browser, len(data))
    import fcntl

    with (models_dir / ".uploads" / f"{upload}.part").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(put(browser, upload, 0, data[:100]), 409, "conflict", "at this moment")
    assert put(browser, upload, 0, data).status_code == 200


def test_data_that_became_a_link_is_not_followed(browser: Client, models_dir: Path, tmp_path: Path) -> None:
    upload = begin(browser, 1000)
    part = models_dir / ".uploads" / f"{upload}.part"
    part.unlink()
    secret = tmp_path / "secret"
    secret.write_bytes(b"")
    part.symlink_to(secret)
    response = put(browser, upload, 0, b"GGUF" * 10)
    assert response.status_code == 404
    assert secret.read_bytes() == b""
