"""Misbehaving sessions: what each kind does on the wire, and that each end is counted once and rightly.

Against servers of a few lines on a real socket, with uvloop as the generator has it; where time or back-pressure
matters, against a transport and a clock that the test moves.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import pytest
import uvloop

from loadtest import LoadError, misbehave, processes
from loadtest.content import Mail, make_source
from loadtest.misbehave import KINDS, OUTCOMES, Context
from loadtest.options import Options
from tests.needs import needs

MAIL = make_source(Options(size="10", recipient="u{1..2}@y.test", recipients=2), 0, 1)()
PARTS = [b"EHLO client.test\r\n", MAIL.mail, *MAIL.rcpts, b"DATA\r\n", MAIL.text, b"QUIT\r\n"]
DIALOGUE = b"".join(PARTS)
GREETING = b"220 mx.test\r\n"
OK = {
    b"EHLO": b"250-mx.test\r\n250-8BITMIME\r\n250 SIZE 100000\r\n",
    b"MAIL": b"250 ok\r\n",
    b"RCPT": b"250 ok\r\n",
    b"DATA": b"354 go\r\n",
    b".": b"250 kept\r\n",
    b"RSET": b"250 ok\r\n",
    b"QUIT": b"221 bye\r\n",
}


class Chosen(Random):
    """Draws what the test wants."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def randrange(self, *_: Any) -> int:
        return self.number

    def choice(self, seq: Any) -> Any:
        return seq[self.number]


@dataclass
class Scripted:
    """A server that answers from a table. An empty answer closes the connection."""

    replies: dict[bytes, bytes] = field(default_factory=dict)
    greeting: bytes = GREETING
    cut: int | None = None  # ends the connection when it has read so many octets
    hard: bool = False  # what ends the connection: RST, not FIN
    limit: int | None = None  # octets of a message, refused at once when there are more
    piecemeal: bool = False
    got: list[bytearray] = field(default_factory=list)  # of each connection
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got = bytearray()
        self.got.append(got)
        self.writers.append(writer)
        try:
            await self._converse(reader, writer, got)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _say(self, writer: asyncio.StreamWriter, octets: bytes) -> None:
        for n in range(0, len(octets), 1 if self.piecemeal else len(octets)):
            writer.write(octets[n : n + 1] if self.piecemeal else octets)
            await writer.drain()
            await asyncio.sleep(0)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, got: bytearray) -> None:
        if self.greeting:
            await self._say(writer, self.greeting)
        in_data = False
        line = bytearray()
        size = 0
        while True:
            if self.cut is not None and len(got) >= self.cut:
                if self.hard:
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            octets = await reader.read(1 if self.cut is not None else 1 << 16)
            if not octets:
                return
            got += octets
            if not self.greeting:
                continue
            for part in octets.splitlines(keepends=True):
                line += part
                if not line.endswith(b"\r\n"):
                    continue
                size += len(line) if in_data else 0
                if in_data and self.limit is not None and size > self.limit:
                    await self._say(writer, b"552 5.3.4 too large\r\n")
                    self.limit = None
                if not in_data or line == b".\r\n":
                    reply = {**OK, **self.replies}[b"." if in_data else bytes(line[:4])]
                    if not reply:
                        return
                    await self._say(writer, reply)
                    in_data = reply.startswith(b"354")
                line.clear()


