"""Session: a state machine without I/O held against an obvious model, and the smuggling property over a connection.

The model has a handful of plain fields and says after every command what must be left of the transaction, what was
counted, and with which code the command was answered.
"""

from __future__ import annotations

import re
from typing import Any

import oracle
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from users import Users, b64, plain
from wire import ARRIVED, HOSTNAME, R554, bench

from fastsmtp._parser import Body, BodyEnd, FrameError, Line, Parser
from fastsmtp.address import parse_address
from fastsmtp.commands import BARRIERS
from fastsmtp.message import Message
from fastsmtp.reply import R451_LOCAL_ERROR, R452_NO_ROOM, R550_UNKNOWN_MAILBOX, Reply, Then
from fastsmtp.session import Answer, Chunk, Session
from fastsmtp.terms import Terms
from fastsmtp.verdict import STORED, Ask, Client, Refused, Stage, Store, Stored, Verdict

SIZE = 1000
RECIPIENTS = 3
ERRORS = 40
USELESS = 25
ACCEPTED = Verdict("accepted")


class Desk:
    """A session with a parser in front of it, and nothing behind: verdicts and the spool's answers are fields."""

    def __init__(self, role: str, asks: frozenset[Stage] = frozenset(), **terms: Any) -> None:
        self.full = False
        self.verdict = ACCEPTED
        self.users = Users()
        self.result: Stored | Refused = STORED
        self.stores: list[Store] = []
        self.number = 0
        options = {"message_size": SIZE, "recipients": RECIPIENTS, "errors": ERRORS, "useless": USELESS} | terms
        self.terms = Terms(
            HOSTNAME,
            role,
            next_id=self.next_id,
            room=lambda size: R452_NO_ROOM if self.full else None,
            now=lambda: ARRIVED,
            asks=asks,
            any_octets=True,
            **options,
        )
        self.parser = Parser(BARRIERS)
        self.session = Session(self.terms, Client("192.0.2.7", 25252, "test"))

    def next_id(self) -> str:
        self.number += 1
        return f"{self.number:020}"

    def say(self, line: bytes, octets: bytes = b"") -> Reply:
        """Sends a command, for BDAT with the octets of its chunk; its reply."""
        self.parser.feed(line + b"\r\n" + octets)
        event = self.parser.next()
        assert isinstance(event, Line)
        answer = self.decide(self.session.receive(event))
        if isinstance(answer, Chunk):
            self.parser.bdat(answer.size, answer.last, SIZE if answer.keep else 0, answer.first)
            return self.end_of_text()
        assert isinstance(answer, Reply)
        if answer.then in (Then.CONTINUE, Then.USER):
            self.parser.command()
        return answer

    def send(self, text: bytes) -> Reply:
        """Sends a message behind 354; its reply."""
        self.parser.data(SIZE)
        self.parser.feed(text + b"\r\n.\r\n")
        return self.end_of_text()

    def end_of_text(self) -> Reply:
        octets = b""
        while not isinstance(event := self.parser.next(), BodyEnd):
            assert isinstance(event, Body)
            octets += event.chunk
        answer = self.decide(self.session.take_end(event, octets + event.chunk))
        if isinstance(answer, Store):
            self.stores.append(answer)
            answer = self.session.resume(self.result)
        assert isinstance(answer, Reply)
        self.parser.command()
        return answer

    def decide(self, answer: Answer) -> Answer:
        while isinstance(answer, Ask):
            verdict = self.users(answer) if answer.stage is Stage.AUTH else self.verdict
            assert isinstance(verdict, Verdict)
            answer = self.session.resume(verdict)
        return answer

    def respond(self, *lines: str) -> Reply:
        """Sends the lines of an AUTH exchange; the reply to the last."""
        reply = None
        for line in lines:
            self.parser.line()
            self.parser.feed(line.encode() + b"\r\n")
            event = self.parser.next()
            assert isinstance(event, Line)
            reply = self.decide(self.session.receive(event))
        assert isinstance(reply, Reply)
        if reply.then is not Then.LINE:
            self.parser.command()
        return reply


