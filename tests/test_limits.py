"""Limits per client: one at a time with a clock of the test, then on real servers with workers and many addresses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import time
from collections import Counter as Tally
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from peer import GoneError, Peer, unverified
from sending import make_certificate
from servers import running, toml

from fastsmtp._shared import Shared
from fastsmtp.address import parse_address
from fastsmtp.config import Inbound
from fastsmtp.log import Log
from fastsmtp.metrics import Counter
from fastsmtp.policy import Policy
from fastsmtp.policy.limits import INTERVAL, Limits
from fastsmtp.verdict import Ask, Client, Stage

SOURCES = [f"127.1.{number // 10}.{number % 10 + 1}" for number in range(50)]  # of five networks


class Book:
    """A log that can be read."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("log")
        self.log = Log(self.fd, human=False, clock=time.time, threaded=False)

    def lines(self, event: str) -> list[dict[str, Any]]:
        self.log.flush()
        lines = [json.loads(line) for line in os.pread(self.fd, 1 << 24, 0).splitlines()]
        return [line for line in lines if line["event"] == event]


class Desk:
    """Limits with a clock that stands still."""

    def __init__(self, book: Book, shared: Shared | None = None, worker: int = 0, **section: object) -> None:
        self.time = 1000.0
        self.book = book
        self.shared = shared or Shared(1, len(Counter))
        self.limits = Limits(
            Inbound.model_validate(section),
            lambda ip: ip.startswith("10."),
            hostname="mx.here.test",
            log=book.log,
            shared=self.shared,
            worker=worker,
            now=lambda: self.time,
        )
        self.policy = Policy(self.limits.checks(), book.log)

    def admit(self, ip: str) -> str:
        """The word of the refusal; empty: it is let in."""
        heard = self.limits.admit(ip)
        if heard is None:
            return ""
        assert heard.startswith(b"421 4.7.0 mx.here.test ")
        assert heard.endswith(b")\r\n")
        return heard.rpartition(b"(")[2][:-3].decode()

    def ask(self, stage: Stage, ip: str, user: str = "") -> str:
        client = Client(ip, 1, "listener")
        client.user = user
        verdict = self.policy.evaluate(Ask(stage, client, recipient=parse_address("a@x.test")))
        assert not hasattr(verdict, "__await__")
        if verdict.reply is None:
            return ""
        assert (verdict.reply.code, verdict.reply.enhanced) == (450, "4.7.1")
        return verdict.reason

    def fail(self, ip: str) -> None:
        self.limits.fail(Client(ip, 1, "listener"))

    def counted(self, counter: Counter) -> int:
        return self.shared.total(counter)


@pytest.fixture
def book() -> Iterator[Book]:
    book = Book()
    yield book
    book.log.close()
    os.close(book.fd)


def test_open_sessions_of_an_address(book: Book) -> None:
    desk = Desk(book, sessions_per_address=2)
    assert [desk.admit("192.0.2.1") for _ in range(4)] == ["", "", "address-full", "address-full"]
    assert desk.admit("192.0.2.2") == ""
    desk.limits.leave("192.0.2.1")
    assert [desk.admit("192.0.2.1") for _ in range(2)] == ["", "address-full"]
    assert desk.counted(Counter.ADDRESS_FULL) == 3


@pytest.mark.parametrize(
    ("near", "far"),
    [
        (["192.0.2.1", "192.0.2.200", "192.0.2.1"], "192.0.3.1"),
        (["2001:db8::1", "2001:db8::2", "2001:db8:0:0:ffff::1"], "2001:db8:0:1::1"),
    ],
)
def test_open_sessions_of_a_network(book: Book, near: list[str], far: str) -> None:
    desk = Desk(book, sessions_per_network=2)
    assert [desk.admit(ip) for ip in near] == ["", "", "network-full"]
    assert desk.admit(far) == ""
    desk.limits.leave(near[1])
    assert desk.admit(near[2]) == ""
    assert desk.counted(Counter.NETWORK_FULL) == 1


