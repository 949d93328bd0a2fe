"""Aliases: what an address of ours stands for, when that is other addresses.

In: an address, and tables of aliases: those of its domain, then those of all domains; in each, `name@domain` goes
before `name`, and the address with its detail before the one without. Out: its members, each mailbox once, as far as
they are ours already resolved. An alias that has an owner (`owner-NAME` in the same table) is a list: what goes to its
members comes from the owner (RFC 5321 3.9.2), which the innermost list decides. An alias that names itself keeps its
mailbox. A member that is unknown here is one with a fault: it is reported like any that cannot be delivered to.
What an expansion may grow to is bounded. Not here: the text of a table, where loops are found (list_compile.py).
Failure: ExpansionError.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .address import Address
from .domains import Domain, Domains
from .lists import Values
from .verdict import Member

SEPARATOR = "\x1f"  # between the owner and the targets of an entry; no address holds it
DEPTH = 20  # aliases in aliases
STEPS = 10  # for each address that an alias may stand for; lists of lists name many of them often
OWNER = "owner-"


class ExpansionError(Exception):
    """An alias stands for too many addresses, or too deep."""


class Entry(NamedTuple):
    """What stands in a table: `local@domain` of owner and targets, the domain empty where it is that of the alias."""

    owner: str
    targets: tuple[str, ...]

    def render(self) -> str:
        return SEPARATOR.join((self.owner, *self.targets))


def parse_entry(value: str) -> Entry:
    owner, *targets = value.split(SEPARATOR)
    return Entry(owner, tuple(targets))


class Aliases:
    """`common` has those of all domains. An alias may stand for `most` addresses."""

    def __init__(self, domains: Domains, common: Values | None, most: int) -> None:
        self._domains = domains
        self._common = common
        self._most = most

    def expand(self, address: Address) -> tuple[Member, ...] | None:
        """The members of an alias, None when it is none. Raises ExpansionError."""
        address = self._domains.stand_in(address)
        row = self._domains.find(address.domain)
        entry = self._find(address, row)
        if entry is None:
            return None
        members: dict[str, Member] = {}
        steps = iter(range(STEPS * self._most))
        for member in self._walk(address, entry, None, (_key(address, row),), set(), steps):
            members.setdefault(member.address.mailbox, member)
            if len(members) > self._most:
                raise ExpansionError(f"more than {self._most} addresses")
        return tuple(members.values())

    def _walk(
        self,
        alias: Address,
        entry: Entry,
        sender: Address | None,
        above: tuple[str, ...],
        been: set[str],
        steps: Iterator[int],
    ) -> Iterator[Member]:
        """`sender` is the owner of the list around it, `above` the aliases that led here, `been` all that were walked:
        a second time they give nothing new, and each that names the next one twice would double the work. `steps`:
        how many names may be looked at, for nobody else is served meanwhile."""
        if len(above) > DEPTH:
            raise ExpansionError("too deep")
        if entry.owner:
            sender = _address(entry.owner, alias)
        for text in entry.targets:
            if next(steps, None) is None:
                raise ExpansionError("too many steps")
            target = self._domains.stand_in(_address(text, alias))
            row = self._domains.find(target.domain)
            key = _key(target, row)
            inner = None if key in above else self._find(target, row)
            if inner is None:
                yield self._member(target, row, sender)
            elif key not in been:
                been.add(key)
                yield from self._walk(target, inner, sender, (*above, key), been, steps)

    def _member(self, target: Address, row: Domain | None, sender: Address | None) -> Member:
        if row is None:
            # Only its own host knows which local-parts are one mailbox (RFC 5321 2.4).
            return Member(Address(target.local, target.domain, str(target)), sender, ours=False)
        mailbox = self._domains.resolve(target, row)
        hop = row.hop() if row.hop is not None else None
        if mailbox is None:
            return Member(target, sender, hop=hop, fault="unknown mailbox")
        return Member(mailbox, sender, hop=hop)

    def _find(self, address: Address, row: Domain | None) -> Entry | None:
        if row is None:
            return None
        local, _, domain = address.mailbox.rpartition("@")
        locals_ = (local,) if row.base(local) == local else (local, row.base(local))
        for name in locals_:
            for table in (row.aliases, self._common):
                if table is not None:
                    value = table.get(f"{name}@{domain}") or table.get(name)
                    if value is not None:
                        return parse_entry(value)
        return None


def _key(address: Address, row: Domain | None) -> str:
    return address.mailbox if row is None else f"{row.key(address)}@{address.domain}"


def _address(text: str, alias: Address) -> Address:
    local, _, domain = text.rpartition("@")
    return Address(local, domain or alias.domain)