REFUSAL = Verdict("refused", R554)
UNKNOWN = Verdict("unknown-mailbox", R550_UNKNOWN_MAILBOX)

HELLOS = (b"EHLO", b"HELO", b"LHLO")
BAD_MAILS = {
    b"MAIL": 501,
    b"MAIL FROM:a": 501,
    b"MAIL FROM:<a": 501,
    b"MAIL FROM:<a\0@b.test>": 501,
    b"MAIL FROM:<a@b.test> FOO": 555,
    b"MAIL FROM:<a@b.test> SIZE=x": 501,
    b"MAIL FROM:<a@b.test> SIZE=1001": 552,
    b"MAIL FROM:<a@b.test> ENVID=+0A": 501,
    "MAIL FROM:<ü@b.test>".encode(): 553,
    b"MAIL " + b"x" * 3000: 500,
}
BAD_RCPTS = {
    b"RCPT": 501,
    b"RCPT TO:<>": 501,
    b"RCPT TO:<a": 501,
    b"RCPT TO:<a@b.test> FOO": 555,
    b"RCPT TO:<a@b.test> NOTIFY=NEVER,DELAY": 501,
    b"RCPT TO:<\xff@b.test>": 501,
    b"RCPT " + b"x" * 3000: 500,
}
BAD_LINES = {
    b"WHAT": 500,
    b"": 500,
    b"TURN": 502,
    b"RSET x": 501,
    b"DATA x": 501,
    b"VRFY": 501,
    b"NOOP " + b"x" * 3000: 500,
    b"DATA " + b"x" * 3000: 500,
    b"STARTTLS x": 501,
}
MOST = 12_288 - 2  # octets of a line in an exchange, without CRLF
# Responses of PLAIN, and how AUTH ends by them; the same by LOGIN, where that takes two.
RESPONSES = {
    plain("ann", "secret"): 235,
    plain("ANN", "secret"): 235,
    plain("ann", "wrong"): 535,
    plain("eve", "secret"): 535,
    plain("ann", "x" * 9000): 535,
    "AA==": 501,
    "*": 501,
    "A": 501,
    "A" * (MOST + 1): 500,
}
GUESSES = {response for response, code in RESPONSES.items() if code == 535 or response == "AA=="}
LOGINS = {
    plain("ann", "secret"): ["YW5u", b64("secret")],
    plain("ANN", "secret"): ["QU5O", b64("secret")],
    plain("ann", "wrong"): ["YW5u", b64("wrong")],
    plain("eve", "secret"): ["ZXZl", b64("secret")],
    plain("ann", "x" * 9000): ["YW5u", b64("x" * 9000)],
    "AA==": ["AA==", b64("secret")],
    "*": ["YW5u", "*"],
    "A": ["A"],
    "A" * (MOST + 1): ["A" * (MOST + 1)],
}
SEEN_AT_A = b"Delivered-To: a@b.test\r\n"
BODIES = {
    b"x": 0,
    b"": 0,
    b"a\nb": 550,
    b"x" * SIZE: 552,
    SEEN_AT_A: 1,  # a loop for one recipient
    b"Received: x\r\n" * 101: 552,
}


