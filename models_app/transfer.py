"""The work of one download, in a thread of the io worker: bytes by range, resumed from what is on disk; then hashes; then registration.

The row belongs to whoever wrote its ``incarnation``. Each report is an update with that condition, renews the lease, and finds out
in the same breath whether the row was taken away: paused or cancelled by somebody, or given to another worker because this one was
silent for too long. Losing the row ends the work and keeps what is on disk.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Final

from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection, transaction
from django.db.models import Count
from django.utils import timezone

from lmweb.errors import Conflict, CorruptDownload, HubBusy, LmwebError
from models_app import downloads, fetching, gguf, hub, placement, services
from models_app.fetching import BusyError
from models_app.hub import RemoteFile
from models_app.models import Download, ModelFile
from models_app.services import NewFile
from models_app.variants import PROJECTOR

logger = logging.getLogger(__name__)

LEASE_SECONDS: Final = 60
REPORT_SECONDS: Final = 1.0
MAX_WAIT_SECONDS: Final = 60.0
#: After this much of a file its header is there, and a file that is no model is given up.
CHECK_BYTES: Final = 16 * 2**20
_SPEED_SECONDS: Final = 8.0
_CLAIM_LOCK: Final = 0x6C6D7765  # of PostgreSQL's advisory locks

Status = Download.Status


class _LostError(Exception):
    """The row is not this worker's any more."""


@dataclass
class Worker:
    """One io worker process: its name, its incarnation, and whether it is told to stop."""

    node: str
    incarnation: uuid.UUID
    stopping: threading.Event


# --- who works on what ------------------------------------------------------------------------------------------------


def claim(download_id: str, worker: Worker) -> Download | None:
    """Take a waiting download in hand; None if somebody else did, or if as many run as may."""
    with transaction.atomic():
        with connection.cursor() as cursor:  # one claim at a time: each counts what runs
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_CLAIM_LOCK])
        download = Download.objects.filter(pk=download_id, status=Status.QUEUED).first()
        if download is None:
            return None
        running = Download.objects.running()
        if running.count() >= max(1, settings.DOWNLOADS_AT_ONCE):
            return None
        if running.filter(requested_by=download.requested_by_id).count() >= max(1, settings.DOWNLOADS_PER_PERSON):
            return None
        download.status = Status.DOWNLOADING
        download.node, download.incarnation = worker.node, worker.incarnation
        download.lease_until = timezone.now() + timedelta(seconds=LEASE_SECONDS)
        download.started_at = download.started_at or timezone.now()
        download.note = download.error_code = download.error_message = ""
        download.save()
    return download


def release_lost(*, node: str = "", incarnation: uuid.UUID | None = None) -> int:
    """Make downloads whose worker is gone wait again: expired leases, and those of an earlier incarnation on ``node``."""
    lost = Download.objects.running().filter(lease_until__lt=timezone.now())
    count = lost.update(status=Status.QUEUED, incarnation=None, lease_until=None, bytes_per_second=0.0)
    if node:
        earlier = Download.objects.running().filter(node=node).exclude(incarnation=incarnation)
        count += earlier.update(status=Status.QUEUED, incarnation=None, lease_until=None, bytes_per_second=0.0)
    return count


def running_per_person() -> dict[int | None, int]:
    """Return how many downloads of each person run."""
    counts = Download.objects.running().order_by().values("requested_by").annotate(count=Count("pk"))
    return {entry["requested_by"]: entry["count"] for entry in counts}


def run(download_id: str, worker: Worker) -> None:
    """Claim a download and do its work to the end, or until it is taken away."""
    download = claim(download_id, worker)
    if download is not None:
        Transfer(download, worker).run()


# --- the work ---------------------------------------------------------------------------------------------------------


