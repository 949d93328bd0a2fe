"""Call-ahead: whether the server behind a transport would take mail for an address, asked before it is taken here.

In: an address. Out: yes, no, or an AheadError that says why there is no answer. MAIL FROM:<>, RCPT and RSET go over
connections of its own, which are kept for a few questions: a server slows a client down that is refused often.
No is what the server refuses for good and says of the address or the mailbox; any other refusal tells something about
the two servers, and what cannot be asked is no answer. Not here: what is remembered (policy/lookup.py).
RFC 5321 3.3, 4.1.1.5; RFC 3463 3.2, 3.3.
"""

from __future__ import annotations

import asyncio
import time

from ..address import NULL, Address
from ..message import Content, Envelope, Message, Recipient
from . import Delivery, Outcome, Result, Scope
from .pool import Limits
from .smtp import Smtp

AT_ONCE = 10  # questions, of each worker
# Postfix lets a client wait from its tenth error on.
KEPT = Limits(messages=8, idle=10.0)
# Subjects of a status that speak of the address itself: none, address, mailbox, and an address it has no octets for.
OF_ADDRESS = ("5.0.", "5.1.", "5.2.", "5.6.7")


class AheadError(Exception):
    """There is no answer; one line."""


class Ahead:
    """`transport` is one of its own, made with KEPT."""

    def __init__(self, transport: Smtp) -> None:
        self._transport = transport
        self._free = asyncio.Semaphore(AT_ONCE)

    async def ask(self, address: Address) -> bool:
        """Whether it would be taken. Raises AheadError."""
        envelope = Envelope(NULL)
        envelope.recipients.append(Recipient(address))
        message = Message(envelope, b"", [], 0, 0, Content.NONE, time.time())
        async with self._free:
            outcomes = await self._transport.deliver([Delivery(message, envelope.recipients, [0], probe=True)])
        return _answer(outcomes[0][0])

    async def close(self) -> None:
        await self._transport.close()


def _answer(outcome: Outcome) -> bool:
    if outcome.result is Result.DELIVERED:
        return True
    if outcome.result is Result.FAILED and outcome.scope is Scope.RECIPIENT and outcome.status.startswith(OF_ADDRESS):
        return False
    raise AheadError(outcome.text)
