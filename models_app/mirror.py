"""Model files on machines that do not share the models directory: a node fetches from the server what it is to load.

The server answers nodes only, by the key that each was given when it joined, and a few megabytes at a time: its own web server does
not wait for slow readers, so a larger answer would pile up in memory. What arrives is checked like a download from the Hub: size and
SHA-256 first, then its final name. What was fetched here, and nothing else, is deleted when its model is gone.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx2
from django.conf import settings
from django.contrib.auth.decorators import login_not_required
from django.http import HttpRequest, HttpResponse
from django.views.decorators.http import require_GET

from lmweb import egress
from lmweb.errors import Conflict, CorruptDownload, InvalidRequest, NotAuthenticated, NotFound, OutboundFailed, OutboundRefused
from models_app import fetching, placement, verify
from models_app.hub import RemoteFile
from models_app.models import InstalledModel, ModelFile
from workers.models import NodeToken, WorkerNode

ANSWER_BYTES: Final = 8 * 1024 * 1024
REPORT_SECONDS: Final = 1.0
MAX_WAIT_SECONDS: Final = 30.0
_READ_BYTES: Final = 1024 * 1024

#: Called with the part that is here, from 0 to 1, and what is going on; may raise to end it.
Report = Callable[[float, str], None]


# --- the server ---------------------------------------------------------------------------------------------------------


@login_not_required
@require_GET
def node_file(request: HttpRequest, file_id: int) -> HttpResponse:
    """Answer a node with the bytes of a model's file from where it asks, at most ``ANSWER_BYTES``.

    Raises ``NotAuthenticated``, ``NotFound`` and ``InvalidRequest``.
    """
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme != "Bearer" or not key or not WorkerNode.objects.filter(key_digest=NodeToken.hash(key)).exists():
        raise NotAuthenticated("Only workers that have joined may fetch model files.")
    file = ModelFile.objects.filter(pk=file_id).first() if file_id < 2**63 else None
    if file is None or not file.file.is_file():
        raise NotFound("There is no such file.")
    first = _first_byte(request)
    with file.file.open("rb") as stream:
        stream.seek(first)
        content = stream.read(ANSWER_BYTES)
    if not content:
        raise InvalidRequest(f"{file.path} ends before byte {first}.")
    response = HttpResponse(content, status=206, content_type="application/octet-stream")
    response.headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{file.file.stat().st_size}"
    return response


def _first_byte(request: HttpRequest) -> int:
    found = re.fullmatch(r"bytes=([0-9]{1,18})-([0-9]{0,18})", request.headers.get("Range", "bytes=0-"), re.ASCII)
    if found is None:
        raise InvalidRequest("Ask for one range of bytes from its first one on.")
    return int(found[1])


# --- the node -----------------------------------------------------------------------------------------------------------


def missing(model_id: int) -> list[ModelFile]:
    """Return the files of a model that are not here, or not whole; the one that says that the model is there comes last."""
    files = ModelFile.objects.filter(model=model_id).select_related("model")
    absent = [file for file in files if not file.file.is_file() or file.file.stat().st_size != file.size_bytes]
    return sorted(absent, key=lambda file: file.path == file.model.path)


def fetch_model(model_id: int, *, key: str, report: Report) -> None:
    """Bring all files of a model here from the server; what an earlier try brought is used.

    Raises ``Conflict`` without space, ``OutboundFailed``, ``OutboundRefused``, ``CorruptDownload``, ``fetching.BusyError`` while
    another process of this machine does it, ``OSError``, and what ``report`` raises.
    """
    _delete_forgotten()
    files = missing(model_id)
    if any(not file.sha256 for file in files):
        verify.note_checksums(InstalledModel.objects.get(pk=model_id))
    here = sum(_part(file).stat().st_size for file in files if _part(file).exists())
    total = sum(file.size_bytes for file in files)
    placement.require_free_space(max(0, total - here))
    done = 0
    for file in files:
        before = done

        def told(at: int, what: str, before: int = before) -> None:
            report((before + at) / max(1, total), what)

        with fetching.locked(_part(file)) as descriptor:
            _fetch(file, descriptor, key, told)
            told(file.size_bytes, f"{Path(file.path).name} is checked.")
            _check(file, told)
            _publish(file)
        done += file.size_bytes


def _fetch(file: ModelFile, descriptor: int, key: str, told: Callable[[int, str], None]) -> None:
    told_at = 0.0

    def arrived(at: int, _count: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= REPORT_SECONDS:
            told_at = time.monotonic()
            placement.require_free_space(0)
            told(at, "Its files are fetched from the server.")

    def wait(error: Exception, tries: int, at: int) -> None:
        deadline = time.monotonic() + min(MAX_WAIT_SECONDS, 0.5 * 2.0**tries)
        while (left := deadline - time.monotonic()) > 0:
            told(at, f"{fetching.words(error)} Next try in {max(1, round(left))} s.")
            time.sleep(min(REPORT_SECONDS, left))

    announced = RemoteFile(path=file.path, size=file.size_bytes, sha256=file.sha256)
    fetching.fetch(announced, descriptor, partial(_open, file.pk, key), arrived=arrived, wait=wait)


@contextmanager
def _open(file_id: int, key: str, *, first: int, last: int) -> Iterator[httpx2.Response]:
    url = f"{settings.SERVER_URL}/node-files/{file_id}"
    headers = {
        "Authorization": f"Bearer {key}",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "Range": f"bytes={first}-{last}",
    }
    with egress.client({urlsplit(url).hostname or ""}) as client, client.stream("GET", url, headers=headers) as response:
        if response.status_code != 206:
            raise _refusal(response.status_code)
        yield response


def _refusal(status: int) -> OutboundFailed | OutboundRefused:
    where = f"The server at LMWEB_SERVER_URL ({settings.SERVER_URL})"
    if status in {401, 403}:
        return OutboundRefused(f"{where} does not know this worker.")
    if status == 404:
        return OutboundRefused(f"{where} has no such file (any more), or is another server.")
    return OutboundFailed(f"{where} answers with status {status}.")


def _check(file: ModelFile, told: Callable[[int, str], None]) -> None:
    """Raise ``CorruptDownload`` unless what arrived has the checksum that the server noted; waits until it has."""
    part = _part(file)
    with part.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    while not (noted := ModelFile.objects.values_list("sha256", flat=True).get(pk=file.pk)):
        told(file.size_bytes, "Waiting for the checksum, which the server computes.")
        time.sleep(REPORT_SECONDS)
    if noted != digest:
        part.unlink()
        raise CorruptDownload(f"What arrived of {file.path} is not what the server has, so it was thrown away. Try again.")


def _publish(file: ModelFile) -> None:
    target = placement.models_dir() / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.parent.resolve() != target.parent:
        raise Conflict(f"{target.parent} is a symbolic link; models are stored in real folders only.")
    _marker(file.path).write_text(file.path)
    _part(file).replace(target)


def _delete_forgotten() -> None:
    """Delete files that were fetched here for models that are gone."""
    for marker in placement.hidden_folder("mirrored").iterdir():
        path = marker.read_text()
        if not ModelFile.objects.filter(path=path).exists():
            placement.remove_file(placement.models_dir() / path)
            marker.unlink()


def _part(file: ModelFile) -> Path:
    return placement.hidden_folder("mirror") / f"{file.pk}-{file.size_bytes}.part"


def _marker(path: str) -> Path:
    return placement.hidden_folder("mirrored") / hashlib.sha256(path.encode()).hexdigest()
