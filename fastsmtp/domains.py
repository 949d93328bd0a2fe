"""The served domains: which recipients are ours, and by which transport their mail leaves.

In: rows of the configuration. Out: the row for an address, by its domain: an exact name wins over `*.parent`, the
nearest parent over a farther one, those over `*`. Postmaster is a recipient of every served domain, and without a
domain of the server itself (RFC 5321 4.5.1); both go to the configured postmaster where there is one. `ann+x` is the
mailbox `ann` where the row has "+" for its `detail`, unless it is a mailbox itself; the address stays as it came.
A row may have to ask somebody else who its recipients are: that is done when mail is taken, never afterwards.
Not here: who may send (policy), aliases (aliases.py), delivering (transports).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from enum import Enum
from typing import TypeAlias, TypeVar

from .address import Address
from .lists import Mailboxes, Values
from .verdict import NextHop

Row = TypeVar("Row")


def find_name(rows: Mapping[str, Row], domain: str) -> Row | None:
    """The row for a domain (lower-case A-labels) by its name: exact, `*.` and the nearest parent, or `*`."""
    row = rows.get(domain)
    if row is not None:
        return row
    parent = domain
    while "." in parent:
        parent = parent.partition(".")[2]
        row = rows.get(f"*.{parent}")
        if row is not None:
            return row
    return rows.get("*")


class Found(Enum):
    """What somebody else knows of a mailbox. TEMPFAIL: it cannot be said now, so it is neither unknown nor welcome."""

    KNOWN = "known"
    UNKNOWN = "unknown"
    TEMPFAIL = "tempfail"


Lookup: TypeAlias = Callable[[Address], "Found | Awaitable[Found]"]


class Domain:
    """A row. `recipients` are keys as in `Address.mailbox` before the "@", None for any; `listed` has them where they
    are too many, and `ask` where somebody else knows. `case_sensitive`: local-parts that differ in case only are
    different mailboxes. `catch_all` gets what is for nobody. `aliases` of this domain go before those of all domains.
    `hop` says what the transport's next host takes, as far as that was heard; None for a transport that takes
    everything."""

    __slots__ = (
        "aliases", "ask", "case_sensitive", "catch_all", "detail", "hop", "listed", "name", "recipients", "transport",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        transport: str,
        recipients: Iterable[str] | None = None,
        case_sensitive: bool = False,
        hop: Callable[[], NextHop | None] | None = None,
        listed: Mailboxes | None = None,
        ask: Lookup | None = None,
        detail: str = "",
        catch_all: Address | None = None,
        aliases: Values | None = None,
    ) -> None:
        self.name = name
        self.transport = transport
        self.case_sensitive = case_sensitive
        self.hop = hop
        self.listed = listed
        self.ask = ask
        self.detail = detail
        self.catch_all = catch_all
        self.aliases = aliases
        self.recipients = None if recipients is None else frozenset(self.key(Address(r, "")) for r in recipients)

    @property
    def is_open(self) -> bool:
        """Whether a mailbox can only be found unknown by asking somebody else, or never."""
        return self.ask is not None or (self.recipients is None and self.listed is None)

    def key(self, address: Address) -> str:
        """The local-part as it is compared in this domain."""
        return address.local if self.case_sensitive else address.mailbox.rpartition("@")[0]

    def base(self, key: str) -> str:
        """A key without its detail; the key itself where it has none."""
        return (self.detail and key.partition(self.detail)[0]) or key

    def find(self, address: Address) -> str:
        """The key of the mailbox that an address stands for, as far as this row knows; "" when it is unknown. Whoever
        else is asked is taken to know it."""
        key = self.key(address)
        if self.has(key, address.domain):
            return key if self.recipients is not None or self.listed is not None else self.base(key)
        base = self.base(key)
        return base if base is not key and self.has(base, address.domain) else ""

    def has(self, key: str, domain: str) -> bool:
        if self.recipients is not None:
            return key in self.recipients
        return self.listed is None or self.listed.has(f"{key}@{domain}")

    def has_whole(self, address: Address) -> bool:
        """Whether an address is a mailbox with all of its local-part."""
        if self.recipients is not None:
            return self.key(address) in self.recipients
        if self.listed is None:
            return True
        return self.listed.has(f"{address.local}@{address.domain}" if self.case_sensitive else address.mailbox)


class Domains:
    """The served domains of the server `hostname`. Where no `postmaster` is configured, a bare one is at the server's
    own name if that is served, else at the first domain that is served by name."""

    __slots__ = ("_home", "_postmaster", "_rows", "_wildcards")

    def __init__(self, rows: Iterable[Domain], hostname: str, postmaster: Address | None = None) -> None:
        self._rows = {row.name: row for row in rows}
        self._wildcards = any(name.startswith("*.") for name in self._rows)
        self._postmaster = postmaster and _keyed(postmaster, self.find(postmaster.domain))
        named = [name for name in self._rows if not name.startswith("*")]
        self._home = hostname if self.find(hostname) or not named else named[0]

    @property
    def home(self) -> str:
        """The domain of an address that has none."""
        return self._home

    def find(self, domain: str) -> Domain | None:
        """The row that serves a domain (lower-case A-labels), None when it is not ours."""
        row = self._rows.get(domain)
        if row is not None:
            return row
        return find_name(self._rows, domain) if self._wildcards else self._rows.get("*")

    def stand_in(self, address: Address) -> Address:
        """The postmaster in place of `postmaster` (RFC 5321 4.5.1); any other address itself."""
        if _is_postmaster(address):
            if self._postmaster is not None:
                return self._postmaster
            return address if address.domain else Address("postmaster", self._home)
        return address

    def resolve(self, address: Address, row: Domain | None) -> Address | None:
        """The mailbox that a recipient stands for, itself as a rule; None when it is unknown. `row` is what serves its
        domain. A mailbox of a case-sensitive domain, and one that has a detail, carries its own key."""
        if _is_postmaster(address):
            return self.stand_in(address)
        if row is None:
            return None
        if not row.detail:
            return _keyed(address, row) if row.has_whole(address) else row.catch_all
        key = row.find(address)
        if not key:
            return row.catch_all
        mailbox = f"{key}@{address.domain}"
        return address if mailbox == address.mailbox else Address(address.local, address.domain, mailbox)

    def route(self, address: Address) -> tuple[str, Address]:
        """The transport for an accepted address ("" when none is left), and the mailbox that it stands for. A list
        that has changed since loses no mail."""
        row = self.find(address.domain)
        if row is not None and not row.detail and not _is_postmaster(address):
            return (row.transport, _keyed(address, row))  # whether it is still known there or not
        mailbox = self.resolve(address, row)
        if mailbox is None or (row is not None and mailbox is row.catch_all):
            mailbox = _keyed(address, row)
        if mailbox.domain != address.domain:
            row = self.find(mailbox.domain)
        return (row.transport if row is not None else "", mailbox)


def _is_postmaster(address: Address) -> bool:
    local = address.local
    return len(local) == 10 and local.lower() == "postmaster"


def _keyed(address: Address, row: Domain | None) -> Address:
    """The address with the key that it has in its domain."""
    if row is None or not row.case_sensitive:
        return address
    return Address(address.local, address.domain, f"{address.local}@{address.domain}")
