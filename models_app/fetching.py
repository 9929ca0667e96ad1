"""Brings one file over HTTP to its announced size, by ranges, from the bytes that are on disk: what downloads and mirrors share."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Protocol

import httpx2

from lmweb.errors import CorruptDownload, LmwebError, OutboundFailed
from models_app.hub import RemoteFile

#: One request asks for at most this much: servers in front of the Hub refuse larger answers.
RANGE_BYTES: Final = 16 * 2**30
MAX_FRUITLESS_TRIES: Final = 12


class BusyError(Exception):
    """Whoever had the download before has not let go of its files yet."""


class Source(Protocol):
    """Asks for the bytes of a file from ``first`` to ``last``, both included. See ``models_app.hub.open_file``."""

    def __call__(self, *, first: int, last: int) -> AbstractContextManager[httpx2.Response]:
        """Return an answer whose body is not read yet."""


def fetch(
    file: RemoteFile,
    descriptor: int,
    source: Source,
    *,
    arrived: Callable[[int, int], None],
    wait: Callable[[Exception, int, int], None],
) -> None:
    """Bring an open, locked file to its announced size.

    Args:
        file: what was announced.
        descriptor: where it goes; what is there already is its beginning.
        source: where it comes from.
        arrived: called with the bytes that are there and those that came just now; may raise to end it.
        wait: called before a further try with the error, the number of fruitless tries and the bytes that are there.

    Raises ``OutboundFailed`` after too many tries without a byte, ``CorruptDownload`` if something else is sent than was announced,
    and what ``source``, ``arrived`` and ``wait`` raise.
    """
    tries = 0
    while (at := os.fstat(descriptor).st_size) != file.size:
        if at > file.size:
            os.ftruncate(descriptor, 0)
            continue
        try:
            _fetch_range(file, descriptor, at, source, arrived)
        except (httpx2.TransportError, OutboundFailed) as error:
            if isinstance(error, OutboundFailed) and not error.retryable:
                raise
            now = os.fstat(descriptor).st_size
            tries = 0 if now > at else tries + 1
            if tries >= MAX_FRUITLESS_TRIES:
                raise OutboundFailed(f"{words(error)} After {tries} tries the download was given up; what arrived is kept.") from None
            wait(error, tries, now)


def _fetch_range(file: RemoteFile, descriptor: int, at: int, source: Source, arrived: Callable[[int, int], None]) -> None:
    last = min(file.size, at + RANGE_BYTES) - 1
    with source(first=at, last=last) as response:
        at = _begin(response, file, descriptor, at)
        for chunk in response.iter_raw():  # as they come: a chunk that is cut off would be lost
            if at + len(chunk) > file.size:
                raise CorruptDownload(f"More of {file.path} is sent than the {file.size} bytes that were announced.")
            _write(descriptor, chunk, at)
            at += len(chunk)
            arrived(at, len(chunk))


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Open a part for writing, alone. Raises ``BusyError`` while another thread or process still has it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError:
        raise BusyError from None
    finally:
        os.close(descriptor)


def _begin(response: httpx2.Response, file: RemoteFile, descriptor: int, at: int) -> int:
    """Check that an answer is about the right bytes of the right file, and return where they begin."""
    for redirect in response.history:
        announced = redirect.headers.get("X-Linked-Etag", "").strip('W/"')
        if file.sha256 and len(announced) == 64 and announced != file.sha256:
            raise CorruptDownload(f"The Hub has another {file.path} now than the one that was asked for. Start the download anew.")
    total = _total_size(response)
    if total is not None and total != file.size:
        raise CorruptDownload(
            f"The Hub announced {file.path} with {file.size} bytes and sends a file of {total}. Look at the model again in Discover."
        )
    if response.status_code == 206:
        start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        if start != str(at):
            raise CorruptDownload(f"The Hub sends other bytes of {file.path} than were asked for.")
        return at
    if at:  # a server without ranges: all of it comes again
        os.ftruncate(descriptor, 0)
    return 0


def _total_size(response: httpx2.Response) -> int | None:
    if response.status_code == 206:
        text = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _write(descriptor: int, chunk: bytes, at: int) -> None:
    rest = memoryview(chunk)
    while rest:
        written = os.pwrite(descriptor, rest, at)
        rest, at = rest[written:], at + written


def words(error: Exception) -> str:
    """Return what went wrong, for people."""
    return error.message if isinstance(error, LmwebError) else "The connection was cut off."