class Machine(RuleBasedStateMachine):
    """Any sequence of commands."""

    role = "mx"
    users = False

    def __init__(self) -> None:
        super().__init__()
        self.connect()

    def connect(self) -> None:
        mechanisms = frozenset(("PLAIN", "LOGIN")) if self.users else frozenset()
        self.desk = Desk(
            self.role, frozenset({Stage.HELO, Stage.MAIL, Stage.RCPT}), mechanisms=mechanisms, auth_clear=True
        )
        self.lmtp = self.role == "lmtp"
        # The model
        self.open = True
        self.hello = ""
        self.sender: str | None = None
        self.accepted: list[str] = []  # RCPTs answered 250
        self.tried = False
        self.begun = False
        self.failed = 0
        self.errors = 0
        self.useless = 0
        self.messages = 0
        self.stores = 0
        self.user = ""
        self.guesses = 0

    # How replies are held against the model

    def reset(self) -> None:
        self.sender, self.accepted, self.tried, self.begun, self.failed = None, [], False, False, 0

    def expect(self, reply: Reply, code: int) -> bool:
        """Whether the command was executed: neither counted out, nor refused."""
        if 500 <= code <= 504 or code == 555:
            self.errors += 1
            if self.errors >= ERRORS:
                self.open = False
                code = 421
        assert reply.code == code
        assert reply.wire.count(b"\r\n") == len(reply.text.split("\n"))
        return code < 400

    def expect_final(self, reply: Reply, codes: list[int]) -> None:
        """The replies to end-of-data: one, in LMTP one for each accepted RCPT."""
        assert [int(line[:3]) for line in reply.wire.split(b"\r\n")[:-1]] == codes
        self.reset()

    def counted_out(self, reply: Reply) -> bool:
        """Useless commands: all but those inside a transaction that has a recipient."""
        if not self.accepted:
            self.useless += 1
        if self.useless > USELESS + self.messages:
            assert reply.code == 421
            self.open = False
            return True
        return False

    # Commands

    @precondition(lambda self: self.open)
    @rule(verb=st.sampled_from(HELLOS), name=st.sampled_from([b"", b" c", b" \xff\0"]), refused=st.booleans())
    def greet(self, verb: bytes, name: bytes, refused: bool) -> None:
        self.desk.verdict = REFUSAL if refused else ACCEPTED
        reply = self.desk.say(verb + name)
        if name and self.hello and self.counted_out(reply):
            return
        code = 501 if not name else 500 if (verb == b"LHLO") != self.lmtp else 554 if refused else 250
        if self.expect(reply, code):
            self.hello = "esmtp" if verb != b"HELO" else "smtp"
            self.reset()

    @precondition(lambda self: self.open)
    @rule(
        sender=st.sampled_from(["", "a@b.test", '"q p"@b.test']),
        tail=st.sampled_from(["", " SIZE=1000", " BODY=8BITMIME SMTPUTF8"]),
        refused=st.booleans(),
        full=st.booleans(),
    )
    def mail(self, sender: str, tail: str, refused: bool, full: bool) -> None:
        self.desk.verdict, self.desk.full = REFUSAL if refused else ACCEPTED, full
        reply = self.desk.say(f"MAIL FROM:<{sender}>{tail}".encode())
        self.desk.full = False
        code = 503 if not self.hello or self.sender is not None else 452 if full else 554 if refused else 250
        if self.expect(reply, code):
            self.sender = sender

    @precondition(lambda self: self.open and self.sender is None)
    @rule(recipients=st.lists(st.sampled_from("abcd"), max_size=2))
    def begin(self, recipients: list[str]) -> None:
        """What leads to a message; by the other rules it is rare."""
        if not self.hello:
            self.greet(b"LHLO" if self.lmtp else b"EHLO", b" c", refused=False)
        if self.open:
            self.mail("a@b.test", "", refused=False, full=False)
        for local in recipients if self.open else ():
            self.rcpt(local, known=True)

    @precondition(lambda self: self.open)
    @rule(line=st.sampled_from(list(BAD_MAILS)))
    def bad_mail(self, line: bytes) -> None:
        self.desk.verdict = ACCEPTED
        code = BAD_MAILS[line]
        # Length and argument are looked at before the order of commands.
        if code != 500 and line != b"MAIL" and (not self.hello or self.sender is not None):
            code = 503
        assert not self.expect(self.desk.say(line), code)

    @precondition(lambda self: self.open)
    @rule(local=st.sampled_from(["a", "A", "b", "c", "d"]), known=st.booleans())
    def rcpt(self, local: str, known: bool) -> None:
        self.desk.verdict = ACCEPTED if known else UNKNOWN
        reply = self.desk.say(f"RCPT TO:<{local}@b.test>".encode())
        if self.sender is None or self.begun:
            assert not self.expect(reply, 503)
            return
        self.tried = True
        code = 452 if len(self.accepted) >= RECIPIENTS else 250 if known else 550
        if self.expect(reply, code):
            self.accepted.append(local)

    @precondition(lambda self: self.open)
    @rule(line=st.sampled_from(list(BAD_RCPTS)))
    def bad_rcpt(self, line: bytes) -> None:
        reply = self.desk.say(line)
        code = BAD_RCPTS[line]
        if code != 500 and line != b"RCPT":
            if not self.hello or self.sender is None or self.begun:
                code = 503
            else:
                self.tried = True
        assert not self.expect(reply, code)

    def no_recipients(self) -> int:
        return 554 if self.tried and not self.lmtp else 503

    def final_codes(self, kind: int, result: int) -> list[int]:
        """The replies to a whole message that is not refused as such."""
        if kind == 1:
            codes = [554 if local.lower() == "a" else 250 for local in self.accepted]
            if set(codes) == {554}:
                return codes if self.lmtp else [554]
        else:
            codes = [250] * len(self.accepted)
        self.stores += 1
        if result == 250:
            self.messages += 1
        else:
            codes = [result] * len(codes)
        return codes if self.lmtp else [result]

    @precondition(lambda self: self.open)
    @rule(body=st.sampled_from(list(BODIES)), refused=st.booleans())
    def data(self, body: bytes, refused: bool) -> None:
        reply = self.desk.say(b"DATA")
        if not self.hello or self.sender is None or self.begun:
            assert not self.expect(reply, 503)
            return
        if not self.accepted:
            assert not self.expect(reply, self.no_recipients())
            return
        assert self.expect(reply, 354)
        assert reply.then is Then.DATA
        self.desk.result = Refused("refused", R451_LOCAL_ERROR) if refused else STORED
        reply = self.desk.send(body)
        kind = BODIES[body]
        if kind > 1:
            self.expect_final(reply, [kind] * (len(self.accepted) if self.lmtp else 1))
        else:
            self.expect_final(reply, self.final_codes(kind, 451 if refused else 250))

    @precondition(lambda self: self.open)
    @rule(size=st.sampled_from([0, 1, 600, 1001]), last=st.booleans(), refused=st.booleans())
    def bdat(self, size: int, last: bool, refused: bool) -> None:
        self.desk.result = Refused("refused", R451_LOCAL_ERROR) if refused else STORED
        line = f"BDAT {size}{' LAST' * last}".encode()
        before = self.desk.session.transaction
        reply = self.desk.say(line, b"Q" * size)
        if self.sender is None:
            assert not self.expect(reply, 503)
            return
        assert before is not None
        if not self.begun and not self.accepted:
            self.failed = self.no_recipients()
            self.chunk = 0
        elif not self.begun:
            self.chunk = 0
        self.begun = True
        self.chunk += size
        if not self.failed and self.chunk > SIZE:
            self.failed = 552
        if not last:
            # What is repeated is no further mistake: it is not counted.
            assert reply.code == (self.failed or 250)
        elif self.failed:
            self.expect_final(reply, [self.failed] * (len(self.accepted) or 1 if self.lmtp else 1))
        else:
            self.expect_final(reply, self.final_codes(0, 451 if refused else 250))

    @precondition(lambda self: self.open)
    @rule()
    def rset(self) -> None:
        reply = self.desk.say(b"RSET")
        if not self.counted_out(reply):
            assert self.expect(reply, 250)
            self.reset()

    @precondition(lambda self: self.open)
    @rule(line=st.sampled_from([b"NOOP", b"NOOP x", b"VRFY x", b"EXPN x", b"HELP"]))
    def useless_command(self, line: bytes) -> None:
        reply = self.desk.say(line)
        if not self.counted_out(reply):
            assert self.expect(reply, {b"VRFY": 252, b"EXPN": 252, b"HELP": 214}.get(line[:4], 250))

    @precondition(lambda self: self.open)
    @rule()
    def starttls(self) -> None:
        assert not self.expect(self.desk.say(b"STARTTLS"), 454)

    @precondition(lambda self: self.open)
    @rule(line=st.sampled_from(list(BAD_LINES)))
    def bad_line(self, line: bytes) -> None:
        assert not self.expect(self.desk.say(line), BAD_LINES[line])

    @precondition(lambda self: self.open)
    @rule(
        response=st.sampled_from(list(RESPONSES)), mechanism=st.sampled_from(["PLAIN", "LOGIN"]), at_once=st.booleans()
    )
    def auth(self, response: str, mechanism: str, at_once: bool) -> None:
        if mechanism == "LOGIN":
            at_once = False
        reply = self.desk.say(f"AUTH {mechanism}{' ' + response if at_once else ''}".encode())
        if at_once and len(response) > MOST:
            assert not self.expect(reply, 500)
            return
        if self.counted_out(reply):
            return
        if not self.users:
            assert not self.expect(reply, 502)
            return
        if not self.hello or self.user or self.sender is not None:
            assert not self.expect(reply, 503)
            return
        if not at_once:
            assert self.expect(reply, 334)
            assert self.desk.session.exchange is not None
            reply = self.desk.respond(*(LOGINS[response] if mechanism == "LOGIN" else [response]))
        if response in GUESSES:
            self.guesses += 1
            if self.guesses >= 3:
                self.open = False
                assert reply.code == 421
                return
        if self.expect(reply, RESPONSES[response]):
            self.user = "ann"

    @precondition(lambda self: self.open)
    @rule()
    def tls_begins(self) -> None:
        """What the connection does behind 220 (RFC 3207 4.2)."""
        session = self.desk.session
        session.client.user = ""
        self.desk.session = Session(self.desk.terms, session.client, before=session)
        self.hello = self.user = ""
        self.reset()

    @precondition(lambda self: self.open)
    @rule(line=st.sampled_from([b"BDAT x", b"BDAT", b"BDAT 1 2", b"BDAT 2001", b"QUIT", b"GET / HTTP/1.1"]))
    def closing(self, line: bytes) -> None:
        reply = self.desk.say(line)
        assert reply.then is Then.CLOSE
        self.open = False

    @precondition(lambda self: not self.open)
    @rule()
    def connect_again(self) -> None:
        self.connect()

    # RFC 5321 3.3, 4.1.4: what is left

    @invariant()
    def the_session_is_what_the_model_says(self) -> None:
        session = self.desk.session
        assert len(self.desk.stores) == self.stores
        assert session.messages == self.messages
        if not self.open:
            return
        assert (session.errors, session.useless) == (self.errors, self.useless)
        assert bool(session.from_part) == bool(self.hello)
        assert session.esmtp == (self.hello == "esmtp")
        assert session.asked is None
        assert session.exchange is None
        assert session.client.user == self.user
        assert session.guesses == self.guesses
        transaction = session.transaction
        assert (transaction is None) == (self.sender is None)
        if transaction is not None:
            assert str(transaction.envelope.reverse_path) == self.sender
            mailboxes = [str(recipient.address).lower() for recipient in transaction.envelope.recipients]
            assert mailboxes == list(dict.fromkeys(f"{local}@b.test".lower() for local in self.accepted))
            assert len(transaction.accepted) == len(self.accepted)
            assert transaction.begun == self.begun
            assert (transaction.failure.code if transaction.failure else 0) == self.failed