class Done:
    """Keeps the calls of `done`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.event = asyncio.Event()

    def __call__(self, outcome: str, detail: str) -> None:
        self.calls.append((outcome, detail))
        self.event.set()


async def misbehaved(
    kind: str, port: int, rng: Random, deadline: float = 20.0, mail: Callable[[], Mail] = lambda: MAIL, **more: Any
) -> tuple[str, str]:
    """Plays a session and gives its end, which must be told once; nothing of it may be left then."""
    done = Done()
    left = await connect(
        kind, port, Context(mail, rng, asyncio.get_running_loop(), done, deadline, **{"pause": 0.0, **more})
    )
    await asyncio.wait_for(done.event.wait(), 30)
    await asyncio.sleep(0.01)
    (call,) = done.calls
    assert call[0] in OUTCOMES
    assert call[1]
    if deadline >= 20:  # its timer, if it still ran, would keep the session
        if left() is not None:
            gc.collect()
        assert left() is None, "a timer or the transport holds the session"
    return call


async def connect(kind: str, port: int, context: Context) -> weakref.ref[Context]:
    try:
        await context.loop.create_connection(lambda: KINDS[kind].factory(context), "127.0.0.1", port)
    except ConnectionError:
        pass  # lost before create_connection returned; the session knows
    return weakref.ref(context)


def play(server: Scripted, kind: str, rng: Random, **more: Any) -> tuple[str, str]:
    async def both() -> tuple[str, str]:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        async with listening:
            call = await misbehaved(kind, listening.sockets[0].getsockname()[1], rng, **more)
            await asyncio.sleep(0.01)
            for writer in server.writers:
                writer.close()
        return call

    return uvloop.run(both())


# Each end


@pytest.mark.parametrize("piecemeal", [False, True])
@pytest.mark.parametrize(
    ("kind", "drawn", "detail"),
    [
        ("drip", 0, "said everything"),
        ("drip", 1, "said everything"),
        ("hangup", len(DIALOGUE), f"hung up at octet {len(DIALOGUE)}"),
        ("early", 0, "EHLO before the greeting"),
        ("early", 1, "everything at once"),
        ("early", 2, "everything at once, before the greeting"),
        ("rset", 0, "1000 times RSET"),
        ("oversize", 0, "194400 octets"),
    ],
)
def test_a_patient_server_is_completed(kind: str, drawn: int, detail: str, piecemeal: bool) -> None:
    server = Scripted(piecemeal=piecemeal)
    assert play(server, kind, Chosen(drawn)) == ("completed", detail)
    (got,) = server.got
    if kind in ("drip", "hangup", "early"):
        assert bytes(got) == DIALOGUE
    if kind == "rset":
        assert bytes(got) == PARTS[0] + b"RSET\r\n" * 1000 + b"QUIT\r\n"
    if kind == "oversize":
        head, tail = b"".join(PARTS[:5]), b".\r\nQUIT\r\n"
        assert got.startswith(head)
        assert got.endswith(tail)
        assert len(got) - len(head) - len(tail) == 194_400
        assert b"\n." not in got.removesuffix(tail)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("greeting", "said"),
    [
        (b"554 5.7.1 go away\r\n", "554 5.7.1 go away"),
        (b"421-busy\r\n421 later\r\n", "421 later"),
        (b"HTTP/1.1 200 OK\r\n", "no SMTP reply: HTTP/1.1 200 OK"),
        (b"220-mx.test\r\n250 mx.test\r\n", "no SMTP reply: 250 mx.test"),
        (b"x" * 70_000, "no SMTP reply: xxx"),
    ],
)
def test_a_server_that_refuses(kind: str, greeting: bytes, said: str) -> None:
    outcome, detail = play(Scripted(greeting=greeting), kind, Chosen(2 if kind == "idle" else 1))
    assert outcome == "refused"
    assert detail.startswith(said)


@pytest.mark.parametrize("verb", [b"EHLO", b"MAIL", b"RCPT", b"DATA", b"."])
@pytest.mark.parametrize(
    ("kind", "drawn"),
    [("drip", 0), ("drip", 1), ("idle", 5), ("hangup", len(DIALOGUE)), ("early", 0), ("early", 1), ("oversize", 0)],
)
def test_a_refusal_in_the_middle(kind: str, drawn: int, verb: bytes) -> None:
    server = Scripted(replies={verb: b"451-4.3.0 no\r\n451 4.3.0 %s\r\n" % verb})
    end = ("refused", f"451 4.3.0 {verb.decode()}")
    if kind == "idle" and verb == b".":
        end = ("completed", "after 0.2 s")  # it never comes as far as that
    assert play(server, kind, Chosen(drawn), deadline=0.2 if verb == b"." and kind == "idle" else 20.0) == end


def test_replies_without_end() -> None:
    server = Scripted(greeting=GREETING + b"250 what\r\n" * 2000)
    assert play(server, "idle", Chosen(0)) == ("refused", "more than 1000 replies that nobody asked for")


def test_rset_refused() -> None:
    server = Scripted(replies={b"RSET": b"421 4.7.0 too many\r\n"})
    assert play(server, "rset", Random(1)) == ("refused", "421 4.7.0 too many")


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(
    ("kind", "drawn", "greeting", "up_to"),  # octets that it says at least
    [
        ("drip", 0, GREETING, len(DIALOGUE) - 1),
        ("drip", 1, GREETING, len(DIALOGUE) - 1),
        ("idle", 0, GREETING, 0),
        ("idle", 5, GREETING, len(b"".join(PARTS[:5]))),
        ("hangup", len(DIALOGUE), GREETING, len(b"".join(PARTS[:-1])) - 1),
        ("early", 0, GREETING, len(DIALOGUE) - 1),
        ("early", 0, b"", len(PARTS[0])),
        ("early", 1, GREETING, len(DIALOGUE) - 1),
        ("early", 2, b"", len(DIALOGUE) - 1),
        ("rset", 0, GREETING, 60),
        ("oversize", 0, GREETING, 120),
    ],
)
def test_the_connection_ends_anywhere(kind: str, drawn: int, greeting: bytes, up_to: int, hard: bool) -> None:
    seen = Counter(
        play(Scripted(cut=cut, hard=hard, greeting=greeting), kind, Chosen(drawn))[0]
        for cut in sorted({*range(0, up_to, 9), up_to})
    )
    # What is closed with octets unread, or written to, is reset.
    assert set(seen) <= ({"reset"} if hard else {"reset", "closed"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_never_greets_is_silent(kind: str) -> None:
    assert play(Scripted(greeting=b""), kind, Chosen(1), deadline=0.2) == ("silent", "after 0.2 s")


def test_the_first_end_counts() -> None:
    """A refusal, and then the connection is lost: one end."""
    server = Scripted(greeting=b"554 no\r\n", cut=0, hard=True)
    outcome, _ = play(server, "idle", Chosen(0))
    assert outcome in ("refused", "reset")


# Each kind


@pytest.mark.parametrize("first", range(0, len(DIALOGUE) + 1, 50))
def test_hangs_up_at_the_very_octet(first: int) -> None:
    async def all_of_them() -> None:
        for at in range(first, min(first + 50, len(DIALOGUE) + 1)):
            server = Scripted()
            listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
            async with listening:
                port = listening.sockets[0].getsockname()[1]
                assert await misbehaved("hangup", port, Chosen(at)) == ("completed", f"hung up at octet {at}")
                assert bytes(server.got[0]) == DIALOGUE[:at]

    uvloop.run(all_of_them())


def test_hang_ups_are_drawn_from_the_whole_dialogue() -> None:
    drawn: Counter[int] = Counter()
    rng = Random(3)
    for _ in range(4000):
        wire = Wire("hangup", rng)
        wire.answer_all()
        drawn[len(wire.written)] += 1
    assert set(drawn) == set(range(len(DIALOGUE) + 1))
    assert max(drawn.values()) < 80


@pytest.mark.parametrize("stage", range(len(PARTS)))
def test_idles_everywhere(stage: int) -> None:
    server = Scripted()
    assert play(server, "idle", Chosen(stage), deadline=0.15) == ("completed", "after 0.15 s")
    half = MAIL.text[: len(MAIL.text) // 2]
    expected = b"".join([*PARTS[:5], half][:stage]) if stage < len(PARTS) - 1 else b"".join(PARTS[:5]) + half
    assert bytes(server.got[0]) == expected


def test_idlers_are_drawn_from_all_stages() -> None:
    said: Counter[int] = Counter()
    rng = Random(3)
    for _ in range(700):
        wire = Wire("idle", rng, deadline=30)
        wire.answer(GREETING, OK[b"EHLO"], OK[b"MAIL"], *[OK[b"RCPT"]] * 2, OK[b"DATA"])
        wire.clock.run_until(30)
        wire.lose()
        said[len(wire.written)] += 1
    assert len(said) == len(PARTS)
    assert min(said.values()) > 50


def test_an_idler_that_is_told_to_go() -> None:
    async def both() -> tuple[str, str]:
        server = Scripted()
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        async with listening:
            session = asyncio.create_task(
                misbehaved("idle", listening.sockets[0].getsockname()[1], Chosen(1), deadline=30)
            )
            while not server.got or not server.got[0]:
                await asyncio.sleep(0.01)
            server.writers[0].write(b"421 4.4.2 timeout\r\n")
            return await session

    assert uvloop.run(both()) == ("refused", "421 4.4.2 timeout")


def test_oversize_stops_when_it_is_refused() -> None:
    server = Scripted(limit=300_000, replies={b"EHLO": b"250-mx\r\n250-size 90000000\r\n250 HELP\r\n"})
    assert play(server, "oversize", Random(1)) == ("refused", "552 5.3.4 too large")
    assert 300_000 < len(server.got[0]) < 60_000_000


def test_oversize_knows_the_limit_in_any_case() -> None:
    server = Scripted(replies={b"EHLO": b"250-mx\r\n250-Size 500000\r\n250 HELP\r\n"})
    assert play(server, "oversize", Random(1)) == ("completed", "583200 octets")


@pytest.mark.parametrize("ehlo", [b"250 mx\r\n", b"250 SIZE\r\n", b"250 SIZE 0\r\n", b"250 SIZE=5\r\n"])
def test_oversize_without_a_limit(ehlo: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misbehave, "OVERSIZE", 3_000_000)
    server = Scripted(replies={b"EHLO": ehlo})
    assert play(server, "oversize", Random(1))[0] == "completed"
    assert 3_000_000 < len(server.got[0]) < 3_200_000


def test_preface_goes_first_and_is_not_counted() -> None:
    server = Scripted(greeting=b"", cut=0)
    server.cut = len(b"PROXY UNKNOWN\r\n")
    play(server, "idle", Chosen(0), preface=lambda _: b"PROXY UNKNOWN\r\n")
    assert bytes(server.got[0]) == b"PROXY UNKNOWN\r\n"
    wire = Wire("hangup", Chosen(4), preface=lambda _: b"PROXY UNKNOWN\r\n")
    wire.answer_all()
    assert bytes(wire.written) == b"PROXY UNKNOWN\r\nEHLO"


def test_every_kind_against_smtp_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("smtp-sink")
    monkeypatch.setattr(misbehave, "OVERSIZE", 3_000_000)
    seen: dict[str, set[str]] = {}

    async def work(port: int) -> None:
        rng = Random(5)
        for kind in KINDS:
            for _ in range(4):
                outcome, _ = await misbehaved(kind, port, rng, deadline=0.3 if kind == "idle" else 20.0)
                seen.setdefault(kind, set()).add(outcome)

    with processes.smtp_sink() as server:
        uvloop.run(work(server.port))
    assert seen == {kind: {"completed"} for kind in KINDS}


# By a clock and a transport of the test's own


class Clock:
    """The part of a loop that sessions use; time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, int, asyncio.Handle]] = []
        self._count = 0
        self._loop = asyncio.new_event_loop()
        self._loop.close()

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self._loop)
        self._count += 1
        self.due.append((self.now + delay, self._count, handle))
        return handle

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> asyncio.Handle:
        return self.call_later(0.0, callback, *args)

    def pending(self) -> list[float]:
        return sorted(when for when, _, handle in self.due if not handle.cancelled())

    def run_until(self, end: float) -> None:
        while self.pending() and self.pending()[0] <= end:
            when, count, handle = min(each for each in self.due if not each[2].cancelled())
            self.due.remove((when, count, handle))
            self.now = when
            handle._run()
        self.now = end