def test_who_becomes_free_or_is_so_no_more_gives_back_what_it_took(book: Book) -> None:
    free: set[str] = set()
    version: list[object] = [object()]
    shared = Shared(1, len(Counter))
    limits = Limits(
        Inbound.model_validate({"sessions_per_address": 2, "sessions_per_network": 3}),
        lambda ip: ip in free,
        hostname="mx.here.test", log=book.log, shared=shared, worker=0, version=lambda: version[0],
    )  # fmt: skip

    def change(*now_free: str) -> None:
        free.clear()
        free.update(now_free)
        version[0] = object()
        limits.tick()

    ip = "192.0.2.1"
    assert [limits.admit(ip) is None for _ in range(3)] == [True, True, False]
    change(ip)
    assert [limits.admit(ip) is None for _ in range(5)] == [True] * 5
    change()
    assert limits.admit(ip) is not None, "the two of before are open still"
    for _ in range(7):
        limits.leave(ip)
    assert [limits.admit(ip) is None for _ in range(3)] == [True, True, False]
    change(ip)
    limits.leave(ip)
    limits.leave(ip)
    change()
    assert [limits.admit(ip) is None for _ in range(3)] == [True, True, False]


def test_who_is_turned_away_at_one_limit_takes_nothing_of_another(book: Book) -> None:
    desk = Desk(book, sessions_per_address=3, sessions_per_network=1, new_sessions="2/m")
    assert desk.admit("192.0.2.1") == ""
    assert [desk.admit("192.0.2.2") for _ in range(5)] == ["network-full"] * 5
    desk.limits.leave("192.0.2.1")
    assert desk.admit("192.0.2.2") == "", "no place of its address and none of its rate were kept"
    desk.limits.leave("192.0.2.2")
    assert desk.admit("192.0.2.2") == ""
    desk.limits.leave("192.0.2.2")
    assert [desk.admit("192.0.2.2") for _ in range(5)] == ["session-rate"] * 5
    assert desk.admit("192.0.2.3") == "", "the network has a place"


def test_new_sessions_in_a_time(book: Book) -> None:
    desk = Desk(book, new_sessions="3/m")
    for _ in range(3):
        assert desk.admit("192.0.2.1") == ""
        desk.limits.leave("192.0.2.1")
    assert desk.admit("192.0.2.1") == "session-rate"
    desk.time += 20
    assert [desk.admit("192.0.2.1") for _ in range(2)] == ["", "session-rate"]
    assert desk.counted(Counter.SESSION_RATE) == 2


@pytest.mark.parametrize(
    ("key", "stage", "reason", "counter"),
    [
        ("messages", Stage.MAIL, "message-rate", Counter.MESSAGE_RATE),
        ("recipients", Stage.RCPT, "recipient-rate", Counter.RECIPIENT_RATE),
    ],
)
def test_messages_and_recipients_in_a_time(book: Book, key: str, stage: Stage, reason: str, counter: Counter) -> None:
    desk = Desk(book, Shared(1, len(Counter)), 0, **{key: "2/10s"})
    other = Stage.RCPT if stage is Stage.MAIL else Stage.MAIL
    assert [desk.ask(stage, "192.0.2.1") for _ in range(3)] == ["", "", reason]
    assert desk.ask(other, "192.0.2.1") == ""
    assert desk.ask(stage, "192.0.2.2") == ""
    desk.time += 5
    assert [desk.ask(stage, "192.0.2.1") for _ in range(2)] == ["", reason]
    assert desk.counted(counter) == 2


def test_failures_close_every_way_in_until_time_has_passed(book: Book) -> None:
    desk = Desk(book, failures="3/m")
    for _ in range(2):
        desk.fail("192.0.2.1")
    assert desk.admit("192.0.2.1") == desk.ask(Stage.RCPT, "192.0.2.1") == ""
    for _ in range(5):
        desk.fail("192.0.2.1")
    assert desk.admit("192.0.2.1") == "failure-rate"
    assert desk.ask(Stage.MAIL, "192.0.2.1") == desk.ask(Stage.RCPT, "192.0.2.1") == "failure-rate"
    assert desk.counted(Counter.FAILURE_RATE) == 3
    assert desk.admit("192.0.2.2") == ""
    desk.time += 20
    assert desk.admit("192.0.2.1") == "", "those beyond the limit did not count"


