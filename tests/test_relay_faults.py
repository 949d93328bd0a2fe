"""Hosts that fail: every fault of the sink at every stage, and what becomes of each recipient.

What is expected is read from the table of failures.py, which docs/failures.md shows: what came, at which stage. Here it
comes over real sockets, from a real peer, with real clocks; only the patience is short where nothing will come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from outgoing import describe
from sending import CLEAR, LIMITS, SHORT, Clock, Fixed, ended, run, sending, terms, to, told

from fastsmtp import log as logs
from fastsmtp.delivery import Outcome, Result
from fastsmtp.delivery.client_tls import Tls
from fastsmtp.delivery.failures import TABLE, Answer, Stage
from loadtest.sink_plan import FAULTS, parse_answer, parse_fault
from loadtest.sink_server import Settings, Sink

ANSWERS = {
    "silence": Answer.TIME_OUT,
    "drip": Answer.TIME_OUT,
    "421": Answer.CLOSING,
    "hangup": Answer.HANG_UP,
    "reset": Answer.HANG_UP,
    "half": Answer.HANG_UP,
    "long-line": Answer.GARBAGE,
    "endless": Answer.GARBAGE,
    "garbage": Answer.GARBAGE,
    "mixed": Answer.GARBAGE,
}
# The sink's stages, and ours; then the one that waits in vain when a host falls silent after its answer there.
STAGES = {
    "banner": (Stage.GREETING, Stage.EHLO),
    "ehlo": (Stage.EHLO, Stage.MAIL),
    "starttls": (Stage.STARTTLS, Stage.TLS),
    "mail": (Stage.MAIL, Stage.RCPT),
    "rcpt": (Stage.RCPT, Stage.RCPT),
    "data": (Stage.DATA, Stage.END),
    "end": (Stage.END, None),
}
ENDS = {Stage.END, Stage.LMTP_END}
# What a host offers, and so how much is said to it at once.
KINDS = {
    "one command at a time": frozenset({"PIPELINING", "CHUNKING"}),
    "a group of commands": frozenset({"CHUNKING"}),
    "all at once": frozenset[str](),
}
DELIVERED = "delivered 2.0.0 recipient"


def expected(stage: Stage, answer: Answer) -> tuple[object, ...]:
    return tuple(TABLE[stage][answer])


def meant(outcome: Outcome) -> tuple[object, ...]:
    return (outcome.result, outcome.scope, outcome.retry)


async def deliver(
    fault: str, at: str, without: frozenset[str], *short: Stage, lmtp: bool = False, tls: Tls = CLEAR
) -> tuple[Sequence[Outcome], Sink, list[tuple[Any, ...]]]:
    """To two recipients. `short`: where an answer is waited for in vain."""
    offered = "off" if tls.mode == "off" else "starttls"
    rules = (parse_fault(f"{fault}@{at}"),)
    async with Sink(Settings(lmtp=lmtp, without=without, rules=rules, tls=offered, drip=SHORT)) as sink:
        async with sending(
            Fixed(sink.port, "127.0.0.1"), terms(*short, lmtp=lmtp, seconds=1.0 if at == "rcpt" else SHORT), tls
        ) as transport:
            (outcomes,) = await transport.deliver([to("ann", "bob")])
            lines = transport._log.written  # type: ignore[attr-defined]
        await ended(sink)
    return outcomes, sink, lines


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ANSWERS)
@pytest.mark.parametrize("lmtp", [False, True], ids=["SMTP", "LMTP"])
def test_a_fault_at_each_stage(fault: str, kind: str, lmtp: bool) -> None:
    async def check(at: str) -> None:
        answer = ANSWERS[fault]
        stage, _ = STAGES[at]
        end = Stage.LMTP_END if lmtp else Stage.END
        if stage is Stage.END:
            stage = end
        awaited = stage
        if kind == "all at once" and at in ("mail", "rcpt") and not lmtp:
            # The whole message has left: it may have been taken, unless a 421 says that it was not.
            stage = stage if answer is Answer.CLOSING else end
        short = (awaited,) if answer is Answer.TIME_OUT else ()
        outcomes, sink, _ = await deliver(fault, at, KINDS[kind], *short, lmtp=lmtp)
        assert [meant(outcome) for outcome in outcomes] == [expected(stage, answer)] * 2, (fault, at, outcomes[0].text)
        assert all(outcome.host == "mx0.test" for outcome in outcomes)
        assert sink.counts.connections == 1

    async def main() -> None:
        # In LMTP the message of several recipients waits for 354.
        in_group = kind == "all at once" and not lmtp
        stages = [at for at in STAGES if at != "starttls" and not (at == "data" and in_group)]
        await asyncio.gather(*[check(at) for at in stages])

    run(main)


@pytest.mark.parametrize("at", [at for at in STAGES if at not in ("starttls", "end")])
def test_a_host_that_falls_silent(at: str) -> None:
    """After its answer: it is the next one that does not come."""

    async def main() -> None:
        stage = STAGES[at][1]
        assert stage is not None
        outcomes, _, _ = await deliver("stall", at, KINDS["one command at a time"], stage)
        assert [meant(outcome) for outcome in outcomes] == [expected(stage, Answer.TIME_OUT)] * 2

    run(main)


@pytest.mark.parametrize("at", ["banner", "ehlo", "mail", "rcpt", "data"])
def test_a_host_that_says_more_than_it_was_asked(at: str) -> None:
    async def main() -> None:
        stage = STAGES[at][0]
        outcomes, _, _ = await deliver("inject", at, KINDS["one command at a time"])
        assert [meant(outcome) for outcome in outcomes] == [expected(stage, Answer.GARBAGE)] * 2

    run(main)


@pytest.mark.parametrize("fault", FAULTS)
def test_after_the_mail_nothing_fails(fault: str) -> None:
    """Whatever comes instead of the answer to QUIT, which nobody waits for; nor does a connection stay."""

    async def main() -> None:
        outcomes, sink, _ = await deliver(fault, "quit", frozenset())
        assert [describe(outcome) for outcome in outcomes] == [DELIVERED] * 2
        assert sink.counts.messages == 1

    run(main)


@pytest.mark.parametrize("fault", ["inject", "stall"])
def test_the_message_was_answered(fault: str) -> None:
    """What comes, or does not, behind the last reply is not the message's."""

    async def main() -> None:
        outcomes, _, _ = await deliver(fault, "end", KINDS["one command at a time"])
        assert [describe(outcome) for outcome in outcomes] == [DELIVERED] * 2

    run(main)


