"""Keeps the reports that dsn.py writes: what a sender is told is as durable as the mail that it is about.

In: a message, what became of some of its recipients, and their marks. Out: reports in the spool, which the queue then
delivers like any mail. A report and the marks of those that it tells of are made in one commit of one spool: whenever
the server is killed, a sender is told once. A report that the spool refuses is offered again until it is kept.
A message without a sender (`<>`) is never reported to anybody but, where one is configured, the postmaster; what the
postmaster cannot be told is only logged. RFC 3461 6.2; RFC 5321 4.5.5, 6.1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from . import log as logs
from .address import NULL, Address
from .dsn import Action, Event, Reporter, is_wanted
from .job import Mark, ReportKeeper
from .message import Envelope, Message, Recipient
from .metrics import Counter
from .verdict import STORED, Member, Refused, Stored

AGAIN_SECONDS = 1.0  # after the spool refused a report


class Reports:
    """`keeper` is the spool that has the mail which is told of. `postmaster` is told of mail without a sender that was
    given up; NULL: nobody is. `expand` has what an alias stands for."""

    def __init__(
        self,
        keeper: ReportKeeper,
        reporter: Reporter,
        *,
        log: logs.Log,
        count: Callable[[Counter, int], None],
        now: Callable[[], float],
        postmaster: Address = NULL,
        expand: Callable[[Address], Sequence[Member] | None] = lambda _: None,
    ) -> None:
        self._keeper = keeper
        self._reporter = reporter
        self._log = log
        self._count = count
        self._now = now
        self._postmaster = postmaster
        self._expand = expand

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

    async def keep(
        self, message: Message, left: list[tuple[Event, Mark]], head: bytes, is_ending: Callable[[], bool]
    ) -> None:
        """Returns when reports of all events are kept, and their marks made. What is kept is taken out of `left`; the
        rest stands there still when the server ends before, or something raises."""
        by_action: dict[tuple[Action, Address | None], list[tuple[Event, Mark]]] = {}
        for event, mark in left:
            by_action.setdefault((event.action, event.recipient.sender), []).append((event, mark))
        asked = bool(message.envelope.reverse_path)
        if not asked:
            message = _sent_by(message, self._postmaster)
        for (action, owner), group in by_action.items():
            events = [event if asked else _unasked(event) for event, _ in group]
            marks = [mark for _, mark in group]
            about = message if owner is None else _sent_by(message, owner)
            while not await self._keep_one(about, action, events, marks, head):
                if is_ending():
                    return
                await asyncio.sleep(AGAIN_SECONDS)
            for told in group:
                left.remove(told)

    async def _keep_one(
        self, message: Message, action: Action, events: list[Event], marks: list[Mark], head: bytes
    ) -> bool:
        (report,) = self._reporter.write(message, events, head, self._keeper.next_id, self._now())
        if (members := self._expand(message.envelope.reverse_path)) is not None:
            report.envelope.recipients = [Recipient(member.address, "NEVER") for member in members]
        draft = self._keeper.draft(report.id, _nothing)
        for part in report.parts or ():
            draft.write(part)
        draft.header_done()
        answered: asyncio.Future[Stored | Refused] = asyncio.get_running_loop().create_future()
        self._keeper.append(report, draft, answered.set_result, marks)
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
    envelope.require_tls = message.envelope.require_tls
    envelope.waives_tls = message.envelope.waives_tls
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
