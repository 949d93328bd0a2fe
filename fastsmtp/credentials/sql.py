"""Users in a database: one query, which the operator writes, finds one of them.

In: the query with `:name`, `:local` and `:domain`. Out: a `Record` of the columns `password`, `scram` and `senders`,
whichever it has. Several rows are one user with more senders; passwords that differ among them are no answer. NULL is
an empty text. What the database cannot answer, or answers with what cannot be understood, is UnavailableError.
Not here: connections and time-outs (sql.py of the package above).
"""

from __future__ import annotations

from collections.abc import Mapping

from ..sql import Database, SqlError
from ..verdict import Keys
from . import UnavailableError
from .directory import Record, Sought
from .scram import SALT, Shape, parse_keys
from .senders import parse_senders


class Query:
    """A source. The database is its owner's to close."""

    label = "auth.sql"

    def __init__(self, database: Database, query: str, iterations: int, domain: str) -> None:
        self._database = database
        self._query = query
        self.shapes: Mapping[Shape, int] = {(iterations, SALT): 1} if iterations else {}
        self._domain = domain

    def stamp(self, name: str) -> object:
        return None

    async def find(self, name: str) -> Sought:
        local, _, domain = name.rpartition("@")
        values = {"name": name, "local": local or domain, "domain": domain if local else ""}
        try:
            rows = await self._database.rows(self._query, values)
        except SqlError as error:
            raise UnavailableError(str(error)) from None
        return self._make_record(name, rows) if rows else None

    async def close(self) -> None:
        pass

    def _make_record(self, name: str, rows: list[dict[str, object]]) -> Record:
        columns = {column.lower() for column in rows[0]}
        if not columns & {"password", "scram"}:
            raise UnavailableError("the query gives neither a column password nor a column scram")
        try:
            password, scram = _one(rows, "password"), _one(rows, "scram")
            keys: Keys | None = parse_keys(scram) if scram else None
            rights = parse_senders(",".join(_texts(rows, "senders")), name, self._domain)
        except ValueError as error:
            raise UnavailableError(f"user {name}: {error}") from None
        return Record(name, password or scram, keys, rights)


def _texts(rows: list[dict[str, object]], column: str) -> list[str]:
    found = [value for row in rows for key, value in row.items() if key.lower() == column and value is not None]
    for value in found:
        if not isinstance(value, str):
            raise ValueError(f"column {column} holds {type(value).__name__}, not text")
    return [str(value).strip() for value in found]


def _one(rows: list[dict[str, object]], column: str) -> str:
    """The same in every row."""
    different = set(_texts(rows, column)) - {""}
    if len(different) > 1:
        raise ValueError(f"rows differ in column {column}")
    return different.pop() if different else ""
