"""LMTP over real sockets: each recipient's own answer, from the sink and from a real Dovecot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from dovecot import DOMAIN, Dovecot, dovecot
from sending import Fixed, ended, run, sending, terms, to, told

from fastsmtp.delivery import Outcome, Result
from fastsmtp.delivery.failures import Stage
from fastsmtp.delivery.smtp import Smtp
from loadtest.sink_plan import parse_answer, parse_fault
from loadtest.sink_server import Settings, Sink

DELIVERED = "delivered 2.0.0 recipient"
LOST = "deferred 4.4.2 host"
RULES = (
    parse_answer("rcpt gone@* 550 5.1.1 no such mailbox"),
    parse_answer("end full@* 552 5.2.2 mailbox full"),
    parse_answer("end busy@* 452 4.3.1 later"),
)


def lmtp(*short: Stage) -> Any:
    return terms(*short, lmtp=True)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("without", [(), ("CHUNKING",), ("PIPELINING", "CHUNKING")], ids=["BDAT", "DATA", "slowly"])
def test_each_recipient_has_an_answer_of_its_own(without: tuple[str, ...], loop: str, tmp_path: Path) -> None:
    async def main() -> None:
        settings = Settings(f"unix:{tmp_path}/socket", lmtp=True, rules=RULES, without=frozenset(without))
        async with Sink(settings) as sink:
            async with sending(tmp_path / "socket", lmtp()) as transport:
                assert transport.destination(to("ann").recipients[0].address) == ""
                for _ in range(2):
                    results = await transport.deliver(
                        [to("ann", "gone", "full", "busy", "bob"), to("full"), to("carl")]
                    )
                    assert told(results) == [
                        [
                            DELIVERED,
                            "failed 5.1.1 recipient",
                            "failed 5.2.2 recipient",
                            "deferred 4.3.1 recipient",
                            DELIVERED,
                        ],
                        ["failed 5.2.2 recipient"],
                        [DELIVERED],
                    ]
                assert sink.counts.connections == 1
                assert transport.heard is not None
            await ended(sink)
        assert sink.counts.recipients == 6

    run(main, loop)


def test_recipients_of_several_domains_go_together(tmp_path: Path) -> None:
    async def main() -> None:
        async with Sink(Settings(f"unix:{tmp_path}/socket", lmtp=True, record=tmp_path / "record")) as sink:
            async with sending(tmp_path / "socket", lmtp()) as transport:
                delivery = to("ann", "bob")
                delivery.recipients[1].address = to("bob", domain="other.test").recipients[0].address
                assert told(await transport.deliver([delivery])) == [[DELIVERED] * 2]
            assert len(sink.records()) == 1

    run(main)


def test_the_connection_ends_between_two_answers(tmp_path: Path) -> None:
    """Who was answered has it; the other is tried later, for the host may have it."""

    async def main() -> None:
        rules = (parse_fault("hangup@end"),)
        for names, expected in ((("ann", "bob"), [LOST, LOST]), (("first", "bob"), [DELIVERED, LOST])):
            first = parse_answer("end first@* 250 2.0.0 kept")
            settings = Settings(f"unix:{tmp_path}/socket", lmtp=True, rules=(first, *rules))
            async with Sink(settings) as sink:
                async with sending(tmp_path / "socket", lmtp()) as transport:
                    assert told(await transport.deliver([to(*names)])) == [expected]
                await ended(sink)

    run(main)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.write_text(""), "Connection refused"),
        (lambda path: path.mkdir(), "Connection refused"),
    ],
    ids=["missing", "a file", "a folder"],
)
def test_no_socket(make: Callable[[Path], object], why: str, tmp_path: Path) -> None:
    """Our sender is not told of our paths."""
    make(tmp_path / "socket")

    async def main() -> None:
        async with sending(tmp_path / "socket", lmtp()) as transport:
            results = await transport.deliver([to("ann")])
        assert told(results) == [["deferred 4.4.1 host next-host"]]
        assert results[0][0].text == f"lost connection with localhost (connect): {why}"

    run(main)


def test_the_server_is_restarted(tmp_path: Path) -> None:
    """Kept connections are gone, and no mail with them."""

    async def main() -> None:
        settings = Settings(f"unix:{tmp_path}/socket", lmtp=True)
        async with sending(tmp_path / "socket", lmtp()) as transport:
            for _ in range(3):
                async with Sink(settings):
                    results = await asyncio.gather(*[transport.deliver([to("ann"), to("bob")]) for _ in range(3)])
                    assert [told(each) for each in results] == [[[DELIVERED]] * 2] * 3
                (outcomes,) = await transport.deliver([to("ann")])
                assert (outcomes[0].result, outcomes[0].status) == (Result.DEFERRED, "4.4.1")

    run(main)


def test_it_is_no_mail_server_for_smtp(tmp_path: Path) -> None:
    """LHLO refused: the host is not what the configuration says."""

    async def main() -> None:
        async with Sink(Settings(f"unix:{tmp_path}/socket")), sending(tmp_path / "socket", lmtp()) as transport:
            assert told(await transport.deliver([to("ann")])) == [["deferred 4.5.1 host next-host"]]

    run(main)


@pytest.mark.parametrize("local", [True, False], ids=["this machine", "elsewhere"])
def test_a_sender_that_requires_tls(local: bool, tmp_path: Path) -> None:
    """What stays on this machine keeps what REQUIRETLS promises; what leaves it must be verified (RFC 8689 5)."""

    async def main() -> None:
        delivery = to("ann")
        delivery.message.envelope.require_tls = True
        async with Sink(Settings(lmtp=True)) as sink:
            way = Fixed(sink.port, "127.0.0.1")
            async with sending(way, lmtp()) as transport:
                if not local:
                    elsewhere = transport._pool.hop("mx0.test", way.hosts[0].address, sink.port, transport._manner)
                    elsewhere.address = Elsewhere("127.0.0.1")
                results = await transport.deliver([delivery])
        assert told(results) == [[DELIVERED if local else "failed 5.7.30 message next-host"]]

    run(main)


class Elsewhere(type(ip_address("127.0.0.1"))):  # type: ignore[misc]
    """An address that answers, and is no loopback address."""

    is_loopback = False


# Dovecot


def with_dovecot(check: Callable[[Smtp], Coroutine[Any, Any, None]], server: Dovecot, tcp: bool) -> None:
    async def main() -> None:
        way = Fixed(server.port, "127.0.0.1") if tcp else server.socket
        async with sending(way, lmtp()) as transport:
            await check(transport)

    run(main)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_dovecot(tcp: bool, tmp_path: Path) -> None:
    """It takes the octets as they were, refuses whom it does not know at RCPT, and a full mailbox after the message."""
    large = b"Subject: large\r\n\r\n" + b".dots and 8-bit \xe4\xf6\xfc\r\n" * 60_000

    async def check(transport: Smtp) -> None:
        results = await transport.deliver(
            [
                to("bob", "nobody", "ann", domain=DOMAIN),
                to("full", "bob", domain=DOMAIN),
                to("bob", octets=b"Subject: one\r\n\r\n.\r\n..\r\nend", domain=DOMAIN),
                to("ann", octets=large, domain=DOMAIN),
            ]
        )
        statuses = [[(outcome.result, outcome.status) for outcome in outcomes] for outcomes in results]
        delivered, unknown, full = (
            (Result.DELIVERED, "2.0.0"),
            (Result.FAILED, "5.1.1"),
            (Result.FAILED, "5.2.2"),
        )
        assert statuses == [[delivered, unknown, delivered], [full, delivered], [delivered], [delivered]]
        outcome: Outcome = results[1][0]
        assert "full" in outcome.reply
        # Over the same connection again
        assert len(transport._pool._links) == 1
        assert told(await transport.deliver([to("bob", domain=DOMAIN)])) == [[DELIVERED]]
        assert len(transport._pool._links) == 1

    with dovecot({"ann": "", "bob": "", "full": "1"}) as server:
        with_dovecot(check, server, tcp)
        mails = server.mails("bob")
        assert len(mails) == 4
        # Dovecot writes line ends as Unix has them. Over BDAT nothing was added at the end.
        (one,) = [mail for mail in mails if b"Subject: one" in mail]
        assert one.partition(b"Subject: one\n")[2] == b"\n.\n..\nend"
        (kept,) = [mail for mail in server.mails("ann") if b"Subject: large" in mail]
        assert kept.endswith(large.replace(b"\r\n", b"\n"))
        assert server.mails("full") == []


def test_dovecot_that_defers_a_full_mailbox() -> None:
    async def check(transport: Smtp) -> None:
        (outcomes,) = await transport.deliver([to("full", "bob", domain=DOMAIN)])
        assert [(each.result, each.status) for each in outcomes] == [
            (Result.DEFERRED, "4.2.2"),
            (Result.DELIVERED, "2.0.0"),
        ]

    with dovecot({"bob": "", "full": "1"}, tempfail=True) as server:
        with_dovecot(check, server, tcp=False)