class Wire:
    """A session on a transport that keeps what is written, and when."""

    def __init__(self, kind: str, rng: Random, deadline: float = 1000.0, **more: Any) -> None:
        self.clock = Clock()
        self.written = bytearray()
        self.writes: list[tuple[float, bytes]] = []
        self.closing: str = ""
        self.ends: list[tuple[str, str]] = []
        context = Context(
            lambda: MAIL,
            rng,
            cast("asyncio.AbstractEventLoop", self.clock),
            lambda outcome, detail: self.ends.append((outcome, detail)),
            deadline,
            **more,
        )
        self.session = KINDS[kind].factory(context)
        self.session.connection_made(cast("asyncio.BaseTransport", self))

    def write(self, octets: bytes) -> None:
        assert not self.closing
        self.written += octets
        if octets:
            self.writes.append((self.clock.now, octets))

    def close(self) -> None:
        self.closing = self.closing or "close"

    def abort(self) -> None:
        self.closing = "abort"

    def state(self) -> str:
        """How it was closed, if it was."""
        return self.closing

    def lose(self, error: Exception | None = None) -> None:
        self.session.connection_lost(error)
        assert not self.clock.pending(), "a timer is left"

    def answer(self, *replies: bytes) -> None:
        self.session.data_received(b"".join(replies))

    def answer_all(self) -> None:
        """As a patient server, until the session ends."""
        for reply in (GREETING, OK[b"EHLO"], OK[b"MAIL"], OK[b"RCPT"], OK[b"RCPT"], OK[b"DATA"], OK[b"."], OK[b"QUIT"]):
            self.clock.run_until(self.clock.now)
            if self.closing:
                break
            self.answer(reply)
        self.clock.run_until(self.clock.now)
        assert self.closing == "close"
        self.lose()


