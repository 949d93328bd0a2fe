"""The client's side of a session, on a transport that is none: every reply, every error, replies cut at every place.

A conversation is the replies of a server, one after the other, each given when the client has said something. What
comes of it must not depend on how the replies were cut into reads, nor on whether the fast or the slow way read them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from loadtest import LoadError
from loadtest.connecting import Connector
from loadtest.content import Mail, make_source
from loadtest.dialogue import LONGEST_REPLY, Dialogue
from loadtest.ledger import Ledger, read_ledger
from loadtest.options import Options
from loadtest.pacing import Pacer
from loadtest.session import Session, make_steps
from loadtest.steps import PIECE, Role
from loadtest.tally import Part, Tally

BANNER = b"220 mx.test ESMTP\r\n"
EHLO = b"250-mx.test\r\n250-PIPELINING\r\n250-CHUNKING\r\n250-8BITMIME\r\n250-AUTH PLAIN LOGIN\r\n250 SIZE 1000\r\n"
OPEN = (BANNER, EHLO)
OK = b"250 2.0.0 Ok\r\n"
GO = b"354 go on\r\n"
BYE = b"221 2.0.0 Bye\r\n"
MESSAGE = (OK, OK, GO, OK)
GONE = b""  # the server closes


class Transport:
    """Keeps what is written; a session that has ended writes nothing more."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False

    def write(self, octets: bytes) -> None:
        assert not self.closed
        self.written.append(octets)

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def get_extra_info(self, name: str) -> Any:
        return {"sockname": ("127.0.0.1", 1000), "peername": ("127.0.0.1", 25)}[name]


class Sender(Pacer):
    """Sends so many messages on a session, and quits."""

    def __init__(self, options: Options, messages: int) -> None:
        source = make_source(options, 0, 1)
        super().__init__(options, source, 1, messages)
        self.closed = 0

    def on_ready(self, session: Dialogue, now: float) -> None:
        self.on_done(session, now)

    def on_done(self, session: Dialogue, now: float) -> None:
        assert not session.busy
        if (mail := self._take()) is None:
            session.quit()
        else:
            session.send(mail, now, now)

    def on_closed(self, session: Dialogue) -> None:
        self.closed += 1


class Played:
    """What came of a conversation."""

    def __init__(self, part: Part, said: bytes, failure: LoadError | None, session: Session) -> None:
        self.part = part
        self.said = said
        self.failure = failure
        self.failures = session.failures
        self.phases = {phase: histogram.counts.total() for phase, histogram in part.phases.items()}

    @property
    def errors(self) -> dict[str, int]:
        return dict(self.part.errors)

    @property
    def facts(self) -> dict[str, Any]:
        """All that must be the same however the replies were cut; times aside."""
        part = self.part
        return {
            "accepted": part.accepted,
            "refused": part.refused,
            "unknown": part.unknown,
            "lost": part.lost,
            "recipients refused": part.recipients_refused,
            "octets": part.octets,
            "errors": self.errors,
            "replies": {code: count for code, count in part.replies.items() if count},
            "phases": {phase: count for phase, count in self.phases.items() if phase != "session"},
            "said": self.said,
            "failure": str(self.failure),
        }


Cut = Callable[[bytes], Sequence[bytes]]


def whole(octets: bytes) -> Sequence[bytes]:
    return [octets]


def by_octet(octets: bytes) -> Sequence[bytes]:
    return [octets[i : i + 1] for i in range(len(octets))]


def at(place: int) -> Cut:
    return lambda octets: [part for part in (octets[:place], octets[place:]) if part]


