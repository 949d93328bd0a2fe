"""One mail on its way in: what MAIL, RCPT and its first octets have said, until it is whole.

In: recipients that were accepted, with what is known of where their mail goes; at end-of-data what the parser found.
Out: the envelope, and why the message cannot go to them as it is: a loop, or a next host that does not take it. A
mailbox that was named twice is answered twice and delivered to once. Whoever ends a transaction forgets it as a whole.
Not here: the order of commands, and what they are answered (session.py). RFC 5321 3.3, 6.3; RFC 2033 4.2; RFC 3461.
"""

from __future__ import annotations

from ._parser import BodyEnd
from .message import LIST, Envelope, Recipient, trace
from .reply import (
    R452_TOO_MANY_RECIPIENTS,
    R550_HOP_NEEDS_ASCII,
    R552_HOP_TOO_BIG,
    R554_HOP_NEEDS_7BIT,
    R554_LOOP,
    Reply,
)
from .verdict import Member, NextHop

EXPANDED_LIMIT = 20_000  # recipients of one message, with what aliases stand for


class Transaction:
    """`failure` is what every further BDAT is answered; `accepted` has the recipient of each RCPT that was answered
    250, in order, `seen` the same by mailbox; `announced` is the octets of its chunks. `foreign` are the recipients
    whose mailboxes are not ours, `hops` what the next hosts of the others take; None for none, as most messages have
    it."""

    __slots__ = ("accepted", "announced", "begun", "envelope", "failure", "foreign", "hops", "seen", "tried")

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope
        self.accepted: list[Recipient] = []
        self.seen: dict[str, Recipient] = {}
        self.tried = False  # a RCPT was heard
        self.begun = False  # by BDAT: no more recipients, no DATA
        self.announced = 0
        self.failure: Reply | None = None
        self.foreign: list[Recipient] | None = None
        self.hops: list[NextHop] | None = None

    def add(self, recipient: Recipient) -> None:
        """The same mailbox twice is answered twice (in LMTP at the end too: RFC 2033 4.2) and delivered once."""
        recipients = self.envelope.recipients
        known = recipient
        if recipients:
            seen = self.seen
            if not seen:  # the second recipient: most messages have one, and need no keys
                seen[recipients[0].address.mailbox] = recipients[0]
            known = seen.setdefault(recipient.address.mailbox, recipient)
        if known is recipient:
            recipients.append(recipient)
        self.accepted.append(known)

    def note(self, recipient: Recipient, hop: NextHop | None) -> None:
        """Where a recipient's mail goes: to a host of which is known what it takes, or (None) it is not ours."""
        if hop is None:
            self.foreign = self.foreign or []
            self.foreign.append(recipient)
            return
        self.hops = self.hops or []
        if hop not in self.hops:
            self.hops.append(hop)

    def add_members(self, asked: Recipient, members: tuple[Member, ...]) -> Reply | None:
        """What an alias stands for. Its members have the sender's wishes for reports, those of a list have none: it has
        an owner who is told, and a sender who wants to know of success hears that the list has it (RFC 3461 5.2.7).
        LMTP's answer at the end is that of the first who has a mailbox."""
        if len(self.envelope.recipients) + len(members) > EXPANDED_LIMIT:
            return R452_TOO_MANY_RECIPIENTS
        first = len(self.accepted)
        by_list = False
        for member in sorted(members, key=lambda member: bool(member.fault)):
            recipient = Recipient(member.address, asked.notify, asked.orcpt, member.fault)
            if member.sender is not None:
                by_list = True
                recipient.notify = recipient.orcpt = ""
                # What has no sender gets none (RFC 5321 4.5.5): its reports would come back to the list.
                recipient.sender = member.sender if self.envelope.reverse_path else None
            if member.hop is not None or not member.ours:
                self.note(recipient, member.hop)
            self.add(recipient)
        del self.accepted[first + 1 :]
        if by_list and self.envelope.reverse_path and "SUCCESS" in asked.notify:
            self._note_list(Recipient(asked.address, "SUCCESS", asked.orcpt, LIST))
        return None

    def _note_list(self, noted: Recipient) -> None:
        """Not among those that are `seen`: a list may have a mailbox of its name."""
        mailbox = noted.address.mailbox
        if not any(each.fault == LIST and each.address.mailbox == mailbox for each in self.envelope.recipients):
            self.envelope.recipients.append(noted)

    def loops(self, header: bytes, most: int, lmtp: bool) -> bool:
        """Whether a message comes back to us, by its trace fields: `most` hosts may have had it. A recipient that has
        had it is marked; one of another domain may have had it there, and be sent it again."""
        hops, been_at = trace(header, most)
        if hops > most:
            return True
        envelope = self.envelope
        foreign = self.foreign or []
        for recipient in envelope.recipients:
            if recipient.address.mailbox in been_at and recipient not in foreign and recipient.fault != LIST:
                recipient.fault = R554_LOOP.text
        sound = [recipient for recipient in envelope.recipients if not recipient.fault]
        if sound and lmtp:
            # Each recipient is answered for itself; over SMTP the fault goes with the message.
            envelope.recipients = [each for each in envelope.recipients if each.fault != R554_LOOP.text]
        return not sound

    def unfit(self, end: BodyEnd, prefix: bytes) -> Reply | None:
        """Why one of the next hosts would not take the message as it is."""
        for hop in self.hops or ():
            refusal = _unfit(end, self.envelope, prefix, hop)
            if refusal is not None:
                return refusal
        return None


def _unfit(end: BodyEnd, envelope: Envelope, prefix: bytes, hop: NextHop) -> Reply | None:
    """Why the next host would not take a message as it is."""
    if 0 < hop.size < end.size + len(prefix):
        return R552_HOP_TOO_BIG
    if not hop.utf8 and envelope.utf8 and (end.eight_bit_header or not prefix.isascii()):
        return R550_HOP_NEEDS_ASCII
    if not hop.eight_bit and (end.eight_bit or end.eight_bit_header):
        return R554_HOP_NEEDS_7BIT
    return None
