"""The sink: every session on a fake transport and on real sockets, its record, its faults, its processes."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import uvloop
from peer import GoneError, Peer, stuff, unverified

from loadtest import LoadError
from loadtest.ledger import digest, make_body
from loadtest.processes import family, make_certificate
from loadtest.sink_framing import LONGEST_LINE
from loadtest.sink_plan import (
    FAULTS,
    STAGES,
    Rule,
    StagePlan,
    make_plan,
    parse_answer,
    parse_delay,
    parse_failure,
    parse_fault,
    parse_hangup,
)  # fmt: skip
from loadtest.sink_protocol import Session
from loadtest.sink_record import Recorder
from loadtest.sink_server import Settings, Sink, SinkProcess
from loadtest.sink_service import EXTENSIONS, Account, Service
from tests.needs import SYSTEM_PATH, needs

ROOT = Path(__file__).parent.parent
HELLO = "EHLO client.test"


# On a fake transport


class Wire:
    """A transport that keeps what is written, and looks at the record whenever a 250 for a message leaves."""

    def __init__(self, record: Path | None) -> None:
        self.said = b""
        self.writes = 0
        self.closed = False
        self._record = record

    def write(self, octets: bytes) -> None:
        self.said += octets
        self.writes += 1
        if self._record is not None:
            assert self._record.read_bytes().count(b"\n") >= self.said.count(b" kept\r\n"), "answered before the record"

    def close(self) -> None:
        self.closed = True

    abort = close

    def get_extra_info(self, name: str) -> Any:
        return ("192.0.2.7", 4711) if name == "peername" else None


def make_service(**given: Any) -> Service:
    defaults: dict[str, Any] = {
        "hostname": "sink.test", "lmtp": False, "without": frozenset(), "size": 0, "plan": {}, "recorder": None,
        "tls": None, "implicit_tls": False, "account": Account(), "drip": 0.001,
    }  # fmt: skip
    return Service(**{**defaults, **given})


BODY = make_body("m1", 3000, Random(1))
SCRIPT = (
    b"EHLO client.test\r\n"
    b"MAIL FROM:<a@x.test> SIZE=3000 BODY=8BITMIME\r\nRCPT TO:<b@y.test> NOTIFY=NEVER\r\nrcpt to:<c@y.test>\r\nDATA\r\n"
    + stuff(BODY)
    + b'MAIL FROM:<>\r\nRCPT TO:<"a b>c"@y.test>\r\nDATA\r\n.\r\n'
    b"NOOP\r\nMAIL FROM:<a@x.test>\r\nRCPT TO:<b@y.test>\r\nDATA\r\n..\r\n.a\r\n\r\n.\r\n"
    b"MAIL FROM:<a@x.test>\r\nRCPT TO:<b@y.test>\r\nBDAT 5\r\n.\r\n.\nBDAT 0\r\nBDAT 3 LAST\r\n\n\r\n"
    b"MAIL FROM:<a@x.test>\r\nRSET\r\nRCPT TO:<b@y.test>\r\nWHAT\r\nVRFY b\r\nDATA\r\nNOOP\nQUIT\r\n"
)
ANSWERS = (
    [b"220"] + [b"250-"] * 7 + [b"250"] + [b"250"] * 3 + [b"354", b"250"] + [b"250"] * 2 + [b"354", b"250"]
    + [b"250"] * 3 + [b"354", b"250"] + [b"250"] * 5 + [b"250", b"250", b"503", b"500", b"252", b"503", b"500", b"221"]
)  # fmt: skip


def play(folder: Path, reads: list[bytes], recorded: bool, **given: Any) -> tuple[bytes, list[dict[str, Any]], int]:
    """What is said to these reads, what is recorded, and in how many writes."""
    record = folder / "record"
    record.unlink(missing_ok=True)
    recorder = Recorder(record, None, False) if recorded else None
    wire = Wire(record if recorded else None)
    loop: Any = asyncio.new_event_loop()
    session = Session(make_service(recorder=recorder, **given), loop)
    session.connection_made(wire)  # type: ignore[arg-type]
    for read in reads:
        session.data_received(read)
    loop.close()
    if recorder is None:
        return wire.said, [], wire.writes
    recorder.close()
    records = [json.loads(line) for line in record.read_bytes().splitlines()]
    for each in records:
        del each["time"]
    return wire.said, records, wire.writes


@pytest.mark.parametrize("recorded", [False, True])
def test_the_same_octets_are_answered_the_same_however_they_are_cut(tmp_path: Path, recorded: bool) -> None:
    """The shortcut for a client that waits, the loop over what is pipelined, and every seam between two reads."""
    whole, records, writes = play(tmp_path, [SCRIPT], recorded)
    codes = [line[:4] if line[3:4] == b"-" else line[:3] for line in whole.splitlines()]
    assert codes == list(ANSWERS)
    assert writes <= 3, "the greeting, the rest, and nothing in between but the end"
    assert play(tmp_path, [SCRIPT[n : n + 1] for n in range(len(SCRIPT))], recorded)[:2] == (whole, records)
    assert play(tmp_path, SCRIPT.splitlines(keepends=True), recorded)[:2] == (whole, records)
    steps = SCRIPT.replace(stuff(BODY), b"\0").splitlines(keepends=True)
    assert play(tmp_path, [step.replace(b"\0", stuff(BODY)) for step in steps], recorded)[:2] == (whole, records)
    chance = Random(7)
    places = range(1, len(SCRIPT)) if not recorded else chance.sample(range(1, len(SCRIPT)), 300)
    for place in places:
        assert play(tmp_path, [SCRIPT[:place], SCRIPT[place:]], recorded)[:2] == (whole, records), place


def test_the_record_says_what_came(tmp_path: Path) -> None:
    _, records, _ = play(tmp_path, [SCRIPT], True)
    assert records[0] == {
        "client": "192.0.2.7:4711",
        "helo": "client.test",
        "protocol": "ESMTP",
        "tls": "",
        "user": "",
        "sender": "a@x.test",
        "sender_parameters": "SIZE=3000 BODY=8BITMIME",
        "recipients": [
            {"address": "b@y.test", "parameters": "NOTIFY=NEVER", "answer": "250 2.0.0 kept"},
            {"address": "c@y.test", "parameters": "", "answer": "250 2.0.0 kept"},
        ],
        "id": "m1",
        "sha256": digest(BODY),
        "octets": 3000,
    }
    assert [each["sha256"] for each in records[1:]] == [
        digest(b""),
        digest(b".\r\na\r\n\r\n"),
        digest(b".\r\n.\n\n\r\n"),
    ]
    assert records[1]["recipients"][0]["address"] == '"a b>c"@y.test'
    assert records[1]["sender"] == ""


def test_trace_fields_are_not_part_of_what_was_sent(tmp_path: Path) -> None:
    text = stuff(b"Received: from a\r\n\tby b\r\n" + BODY)
    script = b"EHLO c\r\nMAIL FROM:<a@x>\r\nRCPT TO:<b@y>\r\nDATA\r\n" + text
    _, records, _ = play(tmp_path, [script], True)
    assert (records[0]["id"], records[0]["sha256"]) == ("m1", digest(BODY))
    _, records, _ = play(tmp_path, [script.replace(b"Received: from", b"Subject: from")], True)
    assert "stands before it" in records[0]["fault"]


def test_a_notification_is_read(tmp_path: Path) -> None:
    report = (
        b"Content-Type: multipart/report; boundary=b\r\n\r\n--b\r\nContent-Type: message/delivery-status\r\n\r\n"
        b"Reporting-MTA: dns; x\r\n\r\nFinal-Recipient: rfc822; b@y.test\r\nAction: failed\r\nStatus: 5.1.1\r\n\r\n"
        b"--b\r\n"
        b"Content-Type: text/rfc822-headers\r\n\r\nX-Ledger: m7 00000100\r\n\r\n--b--\r\n"
    )
    _, records, _ = play(tmp_path, [b"EHLO c\r\nMAIL FROM:<>\r\nRCPT TO:<a@x>\r\nDATA\r\n" + stuff(report)], True)
    assert records[0]["notification"] == {"id": "m7", "fates": [["b@y.test", "failed", "5.1.1"]]}


def ask(lines: list[str], **given: Any) -> list[str]:
    """The codes of the replies to lines said one by one, behind the greeting."""
    said, _, _ = play(Path(), [f"{line}\r\n".encode() for line in lines], False, **given)
    return [line[:3] for line in said.decode("latin1").split("\r\n")[1:-1] if line[3:4] != "-"]


@pytest.mark.parametrize(
    ("lines", "codes"),
    [
        (["MAIL FROM:<a@x>"], ["503"]),
        ([HELLO, "RCPT TO:<a@x>"], ["250", "503"]),
        ([HELLO, "DATA"], ["250", "503"]),
        ([HELLO, "MAIL FROM:<a@x>", "MAIL FROM:<a@x>"], ["250", "250", "503"]),
        ([HELLO, "MAIL FROM:<a@x>", "DATA", "RCPT TO:<>", "RCPT TO:b@y"], ["250", "250", "503", "501", "501"]),
        ([HELLO, "MAIL FROM: <a@x>", "RCPT TO:<b@y> X=Y", "RCPT TO:<Postmaster>"], ["250", "250", "555", "250"]),
        ([HELLO, "MAIL FROM:<a@x> BODY=BINARYMIME"], ["250", "555"]),
        (["HELO x", "MAIL FROM:<a@x> SIZE=1", "MAIL FROM:<a@x>"], ["250", "555", "250"]),
        (["EHLO", "LHLO x", "HELO x", "STARTTLS", "AUTH PLAIN", "HELP"], ["501", "500", "250", "500", "500", "500"]),
        ([HELLO, "BDAT x"], ["250", "501"]),
        ([HELLO, "BDAT 4\r\nQUIT", "NOOP"], ["250", "503", "500", "250"]),
    ],
)
def test_what_is_out_of_order_is_refused(lines: list[str], codes: list[str]) -> None:
    assert ask(lines) == codes


@pytest.mark.parametrize(
    ("without", "line", "code"),
    [
        ("SIZE", "MAIL FROM:<a@x> SIZE=1", "555"),
        ("8BITMIME", "MAIL FROM:<a@x> BODY=8BITMIME", "555"),
        ("SMTPUTF8", "MAIL FROM:<a@x> SMTPUTF8", "555"),
        ("DSN", "MAIL FROM:<a@x> RET=HDRS", "555"),
        ("CHUNKING", "BDAT 0 LAST", "500"),
        ("PIPELINING", "NOOP\r\nNOOP", "503"),
    ],
)
def test_what_is_not_offered_is_refused(without: str, line: str, code: str) -> None:
    assert ask([HELLO, line], without=frozenset({without}))[-1] == code
    assert ask([HELLO, line])[-1] != code or without == "CHUNKING"
    hello, _, _ = play(Path(), [b"EHLO c\r\n"], False, without=frozenset({without}))
    assert without.encode() not in hello
    assert without.encode() in play(Path(), [b"EHLO c\r\n"], False)[0]


def test_a_message_that_is_too_large_is_refused() -> None:
    envelope = [HELLO, "MAIL FROM:<a@x>", "RCPT TO:<b@y>"]
    assert ask([HELLO, "MAIL FROM:<a@x> SIZE=11"], size=10)[-1] == "552"
    assert ask([*envelope, "DATA", "12345678\r\n."], size=10)[-1] == "250"
    assert ask([*envelope, "DATA", "123456789\r\n."], size=10)[-1] == "552"
    assert ask([*envelope, "BDAT 11 LAST\r\n123456789"], size=10)[-1] == "552"


def test_a_line_without_end_is_refused() -> None:
    said, _, _ = play(Path(), [b"x" * 1000] * (LONGEST_LINE // 1000 + 2), False)
    assert said.endswith(b"500 5.5.2 line too long\r\n")


def test_a_record_that_cannot_be_written_is_no_250() -> None:
    service = make_service(recorder=Recorder(Path("/dev/full"), None, False))
    wire = Wire(None)
    loop: Any = asyncio.new_event_loop()
    session = Session(service, loop)
    session.connection_made(wire)  # type: ignore[arg-type]
    session.data_received(b"EHLO c\r\nMAIL FROM:<a@x>\r\nRCPT TO:<b@y>\r\nDATA\r\n.\r\nNOOP\r\n")
    assert wire.said.endswith(b"451 4.3.0 the record cannot be written\r\n250 2.0.0 ok\r\n")
    assert (service.counts.messages, service.counts.unrecorded) == (0, 1)
    loop.close()


def b64(text: str) -> str:
    """With | for the NUL of AUTH PLAIN."""
    return base64.b64encode(text.replace("|", "\0").encode()).decode()


class Clock:
    """A loop whose time comes when it is told."""

    def __init__(self) -> None:
        self.due: list[Callable[[], object]] = []

    def call_later(self, _: float, what: Callable[..., object], *given: object) -> None:
        self.due.append(lambda: what(*given))


def test_octets_that_come_before_a_late_reply_to_starttls_are_refused() -> None:
    clock: Any = Clock()
    wire = Wire(None)
    plan = make_plan([], [parse_delay("starttls=1s")], 1)
    session = Session(make_service(tls=ssl.create_default_context(), plan=plan), clock)
    session.connection_made(wire)  # type: ignore[arg-type]
    for read in (b"EHLO c\r\n", b"STARTTLS\r\n", b"MAIL FROM:<a@x>\r\n"):
        session.data_received(read)
    assert not wire.said.endswith(b"start TLS\r\n")
    clock.due.pop()()
    assert wire.said.endswith(b"220 2.0.0 start TLS\r\n554 5.5.1 octets behind STARTTLS\r\n")
    assert wire.closed


# On real sockets


@contextmanager
def serving(**given: Any) -> Iterator[Sink]:
    """A sink in a loop of a thread of its own."""
    started: list[Sink] = []
    ready = threading.Event()
    ended = threading.Event()

    async def run() -> None:
        async with Sink(Settings(**{"drip": 0.001, "seed": 1, **given})) as sink:
            started.append(sink)
            ready.set()
            while not ended.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=uvloop.run, args=[run()])
    thread.start()
    try:
        assert ready.wait(20)
        yield started[0]
    finally:
        ended.set()
        thread.join(20)


def rules(*texts: str, parse: Callable[[str], Rule] = parse_answer) -> tuple[Rule, ...]:
    return tuple(parse(text) for text in texts)


def test_answers_by_pattern_and_stage(tmp_path: Path) -> None:
    given = rules(
        "rcpt full@* 452 4.2.2 mailbox full", "rcpt good@y.test 250 2.1.5 welcome", "rcpt *@Y.test 550 5.1.1 no\\nbody",
        "mail bad@* 553 5.1.8 not you", "end late@* 451 4.3.0 later", "data none@* 554 5.5.1 no",
    )  # fmt: skip
    with serving(rules=given, record=tmp_path / "record") as sink, Peer(sink.address) as peer:
        assert peer.ask("MAIL FROM:<bad@x>") == "553 5.1.8 not you"
        assert peer.envelope(["full@z", "good@y.test", "any@y.test", "late@z"], "a@x.test") == [
            "250 2.1.0 ok", "452 4.2.2 mailbox full", "250 2.1.5 welcome", "550-5.1.1 no\n550 body", "250 2.1.5 ok"
        ]  # fmt: skip
        assert peer.ask("DATA") == "354 go on"
        peer.send(stuff(BODY))
        assert peer.reply() == "451 4.3.0 later"
        assert peer.data(["b@z"], BODY) == "250 2.0.0 kept"
        assert peer.data(["none@z"], BODY) == "554 5.5.1 no"
        peer.ask("RSET")
        assert peer.bdat(["b@z"], BODY[:1000], BODY[1000:]) == "250 2.0.0 kept"
        assert sink.counts.messages == 2
        assert sink.counts.refusals == {"553": 1, "452": 1, "550": 1, "451": 1, "554": 1}
        answers = [[to["answer"] for to in record["recipients"]] for record in sink.records()]
        assert answers == [["451 4.3.0 later"] * 2, ["250 2.0.0 kept"], ["250 2.0.0 kept"]]


def test_the_first_times_of_each_address() -> None:
    with serving(rules=rules("rcpt *@y.test first 2 451 4.7.1 greylisted")) as sink, Peer(sink.address) as peer:
        said = peer.envelope(["a@y.test", "a@y.test", "b@y.test", "a@y.test", "b@y.test", "b@y.test", "c@z"])
        assert [reply[:3] for reply in said] == ["250", "451", "451", "451", "250", "451", "250", "250"]


def test_refused_at_the_greeting() -> None:
    with serving(rules=rules("banner 554 5.3.2 no mail here")) as sink:
        peer = Peer(sink.address, "")
        assert peer.reply() == "554 5.3.2 no mail here"
        assert peer.ask(HELLO)[:3] == "503"
        assert peer.ask("QUIT")[:3] == "221"
        assert peer.ended()
        peer.close()
    with serving(rules=rules("ehlo evil.* 421 4.7.0 go away")) as sink:
        peer = Peer(sink.address, "EHLO evil.test")
        assert peer.hello == "421 4.7.0 go away"
        assert peer.ended()
        peer.close()


def test_lmtp_answers_each_recipient(tmp_path: Path) -> None:
    given = rules("end full@* 452 4.2.2 full")
    path = tmp_path / "socket"
    with serving(address=f"unix:{path}", lmtp=True, rules=given, record=tmp_path / "record") as sink:
        with Peer(sink.address, "LHLO client.test") as peer:
            assert peer.greeting == "220 sink.test LMTP"
            assert peer.ask(HELLO)[:3] == "500"
            for send in (peer.data, peer.bdat):
                assert send(["a@y", "full@y", "b@y"], BODY) == "250 2.0.0 kept"
                assert peer.replies(2) == ["452 4.2.2 full", "250 2.0.0 kept"]
        first, _ = sink.records()
        assert [to["answer"][:3] for to in first["recipients"]] == ["250", "452", "250"]
        assert (first["protocol"], first["client"]) == ("LMTP", "unix")
        assert (sink.counts.messages, sink.counts.recipients) == (2, 4)


@pytest.mark.parametrize(
    ("fault", "answers"),
    [("421", ["421 4.3.2 closing on purpose", ""]), ("stall", ["250 2.0.0 kept", ""]), ("reset", ["", ""])],
)
def test_what_lmtp_does_not_get_to_say_is_no_answer(tmp_path: Path, fault: str, answers: list[str]) -> None:
    given = rules(f"{fault}@end", parse=parse_fault)
    with serving(lmtp=True, rules=given, record=tmp_path / "record") as sink:
        peer = Peer(sink.address, "LHLO client.test")
        peer.envelope(["a@y", "b@y"])
        peer.ask("DATA")
        peer.send(stuff(BODY))
        said, _ = read_rest(peer)
        peer.close()
        assert said.count(b"\r\n") == sum(map(bool, answers))
        assert [to["answer"] for to in sink.records()[0]["recipients"]] == answers


def test_a_late_reply_holds_up_what_follows(tmp_path: Path) -> None:
    delays = (parse_delay("rcpt=50ms"), parse_delay("100ms"))
    with serving(delays=delays, record=tmp_path / "record") as sink, Peer(sink.address) as peer:
        started = time.monotonic()
        peer.send(b"MAIL FROM:<a@x>\r\nRCPT TO:<b@y>\r\nRCPT TO:<c@y>\r\nDATA\r\n")
        assert [reply[:3] for reply in peer.replies(4)] == ["250", "250", "250", "354"]
        assert time.monotonic() - started >= 0.099
        peer.send(stuff(BODY) + b"NOOP\r\n")
        time.sleep(0.03)
        assert sink.records() == [], "it is not kept before it is answered"
        assert peer.replies(2) == ["250 2.0.0 kept", "250 2.0.0 ok"]
        assert time.monotonic() - started >= 0.198
        assert len(sink.records()) == 1


def test_shares_fail_and_hang_up(tmp_path: Path) -> None:
    given = (parse_failure("30%"), parse_hangup("20%"), parse_failure("10%@rcpt"))
    with serving(rules=given, record=tmp_path / "record") as sink:
        heard = {"250": 0, "451": 0, "": 0}
        for _ in range(200):
            try:
                with Peer(sink.address) as peer:
                    heard[peer.data(["b@y"], BODY)[:3]] += 1
            except GoneError:
                heard[""] += 1
        answers = [record["recipients"][0]["answer"][:3] for record in sink.records()]
        assert answers.count("250") == heard["250"] == sink.counts.messages
        assert answers.count("") == heard[""] == sink.counts.faults["hangup@end"]
        assert heard["451"] == sink.counts.refusals["451"] > answers.count("451")
        assert 20 < heard[""] < 70
        assert 40 < heard["451"] < 100


def reach(peer: Peer, stage: str) -> None:
    """Everything before a stage, and what makes the sink answer there."""
    if stage == "banner":
        return
    peer.reply()
    if stage != "ehlo":
        peer.ask(HELLO)
    said = {
        "ehlo": f"{HELLO}\r\n", "starttls": "STARTTLS\r\n", "mail": "MAIL FROM:<a@x>\r\n", "quit": "QUIT\r\n",
        "auth": f"AUTH PLAIN {b64('|me|secret')}\r\n",
    }  # fmt: skip
    if stage in said:
        peer.send(said[stage].encode())
        return
    peer.ask("MAIL FROM:<a@x>")
    if stage == "rcpt":
        peer.send(b"RCPT TO:<b@y>\r\n")
        return
    peer.ask("RCPT TO:<b@y>")
    if stage == "end":
        peer.ask("DATA")
        peer.send(stuff(BODY))
    else:
        peer.send(b"DATA\r\n")


def read_rest(peer: Peer, most: int = 5 << 18) -> tuple[bytes, str]:
    """What comes until the connection ends, or nothing comes any more."""
    octets = b""
    peer.socket.settimeout(0.15)
    try:
        while len(octets) < most:
            piece = peer.socket.recv(1 << 16)
            if not piece:
                return octets, "closed"
            octets += piece
    except TimeoutError:
        return octets, "silent"
    except ConnectionResetError:
        return octets, "reset"
    return octets, "endless"


def provoke(sink: Sink, stage: str) -> tuple[bytes, str]:
    """What comes at a stage, and how it ends."""
    try:
        peer = Peer(sink.address, "")
    except ConnectionResetError:  # at the banner it may be as early as that
        return b"", "reset"
    reach(peer, stage)
    said, end = read_rest(peer)
    peer.close()
    return said, end


RIGHT = {
    "banner": b"220 sink.test ESMTP\r\n", "ehlo": b"250-", "starttls": b"220 2.0.0 start TLS\r\n",
    "auth": b"235 2.7.0 authenticated\r\n", "mail": b"250 2.1.0 ok\r\n", "rcpt": b"250 2.1.5 ok\r\n",
    "data": b"354 go on\r\n", "end": b"250 2.0.0 kept\r\n", "quit": b"221 2.0.0 bye\r\n",
}  # fmt: skip
SEEN: dict[str, Callable[[bytes, bytes, str], bool]] = {
    "silence": lambda said, _, end: (said, end) == (b"", "silent"),
    "stall": lambda said, right, end: said.startswith(right) and end == "silent",
    "421": lambda said, _, end: (said, end) == (b"421 4.3.2 closing on purpose\r\n", "closed"),
    "hangup": lambda said, _, end: (said, end) == (b"", "closed"),
    "reset": lambda said, _, end: (said, end) == (b"", "reset"),
    "half": lambda said, right, end: right.startswith(said[:3]) and not said.endswith(b"\n") and end == "closed",
    "drip": lambda said, right, _: said.startswith(right) and said.endswith(b"\r\n"),
    "long-line": lambda said, right, _: said[:4] == right[:3] + b" " and len(said) == (1 << 20) + 6,
    "endless": lambda said, right, end: (
        set(said[:80_000].split(b"\r\n")[:-1]) == {right[:3] + b"-more"} and end == "endless"
    ),
    "garbage": lambda said, _, __: said == bytes(range(256)) * 4 + b"\r\n",
    "mixed": lambda said, right, _: said == right[:3] + b"-one\r\n550 two\r\n",
    "bare-lf": lambda said, right, _: b"\r" not in said and said.startswith(right.rstrip()),
    "inject": lambda said, right, _: said.startswith(right) and said.endswith(b"250 2.0.0 injected on purpose\r\n"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_at_every_stage(tmp_path: Path, name: str) -> None:
    needs("openssl")
    make_certificate(tmp_path)
    for stage in STAGES:
        record = tmp_path / f"record-{stage}"
        user = {"user": "me", "password": "secret"} if stage == "auth" else {}
        tls = {"tls": "starttls", "certificate": tmp_path / "cert.pem", "key": tmp_path / "key.pem"}
        with serving(rules=rules(f"{name}@{stage}", parse=parse_fault), record=record, **tls, **user) as sink:
            said, end = provoke(sink, stage)
            assert SEEN[name](said, RIGHT[stage], end), (stage, said[:100], end)
            assert sink.counts.faults == {f"{name}@{stage}": 1}
            answers = [each["recipients"][0]["answer"] for each in sink.records()]
            if stage == "end":
                assert answers == [
                    {"421": "421 4.3.2 closing on purpose"}.get(name, "250 2.0.0 kept" if FAULTS[name].answers else "")
                ]
            else:
                assert answers == []


def test_a_session_goes_on_behind_a_fault() -> None:
    given = rules("drip@mail", "inject@rcpt", "long-line@data", parse=parse_fault)
    with serving(rules=given) as sink, Peer(sink.address) as peer:
        assert peer.ask("MAIL FROM:<a@x>") == "250 2.1.0 ok"
        assert peer.ask("RCPT TO:<b@y>") == "250 2.1.5 ok"
        assert peer.reply() == "250 2.0.0 injected on purpose"
        assert len(peer.ask("DATA")) == (1 << 20) + 4
        peer.send(stuff(BODY))
        assert peer.reply() == "250 2.0.0 kept"


@pytest.mark.parametrize("given", [True, False])
def test_tls(tmp_path: Path, given: bool) -> None:
    needs("openssl")
    settings: dict[str, Any] = {"tls": "starttls", "record": tmp_path / "record"}
    if given:
        make_certificate(tmp_path)
        settings |= {"certificate": tmp_path / "cert.pem", "key": tmp_path / "key.pem"}
    with serving(**settings) as sink:
        with Peer(sink.address) as peer:
            assert "STARTTLS" in peer.hello
            peer.start_tls()
            assert peer.ask("MAIL FROM:<a@x>")[:3] == "503", "what was said before is forgotten"
            assert "STARTTLS" not in peer.ask(HELLO)
            assert peer.data(["b@y"], BODY) == "250 2.0.0 kept"
            assert sink.records()[0]["tls"] == "TLSv1.3"
            assert sink.records()[0]["protocol"] == "ESMTPS"
        with Peer(sink.address) as peer:
            peer.send(b"STARTTLS\r\nMAIL FROM:<a@x>\r\n")
            assert peer.reply() == "554 5.5.1 octets behind STARTTLS"
            assert peer.ended()
        with Peer(sink.address) as peer:
            peer.ask("STARTTLS")
            peer.send(b"this is no handshake\r\n")
            with pytest.raises(GoneError):
                peer.replies(9)
        assert (sink.counts.tls, sink.counts.tls_failed) == (1, 1)
    with serving(**settings | {"tls": "implicit"}) as sink, Peer(sink.address, implicit_tls=True) as peer:
        assert "STARTTLS" not in peer.hello
        assert peer.data(["b@y"], BODY) == "250 2.0.0 kept"


def test_octets_pasted_before_the_handshake() -> None:
    needs("openssl")
    with serving(tls="starttls", rules=rules("inject@starttls", parse=parse_fault)) as sink, Peer(sink.address) as peer:
        assert peer.ask("STARTTLS")[:3] == "220"
        assert peer.reply() == "250 2.0.0 injected on purpose"
        peer.socket = unverified().wrap_socket(peer.socket, server_hostname="x")
        assert peer.ask(HELLO)[:3] == "250"


def test_authentication(tmp_path: Path) -> None:
    with serving(user="me", password="secret", record=tmp_path / "record") as sink:
        with Peer(sink.address) as peer:
            assert "250-AUTH PLAIN LOGIN" in peer.hello.replace("250 AUTH", "250-AUTH")
            assert peer.ask("MAIL FROM:<a@x>") == "530 5.7.0 authentication required"
            for line in (
                f"AUTH PLAIN {b64('|me|wrong')}",
                f"AUTH PLAIN {b64('|you|secret')}",
                f"AUTH PLAIN {b64('||')}",
            ):
                assert peer.ask(line)[:3] == "535"
            assert [peer.ask(line)[:3] for line in ("AUTH LOGIN", b64("me"), b64("wrong"))] == ["334", "334", "535"]
            assert [peer.ask(line)[:3] for line in ("AUTH PLAIN", "*")] == ["334", "501"]
            assert [peer.ask(line)[:3] for line in ("AUTH PLAIN", "=", "AUTH PLAIN !!", "AUTH X")] == [
                "334",
                "501",
                "501",
                "504",
            ]
            assert [peer.ask(line)[:3] for line in ("AUTH LOGIN", b64("me"), b64("secret"))] == ["334", "334", "235"]
            assert peer.ask("AUTH LOGIN")[:3] == "503"
            assert peer.data(["b@y"], BODY) == "250 2.0.0 kept"
        with Peer(sink.address) as peer:
            assert [peer.ask(line)[:3] for line in ("AUTH PLAIN", b64("|me|secret"))] == ["334", "235"]
            assert peer.data(["b@y"], BODY) == "250 2.0.0 kept"
        with Peer(sink.address) as peer:
            assert peer.ask(f"AUTH LOGIN {b64('me')}")[:3] == "334"
            assert peer.ask(b64("secret"))[:3] == "235"
        assert [(each["user"], each["protocol"]) for each in sink.records()] == [("me", "ESMTPA")] * 2


def test_messages_are_kept_as_they_came(tmp_path: Path) -> None:
    body = make_body("m1", 200_000, Random(5))
    with serving(record=tmp_path / "record", keep=tmp_path / "a/b", fsync=True) as sink, Peer(sink.address) as peer:
        assert peer.data(["b@y"], body) == "250 2.0.0 kept"
        assert peer.bdat(["b@y"], b"x\r\n", body) == "250 2.0.0 kept"
        first, second = sink.records()
    assert Path(first["file"]).read_bytes() == body
    assert Path(second["file"]).read_bytes() == b"x\r\n" + body
    assert len(list((tmp_path / "a/b").iterdir())) == 2


def test_a_left_over_socket_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with serving(address=f"unix:{path}") as sink, Peer(sink.address) as peer:
        assert peer.data(["b@y"], BODY) == "250 2.0.0 kept"
    path.unlink(missing_ok=True)
    path.write_text("mine")
    with pytest.raises(LoadError, match="Address already in use"):
        Sink(Settings(address=f"unix:{path}"))
    assert path.read_text() == "mine"


# As a program


def test_processes_share_the_work_and_add_up(tmp_path: Path) -> None:
    needs("smtp-source")
    record = tmp_path / "record"
    with SinkProcess("--processes", "2", "--record", str(record), "--seed", "4") as sink:
        assert len(family(sink.pid)) == 3
        command = [
            "smtp-source",
            "-s",
            "20",
            "-m",
            "400",
            "-l",
            "500",
            "-f",
            "a@x.test",
            "-t",
            "b@y.test",
            f"127.0.0.1:{sink.port}",
        ]
        subprocess.run(command, check=True, timeout=60, env={**os.environ, "PATH": SYSTEM_PATH})
    assert (sink.counts["connections"], sink.counts["messages"], sink.counts["recipients"]) == (400, 400, 400)
    assert len({json.loads(line)["client"] for line in record.read_text().splitlines()}) > 20
    assert len(record.read_text().splitlines()) == 400


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(tmp_path: Path, processes: int, signum: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "loadtest",
        "sink",
        "127.0.0.1:0",
        "--processes",
        str(processes),
        "--fail",
        "100%@quit",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        address = program.stderr.readline().removeprefix("listening on ").strip()
        with Peer(address) as peer:
            peer.data(["b@y", "c@y"], BODY)
            assert peer.ask("QUIT")[:3] == "451"
            program.send_signal(signum)
            assert peer.ended()
        said, wrong = program.communicate(timeout=20)
    assert (program.returncode, wrong) == (0, "")
    assert said.splitlines()[0].startswith(f"1 messages for 2 recipients, {len(stuff(BODY)) - 3} octets, ")
    assert said.splitlines()[1] == "refusals: 451 1"


def test_its_processes_end_when_the_first_is_killed() -> None:
    command = [sys.executable, "-m", "loadtest", "sink", "127.0.0.1:0", "--processes", "2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        program.stderr.readline()
        children = family(program.pid)[1:]
        assert len(children) == 2
        program.kill()
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}/fd").exists() and os.listdir(f"/proc/{pid}/fd") for pid in children):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_process_that_dies_ends_it_with_an_error() -> None:
    sink = SinkProcess("--processes", "2").__enter__()
    os.kill(family(sink.pid)[1], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while sink.running() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(LoadError, match="a process of the sink has failed"):
        sink.__exit__(None, None, None)


def test_generator_sink_and_oracle_agree(tmp_path: Path) -> None:
    ledger, record = tmp_path / "ledger", tmp_path / "record"
    loadtest = [sys.executable, "-m", "loadtest"]
    faults = ("--fail", "5%", "--hangup", "5%", "--answer", "rcpt user7@* 550 no")
    with SinkProcess("--record", str(record), *faults) as sink:
        options = ("--messages", "200", "--duration", "30s", "--sessions", "10", "--recipients", "2")
        what = ("--sizes", "0:10,100:20,2KB:60,50KB:10", "--to", "user{1..20}@y.test", "--ledger", str(ledger))
        run = [*loadtest, "run", "pipelined", f"127.0.0.1:{sink.port}", *options, *what]
        subprocess.run(run, cwd=ROOT, check=True, capture_output=True, timeout=60)
    verify = [*loadtest, "verify", str(ledger), "--sink", str(record), "--json"]
    found = subprocess.run(verify, cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads(found.stdout)
    assert report["messages"] >= 200
    assert report["outcomes"]["acked"] == sink.counts["messages"]
    assert report["outcomes"]["unknown"] == sink.counts["faults"]["hangup@end"] > 0
    assert report["outcomes"]["4xx"] == sink.counts["refusals"]["451"] > 0
    assert report["delivered"] == sink.counts["recipients"]
    lines = record.read_text().splitlines(keepends=True)
    kept = next(n for n, line in enumerate(lines) if '"answer":"250' in line)
    record.write_text("".join(lines[:kept] + lines[kept + 1 :]))
    found = subprocess.run(verify, cwd=ROOT, check=False, capture_output=True, text=True)
    assert (found.returncode, set(json.loads(found.stdout)["broken"])) == (1, set("ABCDEF"))
    assert json.loads(found.stdout)["broken"]["A"] in (1, 2)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--answer", "nowhere 550 x"], 2, "names no stage; there are banner, ehlo"),
        (["--answer", "rcpt full 45 x"], 2, "is no answer"),
        (["--answer", "rcpt grüße 550 x"], 2, "is no answer"),
        (["--answer", ""], 2, "names no stage"),
        (["--fail", "200%"], 2, "is no share"),
        (["--fail", "5%@x"], 2, "names no stage"),
        (["--hangup", "x"], 2, "is no share"),
        (["--fault", "drip"], 2, "names no stage"),
        (["--fault", "drop@rcpt"], 2, "names no fault; there are silence"),
        (["--delay", "rcpt=fast"], 2, "is no time"),
        (["--size", "big"], 2, "is no size"),
        (["--without", "TURN"], 2, "is not one of"),
        (["--user", "me"], 2, "belong together"),
        (["--certificate", __file__], 2, "needs --tls"),
        (["--certificate", __file__, "--tls", "implicit"], 1, "cannot be used"),
        (["--answer", "rcpt first 1 450 x", "--processes", "2"], 1, "one process only"),
        (["--record", "/"], 2, "is a directory"),
        (["--record", "/missing/x"], 1, "/missing/x cannot be written"),
        (["nowhere"], 1, "is no address"),
        (["192.0.2.1:1"], 1, "cannot listen on 192.0.2.1:1"),
        (["127.0.0.1:99999"], 1, "is no address"),
        (["unix:/missing/s"], 1, "cannot listen on unix:/missing/s: No such file"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], code: int, text: str) -> None:
    command = [sys.executable, "-m", "loadtest", "sink", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr
    assert text in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_rules_are_understood() -> None:
    rule = parse_answer("end first 3 451 4.3.0 try   later\\nor never")
    assert (rule.stage, rule.pattern, rule.first) == ("end", "*", 3)
    assert rule.act.reply == b"451-4.3.0 try later\r\n451 or never\r\n"
    assert parse_answer("RCPT first@* 250").act.reply == b"250 \r\n"
    assert parse_delay("1s") == ("end", 1.0)
    assert parse_hangup("1%").stage == "end"
    assert make_plan([], [], 1) == {}
    plan = make_plan([parse_fault("drip@rcpt:50%")], [], 1)["rcpt"]
    assert isinstance(plan, StagePlan)
    assert 300 < sum(plan.choose("a@y") is not None for _ in range(1000)) < 700


def test_every_extension_has_a_rule() -> None:
    needs("openssl")
    with serving(tls="starttls", user="me", password="x") as sink, Peer(sink.address) as peer:
        offered = {line[4:].split()[0] for line in peer.hello.splitlines()[1:]}
        assert offered == set(EXTENSIONS)
    assert ssl.HAS_TLSv1_3