@pytest.mark.parametrize("mode", ["opportunistic", "required"])
@pytest.mark.parametrize("fault", [*ANSWERS, "stall", "inject"])
def test_a_fault_at_starttls(fault: str, mode: Any) -> None:
    """Pasted octets, a hang-up and the like end it there. Where the handshake itself fails, opportunistic TLS is given
    up for that host, and the mail goes in clear; required TLS never is."""

    async def main() -> None:
        stage, answer = STAGES["starttls"][fault == "stall"], ANSWERS.get(fault, Answer.GARBAGE)
        if fault == "stall":
            answer = Answer.TIME_OUT
        assert stage is not None
        short = (stage,) if answer is Answer.TIME_OUT else ()
        outcomes, sink, lines = await deliver(fault, "starttls", frozenset(), *short, tls=Tls(mode))
        if fault == "stall" and mode == "opportunistic":
            assert [describe(outcome) for outcome in outcomes] == [DELIVERED] * 2
            assert lines == [(logs.TLS_GIVEN_UP, "mx0.test", "127.0.0.1", "time-out")]
            assert sink.counts.connections == 2
        else:
            assert [meant(outcome) for outcome in outcomes] == [expected(stage, answer)] * 2
            assert sink.counts.messages == 0
            assert lines == []

    run(main)


