"""Model files that arrive in pieces from a browser.

An upload is two files under ``.uploads`` in the models directory, named by an id that the server made: a small JSON file that
says whose it is, and the bytes so far. Losing the connection costs nothing: the browser asks how far it got and goes on. The
header is checked as soon as it is there, so that a file that is no model is refused after its first piece.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
from django.conf import settings

from lmweb.access import Action, Principal, require
from lmweb.decoding import decode_json
from lmweb.errors import Conflict, InvalidModelFile, InvalidRequest, NotFound, PayloadTooLarge
from models_app import gguf, naming, placement, services
from models_app.models import InstalledModel
from models_app.placement import Mode

CHUNK_BYTES: Final = 8 * 1024 * 1024
MAX_CHUNK_BYTES: Final = 32 * 1024 * 1024
MAX_UPLOADS_PER_PERSON: Final = 4
STALE_SECONDS: Final = 24 * 3600.0


class Upload(msgspec.Struct, kw_only=True):
    """One file on its way in. ``size`` and ``received`` are in bytes; ``checked`` is set once the header was found good."""

    id: str
    user_id: int
    file_name: str
    size: int
    received: int = 0
    checked: bool = False


def create(*, principal: Principal, file_name: str, size: int) -> Upload:
    """Begin an upload of ``size`` bytes.

    Raises ``PermissionDenied``, ``InvalidRequest`` for another kind of file, ``PayloadTooLarge`` above the installation's limit and
    ``Conflict`` without disk space or with too many unfinished uploads of the same person.
    """
    require(principal, Action.IMPORT_MODELS)
    remove_stale()
    name = naming.file_name(file_name)
    if size < 1:
        raise InvalidRequest("The file is empty.", param="size")
    if size > settings.MAX_UPLOAD_BYTES:
        limit = settings.MAX_UPLOAD_BYTES
        raise PayloadTooLarge(f"The file has {size / 1e9:.2f} GB; at most {limit / 1e9:.2f} GB may be uploaded.", param="size")
    unfinished = list(_all())
    if sum(upload.user_id == principal.user.pk for upload in unfinished) >= MAX_UPLOADS_PER_PERSON:
        raise Conflict(f"You have {MAX_UPLOADS_PER_PERSON} unfinished uploads. Finish or cancel one first.")
    placement.require_free_space(size + sum(upload.size - upload.received for upload in unfinished))
    upload = Upload(id=uuid.uuid4().hex, user_id=principal.user.pk, file_name=name, size=size)
    _data(upload.id).touch(mode=0o644, exist_ok=False)
    _write(upload)
    return upload


def get(*, principal: Principal, upload_id: str) -> Upload:
    """Return one of this person's uploads. Raises ``NotFound``, also for somebody else's."""
    require(principal, Action.IMPORT_MODELS)
    upload = _read(upload_id)
    if upload is None or upload.user_id != principal.user.pk:
        raise NotFound("There is no such upload. It was cancelled, or it lay unfinished for a day.")
    return upload


def mine(*, principal: Principal) -> list[Upload]:
    """Return this person's unfinished uploads."""
    require(principal, Action.IMPORT_MODELS)
    return sorted((upload for upload in _all() if upload.user_id == principal.user.pk), key=lambda upload: upload.file_name)


def append(*, principal: Principal, upload_id: str, offset: int, chunk: bytes) -> Upload:
    """Add the piece that begins at ``offset``.

    Raises ``NotFound``; ``Conflict`` (with ``received`` in its details) for an offset that is not where the upload stands;
    ``InvalidRequest`` for more bytes than announced; ``InvalidModelFile`` as soon as the file turns out to be no model, which
    ends the upload.
    """
    upload = get(principal=principal, upload_id=upload_id)
    with _locked(upload) as data:
        upload.received = os.fstat(data).st_size
        if offset != upload.received:
            raise Conflict(f"The upload stands at {upload.received} bytes, not at {offset}.", details={"received": upload.received})
        if not chunk or len(chunk) > min(MAX_CHUNK_BYTES, upload.size - offset):
            raise InvalidRequest("This piece is empty or larger than what is missing.", details={"received": upload.received})
        _append(data, chunk, offset)
        upload.received += len(chunk)
        if not upload.checked:
            try:
                upload.checked = gguf.check_beginning(_data(upload.id), upload.size)
            except InvalidModelFile:
                _remove(upload.id)
                raise
        _write(upload)
    return upload