class LmtpMachine(Machine):
    role = "lmtp"


class UserMachine(Machine):
    users = True


@pytest.mark.parametrize("machine", [Machine, LmtpMachine, UserMachine])
def test_any_sequence_of_commands(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=120, stateful_step_count=40, deadline=None))


# One by one


def test_counters_go_on_after_starttls() -> None:
    desk = Desk("mx")
    desk.say(b"EHLO c")
    desk.say(b"WHAT")
    desk.say(b"NOOP")
    for line in (b"MAIL FROM:<>", b"RCPT TO:<a@b.test>", b"DATA"):
        desk.say(line)
    desk.send(b"x")
    desk.say(b"MAIL FROM:<a@b.test>")
    after = Session(desk.terms, desk.session.client, before=desk.session)
    assert (after.errors, after.useless, after.messages) == (1, 1, 1)
    assert after.transaction is None
    assert after.from_part == ""


def test_a_refused_client_hears_503() -> None:
    desk = Desk("mx", frozenset({Stage.CONNECT}))
    desk.verdict = REFUSAL
    reply = desk.decide(desk.session.greet())
    assert isinstance(reply, Reply)
    assert (reply.code, reply.then) == (554, Then.CONTINUE)
    for line in (b"EHLO c", b"NOOP", b"MAIL FROM:<>", b"WHAT", b"BDAT 0 LAST", b"HELP"):
        assert desk.say(line).code == 503
    assert desk.say(b"QUIT").code == 221


