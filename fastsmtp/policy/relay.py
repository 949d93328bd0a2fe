"""Who may send to any domain: a client from a trusted network, and a user who has proved to be one.

In: RCPT's address. Out: nothing of any other client, of a domain that is served here, or one that no way
leads to: recipients.py, which is asked after this, decides about them, and refuses what is not ours. Else the address
as it came: only its own host knows which local-parts are one mailbox (RFC 5321 2.4), so its key keeps their case.
`Trust` says whether a client is trusted, by its address; a unix socket has none, and is not.
RFC 5321 3.6.1, 7.1; RFC 2505 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import TypeAlias

from ..address import Address
from ..domains import Domains
from ..verdict import Ask, Stage, Verdict

Network: TypeAlias = IPv4Network | IPv6Network

REMEMBERED = 10_000  # addresses of clients whose answer is kept: looking one up takes 3 µs


class Trust:
    """Whether an address, without brackets and unmapped, is in one of the networks."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = tuple(networks)
        self._known: dict[str, bool] = {}

    def __call__(self, ip: str) -> bool:
        known = self._known.get(ip)
        if known is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            known = self._known[ip] = self._look_up(ip)
        return known

    def _look_up(self, ip: str) -> bool:
        try:
            # A zone ("fe80::1%eth0") says where an address was seen, not what it is.
            address = ip_address(ip.partition("%")[0])
        except ValueError:
            return False
        return any(address in network for network in self._networks)


class Relay:
    """The check at RCPT."""

    stage = Stage.RCPT

    def __init__(self, domains: Domains, route: Callable[[Address], tuple[str, Address]]) -> None:
        """`route` gives the name of an address's way out, empty where there is none."""
        self._domains = domains
        self._route = route

    def __call__(self, ask: Ask) -> Verdict | None:
        if not (ask.client.trusted or ask.client.user):
            return None
        address = ask.recipient
        if not address.domain or self._domains.find(address.domain) is not None or not self._route(address)[0]:
            return None
        kept = Address(address.local, address.domain, f"{address.local}@{address.domain}")
        return Verdict("relayed", recipient=kept, ours=False)
