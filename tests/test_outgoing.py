"""Ways out: what a configuration makes of transports and routes, and a whole server that sends mail on to another."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest
from nameserver import nameserver
from needs import needs_root, public_folder
from peer import Peer
from servers import LISTENER, Server, mailbox, running, toml
from test_serve import make_certificate

from fastsmtp.address import parse_address
from fastsmtp.config import Config, parse
from fastsmtp.delivery.client_tls import Tls
from fastsmtp.delivery.offers import Offers
from fastsmtp.delivery.smtp import Smtp
from fastsmtp.log import Log
from fastsmtp.outgoing import Ways, read_offers
from fastsmtp.seat import Settings

T = TypeVar("T")
LETTER = b"Subject: x\r\n\r\nfar away\r\n"


def with_ways(text: str, look: Callable[[Ways], Awaitable[T]]) -> T:
    """What is seen of the ways that a configuration makes; nothing is connected."""

    async def run() -> T:
        config: Config = parse(text, Path("/srv"), "f.toml")
        asks, theirs = socket.socketpair()
        log_fd = os.memfd_create("log")
        log = Log(log_fd, human=False, clock=lambda: 0.0, threaded=False)
        settings = Settings(config, {"provider": "secret"})
        ways = Ways(settings, 0, log, "test", asks)
        ways.build()
        try:
            return await look(ways)
        finally:
            for part in ways.parts():
                await part.close()
            log.close()
            os.close(log_fd)
            asks.close()
            theirs.close()

    return asyncio.run(run())


NET = '[transport.net]\ntype = "smtp"\n'
PROVIDER = '[transport.provider]\ntype = "smtp"\nsmarthost = "h.test:587"\nuser = "me"\npassword_file = "p"\n'
BOXES = '[transport.boxes]\ntype = "discard"\n[[domain]]\nname = "here.test"\nrecipients = "any"\ntransport = "boxes"\n'


def route(domain: str, *lines: str, to: str = "net") -> str:
    return "\n".join([f'[[route]]\ndomain = "{domain}"\ntransport = "{to}"', *lines, ""])


def test_routes_that_say_the_same_share_a_transport() -> None:
    text = (
        NET
        + route("a.test", 'tls = "verified"')
        + route("b.test", 'tls = "verified"')
        + route("c.test", 'tls = "verified"', "concurrency = 5")
        + route("d.test", "concurrency = 5")
        + route("e.test")
        + route("f.test", 'ignore = ["CHUNKING"]')
        + route("g.test", 'tls_minimum = "1.3"')
        + route("*.g.test", 'tls = "opportunistic"')
        + '[relay]\ntransport = "net"\n[queue]\nconcurrency = 7\n'
    )

    async def look(ways: Ways) -> dict[str, tuple[str, Tls, int]]:
        found = {}
        for name in "abcdefgz":
            way = ways.route(parse_address(f"u@{name}.test"))[0]
            transport = ways.transports[way]
            assert isinstance(transport, Smtp)
            manner = transport._manner
            mode = "verified" if manner.verified else "opportunistic" if manner.opportunistic else ""
            version = {771: "1.2", 772: "1.3"}[manner.context.minimum_version] if manner.context else ""
            found[name] = (way, Tls(mode, version, manner.terms.ignore), transport.concurrency)  # type: ignore[arg-type]
        assert ways.route(parse_address("u@x.g.test"))[0] == "net/*.g.test", "said, though it is the same"
        return found

    plain, verified = Tls("opportunistic"), Tls("verified")
    assert with_ways(text, look) == {
        "a": ("net/a.test", verified, 7),
        "b": ("net/a.test", verified, 7),
        "c": ("net/c.test", verified, 5),
        "d": ("net/d.test", plain, 5),
        "e": ("net", plain, 7),
        "f": ("net/f.test", Tls("opportunistic", ignore=frozenset({"CHUNKING"})), 7),
        "g": ("net/g.test", Tls("opportunistic", "1.3"), 7),
        "z": ("net", plain, 7),
    }


def test_a_login_has_its_password_and_verified_tls() -> None:
    async def look(ways: Ways) -> tuple[object, ...]:
        transport = ways.transports["provider"]
        assert isinstance(transport, Smtp)
        credentials = transport._manner.terms.credentials
        assert credentials is not None
        assert "secret" not in repr(credentials)
        return credentials.user, credentials.secret, credentials.mechanisms, transport._manner.verified

    assert with_ways(PROVIDER, look) == ("me", "secret", ("SCRAM-SHA-256", "PLAIN", "LOGIN"), True)
    token = with_ways(f'{PROVIDER}auth = "xoauth2"\ntls = "implicit"', look)
    assert token == ("me", "secret", ("XOAUTH2",), True)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", "all"),
        (BOXES, "all"),
        (f'{PROVIDER}[relay]\ntransport = "provider"', "all"),
        (f'{NET}[relay]\ntransport = "net"', "strangers"),
        (f'{NET}tls = "verified"\n[relay]\ntransport = "net"', "strangers"),  # by whose MX?
        (f'{PROVIDER}{NET}[relay]\ntransport = "provider"\n{route("*")}', "strangers"),
        (f'{NET}smarthost = "h:25"\n[relay]\ntransport = "net"', "strangers"),
        (f'{NET}smarthost = "h:25"\ntls = "verified"\n[relay]\ntransport = "net"', "all"),
        (f'{NET}smarthost = "h:25"\ntls = "verified"\n' + route("a.test", 'tls = "off"'), "strangers"),
        (BOXES.replace('"discard"', '"lmtp"\naddress = "unix:/x"'), "all"),
        (BOXES.replace('"discard"', '"lmtp"\naddress = "[::1]:24"'), "all"),
        (BOXES.replace('"discard"', '"lmtp"\naddress = "boxes.test:24"'), "nobody"),
        (BOXES.replace('"discard"', '"smtp"'), "nobody"),
    ],
)  # fmt: skip
def test_for_whom_requiretls_can_be_kept(text: str, kept: str) -> None:
    async def look(ways: Ways) -> str:
        return ways.keeps_tls

    assert with_ways(text, look) == kept


@pytest.mark.parametrize(
    ("text", "demanded"),
    [
        (NET, False),
        (NET + 'tls = "required"\n', True),
        (NET + route("a.test", 'tls = "verified"'), True),
        (NET + route("a.test", 'tls = "off"'), False),
        (PROVIDER, False),
        (BOXES.replace('"discard"', '"lmtp"\naddress = "unix:/x"'), False),
    ],
)
def test_whether_a_sender_can_waive_anything(text: str, demanded: bool) -> None:
    async def look(ways: Ways) -> bool:
        return ways.demands_tls

    assert with_ways(text, look) is demanded


def test_what_a_next_host_takes_is_known_once_it_was_heard() -> None:
    async def look(ways: Ways) -> None:
        row = ways.domains.find("here.test")
        transport = ways.transports["boxes"]
        assert row is not None
        assert row.hop is not None
        assert isinstance(transport, Smtp)
        assert row.hop() is None
        transport.heard = Offers({"SIZE": "1000", "8BITMIME": ""})
        hop = row.hop()
        assert hop is not None
        assert (hop.size, hop.eight_bit, hop.utf8) == (1000, True, False)
        assert row.hop() is hop
        transport.heard = Offers({"SMTPUTF8": ""})
        hop = row.hop()
        assert hop is not None
        assert (hop.size, hop.eight_bit, hop.utf8) == (0, True, True)

    with_ways(BOXES.replace('"discard"', '"lmtp"\naddress = "unix:/x"'), look)
    assert not read_offers(Offers({}), bounces=True).eight_bit


@pytest.mark.parametrize("kind", ['"discard"', '"smtp"'])
def test_what_takes_all_or_goes_to_many_has_no_next_host(kind: str) -> None:
    async def look(ways: Ways) -> object:
        row = ways.domains.find("here.test")
        assert row is not None
        return row.hop

    assert with_ways(BOXES.replace('"discard"', kind), look) is None


# Whole servers: `far` has the mailboxes, `near` sends them their mail


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("far")
    make_certificate(folder)
    listeners = f"""\