def test_a_client_that_is_not_refused_is_greeted() -> None:
    desk = Desk("mx", frozenset({Stage.CONNECT}))
    reply = desk.decide(desk.session.greet())
    assert reply is desk.terms.greeting
    assert desk.say(b"EHLO c").code == 250


def test_what_a_policy_is_told() -> None:
    desk = Desk("mx", frozenset({Stage.HELO, Stage.MAIL, Stage.RCPT}))
    asks: list[Ask] = []

    def ask(line: bytes) -> None:
        desk.parser.feed(line + b"\r\n")
        event = desk.parser.next()
        assert isinstance(event, Line)
        answer = desk.session.receive(event)
        assert isinstance(answer, Ask)
        asks.append(answer)
        desk.session.resume(ACCEPTED)

    ask(b"EHLO first")
    ask(b"EHLO  second")
    ask(b"MAIL FROM:<s@b.test>")
    ask(b"RCPT TO:<r@b.test>")
    assert [each.stage for each in asks] == [Stage.HELO, Stage.HELO, Stage.MAIL, Stage.RCPT]
    assert [each.helo for each in asks[:2]] == ["first", "second"]
    assert str(asks[2].reverse_path) == "s@b.test"
    assert (str(asks[3].reverse_path), str(asks[3].recipient)) == ("s@b.test", "r@b.test")
    assert asks[3].client.helo == "second"


