"""The tables of the configuration that say how much each client may, and which databases are asked.

As in config_tables.py each key's name, type, default and help stand once, here. `[inbound]` is about clients that
come in, in the order in which they are asked: at CONNECT, MAIL and RCPT; no limit stands where no key does. A database
is asked by whoever names its table: recipients of a domain, users. What one table must know of another is checked in
config_conflicts.py. Not here: counting (policy/limits.py), asking (sql.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, PlainValidator, StrictBool, ValidationInfo

from .config_lists import PerhapsNetworks
from .config_values import (
    Count,
    Duration,
    Kind,
    Rate,
    Table,
    Unset,
    parse_duration,
    parse_path,
    parse_rate,
)
from .sql_text import always_finds, names_in


@dataclass(frozen=True)
class Postgresql:
    """Where a PostgreSQL server is asked; what libpq calls a connection URI."""

    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class Sqlite:
    """A database that is a file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


Place: TypeAlias = Postgresql | Sqlite


def parse_database(value: object, info: ValidationInfo) -> Place:
    """From "postgresql://user@host/name", or the path of an SQLite file."""
    if isinstance(value, Postgresql | Sqlite):
        return value
    wanted = 'a URL such as "postgresql://user@host:5432/name", or the path of an SQLite file'
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(wanted)
    if "://" not in value:
        return Sqlite(parse_path(value, info))
    try:
        parts = urlsplit(value)
        known = parts.scheme in ("postgresql", "postgres") and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known:
        raise ValueError(wanted)
    return Postgresql(value)


class Sql(Table):
    """A database that is asked: which mailboxes a domain has, or who a user is. Every worker has connections of its
    own, and only reads."""

    database: Annotated[Place, PlainValidator(parse_database), Kind("URL or path")] = Field(
        description="`postgresql://user@host:port/name`, with whatever libpq takes behind a `?`; or an SQLite file."
    )
    password_file: Annotated[Path | None, PlainValidator(parse_path), Kind("path"), Unset("none")] = Field(
        None,
        validate_default=False,
        description="The file whose first line is the password. Read once, before `user` is dropped to.",
    )
    connections: Count = Field(4, ge=1, le=100, description="Questions at once, per worker; more wait.")
    timeout: Duration = Field(
        parse_duration("5s"), gt=0, description="For an answer, the wait for a free connection included."
    )


@dataclass(frozen=True)
class _Lookup:
    """How long an answer is remembered, in seconds, how long is waited for one, and what happens without."""

    known_for: float
    unknown_for: float
    timeout: float = 20.0
    on_failure: Literal["defer", "accept"] = "defer"


@dataclass(frozen=True)
class SqlLookup(_Lookup):
    """Recipients that a database knows: `query` finds a row for each."""

    sql: str = ""
    query: str = ""
    known_for: float = 60.0
    unknown_for: float = 10.0

    def __str__(self) -> str:
        return f"sql {self.sql}"


@dataclass(frozen=True)
class AheadLookup(_Lookup):
    """Recipients that the server behind a transport knows."""

    ask: str = ""
    known_for: float = 6 * 3600.0
    unknown_for: float = 600.0

    def __str__(self) -> str:
        return f"server of {self.ask}"


def parse_lookup(value: Mapping[str, object]) -> SqlLookup | AheadLookup:
    """From {sql = "NAME", query = "..."} or {ask = "NAME"}, each perhaps with known_for, unknown_for, timeout and
    on_failure."""
    kind: type[SqlLookup | AheadLookup] = SqlLookup if "sql" in value else AheadLookup
    given: dict[str, Any] = dict(value)
    known = [field.name for field in fields(kind)]
    for name, found in given.items():
        if name not in known:
            raise ValueError(f"{name} is not known here; known are {', '.join(known)}")
        if name in ("known_for", "unknown_for", "timeout"):
            given[name] = parse_duration(found)
        elif name == "on_failure" and found not in ("defer", "accept"):
            raise ValueError('on_failure is "defer" or "accept"')
        elif not isinstance(found, str) or not found:
            raise ValueError(f"{name} is text")
    lookup = kind(**given)
    if isinstance(lookup, SqlLookup) and not names_in(lookup.query) & {"local", "address"}:
        raise ValueError("a query that asks for :local and :domain, or for :address")
    if isinstance(lookup, SqlLookup) and always_finds(lookup.query):
        raise ValueError("a query that finds no row for who is unknown: COUNT and EXISTS always have one")
    if lookup.unknown_for > lookup.known_for:
        raise ValueError("unknown_for is no longer than known_for")
    if not 0 < lookup.timeout < 30:  # what a check may take
        raise ValueError("timeout is less than 30s")
    return lookup


Limit: TypeAlias = Annotated[Rate | None, PlainValidator(parse_rate), Kind("rate"), Unset("no limit")]


class Inbound(Table):
    """How much one client may, over all workers of the machine: an IPv4 address, or an IPv6 network of 64 bits. A limit
    that is left out is none. Nothing is counted of `relay.networks`, of users who have logged in, of `exceptions`, of
    programs that come by a unix socket, and on listeners of role `lmtp`."""

    sessions_per_address: Annotated[Count, Unset("no limit")] = Field(
        0, ge=1, validate_default=False, description="Open sessions of one address; more hear 421."
    )
    sessions_per_network: Annotated[Count, Unset("no limit")] = Field(
        0, ge=1, validate_default=False, description="Open sessions of its network of 24 bits, with IPv6 of 64."
    )
    new_sessions: Limit = Field(
        None,
        validate_default=False,
        description='Sessions begun, such as `"60/m"`: so many at once, then as many in a minute; more hear 421.',
    )
    messages: Limit = Field(
        None, validate_default=False, description="MAIL commands, as long as they are accepted; more hear 450."
    )
    recipients: Limit = Field(
        None, validate_default=False, description="RCPT commands, whatever becomes of them; more hear 450."
    )
    failures: Limit = Field(
        None,
        validate_default=False,
        description="Recipients refused for good, failed logins (on `submission` [auth] counts those), and commands "
        "that are none. Over it a client hears 421 when it connects, and 450 at MAIL and RCPT.",
    )
    exceptions: PerhapsNetworks = Field((), description="Networks without any of these limits.")
    limit_trusted: StrictBool = Field(False, description="True: the limits hold for `relay.networks` too.")

    @property
    def counts(self) -> bool:
        """Whether there is any limit."""
        rates = (self.new_sessions, self.messages, self.recipients, self.failures)
        return bool(self.sessions_per_address or self.sessions_per_network) or rates != (None,) * len(rates)
