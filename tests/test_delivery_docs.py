"""docs/delivery.md, tried as a new user would: its configuration serves, its commands are run, what they print is true.

Each section is a test, in the order of the document, with one server for all of them: Dovecot holds the mailboxes, NSD
the zones, sinks and Postfix are the hosts of others. A block ```toml``` is part of a configuration, ```console``` are
commands with what they print. In what is printed `...` stands for any lines; ids, times and sizes may be others.
What differs from the document stands in `Site.replace`, and nowhere else: paths, ports, users, name servers.
"""

from __future__ import annotations

import email
import email.policy
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from email.message import EmailMessage
from pathlib import Path

import pytest
from documents import ID, Document, Section, commands, install, pattern, serve
from dovecot import DOMAIN, Dovecot, dovecot
from nameserver import nameserver
from needs import SYSTEM_PATH, needs, needs_root, public_folder
from peer import Peer
from postfix import postfix
from sending import make_certificate
from servers import ROOT, Server
from test_odmr import Home

from fastsmtp import log as logs
from fastsmtp.config import parse
from loadtest.sink_server import SinkProcess

DOCUMENT = Document("delivery.md")
MAIN = DOCUMENT.sections["The server"][0].text
ZONE = """\
partner IN MX 10 mx.partner
mx.partner IN A 127.0.0.2
down IN MX 10 mx.down
mx.down IN A 127.0.0.3
smtp.provider IN A 127.0.0.1
"""
STRANGER = "127.0.0.9"
PROVIDER = "smtp.provider.example"
CONFIG = "/etc/fastsmtp/fastsmtp.toml"


class Site:
    """The machine of the document."""

    def __init__(self, folder: Path, mailboxes: Dovecot, dns: str) -> None:
        self.folder = folder
        self.mailboxes = mailboxes
        self.dns = dns
        self.server = Server(folder, "")
        self.provider = 587  # its port
        self.id = ""  # of the message that is spoken of
        install(folder)

    def replace(self, text: str, stranger: bool = False) -> str:
        """What stands in the document, for this machine."""
        host, _, port = self.server.address.rpartition(":") if self.server.lines() else ("", "", "")
        source = f" --local-interface {STRANGER}" if stranger else ""
        replaced = {  # one after the other
            "--server mx1.example.org": f"--server {host} --port {port}{source}",
            "[192.0.2.7]": "[127.0.0.1]",
            "desk.example.org": "client.test",
            "example.org": DOMAIN,
            "/etc/fastsmtp/": f"{self.folder}/",
            "/var/lib/fastsmtp": f"{self.folder}/data",
            "/run/dovecot/lmtp": str(self.mailboxes.socket),
            "/etc/ssl/mx1.pem": f"{self.folder}/mx1.{DOMAIN}.pem",
            "/etc/ssl/mx1.key": f"{self.folder}/mx1.{DOMAIN}.pem",
            "/usr/sbin/sendmail": f"{self.folder}/bin/sendmail",
            "/usr/local/bin/ticket": f"{self.folder}/bin/ticket",
            'user       = "fastsmtp"': 'user = "nobody"\nworkers = 1',  # one knows why a destination is dead
            "user = fastsmtp": "user = nobody",
            '"tickets"\ntimeout': '"daemon"\ntimeout',
            '["0.0.0.0:25", "[::]:25"]': '"127.0.0.1:0"',
            "0.0.0.0:366": "127.0.0.1:0",
            "198.51.100.25": "127.0.0.1",
            "127.0.0.0/8": "127.0.0.1/32",  # so that this machine has strangers
            f"{PROVIDER}:587": f"{PROVIDER}:{self.provider}",
        }
        for old, new in replaced.items():
            text = text.replace(old, new)
        return text

    def serve(self, configuration: str) -> None:
        serve(self.server, self.replace(configuration), self.dns)

    def run(self, console: str, stranger: bool = False) -> None:
        """Runs commands, each of which must print what stands below it."""
        for command, expected in commands(console):
            done = subprocess.run(
                ["sh", "-c", re.sub(ID, self.id, self.replace(command, stranger))],
                cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert re.fullmatch(pattern(self.replace(expected)), done.stdout), f"{command}\n{done.stdout}"
            assert (done.returncode != 0) == ("<** 5" in expected), command

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.folder}/bin:{SYSTEM_PATH}",
            "FASTSMTP_CONFIG": f"{self.folder}/fastsmtp.toml",
            "TZ": "UTC",
        }


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    needs_root()
    needs("swaks", "dovecot", "nsd", "postfix")
    with ExitStack() as stack:
        folder = stack.enter_context(public_folder("docs"))
        quotas = {"ann": "", "bob": "1", "carol": "1"}
        mailboxes = stack.enter_context(dovecot(quotas, passwords={"me": "secret"}))
        dns = stack.enter_context(nameserver(folder / "dns", {"example": ZONE}))
        made = [make_certificate(folder, name) for name in (f"mx1.{DOMAIN}", "mx.partner.example", PROVIDER)]
        trusted = folder / "trusted.pem"  # stands for the certificates of the system
        trusted.write_bytes(b"".join(path.read_bytes() for path in made))
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("SSL_CERT_FILE", str(trusted))
        site = Site(folder, mailboxes, dns)
        stack.callback(site.server.kill)
        site.serve(MAIN)
        yield site
        site.server.check_bugs()


