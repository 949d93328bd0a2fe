"""The served domains: which recipients are ours, and by which transport their mail leaves.

In: rows of the configuration. Out: the row for an address, by its domain: an exact name wins over `*.parent`, the
nearest parent over a farther one, those over `*`. Postmaster is a recipient of every served domain, and without a
domain of the server itself (RFC 5321 4.5.1); both go to the configured postmaster where there is one.
Not here: who may send (policy), delivering (transports).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from .address import Address
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


class Domain:
    """A row. `recipients` are keys as in `Address.mailbox` before the "@", None for any; `case_sensitive`: local-parts
    that differ in case only are different mailboxes. `hop` says what the transport's next host takes, as far as that
    was heard; None for a transport that takes everything."""

    __slots__ = ("case_sensitive", "hop", "name", "recipients", "transport")

    def __init__(
        self,
        name: str,
        transport: str,
        recipients: Iterable[str] | None = None,
        case_sensitive: bool = False,
        hop: Callable[[], NextHop | None] | None = None,
    ) -> None:
        self.name = name
        self.transport = transport
        self.case_sensitive = case_sensitive
        self.hop = hop
        self.recipients = None if recipients is None else frozenset(self.key(Address(r, "")) for r in recipients)

    def key(self, address: Address) -> str:
        """The local-part as it is compared in this domain."""
        return address.local if self.case_sensitive else address.mailbox.rpartition("@")[0]


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

    def find(self, domain: str) -> Domain | None:
        """The row that serves a domain (lower-case A-labels), None when it is not ours."""
        row = self._rows.get(domain)
        if row is not None:
            return row
        return find_name(self._rows, domain) if self._wildcards else self._rows.get("*")

    def resolve(self, address: Address, row: Domain | None) -> Address | None:
        """The mailbox that a recipient stands for, itself as a rule; None when it is unknown. `row` is what serves its
        domain. A mailbox of a case-sensitive domain carries its own key."""
        local = address.local
        if len(local) == 10 and local.lower() == "postmaster":
            if self._postmaster is not None:
                return self._postmaster
            return address if address.domain else Address("postmaster", self._home)
        if row is None or (row.recipients is not None and row.key(address) not in row.recipients):
            return None
        return _keyed(address, row)

    def route(self, address: Address) -> tuple[str, Address]:
        """The transport for an accepted address ("" when none is left), and the mailbox that it stands for. A list
        that has changed since loses no mail."""
        row = self.find(address.domain)
        mailbox = self.resolve(address, row) or _keyed(address, row)
        if mailbox.domain != address.domain:
            row = self.find(mailbox.domain)
        return (row.transport if row is not None else "", mailbox)


def _keyed(address: Address, row: Domain | None) -> Address:
    """The address with the key that it has in its domain."""
    if row is None or not row.case_sensitive:
        return address
    return Address(address.local, address.domain, f"{address.local}@{address.domain}")
