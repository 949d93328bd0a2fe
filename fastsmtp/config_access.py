"""The tables that say who may come in, and for whom mail is: lists, rules and aliases.

In: what tomllib made of them. Out: frozen values; a list that may be long stands in a file of its own, and is here only
its path, or is known to somebody else. Not here: lists by themselves (config_lists.py), limits of clients
(config_inbound.py), the files' contents (list_compile.py), domains (config_tables.py). Raises pydantic's
ValidationError, which config.py explains to people.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Discriminator, Field, PlainValidator, Tag, ValidationInfo

from .config_inbound import AheadLookup, SqlLookup, parse_lookup
from .config_lists import AddressList, InFile, NameList, NetworkList, parse_in_file
from .config_values import ANY, Count, Kind, Table, Unset, check_local_part, parse_any, parse_path

_RULE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


def check_rule_name(value: str) -> str:
    if not _RULE_NAME.fullmatch(value):
        raise ValueError('a name of lower-case letters, digits and "-"')
    return value


def check_text(value: str) -> str:
    if not (value.isascii() and value.isprintable() and len(value) <= 400):
        raise ValueError("a text of at most 400 printable ASCII characters, on one line")
    return value


def check_detail(value: str) -> str:
    if value and (len(value) > 1 or value not in "+-=_#.~!"):
        raise ValueError('one of "+", "-", "=", "_", "#", ".", "~", "!", or ""')
    return value


OptionalPath: TypeAlias = Annotated[Path | None, PlainValidator(parse_path), Kind("path"), Unset("none")]


def parse_source(value: object, info: ValidationInfo) -> InFile | SqlLookup | AheadLookup:
    """Who knows the mailboxes of a domain."""
    if isinstance(value, InFile | SqlLookup | AheadLookup):
        return value
    if isinstance(value, dict):
        if "file" in value:
            return parse_in_file(value, info)
        if "sql" in value or "ask" in value:
            return parse_lookup(value)
    raise ValueError(f'{ANY}, {{file = "PATH"}}, {{sql = "NAME", query = "..."}} or {{ask = "TRANSPORT"}}')


def _recipients_kind(value: object) -> str:
    if isinstance(value, list | tuple):
        return "<list>"
    return "<any>" if isinstance(value, str) else "<source>"


Recipients: TypeAlias = Annotated[
    Annotated[Literal["any"], PlainValidator(parse_any), Tag("<any>")]
    | Annotated[tuple[Annotated[str, AfterValidator(check_local_part)], ...], Tag("<list>")]
    | Annotated[InFile | SqlLookup | AheadLookup, PlainValidator(parse_source), Tag("<source>")],
    Discriminator(_recipients_kind),
]


class Rule(Table):
    """Who is let in, sent away or put off, of clients that are neither trusted nor logged in, on listeners of role
    `mx`. All keys that are given must match; of the rules in their order, the first that does decides. A rule waits
    until what it asks for is known, and so do the rules behind it. `allow` ends the rules and permits no relaying."""

    name: Annotated[Annotated[str, AfterValidator(check_rule_name)], Kind("name"), Unset("its number, from 1")] = Field(
        "", validate_default=False, description="How it is called in log, metrics, replies and `check --as`."
    )
    client: Annotated[NetworkList, Unset("any")] = Field(
        (), validate_default=False, description="The networks that the client is in."
    )
    helo: Annotated[NameList, Unset("any")] = Field(
        (), validate_default=False, description="The names that it says in EHLO or HELO."
    )
    sender: Annotated[AddressList, Unset("any")] = Field(
        (),
        validate_default=False,
        description="The reverse-paths: `ann@x.test`, `x.test` (the domain), `*.x.test` (all below it), `<>`.",
    )
    recipient: Annotated[AddressList, Unset("any")] = Field(
        (), validate_default=False, description="The recipients, in the same forms."
    )
    action: Literal["allow", "refuse", "defer"] = Field(
        description="Refused for good (550, or 554 in place of the greeting), for now (450 or 421), or let through."
    )
    text: Annotated[str, AfterValidator(check_text), Kind("text"), Unset("`Refused` or `Not now`")] = Field(
        "", description="What the client is told, before the rule's name."
    )


class Alias(Table):
    """Addresses of all domains that stand for others. A line is `NAME: ADDRESS, ADDRESS`; a NAME without a domain is
    one in every domain. Where there is an `owner-NAME` as well, NAME is a list, whose mail comes from the owner."""

    file: OptionalPath = Field(None, validate_default=False, description="Where they stand.")
    members: Count = Field(1000, ge=1, le=10_000, description="How many addresses an alias may stand for.")