def play(
    replies: Sequence[bytes], *, messages: int = 1, cut: Cut = whole, ledger: Path | None = None, **options: Any
) -> Played:
    """The session is over, or waits for more than `replies`."""

    async def conversation() -> Played:
        chosen = Options(target="127.0.0.1:25", size="100", **options, ledger=str(ledger or ""))
        tally = Tally()
        connector = Connector(chosen, tally, ("127.0.0.1", 25), ())
        pacer = Sender(chosen, messages)
        book = Ledger(ledger) if ledger else None
        pacer.role = Role(chosen, tally, connector, make_steps(chosen, False), book, pacer)
        session = Session(pacer.role, 0.0, 0)
        transport = Transport()
        session.connection_made(cast("asyncio.Transport", transport))
        for reply in replies:
            if transport.closed:
                break
            if reply == GONE:
                break
            for octets in cut(reply):
                session.data_received(octets)
                await asyncio.sleep(0)  # pieces of long messages go in rounds of their own
            for _ in range(5):
                await asyncio.sleep(0)
        if transport.closed or GONE in replies:
            session.connection_lost(None)
            assert pacer.closed == 1
            assert not pacer.role.sessions
            assert not session.busy
            assert tally.sessions == 0
        return Played(tally.take(0), b"".join(transport.written), pacer.failure, session)

    return uvloop.run(conversation())


def test_a_message_is_said_in_order() -> None:
    played = play([*OPEN, *MESSAGE, BYE])
    mail = make_source(Options(size="100"), 0, 1)()
    expected = [b"EHLO client.test\r\n", mail.mail, *mail.rcpts, b"DATA\r\n", mail.text, b"QUIT\r\n"]
    assert played.said == b"".join(expected)
    assert played.part.accepted == 1
    assert played.errors == {}
    assert played.facts["replies"] == {220: 1, 250: 4, 354: 1, 221: 1}
    counted = {"connect", "banner", "ehlo", "mail", "rcpt", "data", "end_of_data", "message", "session"}
    assert played.phases == dict.fromkeys(counted, 1)


def test_commands_that_go_together() -> None:
    def said(**options: Any) -> bytes:
        replies = [BANNER, EHLO, OK + OK + GO, OK, BYE]
        return play(replies, pipelining=True, **options).said

    mail = make_source(Options(size="100", body="bdat"), 0, 1)()
    group = b"MAIL FROM:<a@x.test>\r\nRCPT TO:<b@y.test>\r\n"
    assert said() == b"EHLO client.test\r\n" + group + b"DATA\r\n" + mail.text + b"QUIT\r\n"
    bdat = play([*OPEN, OK + OK + OK, BYE], pipelining=True, body="bdat")
    assert bdat.said == b"EHLO client.test\r\n" + group + b"BDAT 100 LAST\r\n" + mail.raw + b"QUIT\r\n"
    assert bdat.part.accepted == 1
    assert "data" not in bdat.phases


def test_authentication_goes_first() -> None:
    secret = {"user": "ann", "password": "pw"}
    plain = play([*OPEN, b"235 ok\r\n", *MESSAGE, BYE], auth="plain", **secret)
    assert b"EHLO client.test\r\nAUTH PLAIN AGFubgBwdw==\r\nMAIL" in plain.said
    login = play(
        [*OPEN, b"334 VXNlcm5hbWU6\r\n", b"334 UGFzc3dvcmQ6\r\n", b"235 ok\r\n", *MESSAGE, BYE], auth="login", **secret
    )
    assert b"AUTH LOGIN\r\nYW5u\r\ncHc=\r\nMAIL" in login.said
    assert login.part.accepted == plain.part.accepted == 1
    refused = play([*OPEN, b"535 no\r\n"], auth="plain", **secret)
    assert refused.errors == {"refused": 1}
    assert b"MAIL" not in refused.said


@pytest.mark.parametrize("pipelining", [False, True])
@pytest.mark.parametrize("body", ["data", "bdat"])
def test_a_long_message_goes_in_pieces(pipelining: bool, body: str) -> None:
    options = {"pipelining": pipelining, "body": body, "sizes": f"{3 * PIECE}:1"}
    replies = [*OPEN, OK, OK, *([GO] if body == "data" else []), OK, BYE]
    played = play(replies, **options)
    mail = make_source(Options(**{**options, "sizes": f"{3 * PIECE}:1"}), 0, 1)()
    sent = mail.text if body == "data" else b"BDAT %d LAST\r\n%s" % (3 * PIECE, mail.raw)
    assert sent + b"QUIT\r\n" in played.said
    assert played.part.accepted == 1
    assert played.part.octets > 3 * PIECE