def test_the_host_closes_in_the_handshake() -> None:
    """It says 220, takes our hello, and is gone."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mx\r\n")
        await reader.readline()
        writer.write(b"250-mx\r\n250 STARTTLS\r\n")
        await reader.readline()
        writer.write(b"220 go\r\n")
        await reader.read(10)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with sending(Fixed(port, "127.0.0.1"), tls=Tls("required")) as transport:
            results = await transport.deliver([to("ann")])
            assert meant(results[0][0]) == expected(Stage.TLS, Answer.HANG_UP)
            assert transport._log.written == []  # type: ignore[attr-defined]
        server.close()

    run(main)
    run(main, "asyncio")


def test_each_recipient_has_an_answer_of_its_own() -> None:
    """452 after others were taken means too many: those follow at once."""
    rules = (
        parse_answer("rcpt gone@* 550 5.1.1 no such mailbox"),
        parse_answer("rcpt full@* 452 4.2.2 mailbox full"),
        parse_answer("rcpt later@* first 1 452 4.5.3 too many"),
        parse_answer("rcpt grey@* 450 4.7.1 greylisted"),
    )

    async def check(without: frozenset[str], lmtp: bool) -> None:
        async with Sink(Settings(rules=rules, without=without, lmtp=lmtp)) as sink:
            async with sending(Fixed(sink.port, "127.0.0.1"), terms(lmtp=lmtp)) as transport:
                results = await transport.deliver([to("ann", "gone", "full", "later", "bob", "grey")])
            await ended(sink)
        assert told(results) == [
            [
                DELIVERED,
                "failed 5.1.1 recipient",
                "deferred 4.2.2 recipient",
                DELIVERED,
                DELIVERED,
                "deferred 4.7.1 recipient",
            ]
        ]
        assert sink.counts.connections == 1
        assert sink.counts.recipients == 3

    async def main() -> None:
        for without in KINDS.values():
            for lmtp in (False, True):
                await check(without, lmtp)

    run(main)


# Several hosts


@pytest.mark.parametrize("fault", ["421", "hangup", "garbage"])
@pytest.mark.parametrize("at", ["banner", "ehlo", "mail", "rcpt", "data", "end"])
def test_the_next_host_has_its_turn(fault: str, at: str) -> None:
    """But not where the first may have taken the message."""

    async def main() -> None:
        settings = Settings(rules=(parse_fault(f"{fault}@{at}"),), without=KINDS["one command at a time"])
        async with Sink(settings) as first, Sink(Settings(f"127.0.0.2:{first.port}")) as second:
            async with sending(Fixed(first.port, "127.0.0.1", "127.0.0.2")) as transport:
                results = await transport.deliver([to("ann"), to("bob")])
            await ended(first)
            await ended(second)
        if at == "end" and fault != "421":
            # The other message has not been sent to anyone yet.
            lost = f"deferred 4.{'4.2' if fault == 'hangup' else '5.0'} host"
            assert told(results) == [[lost], [DELIVERED]]
            assert [outcomes[0].host for outcomes in results] == ["mx0.test", "mx1.test"]
        else:
            assert told(results) == [[DELIVERED], [DELIVERED]]
            assert {outcomes[0].host for outcomes in results} == {"mx1.test"}

    run(main)


def test_who_refuses_a_message_is_not_asked_by_its_neighbour() -> None:
    """5xx at MAIL is the last word for one message; the next goes over the same connection. 4xx goes on to the next
    host, and so does only that one."""
    rules = (parse_answer("mail bad@* 550 5.7.1 not you"), parse_answer("mail slow@* 450 4.3.2 not now"))

    async def main() -> None:
        async with Sink(Settings(rules=rules)) as first, Sink(Settings(f"127.0.0.2:{first.port}")) as second:
            async with sending(Fixed(first.port, "127.0.0.1", "127.0.0.2")) as transport:
                deliveries = [to("a"), to("b"), to("c"), to("d")]
                deliveries[1].message.envelope.reverse_path = to("bad").recipients[0].address
                deliveries[2].message.envelope.reverse_path = to("slow").recipients[0].address
                results = await transport.deliver(deliveries)
            assert told(results) == [[DELIVERED], ["failed 5.7.1 message"], [DELIVERED], [DELIVERED]]
            assert [outcomes[0].host for outcomes in results] == ["mx0.test", "mx0.test", "mx1.test", "mx0.test"]
            assert (first.counts.connections, second.counts.connections) == (1, 1)

    run(main)


def test_what_a_host_said_of_the_mail_outlives_a_host_that_is_not_there() -> None:
    """Greylisted by the first, refused connection by the second: the destination is not dead."""

    async def main() -> None:
        async with (
            Sink(Settings(rules=(parse_answer("mail 451 4.7.1 greylisted"),))) as sink,
            sending(Fixed(sink.port, "127.0.0.1", "127.0.0.2")) as transport,
        ):
            results = await transport.deliver([to("ann")])
        assert told(results) == [["deferred 4.7.1 message next-host"]]
        assert results[0][0].host == "mx0.test"

    run(main)


def test_nobody_is_there() -> None:
    async def main() -> None:
        async with Sink() as sink:
            port = sink.port
        async with sending(Fixed(port, "127.0.0.1", "127.0.0.2", "127.0.0.3")) as transport:
            results = await transport.deliver([to("ann", "bob"), to("carl")])
        assert told(results) == [["deferred 4.4.1 host next-host"] * 2, ["deferred 4.4.1 host next-host"]]
        assert results[0][0].text == "lost connection with mx2.test (connect): Connection refused"
        assert results[0][0].result is Result.DEFERRED

    run(main)


def test_a_host_that_failed_comes_last_for_a_while() -> None:
    async def main() -> None:
        async with (
            Sink(Settings(rules=(parse_fault("421@banner"),))) as first,
            Sink(Settings(f"127.0.0.2:{first.port}")) as second,
        ):
            limits = LIMITS._replace(messages=1)
            async with sending(Fixed(first.port, "127.0.0.1", "127.0.0.2"), limits=limits) as transport:
                clock = transport._pool.now = Clock()
                for _ in range(3):
                    assert told(await transport.deliver([to("ann")])) == [[DELIVERED]]
                assert (first.counts.connections, second.counts.connections) == (1, 3)
                clock.now += LIMITS.failing
                assert told(await transport.deliver([to("ann")])) == [[DELIVERED]]
                assert (first.counts.connections, second.counts.connections) == (2, 4)

    run(main)


# Connections that were kept


@pytest.mark.parametrize("how", ["closes at once", "closes at the next command", "says 421"])
@pytest.mark.parametrize("second", ["there.test", "other.test"])
def test_a_kept_connection_that_is_gone_fails_no_message(how: str, second: str) -> None:
    """It says nothing of the host: the mail goes over another connection, to the same one."""
    sessions = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sessions.append(writer)
        count = 0
        writer.write(b"220 mx\r\n")
        while line := await reader.readline():
            if line.startswith(b"EHLO"):
                writer.write(b"250-mx\r\n250-PIPELINING\r\n250 CHUNKING\r\n")
            elif line.startswith(b"BDAT"):
                await reader.readexactly(int(line.split()[1]))
                writer.write(b"250 kept\r\n")
                count += 1
            elif line.startswith(b"MAIL") and count == 1 and len(sessions) == 1 and how != "closes at once":
                writer.write(b"421 idle for too long\r\n" if how == "says 421" else b"")
                break
            else:
                writer.write(b"250 ok\r\n")
            if count == 1 and len(sessions) == 1 and how == "closes at once":
                break
        writer.close()

    async def main() -> None:
        sessions.clear()
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with sending(Fixed(port, "127.0.0.1", "127.0.0.2")) as transport:
            for domain in ("there.test", second):
                results = await transport.deliver([to("ann", domain=domain)])
                assert (results[0][0].host, results[0][0].reply) == ("mx0.test", "250 kept")
            assert len(sessions) == 2
            results = await transport.deliver([to("ann")])
            assert results[0][0].result is Result.DELIVERED
            assert len(sessions) == 2
        server.close()

    run(main)
    run(main, "asyncio")


def test_a_host_that_forgets_its_connections_all_the_time() -> None:
    """Each message has its answer; no connection is tried twice without end."""

    async def main() -> None:
        async with Sink(Settings(rules=(parse_fault("hangup@mail:50%"),), seed=7)) as sink:
            async with sending(Fixed(sink.port, "127.0.0.1")) as transport:
                results: list[Sequence[Outcome]] = []
                for _ in range(20):
                    results += await transport.deliver([to("ann"), to("bob"), to("carl")])
            await ended(sink)
        outcomes = [outcome for each in results for outcome in each]
        assert len(outcomes) == 60
        delivered = [outcome for outcome in outcomes if outcome.result is Result.DELIVERED]
        assert len(delivered) == sink.counts.messages
        assert 10 < len(delivered) < 60
        for outcome in outcomes:
            if outcome.result is not Result.DELIVERED:
                assert meant(outcome) == expected(Stage.END, Answer.HANG_UP)

    run(main)
