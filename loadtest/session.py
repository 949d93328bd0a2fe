"""A session of a client that sends messages, one after the other, as its pacer says.

In: Mail from the pacer, and the replies that Dialogue has read. Out: octets to the server, and a word to the pacer when
a message has its answer. Always: a message is said as its plan has it, and a long one piece by piece, so that other
sessions have their turn; where a command is refused there is no message, the replies to what was already said are still
read (RFC 2920 3.1), and RSET clears the way for the next.
Not here: how replies are read, how a session opens and ends (dialogue), when a message is sent (pacing), which octets
(steps). Nothing raises. RFC 5321, RFC 2920, RFC 3030.
"""

from __future__ import annotations

from operator import length_hint
from time import perf_counter

from .content import Mail
from .dialogue import Dialogue
from .options import Options
from .steps import PIECE, Step, Steps


class Session(Dialogue):
    """One connection."""

    __slots__ = ()

    def send(self, mail: Mail, due: float, now: float) -> None:
        role = self._role
        self._mail = mail
        self._due = due
        self._plan = plan = role.plan(mail)
        role.tally.octets += plan.octets
        self._rest = rest = iter(plan.pairs)
        octets, self._step = next(rest)
        self._at = now
        self._write(octets)

    def on_text(self, now: float) -> None:
        """The reply to the end of data: it is accepted."""
        role = self._role
        tally = role.tally
        tally.accepted += 1
        tally.answered_at = now
        role.note_message(now - self._due)
        if role.ledger is not None or self._refused:
            self._record(250)
        self._mail = None
        self.failures = 0
        self.sent += 1
        self._at = now
        self._step = role.steps.idle
        role.pacer.on_done(self, now)

    def on_text_due(self, now: float) -> None:
        """The message is too long for one write."""
        self._at = now
        self._position = 0
        self._step = self._role.steps.streaming
        self._stream_on()

    def _stream_on(self) -> None:
        if self._over or self._paused or self._step is not self._role.steps.streaming:
            return
        text = self._plan.text
        piece = text[self._position : self._position + PIECE]
        self._position += PIECE
        self._at = perf_counter()
        if self._position >= len(text):
            self._step = self._role.steps.text
        self._write(piece)
        if self._position < len(text) and not self._paused:
            # Not at once: other sessions have their turn between two pieces.
            self._role.loop.call_soon(self._stream_on)

    def resume_writing(self) -> None:
        self._paused = False
        if self._step is self._role.steps.streaming:
            self._stream_on()

    def on_mail_refused(self, code: int) -> None:
        self._doom(code)

    def on_rcpt_refused(self, code: int) -> None:
        mail, steps = self._mail, self._role.steps
        assert mail is not None
        # MAIL is the first of the pairs, so this is the recipient of the pair before those that are left.
        place = len(self._plan.pairs) - length_hint(self._rest) - 2
        self._refused.append(mail.recipients[place])
        self._role.tally.recipients_refused += 1
        if len(self._refused) == len(mail.recipients):
            self._doom(code)
        else:
            self._advance(steps.rcpt, perf_counter())

    def on_long_rcpt_refused(self, code: int) -> None:
        """The last recipient of a long message that goes by BDAT."""
        mail = self._mail
        assert mail is not None
        self._refused.append(mail.recipients[-1])
        self._role.tally.recipients_refused += 1
        if len(self._refused) == len(mail.recipients):
            self._doom(code)
        else:
            self.on_text_due(perf_counter())

    def on_data_refused(self, code: int) -> None:
        self._end_doomed(code)

    def on_text_refused(self, code: int) -> None:
        self._refuse_message(code)
        self._go_on(perf_counter())

    def _doom(self, code: int) -> None:
        """There will be no message; replies to what was already said are still to come."""
        steps = self._role.steps
        self._code = code
        replaced = {steps.data: steps.doomed_data, steps.long_data: steps.doomed_data, steps.text: steps.doomed_text}
        rest = []
        for octets, step in self._rest:
            if octets:
                break
            rest.append((b"", replaced.get(step, steps.doomed)))
        if rest and rest[-1][1] is steps.doomed:  # a long message by BDAT: its text was not sent
            rest[-1] = (b"", steps.doomed_text)
        self._rest = iter(rest)
        if rest:
            _, self._step = next(self._rest)
        else:
            self._end_doomed(code)

    def on_doomed(self, code: int) -> None:
        """One of the replies that are still to come."""
        _, self._step = next(self._rest)

    def on_doomed_data(self, now: float) -> None:
        """The server wants a message without recipients: it gets the end of one (RFC 2920 3.1)."""
        self._say(b".\r\n", self._role.steps.doomed_text)

    def on_doomed_text(self, now: float) -> None:
        self._end_doomed(self._code)

    def on_doomed_refused(self, code: int) -> None:
        self._end_doomed(self._code)

    def _end_doomed(self, code: int) -> None:
        self._refuse_message(code)
        self._say(b"RSET\r\n", self._role.steps.rset)

    def _go_on(self, now: float) -> None:
        self._at = now
        self._step = self._role.steps.idle
        self._role.tally.answered_at = now
        self._role.pacer.on_done(self, now)

    def on_rset(self, now: float) -> None:
        self._go_on(now)


def make_steps(options: Options, large: bool) -> Steps:
    """`large` messages have an end-of-data phase of their own, so that the small ones beside them show."""
    end = "large" if large else "end_of_data"
    refused = Session.on_refused
    opened = Session.on_last_hello if options.auth else Session.on_open
    step = Step
    return Steps(
        banner=step("banner", 220, Session.on_banner, refused),
        # Every EHLO's reply is read in full, but for the octets that were read already.
        hello=step("ehlo", 250, Session.on_hello if options.tls == "starttls" else opened, refused).never(),
        starttls=step("", 220, Session.on_starttls, refused),
        secure_hello=step("ehlo", 250, opened, refused).never(),
        auth=step("auth", 235, Session.on_open, refused),
        challenge=step("", 334, None, refused),
        mail=step("mail", 250, None, Session.on_mail_refused),
        rcpt=step("rcpt", 250, None, Session.on_rcpt_refused),
        long_rcpt=step("rcpt", 250, Session.on_text_due, Session.on_long_rcpt_refused),
        data=step("data", 354, None, Session.on_data_refused),
        long_data=step("data", 354, Session.on_text_due, Session.on_data_refused),
        text=step(end, 250, Session.on_text, Session.on_text_refused),
        doomed=step("", 250, None, Session.on_doomed),
        doomed_data=step("", 354, Session.on_doomed_data, Session.on_doomed_refused),
        doomed_text=step("", 250, Session.on_doomed_text, Session.on_doomed_refused),
        rset=step("", 250, Session.on_rset, refused),
        quit=step("", 221, Session.on_quit, refused),
        idle=step("", 0, None, refused).never(),
        securing=step("", 0, None, refused).never(),
        streaming=step("", 0, None, refused).never(),
    )
