"""SMTP by MX and by smarthost, over real sockets: where mail goes, TLS, login, what stays open, large messages."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from nameserver import nameserver
from sending import (
    CLEAR,
    LIMITS,
    LONG,
    Clock,
    Fixed,
    Lines,
    ended,
    make_certificate,
    run,
    sending,
    terms,
    to,
    told,
    until,
)

from fastsmtp import log as logs
from fastsmtp.address import NULL
from fastsmtp.delivery import Delivery, Outcome, Result
from fastsmtp.delivery.client_tls import SESSIONS, Manner, Sessions, Tls
from fastsmtp.delivery.failures import PATIENCE, Answer, Stage, failure
from fastsmtp.delivery.hosts import NULL_MX, Finder
from fastsmtp.delivery.link import Link
from fastsmtp.delivery.login import Credentials
from fastsmtp.delivery.pool import Limits
from fastsmtp.delivery.smtp import Attempt, ByMx, Smtp, ToHost, patience_within
from fastsmtp.dns import Resolver
from fastsmtp.nameservers import NameServers
from loadtest.sink_plan import parse_answer, parse_fault
from loadtest.sink_server import Settings, Sink

DELIVERED = "delivered 2.0.0 recipient"


# By MX, with a real name server

ZONE = """\
one IN MX 10 h1
second IN MX 10 dead
second IN MX 20 h1
null IN MX 0 .
loop IN MX 10 mx.here
nowhere IN MX 10 none
plain IN A 127.0.0.1
both IN MX 10 h1
both IN MX 10 h2
h1 IN A 127.0.0.1
h2 IN A 127.0.0.2
dead IN A 127.0.0.9
mx.here IN A 127.0.0.1
"""


@asynccontextmanager
async def finding(server: str) -> AsyncIterator[Finder]:
    asked = NameServers([server], timeout=20.0)
    resolver = Resolver(asked.ask)
    yield Finder(resolver, "mx.here.test", allow_loopback=True)
    await resolver.close()
    await asked.close()


def test_mail_goes_where_dns_says(tmp_path: Path) -> None:
    async def main() -> None:
        async with finding(server) as finder, Sink() as first, Sink(Settings(f"127.0.0.2:{first.port}")) as second:
            async with sending(ByMx(finder, first.port)) as transport:

                async def outcome(domain: str) -> Outcome:
                    delivery = to("ann", domain=domain)
                    assert transport.destination(delivery.recipients[0].address) == domain
                    ((found,),) = await transport.deliver([delivery])
                    return found

                for domain, host in (("one", "h1"), ("second", "h1"), ("plain", "plain")):
                    found = await outcome(f"{domain}.test")
                    assert (found.result, found.host) == (Result.DELIVERED, f"{host}.test")
                assert await outcome("null.test") is NULL_MX
                for domain, status in (("loop", "5.4.6"), ("nowhere", "5.4.4"), ("gone", "5.1.2")):
                    found = await outcome(f"{domain}.test")
                    assert (found.result, found.status) == (Result.FAILED, status)
                found = await outcome("elsewhere.example")
                assert (found.result, found.status) == (Result.DEFERRED, "4.4.3")
                found = await outcome("[127.0.0.1]")
                assert (found.result, found.host) == (Result.DELIVERED, "[127.0.0.1]")
                assert {(await outcome("both.test")).host for _ in range(9)} <= {"h1.test", "h2.test"}
            await ended(first)
            await ended(second)

    with nameserver(tmp_path / "nsd", ZONE) as server:
        run(main)


def test_a_smarthost_is_found_by_name(tmp_path: Path) -> None:
    async def main() -> None:
        async with finding(server) as finder, Sink() as sink:
            async with sending(ToHost(finder, "h1.test", sink.port)) as transport:
                assert transport.destination(to("ann").recipients[0].address) == ""
                results = await transport.deliver([to("ann"), to("bob", domain="elsewhere.test")])
                assert told(results) == [[DELIVERED]] * 2
                assert transport.heard is not None
                assert transport.heard.pipelining
            async with sending(ToHost(finder, "none.test", sink.port)) as transport:
                assert told(await transport.deliver([to("ann")])) == [["deferred 4.4.4 host"]]
                assert transport.heard is None

    with nameserver(tmp_path / "nsd", ZONE) as server:
        run(main)


def test_where_there_is_no_host_what_was_found_is_told_to_all() -> None:
    async def main() -> None:
        async with sending(Fixed(25, outcome=NULL_MX)) as transport:
            results = await transport.deliver([to("ann", "bob"), to("carl")])
        assert told(results) == [["failed 5.1.10 host"] * 2, ["failed 5.1.10 host"]]

    run(main)


def test_our_own_address_and_name() -> None:
    async def main(tmp_path: Path) -> None:
        settings = Settings(record=tmp_path / "record", rules=(parse_answer("banner 127.0.0.1 554 not you"),))
        async with Sink(settings) as sink:
            source = (ip_address("127.0.0.7"), ip_address("::1"))
            spoken = replace(terms(), hostname="out.here.test")
            async with sending(Fixed(sink.port, "127.0.0.1"), spoken, source=source) as transport:
                assert told(await transport.deliver([to("ann")])) == [[DELIVERED]]
            (record,) = sink.records()
            assert record["client"].startswith("127.0.0.7:")
            assert record["helo"] == "out.here.test"

    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        run(lambda: main(Path(folder)))


def test_an_address_that_is_not_ours_is_not_the_hosts_fault() -> None:
    async def main() -> None:
        async with (
            Sink() as sink,
            sending(Fixed(sink.port, "127.0.0.1"), source=(ip_address("192.0.2.1"),)) as transport,
        ):
            results = await transport.deliver([to("ann"), to("bob")])
        assert told(results) == [["deferred 4.3.2 session"]] * 2
        assert "mx0.test" in results[0][0].text

    run(main)


def test_a_connection_that_is_never_made() -> None:
    """Nobody takes it from a full backlog; the next host has its turn."""

    async def main() -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            port = full.getsockname()[1]
            fillers = [socket.socket() for _ in range(3)]
            for each in fillers:
                each.setblocking(False)
                each.connect_ex(("127.0.0.1", port))
            way = Fixed(port, "127.0.0.1", "127.0.0.2")
            async with (
                Sink(Settings(f"127.0.0.2:{port}")),
                sending(way, terms(Stage.CONNECT, seconds=1.0)) as transport,
            ):
                results = await transport.deliver([to("ann")])
            assert results[0][0].host == "mx1.test"
            async with sending(Fixed(port, "127.0.0.1"), terms(Stage.CONNECT)) as transport:
                results = await transport.deliver([to("ann")])
            assert results[0][0].text == "mx0.test timed out (connect)"
            for each in fillers:
                each.close()

    run(main)
    run(main, "asyncio")


def test_the_longest_patience() -> None:
    assert patience_within(200.0)[Stage.MAIL] == 200.0
    assert patience_within(200.0)[Stage.CONNECT] == PATIENCE[Stage.CONNECT]


# Connections that stay


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_messages_go_over_one_connection(loop: str) -> None:
    async def main() -> None:
        async with Sink() as sink:
            async with sending(Fixed(sink.port, "127.0.0.1")) as transport:
                for _ in range(5):
                    assert told(await transport.deliver([to("ann"), to("bob", "carl")])) == [
                        [DELIVERED],
                        [DELIVERED] * 2,
                    ]
                assert (sink.counts.connections, sink.counts.messages) == (1, 10)
                # At the same time: each has its own, and they stay for the next ones.
                for _ in range(2):
                    await asyncio.gather(*[transport.deliver([to("ann")]) for _ in range(4)])
                    assert sink.counts.connections == 4
            await ended(sink)

    run(main, loop)


def test_a_host_is_not_looked_up_for_each_message() -> None:
    async def main() -> None:
        async with Sink() as sink:
            way = Fixed(sink.port, "127.0.0.1")
            async with sending(way) as transport:
                clock = transport._pool.now = Clock()
                for _ in range(3):
                    await transport.deliver([to("ann")])
                assert way.asked == ["there.test"]
                await transport.deliver([to("ann", domain="other.test")])
                assert way.asked == ["there.test", "other.test"]
                assert sink.counts.connections == 1  # the same address takes both
                clock.now += LIMITS.near + 1
                await transport.deliver([to("ann")])
                assert len(way.asked) == 3
                assert sink.counts.connections == 1

    run(main)


def test_so_many_messages_over_a_connection() -> None:
    async def main() -> None:
        async with Sink() as sink:
            async with sending(Fixed(sink.port, "127.0.0.1"), limits=LIMITS._replace(messages=4)) as transport:
                results = await transport.deliver([to("ann") for _ in range(10)])
                assert told(results) == [[DELIVERED]] * 10
                assert sink.counts.connections == 3
                await transport.deliver([to("ann"), to("bob")])
                assert sink.counts.connections == 3
            await ended(sink)

    run(main)


@pytest.mark.parametrize("limits", [LIMITS._replace(idle=0.1), LIMITS._replace(age=0.1)], ids=["idle", "age"])
def test_an_idle_connection_ends_with_quit(limits: Limits) -> None:
    async def main() -> None:
        async with Sink(Settings(rules=(parse_fault("hangup@quit"),))) as sink:
            async with sending(Fixed(sink.port, "127.0.0.1"), limits=limits) as transport:
                await transport.deliver([to("ann")])
                await ended(sink)
                assert sink.counts.faults == {"hangup@quit": 1}
                assert told(await transport.deliver([to("ann")])) == [[DELIVERED]]
            await ended(sink)
        assert sink.counts.faults == {"hangup@quit": 2}

    run(main)


def test_no_more_idle_connections_than_are_allowed() -> None:
    async def main() -> None:
        async with (
            Sink() as sink,
            sending(Fixed(sink.port, "127.0.0.1"), limits=LIMITS._replace(idle_links=2)) as transport,
        ):
            await asyncio.gather(*[transport.deliver([to("ann")]) for _ in range(5)])
            await until(lambda: len(sink._service.sessions) == 2)

    run(main)


def test_a_host_with_a_limit_for_a_session() -> None:
    """LIMITS MAILMAX=1 and RCPTMAX=1 (RFC 9422): as many connections as it takes."""
    sessions = Counter[str]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sessions["all"] += 1
        writer.write(b"220 mx\r\n")
        while line := await reader.readline():
            if line.startswith(b"EHLO"):
                writer.write(b"250-mx\r\n250-LIMITS MAILMAX=1 RCPTMAX=1\r\n250 PIPELINING\r\n")
            elif line.startswith(b"DATA"):
                writer.write(b"354 go\r\n")
                await reader.readuntil(b"\r\n.\r\n")
                writer.write(b"250 kept\r\n")
            else:
                sessions[line[:4].decode()] += 1
                writer.write(b"250 ok\r\n")
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with sending(Fixed(port, "127.0.0.1")) as transport:
            results = await transport.deliver([to("ann", "bob", "carl"), to("dora")])
        assert told(results) == [["delivered 2.0.0 recipient relayed"] * 3, ["delivered 2.0.0 recipient relayed"]]
        assert sessions == {"all": 4, "MAIL": 4, "RCPT": 4, "QUIT": 4}
        server.close()

    run(main)


def test_who_stops_waiting_cuts_the_connection() -> None:
    async def main() -> None:
        async with (
            Sink(Settings(rules=(parse_fault("silence@end"),))) as sink,
            sending(Fixed(sink.port, "127.0.0.1")) as transport,
        ):
            waiting = asyncio.create_task(transport.deliver([to("ann")]))
            await until(lambda: sink.counts.faults["silence@end"] == 1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await ended(sink)

    run(main)


def test_closed_while_a_delivery_is_under_way() -> None:
    """It is answered all the same."""

    async def main() -> None:
        async with Sink(Settings(rules=(parse_fault("silence@end"),))) as sink:
            async with sending(Fixed(sink.port, "127.0.0.1")) as transport:
                waiting = asyncio.create_task(transport.deliver([to("ann")]))
                await until(lambda: sink.counts.faults["silence@end"] == 1)
            assert told(await waiting) == [["deferred 4.4.2 host"]]

    run(main)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For mx0.test."""
    return make_certificate(tmp_path_factory.mktemp("tls"), "mx0.test")


