"""A database that is asked: PostgreSQL, or an SQLite file; a few connections, each answering one question at a time.

In: a query that the operator wrote, with `:name` where a value belongs, and the values. Out: rows, as dicts by column.
Values are bound, never pasted into the text. Nothing is changed: connections are read-only. Connections are made when
they are needed and kept; one that was idle and is gone is made anew once. Waiting for a free one, connecting and the
answer together take `timeout` at most; after a failure to connect nobody waits for a second. Whatever goes wrong is an
SqlError of one line, never "no row": so is a query that can find no rows, is several, or finds what cannot be read.
Made on the loop, after the fork. Not here: what rows mean.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import apsw
import apsw.ext

from .config_inbound import Place, Postgresql, Sql, Sqlite
from .sql_text import as_psycopg, names_in
from .thread import OneThread

ROWS = 10_000  # of an answer: more is a query without its condition
RETRY = 1.0  # seconds after a failed connection in which the database counts as down

Rows: TypeAlias = list[dict[str, object]]


class SqlError(Exception):
    """No answer: the database is down, too slow or too busy, or the query is wrong. One line."""


class _BrokenError(Exception):
    """The connection is of no more use; the question may have another."""


class _Link(Protocol):
    """A connection."""

    async def rows(self, query: str, values: Mapping[str, str]) -> Rows:
        """Raises _BrokenError, and SqlError where the query is at fault."""

    async def close(self) -> None: ...


class Database:
    """One database of the configuration."""

    def __init__(self, section: Sql, password: str = "") -> None:
        self._section = section
        self._password = password
        self._free = asyncio.Semaphore(section.connections)
        self._idle: list[_Link] = []
        self._down = ""  # why no connection could be made
        self._down_until = 0.0
        self._ending: set[asyncio.Task[None]] = set()

    async def rows(self, query: str, values: Mapping[str, str]) -> Rows:
        """The rows of a query. Raises SqlError."""
        if unknown := names_in(query) - values.keys():
            raise SqlError(f"the query asks for :{min(unknown)}, which is not known")
        try:
            async with asyncio.timeout(self._section.timeout), self._free:
                return await self._ask(query, values)
        except TimeoutError:
            raise SqlError(f"no answer within {self._section.timeout:g} s") from None

    async def close(self) -> None:
        """Closes the idle connections; those in use close when they are done."""
        self._section = self._section.model_copy(update={"connections": 0})
        for link in self._idle:
            self._drop(link)
        self._idle.clear()
        if self._ending:
            await asyncio.wait(self._ending)

    async def _ask(self, query: str, values: Mapping[str, str]) -> Rows:
        while True:
            reused = bool(self._idle)
            link = self._idle.pop() if reused else await self._connect()
            answer = asyncio.create_task(link.rows(query, values))
            try:
                rows = await asyncio.shield(answer)
            except SqlError:
                self._keep(link)
                raise
            except _BrokenError as error:
                self._drop(link)
                if not reused:
                    raise SqlError(str(error)) from None
            except BaseException:  # a time-out: whatever it answers now belongs to nobody
                self._drop(link, answer)
                raise
            else:
                self._keep(link)
                return rows

    async def _connect(self) -> _Link:
        if time.monotonic() < self._down_until:
            raise SqlError(self._down)
        place: Place = self._section.database
        try:
            if isinstance(place, Sqlite):
                return _SqliteLink(place, self._section.timeout)
            return await _PostgresqlLink.connect(place, self._password, self._section.timeout)
        except SqlError as error:
            self._fail(str(error))
            raise
        except asyncio.CancelledError:
            self._fail("it does not answer")
            raise

    def _fail(self, why: str) -> None:
        self._down = why
        self._down_until = time.monotonic() + RETRY

    def _keep(self, link: _Link) -> None:
        if self._section.connections:
            self._idle.append(link)
        else:
            self._drop(link)

    def _drop(self, link: _Link, answer: asyncio.Task[Rows] | None = None) -> None:
        """Closes a connection while nobody waits. psycopg would first wait until the server has heard that its answer
        is not wanted any more."""
        task = asyncio.create_task(_close(link, answer))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _close(link: _Link, answer: asyncio.Task[Rows] | None) -> None:
    if answer is not None:
        answer.cancel()
        await asyncio.wait([answer])
        if not answer.cancelled():
            answer.exception()  # heard
    await link.close()


class _SqliteLink:
    """A connection with a thread of its own: SQLite answers while it is called."""

    def __init__(self, place: Sqlite, timeout: float) -> None:
        try:
            self._connection = apsw.Connection(str(place.path), flags=apsw.SQLITE_OPEN_READONLY)
        except apsw.Error as error:
            raise SqlError(f"{place.path}: {_one_line(error)}") from None
        self._connection.set_busy_timeout(int(timeout * 1000))
        self._checked: set[str] = set()
        self._thread = OneThread(asyncio.get_running_loop(), "sql")

    async def rows(self, query: str, values: Mapping[str, str]) -> Rows:
        try:
            return await self._thread.call(lambda: self._read(query, values))
        except (apsw.Error, UnicodeError) as error:
            raise SqlError(_one_line(error)) from None

    def _check(self, query: str) -> None:
        """SQLite does whatever it is told, one statement after the other, and is silent about what has no rows."""
        found = apsw.ext.query_info(self._connection, query)
        rest = found.query_remaining
        if rest and apsw.ext.query_info(self._connection, rest).has_vdbe:
            raise SqlError("the query is more than one statement")
        if not found.description:
            raise SqlError("the query is none that finds rows")
        self._checked.add(query)

    def _read(self, query: str, values: Mapping[str, str]) -> Rows:
        if query not in self._checked:
            self._check(query)
        rows: Rows = []
        for row in (cursor := self._connection.execute(query, {name: values[name] for name in names_in(query)})):
            rows.append(dict(zip([column[0] for column in cursor.get_description()], row, strict=True)))
            if len(rows) > ROWS:
                raise _too_many()
        return rows

    async def close(self) -> None:
        self._connection.interrupt()
        await self._thread.call(self._connection.close)
        await self._thread.close()


class _PostgresqlLink:
    """A connection of psycopg, which is needed only where PostgreSQL is asked."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @classmethod
    async def connect(cls, place: Postgresql, password: str, timeout: float) -> _PostgresqlLink:
        try:
            import psycopg
            from psycopg.rows import dict_row
        except ImportError:
            raise SqlError(missing_driver()) from None
        given: dict[str, Any] = {"password": password} if password else {}
        # The server gives up too: nobody waits for its answer any more.
        options = f"-c default_transaction_read_only=on -c statement_timeout={max(1, int(timeout * 1000))}"
        try:
            return cls(
                await psycopg.AsyncConnection.connect(
                    place.url, autocommit=True, row_factory=dict_row, options=options, **given
                )
            )
        except (psycopg.Error, OSError, ValueError) as error:
            raise SqlError(_one_line(error)) from None

    async def rows(self, query: str, values: Mapping[str, str]) -> Rows:
        import psycopg

        try:
            cursor = await self._connection.execute(as_psycopg(query), values)
            rows: Rows = await cursor.fetchmany(ROWS + 1)
        except (psycopg.Error, OSError, UnicodeError) as error:
            if self._connection.closed or self._connection.broken:
                raise _BrokenError(_one_line(error)) from None
            raise SqlError(_one_line(error)) from None
        if len(rows) > ROWS:
            raise _too_many()
        return rows

    async def close(self) -> None:
        await self._connection.close()


def _too_many() -> SqlError:
    return SqlError(f"the query finds more than {ROWS} rows")


def missing_driver() -> str:
    """Why PostgreSQL cannot be asked here; empty when it can."""
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        return f"PostgreSQL needs psycopg ({_one_line(error)}): pip install 'fastsmtp-mta[postgresql]'"
    return ""


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0].strip()