def test_a_refused_helo_leaves_the_old_one() -> None:
    desk = Desk("mx", frozenset({Stage.HELO}))
    desk.say(b"EHLO first")
    desk.say(b"MAIL FROM:<>")
    desk.verdict = REFUSAL
    assert desk.say(b"HELO second").code == 554
    assert desk.session.client.helo == "first"
    assert desk.session.esmtp
    assert desk.session.transaction is not None


def test_a_verdict_replaces_the_recipient() -> None:
    desk = Desk("mx", frozenset({Stage.RCPT}))
    desk.say(b"EHLO c")
    desk.say(b"MAIL FROM:<>")
    desk.verdict = Verdict("known", recipient=parse_address("other@b.test"))
    desk.say(b"RCPT TO:<a@b.test> NOTIFY=NEVER ORCPT=rfc822;a@b.test")
    assert desk.session.transaction is not None
    (recipient,) = desk.session.transaction.envelope.recipients
    assert (str(recipient.address), recipient.notify, recipient.orcpt) == ("other@b.test", "NEVER", "rfc822;a@b.test")


def test_the_envelope_has_what_was_said() -> None:
    desk = Desk("mx")
    desk.say(b"EHLO c")
    desk.say(b"MAIL FROM:<s@b.test> SIZE=77 BODY=8bitmime SMTPUTF8 RET=hdrs ENVID=a+2Bb")
    desk.say(b"RCPT TO:<r@b.test>")
    desk.say(b"DATA")
    assert desk.send(b"x").code == 250
    envelope = desk.stores[0].envelope
    assert (envelope.size, envelope.body, envelope.utf8, envelope.ret, envelope.envid) == (
        77, "8BITMIME", True, "HDRS", "a+2Bb",
    )  # fmt: skip
    assert (envelope.client, envelope.helo, envelope.protocol) == ("192.0.2.7", "c", "UTF8SMTP")
    assert envelope.id == f"{1:020}"


