"""Who is a recipient here: the domain must be served, the mailbox known in it.

In: RCPT's address. Out: 550 5.7.1 for a domain that is not ours, whatever form the address has: percent and bang
forms are plain local-parts, and source routes are gone before; 550 5.1.1 for an unknown mailbox of ours; 550 5.6.7 for
one whose server would not take the addresses; else the mailbox that the address stands for, with what its next host
takes, or the members of an alias. Postmaster is always accepted. Where somebody else knows the mailboxes of a domain,
the answer is waited for; one that does not come is 451 4.3.0: neither unknown nor welcome.
Who may send elsewhere was decided before (relay.py). RFC 5321 3.6.2, 3.9, 4.5.1; RFC 6531 3.5.
"""

from __future__ import annotations

from collections.abc import Awaitable

from ..address import Address
from ..aliases import Aliases, ExpansionError
from ..domains import Domain, Domains, Found
from ..reply import (
    R451_ALIAS_TOO_LARGE,
    R451_RECIPIENT_NOT_CHECKED,
    R550_HOP_NEEDS_ASCII,
    R550_RELAYING_DENIED,
    R550_UNKNOWN_MAILBOX,
)
from ..verdict import Ask, Member, Stage, Verdict

RELAYING_DENIED = Verdict("relaying-denied", R550_RELAYING_DENIED)
UNKNOWN_MAILBOX = Verdict("unknown-mailbox", R550_UNKNOWN_MAILBOX)
HOP_NEEDS_ASCII = Verdict("hop-needs-ascii", R550_HOP_NEEDS_ASCII)
NOT_CHECKED = Verdict("recipient-not-checked", R451_RECIPIENT_NOT_CHECKED)
ALIAS_TOO_LARGE = Verdict("alias-too-large", R451_ALIAS_TOO_LARGE)
KNOWN_MAILBOX = Verdict("known-mailbox")


class Recipients:
    """The check at RCPT."""

    stage = Stage.RCPT

    def __init__(self, domains: Domains, aliases: Aliases | None = None) -> None:
        self._domains = domains
        self._aliases = aliases

    def __call__(self, ask: Ask) -> Verdict | Awaitable[Verdict]:
        address = ask.recipient
        row = self._domains.find(address.domain)
        if row is None and address.domain:
            return RELAYING_DENIED
        if self._aliases is not None:
            expanded = self._expand(address)
            if expanded is not None:
                return expanded
        if row is not None and row.ask is not None and address.local.lower() != "postmaster":
            found = row.ask(address)
            return self._answer(ask, row, found) if isinstance(found, Found) else self._wait(ask, row, found)
        mailbox = self._domains.resolve(address, row)
        if mailbox is address and (row is None or row.hop is None):  # most mail
            return KNOWN_MAILBOX
        return self._decide(ask, row, mailbox)

    def _expand(self, address: Address) -> Verdict | None:
        """The members of an alias; None when the address is none."""
        assert self._aliases is not None
        try:
            members = self._aliases.expand(address)
        except ExpansionError:
            return ALIAS_TOO_LARGE
        if members is None:
            return None
        return UNKNOWN_MAILBOX if all(member.fault for member in members) else _alias(members)

    async def _wait(self, ask: Ask, row: Domain, waiting: Awaitable[Found]) -> Verdict:
        return self._answer(ask, row, await waiting)

    def _answer(self, ask: Ask, row: Domain, found: Found) -> Verdict:
        """What somebody else said of the mailbox."""
        if found is Found.TEMPFAIL:
            return NOT_CHECKED
        mailbox = self._domains.resolve(ask.recipient, row) if found is Found.KNOWN else row.catch_all
        return self._decide(ask, row, mailbox)

    def _decide(self, ask: Ask, row: Domain | None, mailbox: Address | None) -> Verdict:
        """`row` serves the domain that was asked for; None: no domain was, and this is the postmaster."""
        if mailbox is None:
            return UNKNOWN_MAILBOX
        if row is not None and mailbox is row.catch_all:
            if self._aliases is not None and (expanded := self._expand(mailbox)) is not None:
                return expanded
            row = self._domains.find(mailbox.domain)
        if row is not None and row.hop is not None and (hop := row.hop()) is not None:
            if not hop.utf8 and not (mailbox.local.isascii() and ask.reverse_path.local.isascii()):
                return HOP_NEEDS_ASCII
            return Verdict("known-mailbox", recipient=mailbox, hop=hop)
        return KNOWN_MAILBOX if mailbox is ask.recipient else Verdict("known-mailbox", recipient=mailbox)


def _alias(members: tuple[Member, ...]) -> Verdict:
    return Verdict("alias", members=members)