def test_8bit_is_announced_where_it_is_offered(tmp_path: Path) -> None:
    (tmp_path / "mail").write_bytes("Subject: x\n\ngrün\n".encode())
    assert b"BODY=8BITMIME\r\n" in play([*OPEN, *MESSAGE, BYE], corpus=str(tmp_path)).said
    without = EHLO.replace(b"250-8BITMIME\r\n", b"")
    assert b"BODY" not in play([BANNER, without, *MESSAGE, BYE], corpus=str(tmp_path)).said


# What is left of a session that goes wrong: replies, and what must be counted.
REFUSED = b"450 4.2.0 later\r\n"
WRONG: dict[str, tuple[list[bytes], dict[str, Any]]] = {
    "banner refused": ([b"554 no\r\n"], {"errors": {"refused": 1}, "replies": {554: 1}}),
    "shutdown at once": ([b"421-busy\r\n421 bye\r\n"], {"errors": {"refused": 1}, "replies": {421: 1}}),
    "EHLO refused": ([BANNER, b"502 no\r\n"], {"errors": {"refused": 1}}),
    "no greeting": ([GONE], {"errors": {"reset": 1}}),
    "gone after EHLO": ([BANNER, GONE], {"errors": {"reset": 1}}),
    "MAIL refused": ([*OPEN, REFUSED, OK, BYE], {"refused": 1, "replies": {220: 1, 221: 1, 250: 2, 450: 1}}),
    "RCPT refused": ([*OPEN, OK, REFUSED, OK, BYE], {"refused": 1, "recipients refused": 1}),
    "DATA refused": ([*OPEN, OK, OK, REFUSED, OK, BYE], {"refused": 1, "recipients refused": 0}),
    "message refused": ([*OPEN, OK, OK, GO, b"552 too big\r\n", BYE], {"refused": 1, "errors": {"refused": 1}}),
    "message deferred": ([*OPEN, OK, OK, GO, b"451-a\r\n451 b\r\n", BYE], {"refused": 1}),
    "shutdown at MAIL": ([*OPEN, b"421 bye\r\n"], {"refused": 1, "errors": {"refused": 1}}),
    "shutdown at the end of data": ([*OPEN, OK, OK, GO, b"421 bye\r\n"], {"refused": 1}),
    "gone after MAIL": ([*OPEN, OK, GONE], {"lost": 1, "unknown": 0, "errors": {"reset": 1}}),
    "gone after 354": ([*OPEN, OK, OK, GO, GONE], {"unknown": 1, "lost": 0, "errors": {"reset": 1}}),
    "gone instead of 221": ([*OPEN, *MESSAGE, GONE], {"accepted": 1, "errors": {"reset": 1}}),
    "garbage": ([b"hello\r\n"], {"errors": {"protocol": 1}, "replies": {}}),
    "garbage later": ([*OPEN, OK, b"\x00\xff\r\n"], {"errors": {"protocol": 1}, "lost": 1}),
    "codes that differ": ([BANNER, b"250-mx\r\n251 mx\r\n"], {"errors": {"protocol": 1}}),
    "a line too short": ([b"22\r\n"], {"errors": {"protocol": 1}}),
    "a code of the wrong kind": ([*OPEN, GO], {"lost": 1, "replies": {220: 1, 250: 1, 354: 1}}),
    "250 where 354 is due": ([*OPEN, OK, OK, OK], {"errors": {"protocol": 1}, "lost": 1}),
    "a reply that never ends": ([b"220-" + b"x" * LONGEST_REPLY * 2], {"errors": {"protocol": 1}}),
    "many lines without an end": ([b"220-x\r\n" * LONGEST_REPLY], {"errors": {"protocol": 1}}),
    "251 for RCPT": (
        [*OPEN, OK, b"251 will forward\r\n", GO, OK, BYE],
        {"accepted": 1, "errors": {}, "replies": {220: 1, 221: 1, 250: 3, 251: 1, 354: 1}},
    ),
    "replies of several lines": (
        [BANNER, EHLO, b"250-a\r\n250 b\r\n", OK, GO, b"250-a\r\n250-b\r\n250 c\r\n", BYE],
        {"accepted": 1, "errors": {}},
    ),
    "a line that ends in LF": ([BANNER, EHLO, b"250 ok\n", OK, GO, OK, BYE], {"accepted": 1, "errors": {}}),
    "a code and nothing more": ([BANNER, EHLO, b"250\r\n", OK, GO, OK, BYE], {"accepted": 1, "errors": {}}),
    "a reply too many, in the end": ([*OPEN, OK, OK, GO, OK + OK, BYE], {"accepted": 1, "errors": {"protocol": 1}}),
    "250 and 421 in the end": ([*OPEN, OK, OK, GO, OK + b"421 bye\r\n"], {"accepted": 1, "errors": {"refused": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_error_is_counted_once(name: str) -> None:
    replies, expected = WRONG[name]
    facts = play(replies).facts
    assert {fact: facts[fact] for fact in expected} == expected


@pytest.mark.parametrize("name", [name for name in WRONG if "end" not in name])
def test_it_makes_no_difference_where_replies_are_cut(name: str) -> None:
    replies, _ = WRONG[name]
    expected = play(replies).facts
    assert play(replies, cut=by_octet).facts == expected
    for place in range(1, max(map(len, replies))):
        assert play(replies, cut=at(place)).facts == expected, place


PIPELINED: dict[str, tuple[bytes, list[bytes], dict[str, Any]]] = {
    "all accepted": (OK + OK + OK + GO, [OK, BYE], {"accepted": 1}),
    "one recipient refused": (OK + OK + REFUSED + GO, [OK, BYE], {"accepted": 1, "recipients refused": 1}),
    "the other one refused": (OK + REFUSED + OK + GO, [OK, BYE], {"accepted": 1, "recipients refused": 1}),
    "all refused, and DATA": (OK + REFUSED * 2 + b"554 no\r\n", [OK, BYE], {"refused": 1, "recipients refused": 2}),
    "all refused, DATA not": (OK + REFUSED * 2 + GO, [b"554 no\r\n", OK, BYE], {"refused": 1, "accepted": 0}),
    "nobody's message accepted": (OK + REFUSED * 2 + GO, [OK, OK, BYE], {"refused": 1, "accepted": 0}),
    "MAIL refused": (REFUSED + b"503 no\r\n" * 3, [OK, BYE], {"refused": 1, "recipients refused": 0}),
    "DATA refused": (OK + OK + OK + REFUSED, [OK, BYE], {"refused": 1}),
    "shutdown amid": (OK + b"421 bye\r\n", [], {"refused": 1, "errors": {"refused": 1}}),
}


@pytest.mark.parametrize("name", PIPELINED)
def test_replies_to_what_was_said_together(name: str) -> None:
    group, rest, expected = PIPELINED[name]
    options = {"pipelining": True, "recipients": 2, "recipient": "u{1..2}@y.test"}
    facts = play([*OPEN, group, *rest], **options).facts
    assert {fact: facts[fact] for fact in expected} == expected
    assert b"QUIT" in facts["said"] or not rest
    for place in range(1, len(group)):
        assert play([*OPEN, group, *rest], cut=at(place), **options).facts == facts, place


def test_nobodys_message_is_ended_at_once() -> None:
    """A server that answers 354 without a recipient waits for the end of data, and for nothing more."""
    options = {"pipelining": True}
    said = play([*OPEN, OK + REFUSED + GO, b"554 no\r\n", OK, BYE], **options).said
    assert said.endswith(b"DATA\r\n.\r\nRSET\r\nQUIT\r\n")


def test_a_long_bdat_waits_for_its_recipients() -> None:
    options = {"body": "bdat", "pipelining": True, "sizes": f"{3 * PIECE}:1"}
    refused = play([*OPEN, OK + REFUSED, OK, BYE], **options)
    assert b"BDAT" not in refused.said
    assert refused.facts["refused"] == refused.facts["recipients refused"] == 1
    doomed = play([*OPEN, REFUSED + b"503 no\r\n", OK, BYE], **options)
    assert b"BDAT" not in doomed.said
    assert doomed.facts["refused"] == 1


def test_a_refusal_amid_a_long_message_ends_the_session() -> None:
    async def conversation() -> Played:
        options = Options(target="127.0.0.1:25", size=str(50 * PIECE))
        tally = Tally()
        pacer = Sender(options, 1)
        connector = Connector(options, tally, ("127.0.0.1", 25), ())
        pacer.role = Role(options, tally, connector, make_steps(options, False), None, pacer)
        session = Session(pacer.role, 0.0, 0)
        transport = Transport()
        session.connection_made(cast("asyncio.Transport", transport))
        for reply in (BANNER, EHLO, OK, OK, GO):
            session.data_received(reply)
        session.pause_writing()
        session.data_received(b"552 too big\r\n")
        session.resume_writing()
        assert transport.closed
        return Played(tally.take(0), b"".join(transport.written), None, session)

    facts = uvloop.run(conversation()).facts
    assert facts["refused"] == 1
    assert facts["errors"] == {"refused": 1}


def test_an_error_clears_the_way_for_the_next_message() -> None:
    """Refused messages are followed by RSET and the next one, on the same connection."""
    replies = [*OPEN, OK, REFUSED, OK, *MESSAGE, OK, OK, GO, b"550 no\r\n", BYE]
    played = play(replies, messages=3)
    assert (played.part.accepted, played.part.refused) == (1, 2)
    assert played.said.count(b"RSET\r\n") == 1
    assert played.failures == 0


@pytest.mark.parametrize(
    ("idle", "errors"),
    [
        (b"421 going\r\n", {"refused": 1}),
        (b"250 what\r\n", {"protocol": 1}),
        (b"hm\r\n", {"protocol": 1}),
        (GONE, {"reset": 1}),
    ],
)
def test_what_comes_while_nothing_was_asked(idle: bytes, errors: dict[str, int]) -> None:
    class Waits(Sender):
        def on_ready(self, session: Dialogue, now: float) -> None:
            pass

    async def conversation() -> Played:
        options = Options(target="127.0.0.1:25")
        tally = Tally()
        pacer = Waits(options, 1)
        connector = Connector(options, tally, ("127.0.0.1", 25), ())
        pacer.role = Role(options, tally, connector, make_steps(options, False), None, pacer)
        session = Session(pacer.role, 0.0, 0)
        transport = Transport()
        session.connection_made(cast("asyncio.Transport", transport))
        for reply in OPEN:
            session.data_received(reply)
        if idle:
            session.data_received(idle)
            assert transport.closed
        session.connection_lost(None)
        return Played(tally.take(0), b"", None, session)

    played = uvloop.run(conversation())
    assert played.errors == errors
    assert played.failures == 1


@pytest.mark.parametrize(
    ("options", "lacks"),
    [
        ({"pipelining": True}, "PIPELINING"),
        ({"body": "bdat"}, "CHUNKING"),
        ({"tls": "starttls"}, "STARTTLS"),
        ({"auth": "plain", "user": "a", "password": "b"}, "AUTH PLAIN"),
    ],
)
def test_a_run_that_cannot_be_is_given_up(options: dict[str, Any], lacks: str) -> None:
    played = play([BANNER, b"250 mx.test\r\n", *MESSAGE], **options)
    assert f"127.0.0.1:25 does not offer {lacks}" in str(played.failure)
    assert b"MAIL" not in played.said


def test_the_same_ehlo_is_read_in_full_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way takes a reply of several lines that it has seen; an altered one is read again."""

    async def conversations() -> list[bool]:
        options = Options(target="127.0.0.1:25")
        tally = Tally()
        pacer = Sender(options, 10)
        connector = Connector(options, tally, ("127.0.0.1", 25), ())
        pacer.role = Role(options, tally, connector, make_steps(options, False), None, pacer)
        read: list[bytes] = []
        original = Session._read

        def note(session: Session, data: bytes) -> None:
            read.append(data)
            original(session, data)

        monkeypatch.setattr(Session, "_read", note)
        slow = []
        for hello in (EHLO, EHLO, EHLO.replace(b"SIZE 1000", b"SIZE 2000"), EHLO + b"250 x\r\n"):
            session = Session(pacer.role, 0.0, 0)
            session.connection_made(cast("asyncio.Transport", Transport()))
            session.data_received(BANNER)
            read.clear()
            session.data_received(hello)
            slow.append(bool(read))
        return slow

    assert uvloop.run(conversations()) == [True, False, True, True]


@pytest.mark.parametrize(
    ("replies", "outcome", "code", "refused"),
    [
        ([*OPEN, OK, OK, OK, GO, OK, BYE], "acked", 250, ()),
        ([*OPEN, OK, OK, REFUSED, GO, OK, BYE], "acked", 250, ("u2@y.test",)),
        ([*OPEN, OK, OK, OK, GO, b"451 later\r\n", BYE], "4xx", 451, ()),
        ([*OPEN, b"550 no\r\n", OK, BYE], "5xx", 550, ()),
        ([*OPEN, OK, OK, OK, GO, GONE], "unknown", 0, ()),
        ([*OPEN, OK, GONE], "unknown", 0, ()),
    ],
)
def test_the_ledger_gets_each_fate(
    replies: list[bytes], outcome: str, code: int, refused: tuple[str, ...], tmp_path: Path
) -> None:
    book = tmp_path / "ledger"
    play(replies, ledger=book, recipients=2, recipient="u{1..2}@y.test")
    (entry,) = read_ledger(book)
    assert (entry.outcome, entry.code, entry.refused) == (outcome, code, refused)
    assert set(entry.recipients) | set(refused) == {"u1@y.test", "u2@y.test"}


def test_a_proxy_header_goes_first() -> None:
    assert play([*OPEN, *MESSAGE, BYE], proxy="v1").said.startswith(b"PROXY TCP4 127.0.0.1 127.0.0.1 1000 25\r\nEHLO")


def test_time_is_over_only_while_an_answer_is_due() -> None:
    async def conversation() -> list[int]:
        options = Options(target="127.0.0.1:25")
        tally = Tally()
        pacer = Sender(options, 0)
        pacer.on_ready = lambda session, now: None  # type: ignore[method-assign]
        connector = Connector(options, tally, ("127.0.0.1", 25), ())
        pacer.role = Role(options, tally, connector, make_steps(options, False), None, pacer)
        session = Session(pacer.role, 0.0, 0)
        session.connection_made(cast("asyncio.Transport", Transport()))
        counts = []
        far = 1e9
        for reply in OPEN:
            session.data_received(reply)
        session.check_time(far, 60)
        counts.append(tally.errors["timeout"])
        session.send(mail(), 0.0, 0.0)
        session.check_time(59, 60)
        counts.append(tally.errors["timeout"])
        session.check_time(61, 60)
        counts.append(tally.errors["timeout"])
        return counts

    def mail() -> Mail:
        return make_source(Options(), 0, 1)()

    assert uvloop.run(conversation()) == [0, 0, 1]


def every_cut(replies: Sequence[bytes]) -> Iterator[Cut]:
    yield from (at(place) for place in range(1, max(map(len, replies))))


def test_whole_sessions_cut_at_every_place() -> None:
    replies = [*OPEN, *MESSAGE, *MESSAGE, BYE]
    expected = play(replies, messages=2).facts
    assert expected["accepted"] == 2
    for cut in every_cut(replies):
        assert play(replies, messages=2, cut=cut).facts == expected


def test_phases_are_counted_by_what_was_answered() -> None:
    played = play([*OPEN, OK, REFUSED, OK, *MESSAGE, BYE], messages=2)
    counted = Counter(played.phases)
    assert (counted["mail"], counted["rcpt"], counted["data"], counted["end_of_data"]) == (2, 2, 1, 1)