@pytest.mark.parametrize(
    ("role", "hello", "word"),
    [("mx", b"EHLO", "ESMTP"), ("mx", b"HELO", "SMTP"), ("lmtp", b"LHLO", "LMTP")],
)
def test_the_protocol_of_the_trace_field(role: str, hello: bytes, word: str) -> None:
    desk = Desk(role)
    for line in (hello + b" c", b"MAIL FROM:<>", b"RCPT TO:<r@b.test>", b"DATA"):
        desk.say(line)
    desk.send(b"x")
    assert f"with {word} id".encode() in desk.stores[0].prefix


@pytest.mark.parametrize("kind", ["tls", "bare_lf", "line_too_long", "too_much"])
def test_every_frame_error_has_its_last_words(kind: Any) -> None:
    assert Desk("mx").session.lost(FrameError(kind)).then is Then.CLOSE


# Smuggling: as many messages or refusals as there are real ends, and nothing stored that the oracle does not see.

ENDS = (
    b"\n.\n",
    b"\n.\r\n",
    b"\r\n.\n",
    b"\n.\r",
    b"\r.\r",
    b"\r.\n",
    b"\r.\r\n",
    b"\r\n.\r",
    b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",
    b"\r\n.\r\r\n",
    b"\r\r\n.\r\r\n",
    b"\r\n.\r\n",
    b"\r\n..\r\n",
    b".\r\n",
    b"\r\n",
    b"\r",
    b"\n",
    b".",
)
LINES = (
    b"EHLO c\r\n", b"MAIL FROM:<s@b.test>\r\n", b"RCPT TO:<ann@here.test>\r\n", b"DATA\r\n", b"RSET\r\n", b"NOOP\r\n",
    b"BDAT 5\r\n", b"BDAT 3 LAST\r\n", b"BDAT 0 LAST\r\n", b"BDAT 12\r\n", b"x: y\r\n", b"WHAT\r\n",
)  # fmt: skip
TRANSACTION = b"MAIL FROM:<s@b.test>\r\nRCPT TO:<ann@here.test>\r\n"
PIECES = st.sampled_from([*ENDS, *LINES, TRANSACTION + b"DATA\r\n", TRANSACTION + b"BDAT 4\r\n", b"a", b"\0"])
STREAMS = st.lists(PIECES, min_size=1, max_size=25).map(lambda pieces: b"EHLO c\r\n" + b"".join(pieces))
CHUNK = re.compile(rb"([0-9]{1,20})( +LAST)?", re.IGNORECASE)


def final_codes(said: bytes) -> list[int]:
    """The codes of the replies: of a reply of several lines the last."""
    return [int(line[:3]) for line in said.split(b"\r\n")[:-1] if line[3:4] == b" "]


