"""Keeps the reports that dsn.py writes: what a sender is told is as durable as the mail that it is about.

In: a message and what became of some of its recipients. Out: reports in the spool, which the queue then delivers like
any mail. `keep` returns when they are there, and only then may the recipients' marks be made: killed in between, the
server does the last step again and tells twice, never nothing. A report that the spool refuses is offered again until
it is kept. A message without a sender (`<>`) is never reported to anybody but, where one is configured, the postmaster;
what the postmaster cannot be told is only logged. RFC 3461 6.2; RFC 5321 4.5.5, 6.1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace

from . import log as logs
from .address import NULL, Address
from .dsn import Action, Event, Reporter, is_wanted
from .job import Keeper
from .message import Envelope, Message, Recipient
from .metrics import Counter
from .verdict import STORED, Refused, Stored

AGAIN_SECONDS = 1.0  # after the spool refused a report


class Reports:
    """`postmaster` is told of mail without a sender that was given up; NULL: nobody is."""

    def __init__(
        self,
        keeper: Keeper,
        reporter: Reporter,
        *,
        log: logs.Log,
        count: Callable[[Counter, int], None],
        now: Callable[[], float],
        postmaster: Address = NULL,
    ) -> None:
        self._keeper = keeper
        self._reporter = reporter
        self._log = log
        self._count = count
        self._now = now
        self._postmaster = postmaster

    def is_wanted(self, message: Message, recipient: Recipient, action: Action) -> bool:
        """Whether somebody is to be told."""
        if message.envelope.reverse_path:
            return is_wanted(action, recipient.notify)
        postmaster = self._postmaster
        # What fails at the postmaster is not told to the postmaster.
        return action is Action.FAILED and bool(postmaster) and recipient.address.mailbox != postmaster.mailbox

    def head_size(self, message: Message) -> int:
        """How many octets of the body's start `keep` can use."""
        return self._reporter.head_size(message)

    async def keep(self, message: Message, events: Iterable[Event], head: bytes, is_ending: Callable[[], bool]) -> bool:
        """Returns when reports of all events are kept; False: the server ends, and not all of them are."""
        by_action: dict[Action, list[Event]] = {}
        for event in events:
            by_action.setdefault(event.action, []).append(event)
        if not message.envelope.reverse_path:
            message = _sent_by(message, self._postmaster)
            by_action = {action: [_unasked(event) for event in group] for action, group in by_action.items()}
        for action, group in by_action.items():
            while not await self._keep_one(message, action, group, head):
                if is_ending():
                    return False
                await asyncio.sleep(AGAIN_SECONDS)
        return True

    async def _keep_one(self, message: Message, action: Action, events: list[Event], head: bytes) -> bool:
        for report in self._reporter.write(message, events, head, self._keeper.next_id, self._now()):
            draft = self._keeper.draft(report.id, _nothing)
            for part in report.parts or ():
                draft.write(part)
            draft.header_done()
            answered: asyncio.Future[Stored | Refused] = asyncio.get_running_loop().create_future()
            self._keeper.append(report, draft, answered.set_result)
            if await answered is not STORED:
                return False
            self._count(Counter.REPORTS, 1)
            recipients = tuple([event.recipient.address.wire for event in events])
            to = message.envelope.reverse_path.wire
            self._log.write(logs.REPORTED, message.id, action.value, recipients, report.id, to)
        return True


def _sent_by(message: Message, sender: Address) -> Message:
    """The message as if `sender` had sent it, for a report to somebody else."""
    envelope = Envelope(sender)
    envelope.id = message.id
    envelope.recipients = message.envelope.recipients
    return Message(
        envelope, message.prefix, message.parts, message.size, message.header_end, message.content, message.arrived,
        message.file, message.cuts,
    )  # fmt: skip


def _unasked(event: Event) -> Event:
    """Without the wishes of the sender: of a report they are NEVER."""
    recipient = event.recipient
    return replace(event, recipient=Recipient(recipient.address, "", recipient.orcpt))


def _nothing() -> None:
    """Called by the draft when it may take more; a report is given to it whole."""
