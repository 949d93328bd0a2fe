"""Who is a recipient here: the domain must be served, the mailbox known in it.

In: RCPT's address. Out: 550 5.7.1 for a domain that is not ours, whatever form the address has: percent and bang
forms are plain local-parts, and source routes are gone before; 550 5.1.1 for an unknown mailbox of ours; 550 5.6.7 for
one whose server would not take the addresses; else the mailbox that the address stands for, with what its next host
takes. Postmaster is always accepted. Who may send elsewhere was decided before (relay.py).
RFC 5321 3.6.2, 4.5.1; RFC 6531 3.5.
"""

from __future__ import annotations

from ..domains import Domains
from ..reply import R550_HOP_NEEDS_ASCII, R550_RELAYING_DENIED, R550_UNKNOWN_MAILBOX
from ..verdict import Ask, Stage, Verdict

RELAYING_DENIED = Verdict("relaying-denied", R550_RELAYING_DENIED)
UNKNOWN_MAILBOX = Verdict("unknown-mailbox", R550_UNKNOWN_MAILBOX)
HOP_NEEDS_ASCII = Verdict("hop-needs-ascii", R550_HOP_NEEDS_ASCII)
KNOWN_MAILBOX = Verdict("known-mailbox")


class Recipients:
    """The check at RCPT."""

    stage = Stage.RCPT

    def __init__(self, domains: Domains) -> None:
        self._domains = domains

    def __call__(self, ask: Ask) -> Verdict:
        address = ask.recipient
        row = self._domains.find(address.domain)
        if row is None and address.domain:
            return RELAYING_DENIED
        mailbox = self._domains.resolve(address, row)
        if mailbox is None:
            return UNKNOWN_MAILBOX
        if row is not None and row.hop is not None and (hop := row.hop()) is not None:
            if not hop.utf8 and not (mailbox.local.isascii() and ask.reverse_path.local.isascii()):
                return HOP_NEEDS_ASCII
            return Verdict("known-mailbox", recipient=mailbox, hop=hop)
        return KNOWN_MAILBOX if mailbox is address else Verdict("known-mailbox", recipient=mailbox)
