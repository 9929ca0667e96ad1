"""Remembers what was read from model files, which are large and hardly ever change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lmweb.errors import InvalidModelFile

T = TypeVar("T")


def remembered(files: int) -> Callable[[Callable[[Path], T]], Callable[[Path], T]]:
    """Call a function of a file again only when the file was changed, for so many files.

    What comes of it raises ``InvalidModelFile`` for a file that is gone, beside what the function raises.
    """

    def decorate(read: Callable[[Path], T]) -> Callable[[Path], T]:
        @functools.lru_cache(maxsize=files)
        def read_version(file: Path, _modified: int, _size: int) -> T:
            return read(file)

        @functools.wraps(read)
        def wrapper(file: Path) -> T:
            try:
                status = file.stat()
            except OSError as error:
                raise InvalidModelFile(f"The file cannot be read: {error.strerror}.") from None
            return read_version(file, status.st_mtime_ns, status.st_size)

        return wrapper

    return decorate