[[listener]]
address = "127.0.0.1:0"
[[listener]]
address = "unix:{folder}/lmtp"
role = "lmtp"
"""
    domains = """\
[[domain]]
name = "*"
recipients = ["ann", "bob"]
transport = "boxes"
"""
    tables = '[tls]\ncertificate = "cert.pem"\nkey = "key.pem"\n[limits]\nmessage_size = "20KB"\n'
    with running(folder, toml(folder, listeners=listeners, domains=domains, tables=tables)) as server:
        yield server


HERE = '[[domain]]\nname = "here.test"\nrecipients = ["sam"]\ntransport = "boxes"\n'


@pytest.fixture(scope="module")
def near(far: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("near")
    host, lmtp = far.addresses()
    domains = HERE + '[[domain]]\nname = "behind.test"\nrecipients = "any"\ntransport = "dovecot"\n'
    tables = f"""\
[relay]
networks = ["127.0.0.1"]
transport = "out"
[[route]]
domain = "*.clear.test"
transport = "out"
tls = "off"
[transport.out]
type = "smtp"
smarthost = "{host}"
tls = "required"
[transport.dovecot]
type = "lmtp"
address = "{lmtp}"
"""
    listeners = LISTENER + LISTENER + 'role = "lmtp"\n'
    with running(folder, toml(folder, listeners=listeners, domains=domains, tables=tables)) as server:
        yield server


def test_nobody_relays_by_lmtp(near: Server) -> None:
    with Peer(near.addresses()[1], "LHLO client.test") as peer:
        assert [reply[:9] for reply in peer.envelope(["ann@one.test", "sam@here.test"])] == [
            "250 2.1.0", "550 5.7.1", "250 2.1.5",
        ]  # fmt: skip


def test_a_trusted_network_relays_and_nobody_else(near: Server, far: Server) -> None:
    with Peer(near.address) as peer:
        assert "250-DSN" in peer.hello.split("\n")
        assert peer.data(["ann@one.test", "bob@two.clear.test"], LETTER, sender="sam@here.test").startswith("250 ")
    for domain, local, tls in (("one.test", "ann", True), ("two.clear.test", "bob", False)):
        far.wait(lambda: mailbox(far.mail, domain, local), f"{local}@{domain}")  # noqa: B023
        (mail,) = mailbox(far.mail, domain, local)
        assert mail.body.endswith(b"Subject: x\n\nfar away\n")
        assert mail.sender == "sam@here.test"
        assert mail.protocol == ("ESMTPS" if tls else "ESMTP"), "the route says how"
    host, _, port = near.address.rpartition(":")
    with socket.create_connection((host, int(port)), 60, ("127.0.0.2", 0)) as stranger:
        stranger.sendall(b"HELO client.test\r\n")
        said = b""
        while said.count(b"\r\n") < 2:
            said += stranger.recv(4096)
        stranger.sendall(b"MAIL FROM:<sam@here.test>\r\nRCPT TO:<ann@one.test>\r\nRCPT TO:<sam@here.test>\r\nQUIT\r\n")
        while b"\r\n221" not in said:
            said += stranger.recv(4096)
    assert [line[:9] for line in said.split(b"\r\n")[2:5]] == [b"250 2.1.0", b"550 5.7.1", b"250 2.1.5"]


def test_lmtp_and_what_the_host_behind_it_cannot_take(near: Server, far: Server) -> None:
    with Peer(near.address) as peer:
        assert peer.data(["ann@behind.test"], LETTER).startswith("250 ")
        far.wait(lambda: mailbox(far.mail, "behind.test", "ann"), "the first message")
        (mail,) = mailbox(far.mail, "behind.test", "ann")
        assert mail.protocol == "LMTP"
        near.wait_for("relayed", to="ann@behind.test")
        # Now it is known how much is taken there: 20 KB.
        replies = peer.envelope(["bob@behind.test", "sam@here.test"], parameters=" SIZE=30000")
        assert [reply[:9] for reply in replies] == ["250 2.1.0", "552 5.3.4", "250 2.1.5"]
        peer.ask("RSET")
        assert peer.data(["bob@behind.test"], b"x" * 900 + b"\r\n" + LETTER * 1000).startswith("552 5.3.4")
        assert peer.data(["sam@here.test"], b"x" * 900 + b"\r\n" + LETTER * 1000).startswith("250 ")


def test_what_fails_far_away_comes_back_as_a_report(near: Server) -> None:
    with Peer(near.address) as peer:
        recipients = ["nobody@behind.test", "nobody@else.test"]
        assert peer.data(recipients, LETTER, sender="sam@here.test").startswith("250 ")
    texts = told(near, 2)
    for recipient in recipients:
        assert b"Final-Recipient: rfc822; " + recipient.encode() in texts
    assert texts.count(b"Action: failed") == 2
    assert texts.count(b"Status: 5.1.1") == 2
    assert b"auto-replied" in texts


def told(near: Server, n: int) -> bytes:
    """What Sam was told, once it is about so many recipients. A report has no Received field: it was made here."""

    def read() -> bytes:
        found = [path.read_bytes() for path in (near.mail / "here.test" / "sam" / "new").glob("*")]
        return b"".join(octets for octets in found if octets.startswith(b"Return-Path: <>\n"))

    near.wait(lambda: read().count(b"Action: failed") >= n, f"reports about {n} recipients")
    return read()


def test_by_mx_with_our_own_name_servers(far: Server, tmp_path: Path) -> None:
    needs_root()  # for port 25
    host = "127.25.25.25"
    with ExitStack() as stack:
        zone = f"partner IN MX 10 mx\nmx IN A {host}\nown IN MX 10 mx.here\nown IN MX 20 mx\n"
        dns = stack.enter_context(nameserver(tmp_path / "dns", zone))
        (tmp_path / "mx").mkdir()
        (tmp_path / "near").mkdir()
        listener = f'[[listener]]\naddress = "{host}:25"\n'
        mx = stack.enter_context(running(tmp_path / "mx", toml(tmp_path / "mx", listeners=listener)))
        tables = f"""\