def check_stream(stream: bytes, bare: oracle.Bare, codes: list[int], stored: list[bytes]) -> None:
    """Reads the stream with the oracle, in the modes that the replies announced."""
    limits = oracle.Limits(barriers=BARRIERS, bare=bare)
    left = list(codes)
    assert left.pop(0) == 220
    kept: list[bytes] = []
    sender = recipient = begun = failed = False
    chunks = b""
    mode = oracle.COMMAND
    at = 0
    while at < len(stream) or mode.name == "bdat":
        if mode.name == "command":
            event = oracle.line(stream, at, mode, limits)
            if event is None:
                break
            if isinstance(event, oracle.Lost):
                assert left == [500]
                left = []
                break
            at = event.end
            chunk = CHUNK.fullmatch(event.rest) if event.verb == b"BDAT" else None
            if chunk:
                first = not (sender and begun)
                if sender and not begun:
                    begun, failed, chunks = True, not recipient, b""
                mode = oracle.Mode("bdat", int(chunk[1]), chunk[2] is not None, first)
                continue
            assert left, f"no reply to {event}"
            code = left.pop(0)
            if event.verb == b"BDAT":
                assert code == 501
                break
            assert (code == 354) == (event.verb == b"DATA" and not event.rest and recipient and not begun)
            if code == 250 and event.verb in (b"EHLO", b"RSET"):
                sender = recipient = begun = failed = False
            elif code == 250 and event.verb == b"MAIL":
                assert not sender
                sender = True
            elif code == 250 and event.verb == b"RCPT":
                assert sender
                assert not begun
                recipient = True
            elif code == 354:
                mode = oracle.Mode("data")
            continue
        text = (
            oracle.data(stream, at, limits)
            if mode.name == "data"
            else oracle.chunk(stream, at, b"" if mode.first else chunks, mode, limits)
        )
        if not isinstance(text, oracle.Text):
            break
        at = text.end
        assert left, "no reply to an end"
        code = left.pop(0)
        if mode.name == "data":
            assert code == (550 if text.bare and bare == "reject" else 250)
            if code == 250:
                kept.append(text.body)
            sender = recipient = False
        elif not sender or failed:
            assert code == 503
        else:
            assert code == 250
            chunks = text.body
            if mode.last:
                kept.append(text.body)
        if mode.name == "bdat" and mode.last:
            sender = recipient = begun = failed = False
        mode = oracle.COMMAND
    assert left == []
    assert stored == kept


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stream=STREAMS, cuts=st.lists(st.integers(0, 400), max_size=6), bare=st.sampled_from(["reject", "keep"]))
@example(stream=b"EHLO c\r\n" + TRANSACTION + b"DATA\r\n\n.\r\nMAIL FROM:<>\r\n\r\n.\r\n", cuts=[], bare="reject")
def test_as_many_replies_as_ends(stream: bytes, cuts: list[int], bare: oracle.Bare) -> None:
    with bench(bare=bare, early_refused=False, errors=10_000, useless=10_000) as made:
        player = made.connect()
        at = 0
        for cut in [*sorted(cuts), len(stream)]:
            player.send(stream[at:cut])
            at = max(at, cut)
        codes = final_codes(player.take())
        check_stream(stream, bare, codes, [kept.body for kept in made.keeper.kept])
        player.vanish()
        assert made.keeper.leaked == []


@pytest.mark.parametrize("end", ENDS[:12], ids=repr)
@pytest.mark.parametrize("stored", [[], [b"a"]])
def test_the_smuggling_check_can_fail(end: bytes, stored: list[bytes]) -> None:
    """A server that takes `end` for the end answers once more, or stores something else."""
    stream = b"EHLO c\r\n" + TRANSACTION + b"DATA\r\na" + end + b"NOOP\r\n\r\n.\r\n"
    with pytest.raises(AssertionError):
        check_stream(stream, "reject", [220, 250, 250, 250, 354, 250, 250], stored)


def test_convertible_messages_are_told_from_others() -> None:
    with bench(bare="keep") as made:
        player = made.connect()
        player.say("EHLO c")
        for body, convertible in (("a\r\nb", True), ("a\nb", False)):
            player.say("MAIL FROM:<>", "RCPT TO:<ann@here.test>", "DATA")
            player.send(body.encode() + b"\r\n.\r\n")
            message: Message = made.keeper.kept[-1].message
            assert message.convertible is convertible
