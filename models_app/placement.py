"""Puts model files into the models directory and takes them out again.

A file appears under its final name complete or not at all: it is brought in under a temporary name on the same file system,
checked, and renamed. A file that is moved gets its second name first and loses its old one last, so that it is never lost.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, Self

from django.conf import settings

from lmweb.errors import Conflict, InvalidModelFile, InvalidRequest

logger = logging.getLogger(__name__)

#: Left free on the disk for the database and logs.
RESERVED_BYTES: Final = 256 * 1024 * 1024
_COPY_BYTES: Final = 8 * 1024 * 1024

Progress = Callable[[int, int], None]


class Mode(StrEnum):
    """How a file comes into the models directory."""

    MOVE = "move"
    COPY = "copy"
    HARD_LINK = "hard-link"
    SYMBOLIC_LINK = "symbolic-link"


def models_dir() -> Path:
    """Return the models directory, made if it is not there yet, without symbolic links."""
    directory = Path(settings.MODELS_DIR)
    directory.mkdir(parents=True, exist_ok=True)
    return directory.resolve()


def hidden_folder(name: str) -> Path:
    """Return a folder for unfinished work inside the models directory, on the same file system."""
    folder = models_dir() / f".{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def remove_stale(folder: Path, older_than_seconds: float) -> None:
    """Delete the files of such a folder that nobody wrote to for so long: leftovers of processes that were killed."""
    limit = time.time() - older_than_seconds
    for file in folder.iterdir():
        if file.lstat().st_ctime < limit:
            file.unlink(missing_ok=True)


def require_free_space(needed_bytes: int) -> None:
    """Raise ``Conflict`` unless the disk of the models directory has room for so many bytes more."""
    free = max(0, shutil.disk_usage(models_dir()).free - RESERVED_BYTES)
    if needed_bytes > free:
        raise Conflict(
            f"There is not enough space on the disk: {needed_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free.",
            details={"needed_bytes": needed_bytes, "free_bytes": free},
        )


def resolve(path: Path) -> Path:
    """Return the absolute path of something that is there, without symbolic links. Raises ``InvalidRequest`` for any other."""
    try:
        found = path.expanduser().absolute().resolve(strict=True)
        found.stat()
    except (OSError, RuntimeError, ValueError) as error:  # also unknown home directories, loops of links, and NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidRequest(f"{str(path)[:300]} cannot be read: {reason.rstrip('.')}.", param="file") from None
    return found


def check_source(path: Path, mode: Mode) -> Path:
    """Return the absolute path of a file to import. Raises ``InvalidRequest`` if it is none that ``mode`` can take."""
    source = resolve(path)
    if mode is Mode.MOVE and path.expanduser().is_symlink():
        raise InvalidRequest(f"{path} is a symbolic link. Use --copy, --hard-link or --symbolic-link.", param="file")
    if not source.is_file():
        raise InvalidRequest(f"{path} is not a file.", param="file")
    if source.is_relative_to(models_dir()) and mode is not Mode.MOVE:
        raise InvalidRequest(f"{path} lies in the models directory already.", param="file")
    return source


def _make_folder(folder: Path) -> None:
    """Make publisher/name. Raises ``InvalidRequest`` if that would lead out of the models directory through a symbolic link."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"The folder {folder} cannot be made: {error.strerror}.", param="user_repo") from None
    if folder.resolve() != folder:
        raise InvalidRequest("The folder of this name is a symbolic link; models are stored in real folders only.", param="user_repo")