def test_a_client_is_an_ipv4_address_or_an_ipv6_network(book: Book) -> None:
    desk = Desk(book, messages="1/m")
    assert [desk.ask(Stage.MAIL, ip) for ip in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1")] == [
        "", "message-rate", "",
    ]  # fmt: skip
    assert [desk.ask(Stage.MAIL, ip) for ip in ("192.0.2.1", "192.0.2.2")] == ["", ""]
    assert [desk.ask(Stage.MAIL, ip) for ip in ("fe80::1%eth0", "fe80::1%eth1")] == ["", "message-rate"]


def test_who_is_free_of_limits(book: Book) -> None:
    desk = Desk(
        book, sessions_per_address=1, sessions_per_network=1, new_sessions="1/m", messages="1/m", recipients="1/m",
        failures="1/m",
    )  # fmt: skip
    for ip in ("10.0.0.1", ""):
        for _ in range(5):
            desk.fail(ip)
            assert desk.admit(ip) == desk.ask(Stage.MAIL, ip) == desk.ask(Stage.RCPT, ip) == ""
        desk.limits.leave(ip)
    for _ in range(5):
        assert desk.ask(Stage.MAIL, "192.0.2.1", user="ann") == ""
    assert [desk.ask(Stage.MAIL, "192.0.2.1") for _ in range(2)] == ["", "message-rate"]


def test_without_a_limit_nothing_is_asked(book: Book) -> None:
    assert not Inbound().counts
    assert Desk(book, sessions_per_address=1).limits.checks() == []
    desk = Desk(book, failures="1/m")
    assert [check.stage for check in desk.limits.checks()] == [Stage.MAIL, Stage.RCPT]
    for key in ("sessions_per_address", "sessions_per_network"):
        assert Inbound.model_validate({key: 1}).counts
    for key in ("new_sessions", "messages", "recipients", "failures"):
        assert Inbound.model_validate({key: "1/m"}).counts


def test_the_log_has_a_line_for_each_client_and_interval(book: Book) -> None:
    desk = Desk(book, sessions_per_address=1)
    for ip in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.1", "192.0.2.2"):
        desk.admit(ip)
    desk.limits.tick()
    assert book.lines("turned-away") == []
    desk.time += INTERVAL
    desk.limits.tick()
    desk.limits.tick()
    found = [(line["client"], line["reason"], line["connections"]) for line in book.lines("turned-away")]
    assert found == [("192.0.2.1", "address-full", 2), ("192.0.2.2", "address-full", 1)]


def test_the_log_names_only_so_many_clients(book: Book) -> None:
    desk = Desk(book, new_sessions="1/d")
    for _ in range(2):
        for number in range(1200):
            desk.admit(f"192.0.{number // 250}.{number % 250}")
    asyncio.run(desk.limits.close())
    lines = book.lines("turned-away")
    assert len(lines) == 1001
    assert [line["connections"] for line in lines if not line["client"]] == [200]


def test_more_clients_than_are_remembered_are_still_counted(book: Book) -> None:
    desk = Desk(book, sessions_per_address=1)
    ips = [f"192.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(12_000)]
    assert {desk.admit(ip) for ip in ips} == {""}
    assert {desk.admit(ip) for ip in ips} == {"address-full"}
    for ip in ips:
        desk.limits.leave(ip)
    assert {desk.admit(ip) for ip in ips} == {""}


def test_workers_share_what_a_client_has(book: Book) -> None:
    shared = Shared(2, len(Counter))
    one = Desk(book, shared, 0, sessions_per_address=2, messages="2/m")
    two = Desk(book, shared, 1, sessions_per_address=2, messages="2/m")
    assert [desk.admit("192.0.2.1") for desk in (one, two, one, two)] == ["", "", "address-full", "address-full"]
    assert [desk.ask(Stage.MAIL, "192.0.2.1") for desk in (one, two, one)] == ["", "", "message-rate"]
    shared.clear(1)
    assert [desk.admit("192.0.2.1") for desk in (one, two)] == ["", "address-full"]


# On real servers


def inbound(**keys: object) -> str:
    lines = [f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}" for key, value in keys.items()]
    return "[inbound]\n" + "\n".join(lines).replace("'", '"') + "\n"


def connect(address: str, source: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), 60, source_address=(source, 0))