@DOCUMENT.tries("The server")
def test_the_server(site: Site, section: Section) -> None:
    assert section.take("toml") == MAIN
    config = site.folder / "dovecot.conf"
    config.write_text(site.replace(section.take("")))
    said = subprocess.run(
        ["doveconf", "-n", "-c", str(config)], env={"PATH": SYSTEM_PATH}, capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"^protocols = .*\blmtp\b", said, re.MULTILINE)
    assert "unix_listener lmtp {\n    mode = 0600\n    user = nobody\n" in said
    site.run(section.take("console"))
    assert section.take("console") == f"# fastsmtp serve --config {CONFIG}\n"
    (start,) = site.server.events("start")
    assert start["hostname"] == f"mx1.{DOMAIN}"


@DOCUMENT.tries("The first message")
def test_the_first_message(site: Site, section: Section) -> None:
    site.run(section.take("console"), stranger=True)
    site.server.wait(lambda: site.mailboxes.mails("ann"), "the message in Dovecot")
    assert len(site.server.wait_for("refused", 2)) == 2


@DOCUMENT.tries("What fails late")
def test_what_fails_late(site: Site, section: Section) -> None:
    before = len(site.mailboxes.mails("ann"))
    site.run(section.take("console"))
    site.server.wait(lambda: len(site.mailboxes.mails("ann")) > before, "the report in Dovecot")
    (reported,) = site.server.wait_for("reported")
    assert len(reported["recipients"]) == 2
    assert len(site.mailboxes.mails("ann")) == before + 1
    (octets,) = [mail for mail in site.mailboxes.mails("ann") if b"\nFrom: Mail Delivery System" in mail]
    report = email.message_from_bytes(octets, policy=email.policy.default)
    text, fields, header = report.iter_parts()
    assert isinstance(text, EmailMessage)
    said = text.get_content()
    assert re.fullmatch(pattern(site.replace(section.take("text"))), said), said
    assert fields.get_content_type() == "message/delivery-status"
    assert header.get_content_type() == "text/rfc822-headers"


@DOCUMENT.tries("Mail to the Internet")
def test_mail_to_the_internet(site: Site, section: Section) -> None:
    certificate = site.folder / "mx.partner.example.pem"
    options = ["--tls", "starttls", "--certificate", str(certificate)]
    with SinkProcess(*options, address="127.0.0.2:25") as partner:
        site.run(section.take("console"))
        site.server.wait_for("relayed", host="mx.partner.example")
        site.serve(MAIN + section.take("toml"))
        send(site, "eve@partner.example")
        site.server.wait_for("relayed", 2, host="mx.partner.example")
    assert (partner.counts["messages"], partner.counts["tls"]) == (2, 2)
    certificate.write_bytes((site.folder / f"{PROVIDER}.pem").read_bytes())  # another's
    with SinkProcess(*options, address="127.0.0.2:25") as partner:
        message_id = send(site, "eve@partner.example")
        (line,) = site.server.wait_for("deferred", id=message_id)
        assert line["status"] == "4.7.5"
    assert partner.counts["messages"] == 0
    site.id = message_id
    site.run(f"# fastsmtp queue delete --yes {message_id}\n1 message deleted.\n")

    certificate = site.folder / f"{PROVIDER}.pem"
    with postfix(certificate=(certificate, certificate), tls="encrypt", auth=site.mailboxes.auth) as provider:
        site.provider = provider.port
        password = site.folder / "provider.password"
        password.write_text("secret\n")
        password.chmod(0o600)
        site.serve(MAIN[: MAIN.index("[transport.internet]")] + section.take("toml"))
        send(site, "eve@postfix.test")
        (mail,) = provider.wait_mails("eve", 1)
        assert b"with ESMTPSA" in mail
    site.serve(MAIN)


