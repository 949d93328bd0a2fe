"""What VRFY and EXPN are told: whether a mailbox exists, and what an alias stands for.

In: an address, without a domain where the client gave none. Out: 250 with the address or the members, 550 for what is
unknown here, 252 where that must not be told or is not known: to strangers as a rule, of domains that take every
address, and of those whose mailboxes somebody else knows. Nobody is asked and nothing is looked for in another domain.
RFC 5321 3.5, 7.3; RFC 6531 3.7.4.2.
"""

from __future__ import annotations

from ..address import Address
from ..aliases import Aliases, ExpansionError
from ..domains import Domains
from ..reply import R252_CANNOT_EXPN, R252_CANNOT_VRFY, R550_NO_SUCH_LIST, R550_UNKNOWN_MAILBOX, Reply
from ..verdict import Ask, Stage, Verdict

MOST = 100  # lines of an answer

UNTOLD = {
    Stage.VRFY: Verdict("not-told", R252_CANNOT_VRFY),
    Stage.EXPN: Verdict("not-told", R252_CANNOT_EXPN),
}
UNKNOWN_MAILBOX = Verdict("unknown-mailbox", R550_UNKNOWN_MAILBOX)
NO_SUCH_LIST = Verdict("no-such-list", R550_NO_SUCH_LIST)


class Verify:
    """The check at VRFY or EXPN. `everyone`: strangers are told, too."""

    def __init__(self, stage: Stage, domains: Domains, aliases: Aliases | None, everyone: bool) -> None:
        self.stage = stage
        self._domains = domains
        self._aliases = aliases
        self._everyone = everyone

    def __call__(self, ask: Ask) -> Verdict:
        untold = UNTOLD[self.stage]
        if not (self._everyone or ask.client.trusted or ask.client.user):
            return untold
        address = ask.recipient
        if not address.domain:
            address = Address(address.local, self._domains.home)
        try:
            members = self._aliases.expand(address) if self._aliases is not None else None
        except ExpansionError:
            return untold
        if self.stage is Stage.EXPN:
            told = [member.address for member in members or ()]
            return self._tell(told) if told else NO_SUCH_LIST
        return self._tell([address]) if members is not None else self._verify(address)

    def _verify(self, address: Address) -> Verdict:
        row = self._domains.find(address.domain)
        if row is None or row.is_open:
            return UNTOLD[Stage.VRFY]
        mailbox = self._domains.resolve(address, row)
        return UNKNOWN_MAILBOX if mailbox is None else self._tell([mailbox])

    def _tell(self, addresses: list[Address]) -> Verdict:
        if len(addresses) > MOST or not all(address.wire.isascii() for address in addresses):
            return UNTOLD[self.stage]
        return Verdict("told", Reply(250, "2.1.5", "\n".join(f"<{address.wire}>" for address in addresses)))