def test_drip_says_an_octet_each_second() -> None:
    wire = Wire("drip", Chosen(0))
    wire.answer(GREETING)
    wire.clock.run_until(100)
    assert [octets for _, octets in wire.writes] == [bytes([octet]) for octet in PARTS[0]]
    assert [when for when, _ in wire.writes] == [float(n) for n in range(len(PARTS[0]))]
    wire.answer(OK[b"EHLO"])
    wire.clock.run_until(102.5)
    assert wire.written == PARTS[0] + b"MAI"
    wire.lose()
    assert wire.ends == [("closed", "by the server")]


def test_half_of_the_drippers_drip_the_message_only() -> None:
    wire = Wire("drip", Chosen(1))
    wire.answer(GREETING, OK[b"EHLO"], OK[b"MAIL"], OK[b"RCPT"], OK[b"RCPT"], OK[b"DATA"])
    assert [when for when, _ in wire.writes] == [0.0] * 6
    assert wire.written == b"".join(PARTS[:5]) + MAIL.text[:1]
    wire.clock.run_until(4)
    assert wire.written == b"".join(PARTS[:5]) + MAIL.text[:5]
    wire.lose(ConnectionResetError("gone"))
    assert wire.ends == [("reset", "gone")]


def test_a_reply_that_comes_too_soon_is_kept() -> None:
    wire = Wire("drip", Chosen(0))
    wire.answer(GREETING, OK[b"EHLO"])
    wire.clock.run_until(30)
    assert wire.written.startswith(PARTS[0] + b"MAIL FROM")
    wire.lose()


