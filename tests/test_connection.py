"""Connection: time, back-pressure, waiting, and every way in which a connection can end.

Time is chosen: `check(now)` is called with the times that a test wants, on a transport without a network.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import R554, Bench, FakeTransport, Player, bench

from fastsmtp.connection import GROUP_LIMIT, LINGER, UNREAD_LIMIT, Connection
from fastsmtp.metrics import Counter
from fastsmtp.reply import R451_LOCAL_ERROR
from fastsmtp.service import Times
from fastsmtp.verdict import Ask, Refused, Stage, Verdict

TRANSACTION = ("MAIL FROM:<s@b.test>", "RCPT TO:<ann@here.test>")


def greeted(made: Bench) -> Player:
    player = made.connect()
    player.say("EHLO c")
    return player


def in_data(made: Bench) -> Player:
    player = greeted(made)
    assert player.say(*TRANSACTION, "DATA")[-1][:3] == "354"
    return player


def codes(lines: list[str]) -> list[int]:
    return [int(line[:3]) for line in lines]


class Clock:
    """Calls `check` as the server does, at times of the test's choosing."""

    def __init__(self, player: Player) -> None:
        self.player = player
        self.now = time.monotonic()

    def passes(self, seconds: float, step: float = 1.0) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            if not self.player.transport.lost:
                self.player.connection.check(self.now)
                self.player.transport.settle()


# Time-outs (RFC 5321 4.5.3.2)


def test_a_silent_client_hears_421() -> None:
    with bench(times=Times(command=300)) as made:
        player = made.connect()
        player.take()
        clock = Clock(player)
        clock.passes(299)
        assert player.take() == b""
        clock.passes(3)
        assert player.take() == b"421 4.4.2 mx.here.test Timed out, closing\r\n"
        assert player.transport.ended
        clock.passes(LINGER + 2)
        assert player.transport.lost
        assert made.logged("session")[0]["end"] == "timeout"


def test_every_command_starts_the_time_anew() -> None:
    with bench(times=Times(command=300)) as made:
        player = made.connect()
        clock = Clock(player)
        for _ in range(4):
            clock.passes(200)
            assert codes(player.say("NOOP"))[-1] == 250
        player.send(b"NO")
        clock.passes(200)
        player.send(b"O")
        clock.passes(102)
        # A command must be whole: octet by octet nobody holds a session.
        assert player.take().startswith(b"421 4.4.2 ")


def test_data_may_pause_for_five_minutes() -> None:
    with bench(times=Times(data=300, data_rate=100)) as made:
        player = in_data(made)
        clock = Clock(player)
        for _ in range(3):
            player.send(b"x" * 80_000)
            clock.passes(290)
            assert player.take() == b""
        player.send(b"\r\n.\r\n")
        assert player.take().startswith(b"250 ")


def test_data_that_does_not_come() -> None:
    with bench(times=Times(data=300, data_rate=0)) as made:
        player = in_data(made)
        player.send(b"x")
        clock = Clock(player)
        clock.passes(300)
        assert player.take() == b""
        clock.passes(3)
        assert player.take().startswith(b"421 4.4.2 mx.here.test")
        clock.passes(LINGER + 2)
        assert player.transport.lost
        assert made.keeper.leaked == []
        assert made.keeper.kept == []


def test_an_octet_a_second_does_not_hold_a_session() -> None:
    with bench(times=Times(data=300, data_rate=100)) as made:
        player = in_data(made)
        clock = Clock(player)
        for _ in range(700):
            if player.transport.ended:
                break
            player.send(b"x")
            clock.passes(1)
        assert clock.now - player.connection.opened < 400
        assert player.take().startswith(b"421 4.4.2 ")


def test_the_rate_is_measured_over_the_whole_time() -> None:
    with bench(times=Times(data=300, data_rate=100)) as made:
        player = in_data(made)
        clock = Clock(player)
        for _ in range(20):
            player.send(b"x" * 12_000)
            clock.passes(100)
            assert player.take() == b""


def test_bdat_has_the_same_limits() -> None:
    with bench(times=Times(data=300, data_rate=0)) as made:
        player = greeted(made)
        player.say(*TRANSACTION, "BDAT 1000")
        clock = Clock(player)
        clock.passes(301)
        player.send(b"x" * 999)
        assert player.take() == b"" or player.transport.ended


