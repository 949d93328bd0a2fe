"""Aliases: what an address of ours stands for, when that is other addresses.

In: an address, and tables of aliases: those of its domain, then those of all domains; in each, `name@domain` goes
before `name`, and the address with its detail before the one without. Out: its members, each mailbox once, as far as
they are ours already resolved. An alias that has an owner (`owner-NAME` in the same table) is a list: what goes to its
members comes from the owner (RFC 5321 3.9.2), which the innermost list decides. An alias that names itself keeps its
mailbox. A member that is unknown here is one with a fault: it is reported like any that cannot be delivered to.
What an expansion may grow to is bounded. Nobody else is served meanwhile, so each name of an entry is looked up once
for a version of the lists, and remembered: 1,000 members take 6 ms the first time, and then 0.5. Not here: the text of
a table, where loops are found (list_compile.py). Failure: ExpansionError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from .address import Address
from .domains import Domain, Domains
from .lists import Values
from .verdict import Member

SEPARATOR = "\x1f"  # between the owner and the targets of an entry; no address holds it
DEPTH = 20  # aliases in aliases
STEPS = 10  # for each address that an alias may stand for; lists of lists name many of them often
OWNER = "owner-"
REMEMBERED = 50_000  # names that entries hold, about 0.6 KB each


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


class _Target(NamedTuple):
    """What an entry names: `inner` is the value of its own entry, None where it has none. Where that does not count, it
    is `mailbox`, None where that is unknown."""

    key: str
    row: Domain | None
    inner: str | None
    address: Address
    mailbox: Address | None


class _Known:
    """An entry in a domain, of which the first names were looked at: `members` are their members as they were last."""

    __slots__ = ("members", "owner", "targets", "texts")

    def __init__(self, owner: Address | None, texts: tuple[str, ...]) -> None:
        self.owner = owner
        self.texts = texts
        self.targets: list[_Target] = []
        self.members: list[Member | None] = []


class Aliases:
    """`common` has those of all domains. An alias may stand for `most` addresses. What is remembered of lists is
    forgotten when `version` says something else than before."""

    def __init__(
        self, domains: Domains, common: Values | None, most: int, version: Callable[[], object] = lambda: None
    ) -> None:
        self._domains = domains
        self._common = common
        self._most = most
        self._version = version
        self._known_as_of = version()
        self._known: dict[tuple[str, str], _Known] = {}  # by value and domain
        self._names = 0  # that are remembered

    def expand(self, address: Address) -> tuple[Member, ...] | None:
        """The members of an alias, None when it is none. Raises ExpansionError."""
        address = self._domains.stand_in(address)
        row = self._domains.find(address.domain)
        value = self._find(address, row)
        if value is None:
            return None
        self._forget()
        members: dict[str, Member] = {}
        steps = iter(range(STEPS * self._most))
        for member in self._walk(value, address.domain, None, (_key(address, row),), set(), steps):
            members.setdefault(member.address.mailbox, member)
            if len(members) > self._most:
                raise ExpansionError(f"more than {self._most} addresses")
        return tuple(members.values())

    def _walk(
        self,
        value: str,
        domain: str,
        sender: Address | None,
        above: tuple[str, ...],
        been: set[str],
        steps: Iterator[int],
    ) -> Iterator[Member]:
        """`domain` is that of the alias, `sender` the owner of the list around it, `above` the aliases that led here,
        `been` all that were walked: a second time they give nothing new, and each that names the next one twice would
        double the work. `steps`: how many names may be looked at."""
        if len(above) > DEPTH:
            raise ExpansionError("too deep")
        entry = self._entry(value, domain)
        sender = entry.owner or sender
        for number, text in enumerate(entry.texts):
            if next(steps, None) is None:
                raise ExpansionError("too many steps")
            if number == len(entry.targets):
                self._look_up(entry, _address(text, domain))
            target = entry.targets[number]
            if target.inner is None or target.key in above:
                yield self._member(entry, number, sender)
            elif target.key not in been:
                been.add(target.key)
                inner = self._walk(target.inner, target.address.domain, sender, (*above, target.key), been, steps)
                yield from inner

    def _entry(self, value: str, domain: str) -> _Known:
        known = self._known.get((value, domain))
        if known is None:
            owner, texts = parse_entry(value)
            known = self._known[value, domain] = _Known(_address(owner, domain) if owner else None, texts)
            self._names += 1
        return known

    def _look_up(self, entry: _Known, address: Address) -> None:
        address = self._domains.stand_in(address)
        row = self._domains.find(address.domain)
        if row is None:
            # Only its own host knows which local-parts are one mailbox (RFC 5321 2.4).
            mailbox: Address | None = Address(address.local, address.domain, str(address))
        else:
            mailbox = self._domains.resolve(address, row)
        entry.targets.append(_Target(_key(address, row), row, self._find(address, row), address, mailbox))
        entry.members.append(None)
        self._names += 1

    def _member(self, entry: _Known, number: int, sender: Address | None) -> Member:
        _, row, _, address, mailbox = entry.targets[number]
        hop = row.hop() if row is not None and row.hop is not None else None
        member = entry.members[number]
        if member is None or member.hop is not hop or member.sender is not sender:
            fault = "unknown mailbox" if mailbox is None else ""
            member = Member(mailbox or address, sender, hop, row is not None, fault)
            entry.members[number] = member
        return member

    def _forget(self) -> None:
        """What holds no longer, or has become too much."""
        version = self._version()
        if version != self._known_as_of or self._names > REMEMBERED:
            self._known_as_of = version
            self._known.clear()
            self._names = 0

    def _find(self, address: Address, row: Domain | None) -> str | None:
        """The value of an address's entry."""
        if row is None:
            return None
        local, _, domain = address.mailbox.rpartition("@")
        locals_ = (local,) if row.base(local) == local else (local, row.base(local))
        for name in locals_:
            for table in (row.aliases, self._common):
                if table is not None:
                    value = table.get(f"{name}@{domain}") or table.get(name)
                    if value is not None:
                        return value
        return None


def _key(address: Address, row: Domain | None) -> str:
    return address.mailbox if row is None else f"{row.key(address)}@{address.domain}"


def _address(text: str, domain: str) -> Address:
    """`domain` is that of the alias."""
    local, _, named = text.rpartition("@")
    return Address(local, named or domain)
