"""Which addresses a user may send as: a value, made by a credential store.

In: mailboxes and domains. Out: whether an address, of an envelope or of a header, is one of them. Mailboxes are keys as
in `Address.mailbox`, domains as in `Address.domain`; `*` among the domains stands for every address there is. A domain
does not hold those below it. The null reverse-path is nobody's address and not asked about here. RFC 6409 6.1.
"""

from __future__ import annotations

from .address import Address


class Rights:
    """What one user may stand in as. Immutable by convention."""

    __slots__ = ("addresses", "domains")

    def __init__(self, addresses: frozenset[str] = frozenset(), domains: frozenset[str] = frozenset()) -> None:
        self.addresses = addresses
        self.domains = domains

    def allows(self, address: Address) -> bool:
        return address.mailbox in self.addresses or address.domain in self.domains or "*" in self.domains


NO_RIGHTS = Rights()
