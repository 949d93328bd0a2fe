"""The ways out: which transport takes the mail for an address, asked anew at each attempt.

In: the served domains, the rows of [[route]], and where everything else goes. Out: a transport's name and the mailbox
that the address stands for; the name is empty where no way leads. A served domain has its own transport; after it an
exact [[route]] wins over `*.parent`, the nearest parent over a farther one, those over `*`, and that over [relay].
A way permits nothing: who may send where is decided when mail is taken (policy/recipients.py, policy/relay.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from .address import Address
from .domains import Domains, find_name


class Routes:
    """`ways` has a transport's name for each domain name of [[route]]; `relay` is that of [relay], or empty."""

    __slots__ = ("_domains", "_relay", "_ways")

    def __init__(self, domains: Domains, ways: Mapping[str, str], relay: str = "") -> None:
        self._domains = domains
        self._ways = dict(ways)
        self._relay = relay

    def route(self, address: Address) -> tuple[str, Address]:
        """The transport for an accepted address, and the mailbox there."""
        found = self._domains.route(address)
        if found[0]:
            return found
        return (find_name(self._ways, found[1].domain) or self._relay, found[1])