@dataclass
class Incoming:
    """A file on its way in. Use as a context manager: whatever is not published is undone at the end."""

    source: Path
    mode: Mode
    progress: Progress | None = None
    path: Path = field(init=False)
    _target: Path | None = field(default=None, init=False)
    _published: bool = field(default=False, init=False)
    _done: bool = field(default=False, init=False)

    def __enter__(self) -> Self:
        """Bring the file in under a temporary name. Raises ``Conflict`` without space, ``InvalidRequest`` if a link cannot be made."""
        self.path = hidden_folder("incoming") / uuid.uuid4().hex
        with ExitStack() as unless_here:
            unless_here.callback(self._undo)
            try:
                self._bring()
            except OSError as error:
                raise self._explain(error) from None
            unless_here.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Undo everything unless ``finish`` was called."""
        if not self._done:
            self._undo()

    def publish(self, relative: str) -> None:
        """Give the file its final name. Raises ``Conflict`` if there is a file already; it is never overwritten."""
        self._target = models_dir() / relative
        _make_folder(self._target.parent)
        if self.source == self._target:  # it lies where it belongs: nothing to move, nothing to take back
            self.path.unlink()
            return
        if os.path.lexists(self._target) and not self._is_published_already():
            raise Conflict(f"There is already a file {self._target}. Remove it or choose another name.", param="user_repo")
        try:
            self.path.rename(self._target)
            self.path.unlink(missing_ok=True)  # renaming one name of a file to another one of it does nothing
        except OSError as error:
            raise self._explain(error) from None
        self._published = True

    def finish(self) -> None:
        """Keep the file: the row that names it is stored. A file that was moved disappears from where it was."""
        self._done = True
        if self.mode is Mode.MOVE and self.source != self._target:
            try:
                self.source.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s was copied, not moved: it cannot be removed (%s)", self.source, error.strerror)

    def _is_published_already(self) -> bool:
        """Return whether this very file has its final name: the last attempt was killed before it could tell."""
        assert self._target is not None
        return self.mode is Mode.MOVE and not self._target.is_symlink() and self._target.samefile(self.source)

    def _bring(self) -> None:
        if self.mode is Mode.HARD_LINK:
            os.link(self.source, self.path)
        elif self.mode is Mode.SYMBOLIC_LINK:
            self.path.symlink_to(self.source)
        elif self.mode is Mode.COPY:
            self._copy()
        else:
            self._move()

    def _move(self) -> None:
        try:
            os.link(self.source, self.path)
        except OSError:  # another disk or owner, or a file system without hard links
            self._copy()

    def _copy(self) -> None:
        total = self.source.stat().st_size
        require_free_space(total)
        done = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with self.source.open("rb") as reader, os.fdopen(os.open(self.path, flags, 0o644), "wb") as writer:
            while chunk := reader.read(_COPY_BYTES):
                writer.write(chunk)
                done += len(chunk)
                if self.progress:
                    self.progress(done, total)
            writer.flush()
            os.fsync(writer.fileno())

    def _undo(self) -> None:
        self.path.unlink(missing_ok=True)
        if self._target and self._published:
            self._target.unlink(missing_ok=True)
        if self._target:
            remove_empty_folders(self._target)

    def _explain(self, error: OSError) -> InvalidRequest | InvalidModelFile | Conflict:
        if error.errno == errno.ENOSPC:
            return Conflict("The disk became full while the file was copied. Nothing was imported.")
        if self.mode is Mode.HARD_LINK and error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            return InvalidRequest("A hard link to this file is not possible (another disk or owner). Use --copy or --symbolic-link.")
        return InvalidRequest(f"The file could not be brought into the models directory: {error.strerror}.", param="file")


def write_new(path: Path, text: str) -> None:
    """Write a small text file that is not there yet. Raises ``Conflict`` if it is, ``InvalidRequest`` if it cannot be written."""
    _make_folder(path.parent)
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise Conflict(f"There is already a file {path}. Remove it or choose another name.") from None
    except OSError as error:
        raise InvalidRequest(f"The file {path} cannot be written: {error.strerror}.", param="file") from None


def remove_file(path: Path) -> None:
    """Delete a stored model's file (of a linked one the link only) and the folders that became empty."""
    path.unlink(missing_ok=True)
    remove_empty_folders(path)


def remove_folder(folder: Path) -> None:
    """Delete a folder for unfinished work with everything in it."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_if_empty(folder: Path) -> None:
    """Remove the folder that a model was moved out of, unless something else is left in it."""
    try:
        folder.rmdir()
    except OSError:
        logger.info("%s stays: there is more in it than the model", folder)


def remove_empty_folders(path: Path) -> None:
    """Remove the folders of a file that is gone, as far as they are empty and below the models directory."""
    root = models_dir()
    for folder in list(path.parents)[:2]:
        if folder == root or not folder.is_relative_to(root):
            return
        try:
            folder.rmdir()
        except OSError:
            return