class Transfer:
    """The work on one claimed row."""

    def __init__(self, download: Download, worker: Worker) -> None:
        self._row = download
        self._worker = worker
        self._files = downloads.files_of(download)
        self._folder = downloads.parts_folder(download.pk)
        self._progress = _Progress(download.fetched_bytes)
        self._reported_at = 0.0
        self._checked = False

    def run(self) -> None:
        """Do it all. Whatever happens ends in the row, in words."""
        try:
            self._fetch_all()
            self._verify_all()
            self._register()
        except _LostError:
            logger.info("download %s is not ours any more", self._row.pk)
        except BusyError:  # a thread that was paused waits for its last bytes; the periodic look tries again
            self._let_go()
        except LmwebError as error:
            self._fail(error)
        except OSError as error:
            self._fail(_disk_error(error))
        except (DatabaseError, InterfaceError) as error:  # the lease ends, and somebody goes on from the bytes on disk
            logger.warning("download %s lost its database: %s", self._row.pk, error)

    def _fetch_all(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        here = sum(self._size(number) for number in range(len(self._files)))
        placement.require_free_space(max(0, self._row.total_bytes - here))
        done = 0
        for number, file in enumerate(self._files):
            with fetching.locked(self._part(number)) as descriptor:
                self._fetch(file, descriptor, done, is_first=number == 0)
            done += file.size
        self._report(done, force=True)

    def _fetch(self, file: RemoteFile, descriptor: int, before: int, *, is_first: bool) -> None:
        """Bring one file to its announced size; ``before`` are the bytes of earlier files."""

        def arrived(at: int, count: int) -> None:
            self._progress.add(count)
            _throttle.take(count, settings.DOWNLOAD_BYTES_PER_SECOND)
            self._report(before + at)
            if is_first and at >= CHECK_BYTES:
                self._check_beginning(file)

        def wait(error: Exception, tries: int, at: int) -> None:
            self._wait(error, tries, before + at)

        self._report(before + os.fstat(descriptor).st_size, force=True)
        source = partial(hub.open_file, self._row.repo, self._row.revision, file.path)
        fetching.fetch(file, descriptor, source, arrived=arrived, wait=wait)
        self._report(before + file.size, force=True)

    def _check_beginning(self, file: RemoteFile) -> None:
        """Give a file up early that is no model. Parts of a split model are told by all of them only, after the end."""
        weights = [other for other in self._files if other.name.lower().endswith(".gguf") and not PROJECTOR.search(other.name)]
        if not self._checked and self._row.format == "gguf" and len(weights) == 1:
            self._checked = gguf.check_beginning(self._part(0), file.size)

    def _verify_all(self) -> None:
        if not Download.objects.filter(**self._mine()).update(status=Status.VERIFYING, done_bytes=0, bytes_per_second=0.0, note=""):
            raise _LostError
        self._progress = _Progress(self._progress.total)
        done = 0
        for number, file in enumerate(self._files):
            part = self._part(number)
            if not self._is_right(part, file, done):
                part.unlink(missing_ok=True)
                raise CorruptDownload(
                    f"What arrived of {file.path} is not what the Hub announced (its checksum is another one), so it was thrown away. "
                    "Try again; if it fails the same way, the file on the Hub or a proxy on the way to it is broken."
                )
            done += file.size

    def _is_right(self, part: Path, file: RemoteFile, before: int) -> bool:
        """Return whether a file has the announced hash: SHA-256 of its content, or git's SHA-1 for small files."""
        digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\x00" % file.size, usedforsecurity=False)
        at = 0
        with part.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
                at += len(chunk)
                self._progress.note(len(chunk))
                self._report(before + at)
        return at == file.size and digest.hexdigest() == (file.sha256 or file.git_sha1)

    def _register(self) -> None:
        """Take the files over, and end. Nobody can cancel between the two: the row is locked."""
        files = [NewFile(self._part(number), file.name, _role(file), file.sha256) for number, file in enumerate(self._files)]
        with transaction.atomic():
            row = Download.objects.select_for_update().filter(**self._mine()).first()
            if row is None:
                raise _LostError
            row.model = services.register_download(user=row.requested_by, repo=row.repo, label=row.label, files=files)
            row.status, row.finished_at = Status.COMPLETED, timezone.now()
            row.done_bytes, row.fetched_bytes, row.bytes_per_second = row.total_bytes, self._progress.total, 0.0
            row.incarnation = row.lease_until = None
            row.save()
        downloads.forget_parts(row.pk)
        downloads.send_waiting()

    # --- the row ------------------------------------------------------------------------------------------------------

    def _mine(self) -> dict[str, object]:
        return {"pk": self._row.pk, "incarnation": self._worker.incarnation, "status__in": Download.RUNNING}

    def _report(self, done: int, *, force: bool = False, note: str = "") -> None:
        """Write how far it is, about once a second. Raises ``_LostError`` when the row is somebody else's, or this worker stops."""
        if self._worker.stopping.is_set():
            self._let_go()
            raise _LostError
        now = time.monotonic()
        if not force and now - self._reported_at < REPORT_SECONDS:
            return
        self._reported_at = now
        placement.require_free_space(0)
        try:
            mine = Download.objects.filter(**self._mine()).update(
                done_bytes=done,
                bytes_per_second=self._progress.speed(),
                fetched_bytes=self._progress.total,
                lease_until=timezone.now() + timedelta(seconds=LEASE_SECONDS),
                note=note,
            )
        except (DatabaseError, InterfaceError) as error:
            # Bytes go on while PostgreSQL is away; the lease decides whether somebody else does too, and the file's lock that not both do.
            logger.warning("download %s could not report: %s", self._row.pk, error)
            connection.close()
            return
        if not mine:
            raise _LostError

    def _let_go(self) -> None:
        Download.objects.filter(**self._mine()).update(status=Status.QUEUED, incarnation=None, lease_until=None, bytes_per_second=0.0)

    def _wait(self, error: Exception, tries: int, done: int) -> None:
        """Wait before the next try, as long as the Hub asked or a little longer each time, and say so in the row."""
        seconds = float(error.details["retry_after_seconds"]) if isinstance(error, HubBusy) else min(MAX_WAIT_SECONDS, 0.5 * 2.0**tries)
        logger.info("download %s: %s; next try in %.1f s", self._row.pk, fetching.words(error), seconds)
        deadline = time.monotonic() + seconds
        self._progress.rest()
        while (left := deadline - time.monotonic()) > 0:
            self._report(done, force=True, note=f"{fetching.words(error)} Next try in {max(1, round(left))} s."[:300])
            self._worker.stopping.wait(min(REPORT_SECONDS, left))

    def _fail(self, error: LmwebError) -> None:
        logger.warning("download %s failed: %s", self._row.pk, error.message)
        Download.objects.filter(**self._mine()).update(
            status=Status.FAILED,
            error_code=error.code,
            error_message=error.message,
            bytes_per_second=0.0,
            note="",
            fetched_bytes=self._progress.total,
            incarnation=None,
            lease_until=None,
            finished_at=timezone.now(),
        )
        downloads.send_waiting()

    def _part(self, number: int) -> Path:
        return self._folder / f"{number:04}.part"

    def _size(self, number: int) -> int:
        try:
            return self._part(number).stat().st_size
        except FileNotFoundError:
            return 0


# --- pieces -----------------------------------------------------------------------------------------------------------


class _Progress:
    """Counts bytes, and knows their speed over the last seconds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._recent: list[tuple[float, int]] = []

    def add(self, count: int) -> None:
        """Count bytes that came over the network."""
        self.total += count
        self.note(count)

    def note(self, count: int) -> None:
        """Count bytes for the speed only."""
        now = time.monotonic()
        if self._recent and now - self._recent[-1][0] < 0.1:
            at, before = self._recent[-1]
            self._recent[-1] = at, before + count
        else:
            self._recent.append((now, count))

    def rest(self) -> None:
        """Forget the speed: nothing moves."""
        self._recent.clear()

    def speed(self) -> float:
        """Return bytes per second."""
        now = time.monotonic()
        self._recent = [(at, count) for at, count in self._recent if now - at <= _SPEED_SECONDS]
        if not self._recent:
            return 0.0
        return sum(count for _, count in self._recent) / max(0.5, now - self._recent[0][0])


class _Throttle:
    """Holds all threads of this process together under a number of bytes per second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, count: int, bytes_per_second: int) -> None:
        """Wait until so many bytes may have come; 0 is no limit."""
        if bytes_per_second <= 0:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + count / bytes_per_second
            wait = self._free_at - now
        if wait > 0.02:
            time.sleep(wait)


_throttle = _Throttle()


def _role(file: RemoteFile) -> ModelFile.Role:
    return ModelFile.Role.PROJECTOR if PROJECTOR.search(file.name) else ModelFile.Role.WEIGHTS


def _disk_error(error: OSError) -> Conflict:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(placement.models_dir()).free
        return Conflict(f"The disk is full ({free / 1e9:.2f} GB are free). Make room and try again: what arrived is kept.")
    return Conflict(f"The file cannot be written: {error.strerror}. What arrived is kept.")