def test_octets_that_are_not_kept_count_as_octets() -> None:
    """Of a message over the limit, and of a chunk that is refused, nothing is handed out; the client is there."""
    with bench(times=Times(data=300, data_rate=0, oversize=3000), message_size=1000) as made:
        player = in_data(made)
        clock = Clock(player)
        player.send(b"x" * 1001)
        for _ in range(20):
            player.send(b"x" * 100)
            clock.passes(100)
            assert player.take() == b""
        player.send(b"\r\n.\r\n")
        assert player.take().startswith(b"552 5.3.4 ")

        player = greeted(made)
        player.say("BDAT 2000 LAST")
        clock = Clock(player)
        for _ in range(20):
            player.send(b"x" * 100)
            clock.passes(100)
        assert player.take().startswith(b"503 5.5.1 ")


def test_a_message_over_the_limit_is_read_for_ten_minutes() -> None:
    with bench(times=Times(oversize=600, data_rate=0), message_size=1000) as made:
        player = in_data(made)
        player.send(b"x" * 1001)
        clock = Clock(player)
        for _ in range(59):
            player.send(b"x")
            clock.passes(10)
        assert player.take() == b""
        for _ in range(3):
            player.send(b"x")
            clock.passes(10)
        assert player.take().startswith(b"552 5.3.4 ")
        assert player.transport.ended


def test_an_earlier_message_over_the_limit_does_not_count() -> None:
    """Between the two there is no quiet moment in which a check could forget the first."""
    with bench(times=Times(data=3000, oversize=600, data_rate=0), message_size=1000) as made:
        player = in_data(made)
        clock = Clock(player)
        player.send(b"x" * 1001)
        clock.passes(500)
        player.send(b"\r\n.\r\n")
        player.say(*TRANSACTION, "DATA")
        player.send(b"fine")
        clock.passes(2)
        player.send(b"\r\n.\r\n")
        player.say(*TRANSACTION, "DATA")
        player.send(b"x" * 1001)
        clock.passes(200)
        player.send(b"\r\n.\r\n")
        assert player.take().startswith(b"552 5.3.4 ")
        assert not player.transport.ended


def test_ten_times_the_limit_is_the_end() -> None:
    with bench(message_size=1000) as made:
        player = in_data(made)
        for _ in range(10):
            player.send(b"x" * 1000)
            assert player.take() == b""
        player.send(b"x")
        assert player.take().startswith(b"552 5.3.4 ")
        assert player.transport.ended
        player.send(b"\r\n.\r\nNOOP\r\n")
        assert player.take() == b""
        assert made.keeper.kept == []


def test_the_greatest_age_ends_a_session_between_transactions_only() -> None:
    with bench(times=Times(session=1000)) as made:
        player = greeted(made)
        player.say("MAIL FROM:<>")
        clock = Clock(player)
        for _ in range(6):
            clock.passes(200)
            assert codes(player.say("NOOP")) == [250]
        assert codes(player.say("RSET")) == [250]
        clock.passes(2)
        assert player.take().startswith(b"421 4.4.2 mx.here.test Session too old")
        assert player.transport.ended


@pytest.mark.parametrize("line", ["NOOP", "BDAT 0", "RCPT TO:<nobody@here.test>", "RSET\r\nMAIL FROM:<>"])
def test_a_session_that_is_never_between_transactions_ends_at_twice_that_age(line: str) -> None:
    with bench(times=Times(session=1000)) as made:
        player = greeted(made)
        player.say(*TRANSACTION)
        clock = Clock(player)
        while not player.transport.ended and clock.now - player.connection.opened < 3000:
            clock.passes(190)
            player.say(line)
        assert 2000 < clock.now - player.connection.opened < 2300
        clock.passes(LINGER + 2)
        assert made.logged("session")[0]["end"] == "session too old"


def test_whoever_was_told_the_end_is_looked_at_each_second() -> None:
    with bench() as made:
        player = greeted(made)
        for _ in range(20):
            player.say("WHAT")
        assert player.transport.ended
        assert player.connection in made.service.connections()
        made.service.tick()
        assert player.connection.since > 0
        player.vanish()
        assert made.service.connections() == []


def test_nothing_times_out_while_we_are_the_ones_who_take_time() -> None:
    with bench(times=Times(command=10, data=10, session=10)) as made:
        made.keeper.later = True
        player = in_data(made)
        player.send(b"x\r\n.\r\n")
        Clock(player).passes(1000)
        assert player.take() == b""
        made.keeper.release()
        assert player.take().startswith(b"250 ")


def test_a_client_that_takes_no_replies_is_cut_off() -> None:
    with bench(times=Times(write=300)) as made:
        player = greeted(made)
        player.connection.pause_writing()
        assert not player.transport.reading
        player.send(b"NOOP\r\n")
        assert player.take() == b""
        clock = Clock(player)
        clock.passes(299)
        assert not player.transport.closed
        clock.passes(3)
        assert player.transport.aborted
        assert player.transport.lost
        assert made.logged("session")[0]["end"] == "takes no replies"