def secure(address: str, source: str) -> ssl.SSLSocket:
    return unverified().wrap_socket(connect(address, source), server_hostname="mx.here.test")


def greeting(connection: socket.socket) -> bytes:
    octets = b""
    while not octets.endswith(b"\n"):
        more = connection.recv(1000)
        if not more:
            break
        octets += more
    return octets


@contextmanager
def crowd(address: str, sources: list[str], each: int) -> Iterator[tuple[Tally[str], list[socket.socket]]]:
    """So many connections from each source, all at once; how many of each were let in, and what they are."""
    with ExitStack() as stack:
        places = [source for source in sources for _ in range(each)]
        with ThreadPoolExecutor(16) as pool:
            connections = list(pool.map(lambda source: connect(address, source), places))
        for connection in connections:
            stack.callback(connection.close)
        with ThreadPoolExecutor(16) as pool:
            heard = list(pool.map(greeting, connections))
        assert {line[:3] for line in heard} <= {b"220", b"421"}
        open_now = [connection for connection, line in zip(connections, heard, strict=True) if line[:3] == b"220"]
        yield Tally(source for source, line in zip(places, heard, strict=True) if line[:3] == b"220"), open_now


def test_fifty_addresses_get_what_they_may_from_two_workers(tmp_path: Path) -> None:
    tables = inbound(sessions_per_address=8, sessions_per_network=60)
    with running(tmp_path, toml(tmp_path, workers=2, tables=tables)) as server:
        with crowd(server.address, SOURCES, 10) as (let_in, connections):
            networks = Tally[str]()
            for source, count in let_in.items():
                assert count <= 8
                networks[source.rpartition(".")[0]] += count
            assert len(networks) == 5
            for count in networks.values():
                assert 60 - 2 <= count <= 60, "never more, and not fewer by more than the workers"
            for connection in connections:
                connection.sendall(b"NOOP\r\n")
                assert greeting(connection).startswith(b"250 ")
        server.wait_for("session", len(connections), end="eof")
        with crowd(server.address, SOURCES[:3], 10) as (let_in, _):
            assert all(8 - 2 <= let_in[source] <= 8 for source in SOURCES[:3]), let_in
        server.stop()
        lines = server.events("turned-away")
        assert len(lines) >= 3
        assert {line["reason"] for line in lines} <= {"address-full", "network-full"}
        assert {line["client"] for line in lines} <= set(SOURCES)
        assert len(lines) <= 2 * 2 * 50, "a line for each client, reason, worker and interval"


def test_what_a_killed_worker_held_is_given_back(tmp_path: Path) -> None:
    with (
        running(tmp_path, toml(tmp_path, workers=2, tables=inbound(sessions_per_address=10))) as server,
        crowd(server.address, SOURCES[:1], 20) as (let_in, connections),
    ):
        assert 8 <= let_in[SOURCES[0]] <= 10
        os.kill(server.workers()[0], signal.SIGKILL)
        died = server.wait_for("worker-died")[0]
        held = died["sessions"]
        server.wait(lambda: len(server.workers()) == 2, "a new worker")
        with crowd(server.address, SOURCES[:1], 20) as (again, _):
            assert held - 2 <= again[SOURCES[0]] <= held + 10 - len(connections)


def test_new_sessions_messages_and_recipients_over_workers(tmp_path: Path) -> None:
    tables = inbound(new_sessions="20/d", messages="9/d", recipients="15/d")
    domains = '[[domain]]\nname = "x.test"\nrecipients = ["a"]\ntransport = "boxes"\n'
    with running(tmp_path, toml(tmp_path, workers=2, tables=tables, domains=domains)) as server:
        replies = Tally[str]()
        let_in = 0
        for _ in range(30):
            with closing(connect(server.address, SOURCES[0])) as connection:
                if not greeting(connection).startswith(b"220 "):
                    continue
                let_in += 1
                connection.sendall(b"EHLO c.test\r\n")
                while not greeting(connection).splitlines()[-1].startswith(b"250 "):
                    pass
                for command in (b"MAIL FROM:<s@c.test>", b"RCPT TO:<a@x.test>", b"RCPT TO:<a@x.test>"):
                    connection.sendall(command + b"\r\n")
                    replies[f"{command[:4].decode()} {greeting(connection)[:9].decode()}"] += 1
        assert let_in == 20
        assert replies["MAIL 250 2.1.0"] == 9
        assert replies["MAIL 450 4.7.1"] == 11
        assert replies["RCPT 250 2.1.5"] == 15
        assert replies["RCPT 450 4.7.1"] == 3
        server.stop()
        lines = server.events("turned-away")
        assert sum(line["connections"] for line in lines) == 10
        assert {(line["client"], line["reason"]) for line in lines} == {(SOURCES[0], "session-rate")}