@DOCUMENT.tries("Mail that waits")
def test_what_are_said_to_be_the_defaults_are_they(site: Site, section: Section) -> None:
    text = MAIN + section.take("toml")
    assert parse(text, Path("/"), "f").queue == parse(MAIN, Path("/"), "f").queue


@DOCUMENT.tries("In the night")
def test_in_the_night(site: Site, section: Section) -> None:
    octets = b"Subject: minutes\r\nFrom: Ann <ann@dovecot.test>\r\n\r\nHi\r\n"
    first = send(site, "dan@down.example", octets)
    site.server.wait_for("deferred", id=first)
    second = send(site, "eve@down.example", octets)
    site.server.wait_for("deferred", id=second)
    site.id = first
    for _ in range(6):  # up to the release
        site.run(section.take("console"))
    site.server.wait(lambda: len(site.server.events("deferred", id=second)) >= 2, "another attempt")
    with SinkProcess(address="127.0.0.3:25") as partner:
        site.run(section.take("console"))
        site.server.wait_for("relayed", host="mx.down.example")
    assert partner.counts["messages"] == 1


@DOCUMENT.tries("Mail from this machine")
def test_mail_from_this_machine(site: Site, section: Section) -> None:
    before = len(site.mailboxes.mails("ann"))
    site.run(section.take("console"))
    site.server.wait(lambda: len(site.mailboxes.mails("ann")) > before, "the message in Dovecot")
    (mail,) = [mail for mail in site.mailboxes.mails("ann") if b"Subject: backup done" in mail]
    assert b"(local, uid 0)" in mail
    assert (site.folder / "data").stat().st_mode & 0o777 == 0o711
    assert (site.folder / "data/spool").stat().st_mode & 0o077 == 0


@DOCUMENT.tries("Mail for a program")
def test_mail_for_a_program(site: Site, section: Section) -> None:
    tickets = site.folder / "tickets"
    tickets.mkdir()
    tickets.chmod(0o777)
    program = site.folder / "bin" / "ticket"
    program.write_text(f'#!/bin/sh\ncat >{tickets}/new && mv {tickets}/new "{tickets}/$2"\n')
    program.chmod(0o755)
    site.serve(MAIN + section.take("toml"))
    send(site, f"door/7@tickets.{DOMAIN}")
    site.server.wait_for("delivered", transport="tickets")
    assert (tickets / "door_7").read_bytes().endswith(b"\n\nHi\n")


@DOCUMENT.tries("Mail that is fetched")
def test_mail_that_is_fetched(site: Site, section: Section) -> None:
    site.serve(MAIN + section.take("toml"))
    message_id = send(site, "dan@customer.example")
    site.server.wait_for("deferred", id=message_id)
    dialogue = [line.split(": ", 1) for line in site.replace(section.take("smtp")).splitlines()]
    with Peer(site.server.addresses()[1], hello="") as peer:
        peer.reply()
        for (who, command), (whose, reply) in zip(dialogue[::2], dialogue[1::2], strict=True):
            assert (who, whose) == ("C", "S")
            assert peer.ask(command).split("\n")[0] == reply
        home = Home(peer)
        assert home.serve() == "quit"
    assert [taken.recipients for taken in home.taken] == [["dan@customer.example"]]
    site.server.wait_for("relayed", id=message_id)


def send(site: Site, recipient: str, octets: bytes = b"Subject: x\r\n\r\nHi\r\n") -> str:
    """The id of a message from Ann."""
    with Peer(site.server.address) as peer:
        reply = peer.data([recipient], octets, sender=f"ann@{DOMAIN}")
    assert reply.startswith("250 "), reply
    return reply.split()[-1]


def test_every_block_is_tried() -> None:
    DOCUMENT.check_all_tried()


@pytest.mark.parametrize("event", re.findall(r"^\| `([a-z-]+)` \|", DOCUMENT.text, re.MULTILINE))
def test_the_events_are_logged(event: str) -> None:
    assert event in {each.name for each in vars(logs).values() if isinstance(each, logs.Event)}


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", DOCUMENT.text))
def test_the_links_lead_somewhere(link: str) -> None:
    assert (ROOT / "docs" / link).is_file()
