"""The one bridge from async code to the ORM."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from channels.db import database_sync_to_async

P = ParamSpec("P")
R = TypeVar("R")

# Not the default thread-sensitive executor: that is one thread per process, where a slow query would hold up everybody.
_executor = ThreadPoolExecutor(max_workers=8, thread_name_prefix="db")


async def run_db(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function that uses the ORM in a small thread pool and return its result."""
    bridged: Callable[P, Awaitable[R]] = database_sync_to_async(function, thread_sensitive=False, executor=_executor)
    return await bridged(*args, **kwargs)
