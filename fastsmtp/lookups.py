"""Who else knows the mailboxes of a domain: a database, or the server behind a transport; what asks them is made here.

In: the `recipients` of a [[domain]] that names somebody, the databases, and what makes a transport for call-ahead. Out:
what `Domain.ask` is. Each domain remembers its own answers; a server is asked over the same connections for all domains
that go there. A query finds rows for a mailbox, and none for what is none. A row that holds nothing is neither, as of
`SELECT (SELECT id ...)`, which always has one: a failure. On failure: as the domain says, by default 451 4.3.0.
Not here: what is remembered (policy/lookup.py), how it is asked (sql.py, delivery/ahead.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .address import Address
from .config import AheadLookup, SqlLookup
from .delivery.ahead import Ahead, AheadError
from .delivery.smtp import Smtp
from .domains import Lookup
from .log import Log
from .metrics import Counter
from .policy.lookup import Asked, LookupFailedError, Question
from .sql import Database, SqlError


class Lookups:
    """`make_transport` makes the transport of a name anew, for call-ahead; `count` counts what fails."""

    def __init__(
        self,
        databases: Mapping[str, Database],
        make_transport: Callable[[str], Smtp],
        log: Log,
        count: Callable[[Counter, int], None],
    ) -> None:
        self._databases = databases
        self._make_transport = make_transport
        self._log = log
        self._count = count
        self._servers: dict[str, Ahead] = {}

    def make(self, section: SqlLookup | AheadLookup, case_sensitive: bool) -> Lookup:
        """What is asked whether an address is a mailbox."""
        if isinstance(section, SqlLookup):
            source = f"sql.{section.sql}"
            ask = _ask_database(self._databases[section.sql], section.query, case_sensitive)
        else:
            source = f"transport.{section.ask}"
            if section.ask not in self._servers:
                self._servers[section.ask] = Ahead(self._make_transport(section.ask))
            ask = _ask_server(self._servers[section.ask])
        return Asked(
            source,
            ask,
            known_for=section.known_for,
            unknown_for=section.unknown_for,
            timeout=section.timeout,
            accepts=section.on_failure == "accept",
            folds=not case_sensitive,
            log=self._log,
            count=lambda: self._count(Counter.LOOKUP_FAILED, 1),
        )

    async def close(self) -> None:
        """Ends the connections for call-ahead."""
        for server in self._servers.values():
            await server.close()


def _ask_database(database: Database, query: str, case_sensitive: bool) -> Question:
    async def ask(address: Address) -> bool:
        local = address.local if case_sensitive else address.mailbox.rpartition("@")[0]
        values = {"local": local, "domain": address.domain, "address": f"{local}@{address.domain}"}
        try:
            rows = await database.rows(query, values)
        except SqlError as error:
            raise LookupFailedError(str(error)) from None
        if not all(map(_holds_something, rows)):
            raise LookupFailedError("the query finds a row of nothing but NULL, false, 0 or blanks: is it a mailbox?")
        return bool(rows)

    return ask


def _holds_something(row: Mapping[str, object]) -> bool:
    return any(value.strip() if isinstance(value, str | bytes) else value for value in row.values())


def _ask_server(server: Ahead) -> Question:
    async def ask(address: Address) -> bool:
        try:
            return await server.ask(address)
        except AheadError as error:
            raise LookupFailedError(str(error)) from None

    return ask