NO_TLS = "deferred 4.7.4 host next-host"
BAD_TLS = "deferred 4.7.5 host next-host"


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize(
    ("mode", "offered", "name", "expected", "secured"),
    [
        ("opportunistic", "off", "mx0.test", DELIVERED, False),
        ("opportunistic", "starttls", "mx0.test", DELIVERED, True),
        ("opportunistic", "starttls", "other.test", DELIVERED, True),
        ("off", "starttls", "mx0.test", DELIVERED, False),
        ("required", "off", "mx0.test", NO_TLS, False),
        ("required", "starttls", "other.test", DELIVERED, True),
        ("verified", "off", "mx0.test", NO_TLS, False),
        ("verified", "starttls", "mx0.test", DELIVERED, True),
        ("verified", "starttls", "other.test", BAD_TLS, False),
        ("implicit", "implicit", "mx0.test", DELIVERED, True),
        ("implicit", "implicit", "other.test", BAD_TLS, False),
        ("implicit", "off", "mx0.test", BAD_TLS, False),
    ],
)
def test_tls(
    mode: Any, offered: str, name: str, expected: str, secured: bool, loop: str, certificate: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        settings = Settings(tls=offered, certificate=certificate, record=tmp_path / "record")
        async with Sink(settings) as sink:
            way = Fixed(sink.port, (name, "127.0.0.1"))
            async with sending(way, tls=Tls(mode), ca_file=certificate) as transport:
                for _ in range(2):
                    assert told(await transport.deliver([to("ann")])) == [[expected]]
            await ended(sink)
            kinds = [record["protocol"] for record in sink.records()] if expected == DELIVERED else []
        assert kinds == (["ESMTPS" if secured else "ESMTP"] * 2 if expected == DELIVERED else [])

    run(main, loop)


def test_a_certificate_that_nobody_vouches_for(certificate: Path) -> None:
    async def main() -> None:
        async with Sink(Settings(tls="starttls", certificate=certificate)) as sink:
            async with sending(Fixed(sink.port, "127.0.0.1"), tls=Tls("verified")) as transport:
                results = await transport.deliver([to("ann")])
            assert told(results) == [[BAD_TLS]]
            assert results[0][0].text == "mx0.test: the TLS handshake failed: certificate: self-signed certificate"
            assert sink.counts.messages == 0

    run(main)


def test_the_oldest_version(certificate: Path) -> None:
    """A host that has only an older one: required TLS defers, opportunistic goes in clear, and stays there."""

    async def main() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        async with Sink(Settings(tls="starttls"), tls=context) as sink:
            way = Fixed(sink.port, "127.0.0.1")
            async with sending(way, tls=Tls("required", "1.3")) as transport:
                ((outcome,),) = await transport.deliver([to("ann")])
                # With an alert, or without
                assert told([[outcome]]) in ([[BAD_TLS]], [["deferred 4.4.2 host next-host"]])
            async with sending(way, tls=Tls("required", "1.2")) as transport:
                assert told(await transport.deliver([to("ann")])) == [[DELIVERED]]
            before = sink.counts.connections
            log = Lines()
            async with sending(way, tls=Tls("opportunistic", "1.3"), limits=LIMITS._replace(messages=1), log=log) as t:
                assert told(await t.deliver([to("ann"), to("bob")])) == [[DELIVERED]] * 2
                assert sink.counts.connections == before + 3
            assert [line[:3] for line in log.written] == [(logs.TLS_GIVEN_UP, "mx0.test", "127.0.0.1")]
            assert sink.counts.tls == 1

    run(main)


def test_tls_is_tried_again_after_a_while() -> None:
    async def main() -> None:
        rules = (parse_fault("stall@starttls"),)
        async with Sink(Settings(tls="starttls", rules=rules)) as sink:
            log = Lines()
            async with sending(
                Fixed(sink.port, "127.0.0.1"),
                terms(Stage.TLS),
                Tls("opportunistic"),
                LIMITS._replace(messages=1),
                log=log,
            ) as transport:
                clock = transport._pool.now = Clock()
                # The clock of the pool stands still, that of a handshake does not.
                for connections in (2, 3):
                    assert told(await transport.deliver([to("ann")])) == [[DELIVERED]]
                    assert sink.counts.connections == connections
                clock.now += LIMITS.clear
                assert told(await transport.deliver([to("ann")])) == [[DELIVERED]]
                assert sink.counts.connections == 5
            assert len(log.written) == 2

    run(main)


def test_a_host_that_speaks_in_clear_where_tls_was_to_begin() -> None:
    """Its greeting would be answered in clear, with the password behind it."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mx\r\n")
        heard.append(await reader.read(3))
        writer.write(b"250-mx\r\n250 AUTH PLAIN\r\n")
        with suppress(ConnectionError):
            heard.append(await reader.read())
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        spoken = terms(credentials=Credentials("ann", "secret"))
        async with sending(Fixed(port, "127.0.0.1"), spoken, Tls("implicit")) as transport:
            results = await transport.deliver([to("ann")])
        assert told(results) == [[BAD_TLS]]
        assert heard[0][:2] == b"\x16\x03"
        assert b"EHLO" not in b"".join(heard)
        server.close()

    run(main)
    run(main, "asyncio")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_is_resumed(certificate: Path, version: ssl.TLSVersion) -> None:
    resumed: list[bool] = []

    async def main() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        context.maximum_version = version

        class Seen(ssl.SSLObject):
            def do_handshake(self) -> None:
                super().do_handshake()
                resumed.append(bool(self.session_reused))

        context.sslobject_class = Seen
        async with Sink(Settings(tls="starttls"), tls=context) as sink:
            way = Fixed(sink.port, "127.0.0.1")
            limits = LIMITS._replace(age=0.0)
            async with sending(way, tls=Tls("verified"), ca_file=certificate, limits=limits) as transport:
                for _ in range(3):
                    assert told(await transport.deliver([to("ann")])) == [[DELIVERED]]
                    await ended(sink)
        assert resumed == [False, True, True]

    run(main)
    resumed.clear()
    run(main, "asyncio")


def test_no_more_sessions_are_kept_than_are_allowed() -> None:
    class Session:
        has_ticket = True

    sessions = Sessions()
    made: list[Any] = [Session() for _ in range(SESSIONS + 1)]
    for number, each in enumerate(made):
        sessions.keep(str(number), each)
    assert sessions.find("0") is None
    assert sessions.find("1") is made[1]
    sessions.keep("1", None)
    assert sessions.find("1") is made[1]


def test_a_manner_has_its_terms() -> None:
    spoken = terms(ignore=frozenset({"DSN"}))
    manner = Manner(Tls("opportunistic", ignore=frozenset({"CHUNKING"})), spoken)
    assert manner.terms.starttls == "opportunistic"
    assert manner.clear.starttls == "off"
    assert manner.terms.ignore == manner.clear.ignore == {"DSN", "CHUNKING"}
    assert Manner(Tls("verified"), spoken).terms.starttls == "required"
    assert Manner(Tls("implicit"), spoken).terms.starttls == "off"
    assert Manner(CLEAR, spoken).context is None


def test_ignored_keywords_are_not_used(tmp_path: Path) -> None:
    async def main() -> None:
        # Who offers it and refuses it
        rules = (parse_answer("mail * 555 5.5.4 no parameters, please"),)
        async with Sink(Settings(rules=rules, size=10_000)) as sink:
            way = Fixed(sink.port, "127.0.0.1")
            async with sending(way, tls=Tls("off", ignore=frozenset({"SIZE"}))) as transport:
                (outcomes,) = await transport.deliver([to("ann", octets=b"x" * 20_000)])
                assert outcomes[0].status == "5.5.4"  # it was asked at all
            async with sending(way) as transport:
                (outcomes,) = await transport.deliver([to("ann", octets=b"x" * 20_000)])
                assert outcomes[0].status == "5.3.4"

    run(main)


# Login


@pytest.mark.parametrize("mode", ["verified", "implicit"])
def test_login_over_a_verified_connection(mode: Any, certificate: Path, tmp_path: Path) -> None:
    async def main() -> None:
        offered = "implicit" if mode == "implicit" else "starttls"
        settings = Settings(tls=offered, certificate=certificate, user="ann", password="secret", record=tmp_path / "r")
        async with Sink(settings) as sink:
            way = Fixed(sink.port, "127.0.0.1", "127.0.0.1")
            for password, expected in (("secret", DELIVERED), ("wrong", "deferred 4.7.8 host")):
                spoken = terms(credentials=Credentials("ann", password))
                async with sending(way, spoken, Tls(mode), ca_file=certificate) as transport:
                    results = await transport.deliver([to("ann"), to("bob")])
                    assert told(results) == [[expected]] * 2
            assert [record["user"] for record in sink.records()] == ["ann"] * 2
            # A wrong password is not shown to the next host.
            assert sink.counts.connections == 2

    run(main)


@pytest.mark.parametrize("mode", ["off", "opportunistic", "required"])
def test_no_login_over_any_other(mode: Any, certificate: Path) -> None:
    async def main() -> None:
        settings = Settings(tls="starttls", certificate=certificate, user="ann", password="secret")
        async with Sink(settings) as sink:
            spoken = terms(credentials=Credentials("ann", "secret"))
            async with sending(Fixed(sink.port, "127.0.0.1"), spoken, Tls(mode)) as transport:
                assert told(await transport.deliver([to("ann")])) == [["deferred 4.7.0 host next-host"]]
            assert sink.counts.messages == 0

    run(main)


def test_a_sender_that_requires_tls(certificate: Path) -> None:
    """The sink does not know REQUIRETLS: the message fails, its neighbour does not (RFC 8689 4.2.1)."""

    async def main() -> None:
        async with (
            Sink(Settings(tls="starttls", certificate=certificate)) as sink,
            sending(Fixed(sink.port, "127.0.0.1"), tls=Tls("verified"), ca_file=certificate) as transport,
        ):
            deliveries = [to("ann"), to("bob")]
            deliveries[0].message.envelope.require_tls = True
            results = await transport.deliver(deliveries)
        assert told(results) == [["failed 5.7.30 message next-host"], [DELIVERED]]

    run(main)


@pytest.mark.parametrize("mode", ["required", "verified"])
@pytest.mark.parametrize(("offered", "secured"), [("off", "ESMTP"), ("starttls", "ESMTPS")])
def test_a_sender_that_waives_tls(mode: Any, offered: str, secured: str, certificate: Path, tmp_path: Path) -> None:
    """Its mail leaves all the same, over TLS where there is any; that of others waits, and uses no link of it."""

    async def main() -> None:
        settings = Settings(tls=offered, certificate=certificate, record=tmp_path / "record")
        async with Sink(settings) as sink:
            # Whatever the certificate says, it is not this name.
            async with sending(Fixed(sink.port, ("wrong.test", "127.0.0.1")), tls=Tls(mode)) as transport:
                assert transport.demands_tls
                for _ in range(2):
                    deliveries = [to("ann"), to("bob"), to("carl")]
                    deliveries[1].message.envelope.waives_tls = True
                    results = told(await transport.deliver(deliveries))
                    assert results[1] == [DELIVERED]
                    strict = [[DELIVERED]] * 2 if (mode, offered) == ("required", "starttls") else [results[0]] * 2
                    assert [results[0], results[2]] == strict
                    assert (results[0] == [DELIVERED]) is ((mode, offered) == ("required", "starttls"))
            await ended(sink)
            taken = {(record["recipients"][0]["address"], record["protocol"]) for record in sink.records()}
            assert ("bob@there.test", secured) in taken
            assert all(protocol == "ESMTPS" for name, protocol in taken if name != "bob@there.test")

    run(main)


def test_a_host_that_is_configured_is_spoken_to_as_configured_whatever_a_sender_waives() -> None:
    async def main() -> None:
        async with Sink(Settings(tls="off")) as sink:
            way = Fixed(sink.port, "127.0.0.1")
            way.by_domain = False
            async with sending(way, tls=Tls("verified")) as transport:
                delivery = to("ann")
                delivery.message.envelope.waives_tls = True
                assert not transport.demands_tls
                assert told(await transport.deliver([delivery])) == [[NO_TLS]]
                assert sink.counts.messages == 0

    run(main)


def test_a_report_of_what_requires_tls_rather_leaves_without() -> None:
    """RFC 8689 5: only for mail without a sender."""

    async def main() -> None:
        async with Sink() as sink, sending(Fixed(sink.port, "127.0.0.1")) as transport:
            deliveries = [to("ann"), to("bob")]
            for delivery in deliveries:
                delivery.message.envelope.require_tls = True
            deliveries[0].message.envelope.reverse_path = NULL
            results = await transport.deliver(deliveries)
        assert told(results) == [[DELIVERED], ["failed 5.7.30 message next-host"]]

    run(main)


@pytest.mark.parametrize("kept", [True, False])
def test_what_becomes_of_the_rest_when_a_connection_breaks(kept: bool) -> None:
    """The end of one that earlier mail has left says little of its host."""
    attempt = Attempt([to("ann"), to("bob")])
    gone = failure(Stage.DATA, Answer.HANG_UP, "mx.test")
    attempt.take([[gone]], gone, opened=True, kept=kept)
    open_here = [str(each.delivery.recipients[0].address) for each in attempt.same]
    open_there = [str(each.delivery.recipients[0].address) for each in attempt.following]
    assert open_here == (["bob@there.test"] if kept else [])
    assert open_there == (["ann@there.test"] if kept else ["ann@there.test", "bob@there.test"])


def test_who_cannot_take_it_does_not_speak_for_who_was_not_there() -> None:
    async def main() -> None:
        async with Sink() as sink, sending(Fixed(sink.port, "127.0.0.2", "127.0.0.1")) as transport:
            delivery = to("ann")
            delivery.message.envelope.require_tls = True
            assert told(await transport.deliver([delivery])) == [["deferred 4.4.1 host next-host"]]

    run(main)


def test_what_is_said_before_our_hello_is_not_its_answer(certificate: Path) -> None:
    """The host's Finished and a reply come in one segment."""

    def serve(listening: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        read, written = ssl.MemoryBIO(), ssl.MemoryBIO()
        secured = context.wrap_bio(read, written, server_side=True)
        client, _ = listening.accept()
        with client:
            client.sendall(b"220 mx\r\n")
            client.recv(1000)
            client.sendall(b"250-mx\r\n250 STARTTLS\r\n")
            client.recv(1000)
            client.sendall(b"220 go\r\n")
            while True:
                try:
                    secured.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    client.sendall(written.read())
                    read.write(client.recv(10_000))
            secured.write(b"250 mx\r\n")
            client.sendall(written.read())
            with suppress(ConnectionError):
                client.recv(1000)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            thread = threading.Thread(target=serve, args=(listening,))
            thread.start()
            way = Fixed(listening.getsockname()[1], "127.0.0.1")
            async with sending(way, tls=Tls("required")) as transport:
                results = await transport.deliver([to("ann")])
            assert told(results) == [[BAD_TLS]]
            await until(lambda: not thread.is_alive())

    run(main)
    run(main, "asyncio")


# Large messages


def large(tmp_path: Path, size: int) -> tuple[Delivery, bytes]:
    """A message in a file, as the spool keeps it."""
    octets = b"Subject: large\r\n\r\n" + b".0123456789abcdef0123456789abcdef0123456789abcdef\r\n" * (size // 50)
    file = tmp_path / "body"
    file.write_bytes(octets)
    delivery = to("ann", octets=octets)
    message = delivery.message
    message.parts, message.file = None, str(file)
    return delivery, message.prefix + octets


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("without", [(), ("CHUNKING",), ("PIPELINING", "CHUNKING")], ids=["BDAT", "DATA", "slowly"])
def test_a_large_message_from_a_file(without: tuple[str, ...], loop: str, tmp_path: Path) -> None:
    delivery, sent = large(tmp_path, 3_000_000)

    async def main() -> None:
        async with Sink(Settings(without=frozenset(without), keep=tmp_path / "kept")) as sink:
            async with sending(Fixed(sink.port, "127.0.0.1")) as transport:
                results = await transport.deliver([delivery, to("bob"), delivery])
            assert told(results) == [[DELIVERED]] * 3
            await ended(sink)
        kept = [path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()]
        assert sorted(map(len, kept))[1:] == [len(sent)] * 2
        assert sent in kept

    run(main, loop)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    delivery, _ = large(tmp_path, 2_000_000)
    (tmp_path / "body").unlink()

    async def main() -> None:
        async with Sink() as sink:
            async with sending(Fixed(sink.port, "127.0.0.1")) as transport:
                results = await transport.deliver([delivery, to("bob")])
            assert told(results) == [["deferred 4.3.0 message"], [DELIVERED]]
            await ended(sink)
            assert sink.counts.messages == 1

    run(main)


def test_a_host_that_takes_no_octets(tmp_path: Path) -> None:
    """A message is not read faster than it is taken; nor is it waited for without end."""
    delivery, sent = large(tmp_path, 40_000_000)
    taken = 0
    stop = threading.Event()

    def serve(listening: socket.socket) -> None:
        nonlocal taken
        client, _ = listening.accept()
        with client:
            client.sendall(b"220 mx\r\n")
            client.recv(1000)
            client.sendall(b"250 mx\r\n")
            for _ in range(2):
                client.recv(1000)
                client.sendall(b"250 ok\r\n")
            client.recv(1000)
            client.sendall(b"354 go\r\n")
            stop.wait(LONG)
            while piece := client.recv(1 << 20):
                taken += len(piece)

    async def main() -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            thread = threading.Thread(target=serve, args=(listening,))
            thread.start()
            way = Fixed(listening.getsockname()[1], "127.0.0.1")
            async with sending(way, terms(Stage.BODY)) as transport:
                results = await transport.deliver([delivery])
            stop.set()
            await until(lambda: not thread.is_alive())
        assert told(results) == [["deferred 4.4.2 host next-host"]]
        assert taken < len(sent) // 2

    run(main)


def test_a_slow_host_is_waited_for() -> None:
    """As long as it takes octets at all, a piece may take longer than the patience."""

    class Slow(asyncio.Transport):
        def __init__(self, link: Link) -> None:
            super().__init__()
            self.link = link
            self.left = 0
            self.aborted = False

        def write(self, data: Any) -> None:
            self.left += len(data)
            self.link.pause_writing()

        def get_write_buffer_size(self) -> int:
            return self.left

        def close(self) -> None:
            pass

        def abort(self) -> None:
            self.aborted = True

    async def main() -> None:
        manner = Manner(CLEAR, terms())
        link = Link("mx", manner, clear=False, local=False, most=1, executor=None, on_end=print, on_gone=print)  # type: ignore[arg-type]
        running = link.run([to("ann", octets=b"x" * 3_000_000)])
        transport = Slow(link)
        link.connection_made(transport)
        for reply in (b"220 mx\r\n", b"250-mx\r\n250-PIPELINING\r\n250 CHUNKING\r\n", b"250 ok\r\n250 ok\r\n"):
            link.resume_writing()
            link.data_received(reply)
        now = 0.0
        for _ in range(5):
            now += LONG
            link.check(now)
            transport.left -= 10
        assert not running.done()
        for _ in range(3):
            now += LONG
            link.check(now)
        assert told(await running) == [["deferred 4.4.2 host next-host"]]
        assert transport.aborted
        # Nor may it take for ever to hear our last words.
        transport.aborted = False
        for _ in range(3):
            now += LONG
            link.check(now)
        assert transport.aborted

    run(main)


def test_what_a_transport_says_of_itself() -> None:
    async def main() -> None:
        async with sending(Fixed(25), concurrency=7) as transport:
            assert (transport.concurrency, transport.any_octets, transport.needs_body) == (7, False, True)
        assert isinstance(transport, Smtp)

    run(main)