[relay]
networks = ["127.0.0.1"]
transport = "internet"
[transport.internet]
type = "smtp"
[dns]
servers = ["{dns}"]
allow_loopback = true
"""
        near = stack.enter_context(running(tmp_path / "near", toml(tmp_path / "near", domains=HERE, tables=tables)))
        with Peer(near.address) as peer:
            recipients = ["ann@partner.test", "ann@missing.test", "ann@own.test"]
            assert peer.data(recipients, LETTER, sender="sam@here.test").startswith("250 ")
        mx.wait(lambda: mailbox(mx.mail, "partner.test", "ann"), "the message at the MX")
        texts = told(near, 2)
        assert b"Status: 5.1.2" in texts, "no such domain"
        assert b"Status: 5.4.6" in texts, "its best mail host is this server"


@pytest.fixture
def public() -> Iterator[Path]:
    with public_folder("outgoing") as folder:
        yield folder


def test_pipe_through_the_runner(public: Path) -> None:
    out = public / "out"
    out.mkdir()
    out.chmod(0o777)
    user = 'user = "nobody"\n' if os.geteuid() == 0 else ""
    command = json.dumps(["/usr/bin/tee", f"{out}/{{local}}"])
    tables = f'[transport.program]\ntype = "pipe"\ncommand = {command}\nfields = true\n{user}'
    domains = '[[domain]]\nname = "here.test"\nrecipients = "any"\ntransport = "program"\n'
    with running(public, toml(public, domains=domains, tables=tables)) as server:
        with Peer(server.address) as peer:
            assert peer.data(["a/b@here.test"], LETTER).startswith("250 ")
        server.wait_for("delivered", to="a/b@here.test")
        (written,) = out.iterdir()
        text = written.read_bytes()
        assert text.startswith(b"Return-Path: <s@client.test>\nDelivered-To: a/b@here.test\nReceived: ")
        assert text.endswith(b"Subject: x\n\nfar away\n")
        if os.geteuid() == 0:
            assert written.owner() == "nobody"
        # The process that runs commands is looked after like a worker.
        (runner,) = [pid for pid in server.workers() if b"runner.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(runner, signal.SIGKILL)
        server.wait_for("runner-died", why="SIGKILL")
        with Peer(server.address) as peer:
            assert peer.data(["again@here.test"], LETTER).startswith("250 ")
        server.wait_for("delivered", to="again@here.test")
        assert server.stop() == 0


def test_a_password_is_read_before_privileges_are_dropped(public: Path) -> None:
    needs_root()
    secret = public / "secret"
    secret.write_text("password\n")
    secret.chmod(0o600)
    (public / "mail").mkdir(mode=0o777)
    (public / "mail").chmod(0o777)
    tables = """\
[transport.provider]
type = "smtp"
smarthost = "127.0.0.1:9"
user = "me"
password_file = "secret"
"""
    configuration = toml(public, top='user = "nobody"', tables=tables)
    with running(public, configuration) as server:
        assert os.stat(f"/proc/{server.workers()[0]}").st_uid != 0
        assert server.stop() == 0
    secret.write_text("\n")
    server = Server(public, configuration)
    server.launch()
    assert server.ended() == 1
    assert server.errors() == f"fastsmtp: transport.provider: {secret} is empty\n"