def finish(*, principal: Principal, upload_id: str, user_repo: str | None) -> InstalledModel:
    """Import a complete upload. When the name is taken or not allowed, the upload stays and can be finished under another one.

    Raises what ``services.import_file`` raises, and ``Conflict`` while bytes are missing.
    """
    upload = get(principal=principal, upload_id=upload_id)
    with _locked(upload) as data:
        received = os.fstat(data).st_size
        if received != upload.size:
            raise Conflict(f"The upload is not complete: {upload.size - received} bytes are missing.", details={"received": received})
        try:
            model = services.import_file(
                principal=principal, source=_data(upload.id), user_repo=user_repo, mode=Mode.MOVE, original_name=upload.file_name
            )
        except InvalidModelFile:
            _remove(upload.id)
            raise
        _remove(upload.id)
    return model


def cancel(*, principal: Principal, upload_id: str) -> None:
    """End an upload and delete what arrived. Raises ``NotFound``."""
    _remove(get(principal=principal, upload_id=upload_id).id)


def remove_stale() -> None:
    """Delete uploads to which nothing was added for a day, and what imports left behind when they were killed."""
    for folder in ("uploads", "incoming"):
        placement.remove_stale(placement.hidden_folder(folder), STALE_SECONDS)


# --- files ------------------------------------------------------------------------------------------------------------


def _folder() -> Path:
    return placement.hidden_folder("uploads")


def _data(upload_id: str) -> Path:
    return _folder() / f"{upload_id}.part"


def _facts(upload_id: str) -> Path:
    return _folder() / f"{upload_id}.json"


def _read(upload_id: str) -> Upload | None:
    """Return an upload whatever its owner; None for an id that is not one, before it can become part of a path."""
    try:
        canonical = uuid.UUID(hex=upload_id).hex
    except ValueError:
        return None
    try:
        upload = decode_json(_facts(canonical).read_bytes(), Upload)
        upload.received = _data(canonical).stat().st_size
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return upload


def _all() -> Iterator[Upload]:
    for file in _folder().glob("*.json"):
        if (upload := _read(file.stem)) is not None:
            yield upload


def _write(upload: Upload) -> None:
    """Replace the facts at once, so that a reader never sees half of them."""
    fresh = _facts(upload.id).with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(upload))
    fresh.replace(_facts(upload.id))


def _remove(upload_id: str) -> None:
    _facts(upload_id).unlink(missing_ok=True)
    _data(upload_id).unlink(missing_ok=True)


@contextmanager
def _locked(upload: Upload) -> Iterator[int]:
    """Open the bytes for writing, alone: two pieces at the same time would mix. Yields the descriptor."""
    try:
        descriptor = os.open(_data(upload.id), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        raise NotFound("There is no such upload any more.") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError:
        raise Conflict("Another piece of this upload is being written at this moment.", details={"received": upload.received}) from None
    finally:
        os.close(descriptor)


def _append(data: int, chunk: bytes, offset: int) -> None:
    """Write a piece whole or not at all."""
    rest, at = memoryview(chunk), offset
    try:
        while rest:
            written = os.pwrite(data, rest, at)
            rest, at = rest[written:], at + written
    except OSError as error:
        os.ftruncate(data, offset)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Conflict("The server's disk is full. The upload can go on when there is space again.", details={"received": offset}) from None
