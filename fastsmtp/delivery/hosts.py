"""Which hosts a domain's mail goes to: a domain in, the addresses to try in their order out, or what became of it.

Preference order, by chance within equals. An address record counts only where there is no MX record, never after an
error. Where we stand in the list ourselves, we and all that are no better are left out (RFC 5321 5.1), so that mail
goes towards its end; it is a loop only when nobody better was ever named. Addresses that no mail host of others has
(loopback, link-local, multicast, 0/8 and the like) are passed over. Of one host an IPv6 and an IPv4 address come in
turn, IPv6 first, so that a broken IPv6 costs one try; no host takes the places of others.
Not here: asking DNS (dns.py), connecting, which hosts are dead.
Failure: an Outcome. What does not exist has failed; what could not be asked is deferred; the table is below.
RFC 5321 5.1, RFC 7505, RFC 3463 3.2 and 3.5, RFC 6724 (only that IPv6 comes first).
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from ipaddress import ip_address, ip_network
from itertools import groupby, zip_longest
from typing import Any, NamedTuple, TypeAlias

from ..dns import MX, Answer, IPAddress, Resolver, Status
from . import Outcome, Result, Scope

ADDRESSES = 5  # tried in one attempt
PAIR = 2  # addresses that one host has before the next one's turn: one of each family
BATCH = 10  # hosts whose addresses are asked for at once
REMEMBERED = 60.0  # seconds for which it is known where an address leads
MANY = 10_000  # addresses of which it is known


class Host(NamedTuple):
    """An address to try. `name` is the host's name as DNS has it, or the literal: what a certificate is checked for."""

    name: str
    address: IPAddress


Hosts: TypeAlias = tuple[Host, ...]


class Way(Enum):
    """Where an address leads."""

    OUT = "to another machine"
    OWN = "to this one"
    NONE = "nowhere from here"
    UNUSABLE = "to no mail host"


# Why there is no host to try. Postfix and Exim fail the same ones for good (Postfix 5.4.4, RFC 3463 3.5 "unable to
# route"), and Postfix defers as we do where a better host than ourselves was named and is not to be found.
NULL_MX = Outcome(Result.FAILED, "5.1.10", "the domain takes no mail (null MX)", Scope.HOST)  # RFC 7505 4: 556
NO_DOMAIN = Outcome(Result.FAILED, "5.1.2", "the domain does not exist", Scope.HOST)
NO_ADDRESS = Outcome(Result.FAILED, "5.1.2", "the domain has neither MX nor address records", Scope.HOST)
NO_HOSTS = Outcome(Result.FAILED, "5.4.4", "none of the domain's MX hosts exists", Scope.HOST)
UNUSABLE = Outcome(Result.FAILED, "5.4.4", "the domain's mail hosts have only addresses of no use", Scope.HOST)
LOOP = Outcome(
    Result.FAILED, "5.4.6", "the domain's best mail host is this server, which does not serve it", Scope.HOST
)
NO_BETTER = Outcome(Result.DEFERRED, "4.4.4", "no better mail host than this server is to be found", Scope.HOST)
NO_SMARTHOST = Outcome(Result.DEFERRED, "4.4.4", "the configured host has no address", Scope.HOST)

# RFC 6890 and IANA's registries of special addresses: those that cannot be another machine's. Private ones can.
_NO_MAIL_HOST = [
    ip_network(network)
    for network in ("0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4", "::/96", "fe80::/10", "ff00::/8")
]