@pytest.mark.parametrize(("drawn", "at_once"), [(0, PARTS[0]), (1, b""), (2, DIALOGUE)])
def test_early_talkers_do_not_wait_for_the_greeting(drawn: int, at_once: bytes) -> None:
    wire = Wire("early", Chosen(drawn))
    assert wire.written == at_once
    wire.answer(GREETING)
    assert wire.written == (DIALOGUE if drawn else at_once)
    wire.answer(*list(OK.values())[:2], *[OK[b"RCPT"]] * 2, OK[b"DATA"], OK[b"."])
    assert wire.state() == ""
    assert wire.written == DIALOGUE
    wire.answer(OK[b"QUIT"])
    assert wire.state() == "close"


def test_oversize_waits_for_room() -> None:
    wire = Wire("oversize", Random(1))
    wire.answer(GREETING, b"250 SIZE 1000000\r\n", OK[b"MAIL"], OK[b"RCPT"], OK[b"RCPT"])
    wire.answer(OK[b"DATA"])
    assert len(wire.writes) == 6  # one piece, the next when others had their turn
    wire.session.pause_writing()
    wire.clock.run_until(0)
    after_pause = len(wire.writes)
    wire.clock.run_until(500)
    assert len(wire.writes) == after_pause <= 7
    wire.session.resume_writing()
    wire.session.pause_writing()
    wire.clock.run_until(600)
    assert after_pause < len(wire.writes) <= after_pause + 2
    wire.answer(b"552 enough\r\n")
    wire.session.resume_writing()
    assert wire.state() == "abort"
    wire.lose()
    assert wire.ends == [("refused", "552 enough")]


def test_the_deadline_ends_what_is_let_do() -> None:
    wire = Wire("idle", Chosen(1), deadline=30)
    wire.answer(GREETING, OK[b"EHLO"])
    wire.clock.run_until(29.9)
    assert wire.state() == ""
    wire.clock.run_until(30)
    assert wire.state() == "abort"
    assert not wire.ends  # the connection is not gone yet
    wire.lose(ConnectionAbortedError())
    assert wire.ends == [("completed", "after 30 s")]


@pytest.mark.parametrize(("answered", "outcome"), [(5, "silent"), (20, "completed")])
def test_a_reply_that_is_owed_at_the_deadline(answered: float, outcome: str) -> None:
    wire = Wire("rset", Random(1), deadline=30)
    wire.answer(GREETING)
    wire.clock.run_until(answered)
    wire.answer(OK[b"EHLO"])
    wire.clock.run_until(30)
    wire.lose()
    assert wire.ends == [(outcome, "after 30 s")]


def test_the_deadline_also_ends_a_farewell_that_does_not_leave() -> None:
    wire = Wire("hangup", Chosen(10), deadline=30)
    wire.answer(GREETING)
    wire.clock.run_until(10)
    assert wire.state() == "close"
    wire.answer(b"554 too late\r\n")
    wire.clock.run_until(30)
    assert wire.state() == "abort"
    wire.lose()
    assert wire.ends == [("completed", "hung up at octet 10")]


def test_a_mail_that_cannot_be_had_is_no_outcome() -> None:
    def none() -> Mail:
        raise LoadError("no more mail")

    with pytest.raises(LoadError):
        next(misbehave.hangup(Context(none, Random(1), asyncio.new_event_loop(), lambda *_: None, 1.0)))


def test_kinds_say_what_they_do() -> None:
    assert list(KINDS) == ["drip", "idle", "hangup", "early", "rset", "oversize"]
    for name, kind in KINDS.items():
        assert kind.name == name
        assert kind.sentence.endswith(".")