def test_failures_shut_a_guesser_out_and_nobody_else(tmp_path: Path) -> None:
    domains = '[[domain]]\nname = "x.test"\nrecipients = ["a"]\ntransport = "boxes"\n'
    with running(tmp_path, toml(tmp_path, tables=inbound(failures="5/d"), domains=domains)) as server:
        with Peer(server.address) as guesser:
            replies = guesser.envelope([f"guess{number}@x.test" for number in range(7)])
            assert [reply[:9] for reply in replies] == ["250 2.1.0"] + ["550 5.1.1"] * 5 + ["450 4.7.1"] * 2
            assert "(failure-rate)" in replies[-1]
        with closing(connect(server.address, "127.0.0.1")) as connection:
            assert greeting(connection) == (
                b"421 4.7.0 mx.here.test You were refused too often, try again later (failure-rate)\r\n"
            )
            assert connection.recv(1) == b""
        with closing(connect(server.address, SOURCES[0])) as connection:
            assert greeting(connection).startswith(b"220 ")


def test_trusted_networks_exceptions_and_local_programs_are_free(tmp_path: Path) -> None:
    listeners = f'[[listener]]\naddress = ["127.0.0.1:0", "unix:{tmp_path}/s"]\n'
    relay = '[relay]\nnetworks = ["127.2.0.0/16"]\ntransport = "boxes"\n'
    tables = inbound(sessions_per_address=1, new_sessions="2/d", exceptions=["127.3.0.1"]) + relay
    with running(tmp_path, toml(tmp_path, listeners=listeners, tables=tables)) as server:
        for source, expected in (("127.2.0.9", 5), ("127.3.0.1", 5), ("127.3.0.2", 1)):
            with crowd(server.address, [source], 5) as (let_in, _):
                assert let_in[source] == expected
        with ExitStack() as stack:
            for _ in range(5):
                assert stack.enter_context(Peer(server.addresses()[1])).greeting.startswith("220 ")


def test_exceptions_in_a_file_hold_from_its_next_version_on(tmp_path: Path) -> None:
    """Of two workers, without a reload; who held sessions when it became free takes nothing with it."""
    exceptions = tmp_path / "free"
    exceptions.write_text("127.3.0.1\n# an office\n127.4.0.0/16\n")
    tables = inbound(sessions_per_address=2) + 'exceptions = {file = "free"}\n'
    with running(tmp_path, toml(tmp_path, tables=tables, workers=2)) as server:
        for source, expected in (("127.3.0.1", 6), ("127.4.5.6", 6), ("127.3.0.2", 2)):
            with crowd(server.address, [source], 6) as (let_in, _):
                assert let_in[source] == expected

        def lets_in(source: str, expected: int) -> bool:
            with crowd(server.address, [source], 6) as (let_in, _):
                return let_in[source] == expected

        with crowd(server.address, ["127.5.0.1"], 3) as (before, _):
            assert before["127.5.0.1"] == 2
            exceptions.write_text("127.5.0.1\n")
            server.wait(lambda: lets_in("127.5.0.1", 6), "the new list")
            server.wait(lambda: lets_in("127.3.0.1", 2), "the old one to be gone")
        exceptions.write_text("127.6.0.1\n")
        server.wait(lambda: lets_in("127.5.0.1", 2), "nothing of what was held")
        exceptions.write_text("127.6.0.1/8\n")
        assert "bit" in server.wait_for("list-kept")[0]["why"]


def test_limits_can_hold_for_trusted_networks_too(tmp_path: Path) -> None:
    relay = '[relay]\nnetworks = ["127.2.0.0/16"]\ntransport = "boxes"\n'
    tables = inbound(sessions_per_address=1) + "limit_trusted = true\n" + relay
    with (
        running(tmp_path, toml(tmp_path, tables=tables)) as server,
        crowd(server.address, ["127.2.0.9"], 5) as (got, _),
    ):
        assert got["127.2.0.9"] == 1