def test_a_client_that_takes_replies_again_is_answered() -> None:
    with bench() as made:
        player = greeted(made)
        player.connection.pause_writing()
        player.send(b"NOOP\r\nRSET\r\n")
        player.connection.resume_writing()
        assert player.transport.reading
        assert codes(player.take().decode().splitlines()) == [250, 250]


def test_the_period_of_checks_follows_the_limits() -> None:
    assert Times().period == 30
    assert Times(command=8).period == 2
    assert Times(write=1).period == 1


def test_a_tick_checks_every_connection_once_in_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    with bench(times=Times(command=20)) as made:
        players = []
        for _ in range(7):
            players.append(made.connect())
            made.service.tick()
        assert len(made.service.connections()) == 7
        start = time.monotonic()
        for second in range(60):
            monkeypatch.setattr(time, "monotonic", lambda second=second: start + second)
            made.service.tick()
            for player in players:
                player.transport.settle()
        assert all(b"421 4.4.2" in player.take() for player in players)
        assert made.service.connections() == []


# Back-pressure


def test_what_is_not_interpreted_is_not_read_without_end() -> None:
    with bench() as made:
        made.keeper.later = True
        player = in_data(made)
        player.send(b"x\r\n.\r\n")
        player.send(b"NOOP\r\n" * (UNREAD_LIMIT // 6))
        assert player.transport.reading
        player.send(b"RSET\r\n")
        assert not player.transport.reading
        assert player.take() == b""
        made.keeper.release()
        assert player.transport.reading
        assert codes(player.take().decode().splitlines())[:2] == [250, 250]


def test_a_draft_that_is_full_is_waited_for() -> None:
    with bench() as made:
        player = in_data(made)
        made.keeper.full = True
        player.send(b"x" * 1000)
        assert not player.transport.reading
        made.keeper.drafts[0].drained()
        assert player.transport.reading
        player.send(b"y" * 1000)
        assert not player.transport.reading
        # What was on its way is taken all the same.
        made.keeper.full = False
        player.send(b"\r\n.\r\n")
        assert player.take().startswith(b"250 ")
        assert made.keeper.kept[0].body == b"x" * 1000 + b"y" * 1000 + b"\r\n"
        # The draft is gone: nobody would say that it was drained.
        assert player.transport.reading


def test_an_abandoned_draft_is_not_waited_for() -> None:
    with bench() as made:
        player = greeted(made)
        made.keeper.full = True
        player.say(*TRANSACTION, "BDAT 3")
        player.send(b"abcRSET\r\n")
        assert made.keeper.drafts[0].abandoned
        assert player.transport.reading
        made.keeper.drafts[0].drained()
        assert player.transport.reading


def test_two_reasons_to_pause() -> None:
    with bench() as made:
        player = in_data(made)
        made.keeper.full = True
        player.send(b"x")
        player.connection.pause_writing()
        made.keeper.drafts[0].drained()
        assert not player.transport.reading
        player.connection.resume_writing()
        assert player.transport.reading


def test_time_does_not_run_while_we_do_not_read() -> None:
    with bench(times=Times(data=300, data_rate=100)) as made:
        player = in_data(made)
        made.keeper.full = True
        player.send(b"x" * 1000)
        clock = Clock(player)
        clock.passes(2000)
        assert player.take() == b""
        made.keeper.full = False
        made.keeper.drafts[0].drained()
        clock.passes(200)
        player.send(b"\r\n.\r\n")
        assert player.take().startswith(b"250 ")


@pytest.mark.parametrize("line", ["EHLO c", "HELP", "VRFY x", "WHAT", "RCPT TO:<x@here.test>", "BDAT 0"])
def test_replies_do_not_pile_up(line: str) -> None:
    """Whatever one read asks for: a client that takes no replies is not answered without end."""
    with bench(early_refused=False, errors=1 << 30) as made:
        player = greeted(made)
        player.say("MAIL FROM:<>", "RCPT TO:<ann@here.test>")
        player.transport.stuck = True
        player.send((f"{line}\r\n".encode() * 65536)[:262144])
        assert player.transport.waiting < 1 << 20
        assert len(max(player.take_writes(), key=len, default=b"")) < 1 << 19


def test_a_long_group_leaves_others_their_turn() -> None:
    with bench() as made:
        player = greeted(made)
        player.say("MAIL FROM:<>")
        player.send(b"RCPT TO:<nobody@here.test>\r\n" * 4000)
        assert len(player.take().splitlines()) == GROUP_LIMIT
        assert not player.transport.reading
        other = greeted(made)
        assert codes(other.say("NOOP")) == [250]
        lines = 0
        for _ in range(200):
            made.run(0.05)
            lines += len(player.take().splitlines())
            if lines >= 4000 - GROUP_LIMIT:
                break
        assert lines == 4000 - GROUP_LIMIT
        assert player.transport.reading


def test_a_client_that_is_gone_has_no_turn_left() -> None:
    with bench() as made:
        player = greeted(made)
        player.say("MAIL FROM:<>")
        player.send(b"RCPT TO:<ann@here.test>\r\n" * GROUP_LIMIT + b"BDAT 1 LAST\r\nx")
        player.vanish()
        made.run(0.1)
        assert made.keeper.kept == []


def test_the_end_of_a_client_waits_for_its_turn_and_for_its_taking_replies() -> None:
    with bench() as made:
        player = greeted(made)
        player.say("MAIL FROM:<>")
        player.connection.pause_writing()
        player.send(b"RCPT TO:<nobody@here.test>\r\n" * (GROUP_LIMIT + 1))
        player.end()
        assert not player.transport.closed
        player.connection.resume_writing()
        assert len(player.take().splitlines()) == GROUP_LIMIT
        assert not player.transport.closed
        made.run(0.1)
        assert len(player.take().splitlines()) == 1
        assert player.transport.closed


def test_what_was_answered_is_sent_before_the_end_is_heard() -> None:
    """Inside TLS the last octets and the end come in one call."""
    with bench() as made:
        player = greeted(made)
        player.connection.data_received(b"NOOP\r\n")
        player.end()
        assert player.take() == b"250 2.0.0 OK\r\n"
        assert player.transport.closed


def test_inside_tls_nothing_is_answered_behind_the_clients_end() -> None:
    with bench() as made:
        made.keeper.later = True
        player = in_data(made)
        player.connection.client.tls = "TLSv1.3 X"
        player.send(b".\r\n")
        # uvloop would warn on stderr
        assert player.connection.eof_received() is False
        made.keeper.release()


# What has to wait


class Slow:
    """A check that waits until it is told."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.waiting: list[asyncio.Future[Verdict | None]] = []

    def __call__(self, ask: Ask) -> Awaitable[Verdict | None]:
        future: asyncio.Future[Verdict | None] = asyncio.Future(loop=self.loop)
        self.waiting.append(future)
        return future

    loop: asyncio.AbstractEventLoop


def slow_bench(stage: Stage, **options: Any) -> tuple[Slow, Any]:
    slow = Slow(stage)
    return slow, bench(checks=[slow], **options)


@pytest.mark.parametrize(
    ("stage", "before", "line", "after"),
    [
        (Stage.HELO, [], "EHLO c", 250),
        (Stage.MAIL, ["EHLO c"], "MAIL FROM:<>", 250),
        (Stage.RCPT, ["EHLO c", "MAIL FROM:<>"], "RCPT TO:<ann@here.test>", 250),
    ],
)
def test_a_check_that_waits_holds_up_its_own_session_only(
    stage: Stage, before: list[str], line: str, after: int
) -> None:
    slow, made_bench = slow_bench(stage)
    with made_bench as made:
        slow.loop = made.service.loop
        player, other = made.connect(), made.connect()
        for each in before:
            player.say(each)
        player.take()
        other.take()
        assert player.say(line) == []
        made.run()
        # What comes behind it waits, in order; others do not.
        assert player.say("NOOP", "WHAT") == []
        assert codes(other.say("NOOP")) == [250]
        slow.waiting[0].set_result(None)
        made.run()
        made.run()
        answered = codes(player.take().decode().splitlines())
        assert answered[-3:] == [after, 250, 500]
        assert len(answered) == 3 or stage is Stage.HELO


def test_a_check_that_waits_at_connect() -> None:
    slow, made_bench = slow_bench(Stage.CONNECT)
    with made_bench as made:
        slow.loop = made.service.loop
        player = made.connect()
        made.run()
        assert player.take() == b""
        player.send(b"NOOP\r\n")
        slow.waiting[0].set_result(Verdict("refused", R554))
        made.run()
        made.run()
        assert codes(player.take().decode().splitlines()) == [554, 503]
        assert codes(player.say("QUIT")) == [221]


@pytest.mark.parametrize("how", ["lost", "aborted"])
def test_the_connection_is_gone_when_a_check_has_decided(how: str) -> None:
    slow, made_bench = slow_bench(Stage.RCPT)
    with made_bench as made:
        slow.loop = made.service.loop
        player = greeted(made)
        player.say(*TRANSACTION)
        player.send(b"DATA\r\n")
        made.run()
        if how == "lost":
            player.vanish()
        else:
            player.connection.abort("shutdown")
        slow.waiting[0].set_result(None)
        made.run()
        made.run()
        player.transport.settle()
        assert player.take() == b""
        assert made.keeper.drafts == []


def test_a_check_that_takes_too_long_or_raises_is_answered_451() -> None:
    class Raises:
        stage = Stage.MAIL

        def __call__(self, ask: Ask) -> Verdict | None:
            raise KeyError("secret")

    slow = Slow(Stage.RCPT)
    with bench(bugs=1, checks=[slow, Raises()]) as made:
        slow.loop = made.service.loop
        player = greeted(made)
        assert player.say("MAIL FROM:<>") == ["451 4.3.0 A check failed, try again later"]
    with bench(bugs=1, checks=[slow], patience=0.01) as made:
        slow.loop = made.service.loop
        player = greeted(made)
        player.say(*TRANSACTION)
        made.run(0.05)
        assert player.take() == b"451 4.3.0 A check failed, try again later\r\n"
        assert codes(player.say("DATA")) == [554]


def test_the_next_transaction_waits_for_the_commit() -> None:
    with bench() as made:
        made.keeper.later = True
        player = in_data(made)
        player.send(b"one\r\n.\r\nMAIL FROM:<>\r\nRCPT TO:<bob@here.test>\r\nDATA\r\n")
        assert player.take() == b""
        assert made.service.connections()[0].session.messages == 0
        made.keeper.release()
        assert codes(player.take().decode().splitlines()) == [250, 250, 250, 354]
        player.send(b"two\r\n.\r\n")
        made.keeper.release()
        assert codes(player.take().decode().splitlines()) == [250]
        assert [kept.body for kept in made.keeper.kept] == [b"one\r\n", b"two\r\n"]


def test_replies_behind_a_commit_leave_in_one_write() -> None:
    with bench() as made:
        made.keeper.later = True
        player = in_data(made)
        player.send(b"one\r\n.\r\nMAIL FROM:<>\r\nRCPT TO:<bob@here.test>\r\nDATA\r\n")
        player.take()
        made.keeper.release()
        assert len(player.take_writes()) == 1


def test_a_bug_is_answered_421_and_logged_once() -> None:
    with bench(bugs=1) as made:
        player = in_data(made)
        made.keeper.broken = True
        player.send(b"x")
        assert player.take() == b"421 4.3.0 mx.here.test Internal error, try again later\r\n"
        assert player.transport.ended
        player.send(b"y")
        player.vanish()
        assert made.keeper.leaked == []


def test_a_bug_behind_the_spool_stays_in_its_session() -> None:
    """The spool answers many sessions in a row: an exception must not reach it."""
    with bench(bugs=1) as made:
        made.keeper.later = True
        one, two = in_data(made), in_data(made)
        one.send(b"x\r\n.\r\n")
        two.send(b"x\r\n.\r\n")
        one.connection.session.transaction = None
        made.keeper.release()
        assert one.take().startswith(b"421 4.3.0 ")
        assert two.take().startswith(b"250 ")


# The greeting


def test_the_greeting_may_wait() -> None:
    with bench(times=Times(greet_delay=0.01)) as made:
        player = made.connect()
        assert player.take() == b""
        made.run(0.03)
        assert codes(player.take().decode().splitlines()) == [220]


@pytest.mark.parametrize("refused", [True, False])
def test_who_talks_before_the_greeting(refused: bool) -> None:
    with bench(times=Times(greet_delay=0.01), early_refused=refused) as made:
        player = made.connect()
        player.send(b"EHLO c\r\n")
        assert player.take() == b""
        made.run(0.03)
        answered = player.take().decode().splitlines()
        if refused:
            assert answered == ["554 5.5.0 mx.here.test You spoke before you were answered, closing"]
            assert player.transport.ended
        else:
            assert codes(answered)[0] == 220
            assert len(answered) > 5


def test_a_client_that_leaves_before_the_greeting() -> None:
    with bench(times=Times(greet_delay=0.01)) as made:
        player = made.connect()
        player.vanish()
        made.run(0.03)
        assert player.take() == b""


def test_a_mapped_address_is_an_ipv4_address() -> None:
    with bench() as made:
        player = made.connect(("::ffff:192.0.2.9", 4711, 0, 0))
        assert player.connection.client.ip == "192.0.2.9"
        player = made.connect(("2001:db8::1", 4711, 0, 0))
        assert player.connection.client.ip == "2001:db8::1"
        # a unix socket
        player = made.connect("")
        assert player.connection.client.ip == ""
        assert codes(player.say("EHLO c"))[0] == 220


def test_who_is_gone_before_he_was_asked_for_his_address_is_nobody() -> None:
    """Behind a reset the kernel knows no address: that is no unix socket, and what was said counts for nothing."""
    with bench() as made, socket.socket() as client:
        transport = FakeTransport(None)
        transport.socket = client
        connection = Connection(made.service)
        connection.connection_made(transport)
        assert transport.aborted
        assert not transport.writes
        connection.connection_lost(None)
        assert made.service.connections() == []
        assert made.logged("session") == []


def test_too_many_sessions_are_told_so() -> None:
    with bench(session_limit=2) as made:
        first = made.connect()
        made.connect()
        third = made.connect()
        assert third.take() == b"421 4.3.2 mx.here.test Too many sessions, try again later\r\n"
        assert third.transport.ended
        third.end()
        assert third.transport.lost
        first.vanish()
        assert codes(made.connect().take().decode().splitlines()) == [220]
        assert made.counted(Counter.SESSIONS) == 4
        assert made.counted(Counter.SESSIONS_REFUSED) == 1


# The end


DIALOG = (
    b"EHLO c\r\n",
    b"MAIL FROM:<s@b.test>\r\n",
    b"RCPT TO:<ann@here.test>\r\n",
    b"DATA\r\n",
    b"x: y\r\n\r\nbody",
    b"\r\n.",
    b"\r\n",
    b"MAIL FROM:<>\r\n",
    b"RCPT TO:<ann@here.test>\r\n",
    b"BDAT 4\r\n",
    b"ab",
    b"cd",
    b"BDAT 2 LAST\r\n",
    b"ef",
    b"NOOP\r\n",
)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("how", ["vanish", "end", "abort"])
@pytest.mark.parametrize("at", range(len(DIALOG) + 1))
def test_the_connection_is_lost_at_every_point(at: int, how: str, later: bool) -> None:
    with bench() as made:
        made.keeper.later = later
        player = made.connect()
        for number, octets in enumerate(DIALOG[:at]):
            if number and later:
                made.keeper.release()
            player.send(octets)
        if how == "abort":
            player.connection.abort("shutdown")
            player.transport.settle()
        else:
            getattr(player, how)()
        made.keeper.release()
        player.transport.settle()
        assert player.transport.lost
        assert made.keeper.leaked == []
        # What was handed over is kept, heard of or not.
        assert len(made.keeper.kept) == (at >= 7) + (at >= 14)
        assert made.service.shared.open_sessions() == 0
        assert len(made.logged("session")) == 1


def test_what_was_sent_before_the_end_is_answered_and_then_closed() -> None:
    with bench() as made:
        made.keeper.later = True
        player = in_data(made)
        player.send(b"x\r\n.\r\nNOOP\r\n")
        player.end()
        assert not player.transport.closed
        made.keeper.release()
        player.transport.settle()
        assert codes(player.take().decode().splitlines()) == [250, 250]
        assert player.transport.lost


def test_nothing_is_executed_once_the_connection_was_cut() -> None:
    with bench() as made:
        made.keeper.later = True
        player = in_data(made)
        player.send(b"x\r\n.\r\nMAIL FROM:<>\r\nRCPT TO:<bob@here.test>\r\nBDAT 1 LAST\r\ny")
        player.connection.abort("shutdown")
        made.keeper.release()
        player.transport.settle()
        assert len(made.keeper.kept) == 1


def test_a_refusal_is_not_lost_to_a_reset() -> None:
    """A client that still sends is read on for a while, so that it can read why."""
    with bench(errors=1) as made:
        player = made.connect()
        player.say("WHAT")
        assert player.transport.eof
        assert not player.transport.closed
        player.send(b"x" * 100_000)
        assert player.transport.reading
        player.end()
        assert player.transport.lost


def test_the_client_that_does_not_go_is_cut_off() -> None:
    with bench(errors=1) as made:
        player = made.connect()
        player.say("WHAT")
        Clock(player).passes(LINGER + 2)
        assert player.transport.aborted
        assert player.transport.lost


def test_drain() -> None:
    with bench() as made:
        made.keeper.later = True
        idle, fresh, mid, writing, waiting = (
            greeted(made), made.connect(), greeted(made), in_data(made), in_data(made),
        )  # fmt: skip
        mid.say(*TRANSACTION)
        waiting.send(b"x\r\n.\r\n")
        fresh.take()
        made.service.drain()
        for player in (idle, fresh):
            assert player.take() == b"421 4.3.2 mx.here.test Shutting down, try again later\r\n"
            assert player.transport.ended
        for player in (mid, writing, waiting):
            assert player.take() == b""
            assert not player.transport.ended
        late = made.connect()
        assert late.take().startswith(b"421 4.3.2 ")
        assert codes(mid.say("DATA")) == [354]
        for player in (mid, writing):
            player.send(b"x\r\n.\r\n")
        made.keeper.release()
        for player in (mid, writing, waiting):
            assert codes(player.take().decode().splitlines()) == [250, 421]
            assert player.transport.ended
        assert len(made.keeper.kept) == 3


@pytest.mark.parametrize("line", ["RSET", "EHLO c"])
def test_drain_ends_a_transaction_that_is_given_up(line: str) -> None:
    with bench() as made:
        player = greeted(made)
        player.say("MAIL FROM:<>")
        made.service.drain()
        answered = codes(player.say(line))
        assert answered[0] == 250
        assert answered[-1] == 421
        assert player.transport.ended


def test_drain_does_not_forget_a_bdat_between_chunks() -> None:
    with bench() as made:
        player = greeted(made)
        player.say(*TRANSACTION, "BDAT 1")
        player.send(b"x")
        made.service.drain()
        player.take()
        player.send(b"BDAT 1 LAST\r\ny")
        assert codes(player.take().decode().splitlines()) == [250, 421]


# What is logged and counted


def test_what_is_logged() -> None:
    with bench() as made:
        player = greeted(made)
        player.say("MAIL FROM:<s@b.test>", "RCPT TO:<nobody@here.test>", "RCPT TO:<ann@here.test>", "DATA")
        player.send(b"12345\r\n.\r\n")
        player.say("MAIL FROM:<>", "RCPT TO:<ann@here.test>", "DATA")
        made.keeper.result = Refused("disk", R451_LOCAL_ERROR)
        player.send(b"x\r\n.\r\n")
        player.say("QUIT")
        (refused, again), (accepted,), (session,) = (
            made.logged("refused"), made.logged("accepted"), made.logged("session"),
        )  # fmt: skip
        assert refused["stage"] == "RCPT"
        assert refused["reason"] == "unknown-mailbox"
        assert (refused["from"], refused["to"]) == ("s@b.test", "nobody@here.test")
        assert again["stage"] == "end-of-data"
        assert again["reply"].startswith("451 4.3.0 ")
        assert again["reason"] == "local-error"
        assert (accepted["from"], accepted["to"], accepted["size"]) == ("s@b.test", ["ann@here.test"], 7)
        assert accepted["id"] == made.keeper.kept[0].message.id
        assert (session["helo"], session["messages"], session["end"]) == ("c", 1, "quit")
        assert made.counted(Counter.MESSAGES_ACCEPTED) == 1
        assert made.counted(Counter.MESSAGES_REFUSED) == 1
        assert made.counted(Counter.RECIPIENTS_REFUSED) == 1
        assert made.counted(Counter.OCTETS_RECEIVED) > 100


def test_every_rejected_command_is_counted() -> None:
    with bench() as made:
        player = greeted(made)
        player.say("WHAT", "RSET x", "TURN")
        assert made.counted(Counter.COMMANDS_REJECTED) == 3


def test_what_a_client_says_is_logged_without_its_control_characters() -> None:
    with bench() as made:
        player = made.connect()
        player.send(b"EHLO a\x1b[31m\r\nRSET\r\n")
        player.send(b"EHLO a\x1b[31m\0\r\n")
        player.vanish()
        made.service.log.flush()
        raw = made.log[-1]["helo"]
        assert raw == "a\x1b[31m\0" or raw == ""  # escaped in the line, whole in the value


def test_the_header_is_told_to_the_draft() -> None:
    with bench() as made:
        player = in_data(made)
        player.send(b"a: b\r\n\r")
        assert made.keeper.drafts[0].whole_header_at < 0
        player.send(b"\nbody")
        assert made.keeper.drafts[0].whole_header_at >= 8
        player.send(b"\r\n.\r\n")
        assert made.keeper.kept[0].message.header_end == 8


# Random octets: nothing is a bug, memory is bounded, there is always an end.

WORDS = st.sampled_from(
    [
        b"EHLO c\r\n", b"LHLO c\r\n", b"MAIL FROM:<>\r\n", b"RCPT TO:<ann@here.test>\r\n", b"DATA\r\n", b"BDAT 9\r\n",
        b"BDAT 0 LAST\r\n", b"RSET\r\n", b"NOOP\r\n", b"VRFY x\r\n", b"STARTTLS\r\n", b"AUTH PLAIN\r\n", b"HELP\r\n",
        b"\r\n.\r\n", b"x" * 3000, b"\n", b"\r", b"QUIT\r\n", b"MAIL FROM:<a@b.c> SIZE=", b"\xff\xfe", b"\0",
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    reads=st.lists(WORDS | st.binary(max_size=40) | st.lists(WORDS, max_size=8).map(b"".join), max_size=30),
    role=st.sampled_from(["mx", "submission", "lmtp"]),
    later=st.booleans(),
    bare=st.sampled_from(["reject", "normalize", "keep"]),
    early=st.booleans(),
)
def test_random_octets(reads: list[bytes], role: str, later: bool, bare: str, early: bool) -> None:
    with bench(role, bare=bare, early_refused=early, message_size=5000) as made:
        made.keeper.later = later
        player = made.connect()
        for number, octets in enumerate(reads):
            player.send(octets)
            if number % 3 == 0:
                made.keeper.release()
            assert len(player.take()) < 65536
            assert player.connection.parser.unread <= UNREAD_LIMIT + 30_000
        player.end()
        made.keeper.release()
        player.transport.settle()
        Clock(player).passes(60)
        assert player.transport.lost
        assert made.keeper.leaked == []
        assert len(made.keeper.kept) == made.counted(Counter.MESSAGES_ACCEPTED)


def test_the_fuzz_would_notice() -> None:
    """A bug that the connection catches still fails a test: its line is in the log."""
    with bench(bugs=1) as made:
        player = in_data(made)
        player.connection.service.keeper = None  # type: ignore[assignment]
        player.send(b"x\r\n.\r\n")
        with pytest.raises(AssertionError):
            made.check_bugs(0)


def test_the_fake_transport_is_strict() -> None:
    transport = FakeTransport()
    transport.write_eof()
    with pytest.raises(AssertionError):
        transport.write(b"x")


ENDINGS: dict[str, Callable[[Player], None]] = {
    "quit": lambda player: player.send(b"QUIT\r\n"),
    "eof": lambda player: player.end(),
    "reset": lambda player: player.vanish(),
    "bare LF": lambda player: player.send(b"NOOP\n"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_session_says_how_it_ended(ending: str) -> None:
    with bench() as made:
        player = greeted(made)
        ENDINGS[ending](player)
        player.end()
        (line,) = made.logged("session")
        assert line["end"] == (ending if ending != "bare LF" else "Lines must end in CRLF, not in LF alone, closing")


# Last words


@pytest.mark.parametrize("case", ["plain", "octets wait", "TLS"])
def test_last_words_go_past_the_transport_only_when_nothing_is_before_them(case: str) -> None:
    ours, theirs = socket.socketpair()
    with bench() as made, ours, theirs:
        player = greeted(made)
        player.transport.socket = ours
        player.transport.waiting = int(case == "octets wait")
        if case == "TLS":
            player.connection.client.tls = "TLSv1.3"
        player.send(b"NOOP\r\nQUIT\r\n")
        written = player.take()
        theirs.setblocking(False)
        if case == "plain":
            assert written == b""
            written = theirs.recv(100)
            assert theirs.recv(100) == b""
        else:
            with pytest.raises(BlockingIOError):
                theirs.recv(100)
        assert written == b"250 2.0.0 OK\r\n221 2.0.0 Bye\r\n"
        assert player.transport.closed
        player.transport.settle()
        assert made.logged("session")[0]["end"] == "quit"


def test_last_words_stand_behind_what_was_posted_before() -> None:
    ours, theirs = socket.socketpair()
    with bench() as made, ours, theirs:
        player = greeted(made)
        player.transport.socket = ours
        player.connection.data_received(b"NOOP\r\n")
        player.connection.data_received(b"QUIT\r\n")
        before = len(player.transport.writes)
        made.service.send()
        assert player.transport.writes[before:] == [b"250 2.0.0 OK\r\n"]
        assert theirs.recv(100) == b"221 2.0.0 Bye\r\n"


def test_what_the_socket_does_not_take_is_written() -> None:
    ours, theirs = socket.socketpair()
    with bench() as made, ours, theirs:
        ours.setblocking(False)
        with suppress(BlockingIOError):
            while ours.send(b"x" * 4096):
                pass
        player = greeted(made)
        player.transport.socket = ours
        player.send(b"QUIT\r\n")
        assert player.take() == b"221 2.0.0 Bye\r\n"
        assert player.transport.closed
