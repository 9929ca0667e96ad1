"""Database connections outside Django's own requests: the one bridge from async code to the ORM, how long-lived threads behave.

And two short cuts for the way to the first token, on which the ORM would build the same SQL again and again.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import select
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial
from inspect import signature
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar
from uuid import UUID

from django.db import Error as DatabaseError, close_old_connections, connection, connections
from django.db.models import Model, QuerySet
from django.db.models.expressions import RawSQL

from lmweb.errors import Conflict

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# Not asgiref's thread-sensitive executor: that is one thread per process, where a slow query would hold up everybody.
_executor = ThreadPoolExecutor(max_workers=8, thread_name_prefix="db")


def drop_dead_connections(**_: Any) -> None:
    """Close this thread's connections that are too old, or whose server is gone.

    The latter shows on the socket (there is something to read although nothing was asked), which costs no round trip as
    Django's own health check does, and the way to the first token has many short visits to the database.
    """
    for open_ in connections.all(initialized_only=True):
        if open_.in_atomic_block:  # a request inside somebody's transaction, as in tests
            continue
        raw = open_.connection
        if raw is not None and (raw.closed or _is_readable(raw.fileno())):
            open_.close()
        open_.close_if_unusable_or_obsolete()


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


def try_to_store(action: Callable[[], object]) -> None:
    """Do something that the database should know but that must not stop anything else when it is away."""
    try:
        action()
    except DatabaseError as error:
        logger.warning("PostgreSQL is away: %s", in_short(error))


def in_short(error: DatabaseError) -> str:
    """Return the first line of what the database says."""
    return str(error).strip().splitlines()[0]


async def run_db(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function that uses the ORM in a small thread pool and return its result."""
    call = partial(contextvars.copy_context().run, partial(visit, function, *args, **kwargs))
    return await asyncio.get_running_loop().run_in_executor(_executor, call)


class Lookup:
    """The first row of a query, with the SQL built once per process: cold, that takes several times as long as the answer.

    ``queryset`` is called once, with stand-ins, and has to use its arguments as the query's only parameters, in their order; it
    ends with ``values_list``.
    """

    def __init__(self, queryset: Callable[..., QuerySet[Any, Any]]) -> None:
        self._queryset = queryset

    def __call__(self, *values: str) -> tuple[Any, ...] | None:
        """Return the row for these values, or None."""
        sql, convert = self._compiled
        with connection.cursor() as cursor:
            cursor.execute(sql, values)
            row = cursor.fetchone()
        return None if row is None else convert(row)

    @cached_property
    def _compiled(self) -> tuple[str, Callable[[Any], tuple[Any, ...]]]:
        stand_ins = tuple(f"value {index}" for index in range(len(signature(self._queryset).parameters)))
        compiler = self._queryset(*stand_ins).order_by()[:1].query.get_compiler(connection=connection)
        sql, parameters = compiler.as_sql()
        if tuple(parameters) != stand_ins:
            raise TypeError(f"the parameters of {sql} are {parameters}")
        converters = compiler.get_converters([column for column, *_ in compiler.select])

        def convert(row: Any) -> tuple[Any, ...]:
            return tuple(next(iter(compiler.apply_converters([row], converters))))

        return sql, convert


def field_names(model: type[Model], wanted: set[str] | None = None) -> list[str]:
    """Return the names of a model's columns, all or those wanted, in the order in which ``from_db`` takes their values."""
    names = [field.attname for field in model._meta.concrete_fields]  # noqa: SLF001  (Django's documented name)
    return [name for name in names if wanted is None or name in wanted]


class Version(NamedTuple):
    """A row as it was read once. ``mark`` is PostgreSQL's ``xmin``: every change of a row gives it another one."""

    table: str
    pk: int | UUID
    mark: str

    @classmethod
    def of(cls, row: Model, mark: str) -> Version:
        """Return the version of a row that was read together with ``mark_of`` its model."""
        return cls(row._meta.db_table, row.pk, mark)  # noqa: SLF001  (Django's documented name)


class Stale(Conflict):
    """Something that was remembered is not so any more. Whoever remembered it reads it again."""


def mark_of(model: type[Model]) -> RawSQL:
    """Return the expression for ``Version.mark`` in a query of the model's table."""
    return RawSQL(f"{connection.ops.quote_name(model._meta.db_table)}.xmin::text", ())  # noqa: S611, SLF001  (no input in it)


class Memory(Generic[R]):
    """What was read a moment ago, for those who let ``insert`` prove that it still holds."""

    def __init__(self, size: int = 1024) -> None:
        self._size = size
        self._known: dict[str, R] = {}

    def __setitem__(self, key: str, value: R) -> None:
        """Remember. When there are too many, all are forgotten: a miss costs one query."""
        if len(self._known) >= self._size:
            self._known = {}
        self._known[key] = value

    def get(self, key: str) -> R | None:
        """Return what was remembered, if anything was."""
        return self._known.get(key)


def insert(row: Model, *, unless_changed: tuple[Version, ...] = ()) -> None:
    """Store a new row, as ``row.save(force_insert=True)`` does, without signals.

    Raises ``Stale``, and stores nothing, if one of the rows ``unless_changed`` is not as it was: what was decided on remembered rows
    is proved in the same round trip.

    Outside a transaction of the caller's it does not wait for the disk: if PostgreSQL dies in the next half second the row may be
    lost. Inside one, that is the business of whoever began it.
    """
    sql = _insert_sql(type(row), tuple(version.table for version in unless_changed), relaxed=not connection.in_atomic_block)
    fields = row._meta.concrete_fields  # noqa: SLF001  (Django's documented name)
    values = [field.get_db_prep_save(field.pre_save(row, add=True), connection) for field in fields]
    values += [value for version in unless_changed for value in (version.pk, version.mark)]
    with connection.cursor() as cursor:
        cursor.execute(sql, values)
        if not cursor.rowcount:
            raise Stale("Something that this rests on has just changed. Please try again.")
    row._state.adding, row._state.db = False, connection.alias  # noqa: SLF001  (likewise)


@cache
def _insert_sql(model: type[Model], unchanged: tuple[str, ...], *, relaxed: bool) -> str:
    """Return the statement: with the commit that does not wait, if ``relaxed``; it inserts nothing if a row has changed."""
    quote = connection.ops.quote_name
    fields = model._meta.concrete_fields  # noqa: SLF001
    columns = ", ".join(quote(field.column) for field in fields if field.column)
    types = [re.sub(r"\(.*\)", "", field.db_type(connection) or "") for field in fields]  # a cast to varchar(9) would cut texts
    values = ", ".join(f"%s::{type_}" for type_ in types)
    conditions = ["set_config('synchronous_commit', 'off', true) = 'off'"] if relaxed else []
    conditions += [f"(SELECT xmin::text FROM {quote(table)} WHERE id = %s) = %s::text" for table in unchanged]  # noqa: S608  (names are ours)
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    return f"INSERT INTO {quote(model._meta.db_table)} ({columns}) SELECT {values}{where}"  # noqa: SLF001
