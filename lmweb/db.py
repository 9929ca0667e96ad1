"""Database connections outside Django's own requests: the one bridge from async code to the ORM, and how long-lived threads behave."""

from __future__ import annotations

import asyncio
import contextvars
import select
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from django.db import close_old_connections, connections

P = ParamSpec("P")
R = TypeVar("R")

# Not asgiref's thread-sensitive executor: that is one thread per process, where a slow query would hold up everybody.
_executor = ThreadPoolExecutor(max_workers=8, thread_name_prefix="db")


def drop_dead_connections(**_: Any) -> None:
    """Close this thread's connections that are too old, or whose server is gone.

    The latter shows on the socket (there is something to read although nothing was asked), which costs no round trip as
    Django's own health check does, and the way to the first token has many short visits to the database.
    """
    for connection in connections.all(initialized_only=True):
        if connection.in_atomic_block:  # a request inside somebody's transaction, as in tests
            continue
        raw = connection.connection
        if raw is not None and (raw.closed or _is_readable(raw.fileno())):
            connection.close()
        connection.close_if_unusable_or_obsolete()


def _is_readable(descriptor: int) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(0))


def visit(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function that uses the ORM on a live connection of this thread, and leave none behind that is too old."""
    drop_dead_connections()
    try:
        return function(*args, **kwargs)
    finally:
        close_old_connections()


async def run_db(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function that uses the ORM in a small thread pool and return its result."""
    call = partial(contextvars.copy_context().run, partial(visit, function, *args, **kwargs))
    return await asyncio.get_running_loop().run_in_executor(_executor, call)
