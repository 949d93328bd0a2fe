"""What a transport is: it takes deliveries and says, for each recipient, what became of it.

A transport says which destination a recipient belongs to; what goes to one destination waits together. To a transport
without `concurrency` the queue hands as many deliveries at once as wait for it, so that one flush can serve them all;
to any other a few at a time, and several times at once. A transport knows neither queue nor spool. `deliver` never
raises for what a disk or a peer does: that is an Outcome. "delivered" is said only when it is durable: file and name
are on stable storage, or the next hop said 250.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from enum import Enum
from typing import Protocol

from ..address import Address
from ..message import Message, Recipient


class Result(Enum):
    """The fate of one recipient in one attempt."""

    DELIVERED = "delivered"
    DEFERRED = "deferred"
    FAILED = "failed"


class Scope(Enum):
    """What a failure is about, and so what else is worth trying."""

    SESSION = "session"
    HOST = "host"
    MESSAGE = "message"
    RECIPIENT = "recipient"


class Retry(Enum):
    """Where a deferred recipient may be tried again. Of a failed one only NEXT_HOST says something: it has failed when
    no other host of its destination takes it."""

    SAME_HOST = "same host, over another connection, at once"
    NEXT_HOST = "next host, at once"
    LATER = "later"


class Outcome:
    """One recipient's result. `status` is an enhanced status code (RFC 3463), `text` says why, on one line.

    What a next hop said: `host` is its name, `reply` its answer with the code, on one line; both empty where nobody
    answered. `relayed`: delivered to a host that sends no report of success (RFC 3461 5.2.2); `reports`: to one that
    was told what the sender wants to know, and reports success itself.
    """

    __slots__ = ("host", "relayed", "reply", "reports", "result", "retry", "scope", "status", "text")

    def __init__(
        self,
        result: Result,
        status: str,
        text: str,
        scope: Scope = Scope.RECIPIENT,
        retry: Retry = Retry.LATER,
        host: str = "",
        reply: str = "",
        relayed: bool = False,
        reports: bool = False,
    ) -> None:
        self.result = result
        self.status = status
        self.text = text
        self.scope = scope
        self.retry = retry
        self.host = host
        self.reply = reply
        self.relayed = relayed
        self.reports = reports


# The one outcome of success without a next hop. With one, `result` is DELIVERED and host and reply are told.
DELIVERED = Outcome(Result.DELIVERED, "2.0.0", "delivered")


class Delivery:
    """One message for some of its recipients, all by one transport.

    `numbers` are the recipients' places in the envelope: a retry of the same recipient has the same number. `sender`:
    the owner of the list that all of them come by. `probe`: only whether the next host would take the recipients is
    asked; "delivered" says yes then.
    """

    __slots__ = ("message", "numbers", "probe", "recipients", "sender")

    def __init__(
        self, message: Message, recipients: Sequence[Recipient], numbers: Sequence[int], probe: bool = False
    ) -> None:
        self.message = message
        self.recipients = recipients
        self.numbers = numbers
        self.probe = probe
        self.sender = recipients[0].sender if recipients else None


class Transport(Protocol):
    """A way out. `any_octets`: it keeps every octet as it is, so BINARYMIME may be offered before it.
    `needs_body`: whether `Message.parts` (or `file`) must be there when `deliver` is called. `concurrency`: how many
    calls of `deliver` may be under way for one destination, in all workers of the machine; 0: one in each worker, with
    all that waits."""

    any_octets: bool
    needs_body: bool
    concurrency: int

    def destination(self, recipient: Address) -> str:
        """What fails and recovers as a whole, such as the domain or the smarthost; "" when there is only one. Called
        for each recipient: it waits for nothing."""
        ...

    def deliver(
        self, deliveries: Sequence[Delivery]
    ) -> Sequence[Sequence[Outcome]] | Awaitable[Sequence[Sequence[Outcome]]]:
        """For each delivery, the outcomes of its recipients in their order; or an awaitable of that."""
        ...

    async def close(self) -> None:
        """Ends threads and connections; deliveries under way are finished first."""
        ...