class Finder:
    """`hostname` is our own name; `own_addresses` are ours without being on this machine, such as a NAT's. With
    `allow_loopback`, loopback addresses are usable and are others. `way` says OUT, OWN or NONE; `shuffle` puts a list
    into an order by chance; `now` is in seconds."""

    def __init__(
        self,
        dns: Resolver,
        hostname: str,
        *,
        own_addresses: Iterable[IPAddress] = (),
        allow_loopback: bool = False,
        way: Callable[[IPAddress], Way] | None = None,
        shuffle: Callable[[list[Any]], None] = random.shuffle,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dns = dns
        self._hostname = hostname.lower()
        self._own_addresses = frozenset(own_addresses)
        self._allow_loopback = allow_loopback
        self._find_way = way or find_way
        self._shuffle = shuffle
        self._now = now
        self._ways: dict[IPAddress, Way] = {}
        self._forget_at = 0.0

    async def find(self, domain: str) -> Hosts | Outcome:
        """At most five addresses. `domain` as in Address: A-labels, or a literal."""
        if domain.startswith("["):
            return self._find_literal(domain)
        answer = await self._dns.mx(domain)
        if answer.status is Status.FAILED:
            return _unanswered(answer)
        if answer.status is Status.NO_NAME:
            return NO_DOMAIN
        if answer.status is Status.NO_RECORDS:
            return await self._find_among((MX(0, domain.lower()),), NO_ADDRESS)
        named = [record for record in answer.records if record.host]
        return await self._find_among(named, NO_HOSTS) if named else NULL_MX

    async def find_host(self, name: str) -> Hosts | Outcome:
        """The addresses of a host that the configuration names, or of an IP address: without MX, any of them usable,
        and never failed for good, for a configuration can be mended."""
        try:
            address = ip_address(name)
        except ValueError:
            pass
        else:
            return (Host(name, address),)
        answer = await self._dns.addresses(name)
        if answer.status is Status.FAILED:
            return _unanswered(answer)
        found = [(name, self._alternate(answer.records))] if answer.records else []
        return choose(found) or NO_SMARTHOST

    def _find_literal(self, literal: str) -> Hosts | Outcome:
        address = ip_address(literal[1:-1].removeprefix("ipv6:"))
        way = self._way(address)
        if way is Way.OWN:
            return LOOP
        return UNUSABLE if way is Way.UNUSABLE else (Host(literal, address),)

    async def _find_among(self, records: Sequence[MX], nobody: Outcome) -> Hosts | Outcome:
        """The hosts of `records`, which stand in order of preference. `nobody`: none of them has an address."""
        mine = min((record.preference for record in records if record.host == self._hostname), default=None)
        found: list[tuple[str, list[IPAddress]]] = []
        failed: Answer[Any] | None = None
        unusable = False
        for preference, group in groupby(records, lambda record: record.preference):
            if mine is not None and mine <= preference:
                break
            equals = await self._resolve([record.host for record in group])
            if any(self._way(address) is Way.OWN for _, answer in equals for address in answer.records):
                mine = preference
                break
            for name, answer in equals:
                if answer.status is Status.FAILED:
                    failed = answer
                usable = [address for address in answer.records if self._way(address) is not Way.UNUSABLE]
                unusable = unusable or len(usable) < len(answer.records)
                if usable:
                    found.append((name, self._alternate(usable)))
            if sum(min(PAIR, len(addresses)) for _, addresses in found) >= ADDRESSES:
                break
        if found:
            return choose(found)
        if failed is not None:
            return _unanswered(failed)
        if mine is not None:
            return LOOP if mine == records[0].preference else NO_BETTER
        return UNUSABLE if unusable else nobody

    async def _resolve(self, names: list[str]) -> list[tuple[str, Answer[IPAddress]]]:
        """By chance, some at once, until there are enough: among hundreds of equals nobody looks at all."""
        self._shuffle(names)
        found: list[tuple[str, Answer[IPAddress]]] = []
        for start in range(0, len(names), BATCH):
            batch = names[start : start + BATCH]
            found += zip(batch, await self._dns.addresses_of(batch), strict=True)
            if sum(bool(answer.records) for _, answer in found) >= ADDRESSES:
                break
        return found

    def _alternate(self, addresses: Iterable[IPAddress]) -> list[IPAddress]:
        """IPv6 and IPv4 in turn, IPv6 first; by chance within each, for what is kept always comes in the same order.
        Those that no route leads to are left out while there are others."""
        ordered = list(addresses)
        self._shuffle(ordered)
        six, four = ([address for address in ordered if address.version == version] for version in (6, 4))
        turns = [address for turn in zip_longest(six, four) for address in turn if address is not None]
        return [address for address in turns if self._way(address) is not Way.NONE] or turns

    def _way(self, address: IPAddress) -> Way:
        """Where it leads; 15 µs for one that is new."""
        if self._now() >= self._forget_at or len(self._ways) > MANY:
            self._ways.clear()
            self._forget_at = self._now() + REMEMBERED
        way = self._ways.get(address)
        if way is None:
            way = self._ways[address] = self._judge(address)
        return way

    def _judge(self, address: IPAddress) -> Way:
        if address in self._own_addresses:
            return Way.OWN
        if address.is_loopback:
            return Way.OUT if self._allow_loopback else Way.UNUSABLE
        if any(address in network for network in _NO_MAIL_HOST):
            return Way.UNUSABLE
        return self._find_way(address)


def choose(hosts: Sequence[tuple[str, Sequence[IPAddress]]]) -> Hosts:
    """Five addresses at most, each once, in the order of `hosts`: a pair of each as long as there is room, then more of
    the first ones."""
    seen: set[IPAddress] = set()
    lists: list[list[Host]] = []
    for name, addresses in hosts:
        lists.append([Host(name, address) for address in addresses if address not in seen])
        seen.update(addresses)
    taken = [0] * len(lists)
    room = ADDRESSES
    while room and any(count < len(each) for count, each in zip(taken, lists, strict=True)):
        for place, each in enumerate(lists):
            more = min(PAIR, len(each) - taken[place], room)
            taken[place] += more
            room -= more
    return tuple(host for count, each in zip(taken, lists, strict=True) for host in each[:count])


def find_way(address: IPAddress) -> Way:
    """Asks the kernel's routing table, which knows every address of this machine: a datagram socket is connected,
    nothing is sent."""
    try:
        with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 25))
            return Way.OWN if probe.getsockname()[0] == str(address) else Way.OUT
    except OSError:
        return Way.NONE


def _unanswered(answer: Answer[Any]) -> Outcome:
    return Outcome(Result.DEFERRED, "4.4.3", f"DNS: {answer.reason}", Scope.HOST)