def test_before_tls_a_client_over_its_limits_is_gone(tmp_path: Path) -> None:
    certificate = key = make_certificate(tmp_path, "mx.here.test")
    listeners = '[[listener]]\naddress = "127.0.0.1:0"\ntls = "implicit"\n'
    tables = f'[tls]\ncertificate = "{certificate}"\nkey = "{key}"\n' + inbound(sessions_per_address=1)
    with running(tmp_path, toml(tmp_path, listeners=listeners, tables=tables)) as server:
        with Peer(server.address, implicit_tls=True) as first:
            assert first.greeting.startswith("220 ")
            assert first.data(["a@x.test"], b"Subject: in TLS\r\n\r\nx\r\n").startswith("250 ")
            with closing(connect(server.address, "127.0.0.1")) as second:
                assert second.recv(100) == b"", "not a word in clear"
            with pytest.raises((ssl.SSLError, ConnectionError)):
                Peer(server.address, implicit_tls=True)
            with secure(server.address, SOURCES[0]) as another:
                assert greeting(another).startswith(b"220 ")
        server.wait_mail(1)
        server.wait_for("session", 2)
        with Peer(server.address, implicit_tls=True) as again:
            assert again.greeting.startswith("220 ")
        # A handshake that fails gives its place back.
        for _ in range(3):
            with closing(connect(server.address, SOURCES[1])) as junk:
                junk.sendall(b"EHLO in clear\r\n")
                while junk.recv(100):
                    pass
        server.wait_for("tls-failed", 3)
        with secure(server.address, SOURCES[1]) as another:
            assert greeting(another).startswith(b"220 ")


def test_handshakes_are_sessions(tmp_path: Path) -> None:
    """Who connects and never begins TLS takes the place of a session, as on other listeners, and gives it back."""
    certificate = make_certificate(tmp_path, "mx.here.test")
    listeners = '[[listener]]\naddress = "127.0.0.1:0"\ntls = "implicit"\n'
    tables = f'[tls]\ncertificate = "{certificate}"\nkey = "{certificate}"\n[limits]\nsessions = 2\n'
    with running(tmp_path, toml(tmp_path, listeners=listeners, tables=tables)) as server:
        with ExitStack() as stack:
            for number in range(3):
                last = stack.enter_context(closing(connect(server.address, SOURCES[number])))
            assert last.recv(1) == b""
        server.wait(lambda: _is_let_in(server.address), "the places of the first two")


def _is_let_in(address: str) -> bool:
    try:
        with Peer(address, implicit_tls=True):
            return True
    except (OSError, GoneError):
        return False


def test_lmtp_is_not_limited(tmp_path: Path) -> None:
    listeners = '[[listener]]\naddress = "127.0.0.1:0"\nrole = "lmtp"\n'
    with (
        running(tmp_path, toml(tmp_path, listeners=listeners, tables=inbound(sessions_per_address=1))) as server,
        crowd(server.address, SOURCES[:1], 5) as (let_in, _),
    ):
        assert let_in[SOURCES[0]] == 5


def test_limits_of_a_running_server_are_replaced(tmp_path: Path) -> None:
    """Who was counted by the old ones is still counted by the new."""
    with running(tmp_path, toml(tmp_path, tables=inbound(sessions_per_address=2))) as server:
        with crowd(server.address, SOURCES[:1], 3) as (let_in, _):
            assert let_in[SOURCES[0]] == 2
            (tmp_path / "fastsmtp.toml").write_text(toml(tmp_path, tables=inbound(sessions_per_address=4)))
            os.kill(server.pid, signal.SIGHUP)
            server.wait_for("reloaded")
            with crowd(server.address, SOURCES[:1], 3) as (more, _):
                assert more[SOURCES[0]] == 2
        deadline = time.monotonic() + 30
        while True:
            with crowd(server.address, SOURCES[:1], 6) as (again, _):
                if again[SOURCES[0]] == 4:
                    break
            assert time.monotonic() < deadline, again
