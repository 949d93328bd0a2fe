"""One mail on its way out: MAIL, RCPT, DATA or BDAT, and what their replies make of its recipients.

In: replies, each with the stage of the command that it answers. Out: commands and octets on the wire, an Outcome for
each recipient or None for those that are to be named `again`. Where the host offers PIPELINING, MAIL, RCPT and DATA
leave in one write, and with CHUNKING a small message does too; otherwise a command waits for the reply before it. A
recipient is delivered to only when MAIL, its RCPT and the message itself were each answered 2xx.
On failure: what ends the session is returned as a Fault; BodyError passes through. Not here: the session's life.
RFC 5321 3.3, 4.5.3.1.10; RFC 2033 4.2; RFC 2920 3.1; RFC 3030 2, 4.2.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from ..message import Message, Recipient
from . import Outcome, Result
from .body import PIECE, OutgoingBody, sent_size
from .failures import Answer, Stage, classify, failure
from .offers import Offers, Terms, render_mail, render_rcpt
from .replies import Reply

SHORT = 500  # octets of a reply's text in the ordinary case
EAGER = 65_536  # octets of a message that is sent without waiting for what its recipients are answered
MUDDLED = "its replies are not those to what it was asked"

# Names of this module: looking up an Enum's member costs 0.05 µs each time on Python 3.11.
REUSE, MAIL, RCPT, DATA, CHUNK = Stage.REUSE, Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.BODY
END, LMTP_END = Stage.END, Stage.LMTP_END
GARBAGE = Answer.GARBAGE
DELIVERED = Result.DELIVERED

_ALL_TAKEN = re.compile(rf"(?:2[0-9][0-9] [^\n]{{0,{SHORT}}}\n)*".encode())


class Fault(NamedTuple):
    """Why a session cannot go on."""

    stage: Stage
    answer: Answer
    reply: Reply | None = None
    why: str = ""


class Wire:
    """Between a session and its transactions. `awaited` holds the stage of each command whose reply has not come;
    `allowed` is how many replies the read that is being looked at may hold."""

    __slots__ = ("allowed", "awaited", "output")

    def __init__(self) -> None:
        self.awaited: deque[Stage] = deque()
        self.output: list[bytes] = []
        self.allowed = 0

    def say(self, stage: Stage, line: bytes) -> None:
        self.awaited.append(stage)
        self.output.append(line)


class Transaction:
    """`outcomes` stand in the order of `recipients`; `again` are places of those that were too many for this one.
    `body` is what send_piece wants; `finished`: the host has said all; `clean`: it has nothing of this mail left."""

    __slots__ = (
        "_accepted", "_answered", "_chunked", "_confirmed", "_ended", "_host", "_mailed", "_message", "_muddled",
        "_offers", "_probe", "_terms", "_unsent", "_wire", "again", "body", "clean", "finished", "heard", "outcomes",
        "whole",
    )  # fmt: skip

    def __init__(self, wire: Wire, offers: Offers, terms: Terms, host: str, message: Message) -> None:
        self._wire = wire
        self._offers = offers
        self._terms = terms
        self._host = host
        self._message = message
        self._unsent: deque[tuple[Stage, str]] = deque()  # one at a time, without PIPELINING
        self._accepted: list[int] = []
        self._answered = 0  # replies to RCPT
        self._ended = 0  # replies to the end, in LMTP
        self._confirmed: Reply | None = None  # the answer to the message, while another one is asked for
        self._chunked = False  # by BDAT
        self._mailed = False
        self._probe = False  # there is no message: RSET takes its place
        self._muddled = False  # a recipient was taken for a MAIL that was not
        self.outcomes: list[Outcome | None] = []
        self.again: list[int] = []
        self.body: OutgoingBody | None = None
        self.heard = False
        self.finished = False
        self.clean = True
        self.whole = False  # message and all have left at once

    def begin(self, recipients: Sequence[Recipient], *, reset: bool, require_tls: bool, probe: bool = False) -> None:
        """`reset`: RSET goes before. `probe`: RSET takes the place of the message. Raises BodyError."""
        self._probe = probe
        offers, message = self._offers, self._message
        # In LMTP the end has as many answers as recipients were taken: 354 shows that we count the same ones.
        self._chunked = offers.chunking and (not self._terms.lmtp or len(recipients) == 1 or bool(int(message.content)))
        self.outcomes = [None] * len(recipients)
        utf8 = offers.utf8 and not "".join([each.address.local for each in recipients]).isascii()
        mail = render_mail(message, offers, utf8=utf8, require_tls=require_tls)
        if not offers.pipelining:
            if reset:
                self._unsent.append((REUSE, "RSET\r\n"))
            self._unsent.append((MAIL, mail))
            self._unsent.extend([(RCPT, render_rcpt(each, offers)) for each in recipients])
            if probe:
                self._unsent.append((REUSE, "RSET\r\n"))
            self._go_on()
            return
        awaited = self._wire.awaited
        lines = [mail]
        if reset:
            awaited.append(REUSE)
            lines.insert(0, "RSET\r\n")
        awaited.append(MAIL)
        for each in recipients:
            awaited.append(RCPT)
            lines.append(render_rcpt(each, offers))
        octets = b""
        if probe:
            awaited.append(REUSE)
            lines.append("RSET\r\n")
        elif not self._chunked:
            awaited.append(DATA)
            lines.append("DATA\r\n")
        elif message.parts is not None and sent_size(message) <= EAGER:
            octets = OutgoingBody(message, stuffed=False).read()
            self.whole = not self._terms.lmtp or len(recipients) == 1
            awaited.append(LMTP_END if self._terms.lmtp else END)
            lines.append(f"BDAT {len(octets)} LAST\r\n")
        self._wire.output.append("".join(lines).encode() + octets)

    def take_all(self, data: bytes) -> bool:
        """The ordinary end of a group that has its message in it: for each command a 2xx of one line, all in one read.

        False: it is something else, and nothing was done. A shortcut of `receive`: a third of a message's time.
        """
        awaited = self._wire.awaited
        if _ALL_TAKEN.fullmatch(data) is None or data.count(b"\n") != len(awaited):
            return False
        end = awaited[-1]
        awaited.clear()
        self._mailed = True
        self._accepted = list(range(len(self.outcomes)))
        last = data[data.rfind(b"\n", 0, -1) + 1 :]
        _HANDLERS[end](self, Reply(int(last[:3]), [last[4:]]))
        return True

    def receive(self, stage: Stage, reply: Reply) -> Fault | None:
        """A reply to a command of this transaction. Raises BodyError."""
        self.heard = True
        if 300 <= reply.code < 400 and stage is not DATA:
            return Fault(stage, GARBAGE, reply)
        return _HANDLERS[stage](self, reply)

    def send_piece(self, piece: bytes) -> None:
        """The next octets of `body`, as it was read."""
        body, wire = self.body, self._wire
        assert body is not None
        if not body.stuffed and self._offers.pipelining:
            # A chunk for each piece: the host may refuse between two of them, so its replies are read meanwhile.
            wire.output.append(b"BDAT %d%s\r\n" % (len(piece), b" LAST" if body.finished else b""))
            if not body.finished:
                wire.awaited.append(CHUNK)
        wire.output.append(piece)
        if body.finished:
            self.body = None
            wire.awaited.extend([LMTP_END] * len(self._accepted) if self._terms.lmtp else [END])

    def fault_stage(self, answer: Answer, first: bool) -> Stage:
        """Which row of the table it is when the session ends here. `first`: no transaction came before."""
        awaited = self._wire.awaited
        if not awaited:
            return CHUNK
        if not self.heard and not first and answer in (Answer.HANG_UP, Answer.CLOSING):
            return REUSE
        if answer is not Answer.CLOSING and awaited[-1] in (END, LMTP_END):
            # All of the message has left: it may have been taken, whatever was not said of its recipients.
            return awaited[-1]
        return awaited[0]

    def _go_on(self) -> None:
        """Nothing is awaited: the next command of a host that takes one at a time, or the message, or the end."""
        if self._unsent:
            stage, line = self._unsent.popleft()
            self._wire.say(stage, line.encode())
        elif self._probe:
            self._finish(clean=True)
        elif not self._accepted:
            self._finish(clean=not self._mailed)
        elif self._chunked:
            self._send_body()
        else:
            self._wire.say(DATA, b"DATA\r\n")

    def _finish(self, clean: bool) -> None:
        self.clean = clean
        self.finished = True

    def _decide(self, places: Sequence[int], outcome: Outcome) -> None:
        """For those of `places` that nothing has been decided about."""
        for place in places:
            if self.outcomes[place] is None:
                self.outcomes[place] = outcome

    def _refused(self, stage: Stage, reply: Reply, places: Sequence[int]) -> None:
        self._decide(places, failure(stage, classify(reply), self._host, reply))

    def _on_rset(self, reply: Reply) -> Fault | None:
        if reply.code >= 400:
            return Fault(REUSE, classify(reply), reply)
        if not self._wire.awaited:
            self._go_on()
        return None

    def _on_mail(self, reply: Reply) -> Fault | None:
        if reply.code < 300:
            self._mailed = True
        else:
            self._refused(MAIL, reply, range(len(self.outcomes)))
            self._unsent.clear()
        if not self._wire.awaited:
            self._go_on()
        return None

    def _on_rcpt(self, reply: Reply) -> Fault | None:
        place = self._answered
        self._answered += 1
        awaited = self._wire.awaited
        if reply.code < 300:
            if not self._mailed:
                self._muddled = True
            else:
                self._accepted.append(place)
                if self._probe:
                    self._decide((place,), self._verdict(RCPT, reply))
                if len(self._accepted) > 1 and awaited and awaited[-1] is LMTP_END:
                    # The message has left with its recipients, and each accepted one has an answer of its own.
                    awaited.append(LMTP_END)
                    self._wire.allowed += 1
        elif self._accepted and reply.code in (452, 552) and reply.status[2:4] not in ("1.", "2."):
            # Too many for one transaction (RFC 5321 4.5.3.1.10), unless the status speaks of this mailbox.
            self.again.append(place)
        else:
            self._refused(RCPT, reply, (place,))
        if not awaited:
            self._go_on()
        return None

    def _on_data(self, reply: Reply) -> Fault | None:
        if reply.code >= 400:
            self._refused(DATA, reply, self._accepted)
            self._finish(clean=not self._mailed)
        elif reply.code != 354:
            return Fault(DATA, GARBAGE, reply)
        elif self._accepted:
            self._send_body()
        elif self._muddled or self._terms.lmtp:
            # A dot might deliver an empty message; in LMTP nobody knows how many answers it has.
            return Fault(DATA, GARBAGE, reply)
        else:
            # RFC 2920 3.1: there is nobody to send to, so the message is ended at once.
            self._wire.say(END, b".\r\n")
        return None

    def _send_body(self) -> None:
        """Begins with the message. What is small leaves at once, what is large when the transport has read it."""
        chunked = self._chunked
        body = self.body = OutgoingBody(self._message, stuffed=not chunked)
        if chunked and not self._offers.pipelining:
            # Each chunk would cost a round trip.
            self._wire.output.append(b"BDAT %d LAST\r\n" % body.size)
        if not body.blocking and body.size <= PIECE:
            self.send_piece(body.read())

    def _on_chunk(self, reply: Reply) -> Fault | None:
        """A BDAT before the last. After a refusal no more are sent (RFC 3030 4.2); those under way are refused too."""
        if reply.code >= 400:
            self.body = None
            self._refused(CHUNK, reply, self._accepted)
        if not self._wire.awaited and self.body is None:
            self._finish(clean=False)
        return None

    def _on_end(self, reply: Reply) -> Fault | None:
        if self._confirmed is not None:
            if reply.code >= 300:
                return Fault(END, GARBAGE, reply, MUDDLED)
            reply = self._confirmed
        elif self.whole and reply.status[:4] == "2.1." and self._accepted:
            return self._confirm(reply)
        if self._accepted:
            self._decide(self._accepted, self._verdict(END, reply))
        return self._ended_with(reply)

    def _confirm(self, reply: Reply) -> Fault | None:
        """A message is answered with the status of an address: perhaps a reply too many has come before, and this one
        is the last recipient's. Then the next one is the message's: when that says yes too, it was taken either way."""
        if any(self.outcomes) or self.again:
            self.outcomes = [None] * len(self.outcomes)
            return Fault(END, GARBAGE, reply, MUDDLED)
        self._confirmed = reply
        self._wire.say(END, b"NOOP\r\n")
        return None

    def _on_lmtp_end(self, reply: Reply) -> Fault | None:
        """One for each accepted recipient, in order; one in all where none was accepted."""
        if self._accepted:
            self._decide((self._accepted[self._ended],), self._verdict(LMTP_END, reply))
            self._ended += 1
        return None if self._wire.awaited else self._ended_with(reply)

    def _ended_with(self, reply: Reply) -> Fault | None:
        if self._muddled:
            return Fault(RCPT, GARBAGE, None, "a recipient was taken for a message that was refused")
        self._finish(clean=reply.code < 300)
        return None

    def _verdict(self, stage: Stage, reply: Reply) -> Outcome:
        """What the last reply means for those who wait for it."""
        if reply.code >= 300:
            return failure(stage, classify(reply), self._host, reply)
        text = reply.text
        reports = self._offers.dsn
        relayed = not (reports or self._terms.lmtp)
        return Outcome(
            DELIVERED, reply.status or "2.0.0", text, host=self._host, reply=text, relayed=relayed, reports=reports
        )


_Handler: TypeAlias = Callable[[Transaction, Reply], Fault | None]
_HANDLERS: Mapping[Stage, _Handler] = {
    REUSE: Transaction._on_rset,
    MAIL: Transaction._on_mail,
    RCPT: Transaction._on_rcpt,
    DATA: Transaction._on_data,
    CHUNK: Transaction._on_chunk,
    END: Transaction._on_end,
    LMTP_END: Transaction._on_lmtp_end,
}
