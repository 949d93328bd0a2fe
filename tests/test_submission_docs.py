"""docs/submission.md, tried as a new user would: its configuration serves, its commands print what it says.

Each section is a test, in the order of the document, with one server for all of them. A block ```toml``` is part of the
configuration, ```console``` are commands with what they print; the others are files, records, and what mail programs
fetch. In what is printed `...` stands for any lines; ids, times and sizes may be others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import dns.message
import dns.query
import pytest
from documents import ID, Section, commands, pattern
from nameserver import nameserver
from needs import needs
from servers import mailbox
from submission_site import CONFIG, DOCUMENT, HOST, MAIN, PASSWORD, Site, site

from fastsmtp import config, reply
from fastsmtp.config import parse


@pytest.fixture(scope="module", name="site")
def place() -> Iterator[Site]:
    needs("swaks", "curl", "openssl", "nmap", "msmtp")
    with site() as found:
        yield found


def run(place: Site, console: str, source: str = "") -> None:
    """Runs commands, each of which must print what stands below it; `source` is where nmap comes from."""
    for command, expected in commands(console):
        typed = [PASSWORD] * expected.count(":\n") if "fastsmtp user" in command else []
        command = re.sub(ID, "", place.replace(command))
        if source:
            command = command.replace("nmap ", f"nmap -n -Pn -e lo -S {source} ")
        said, code = place.shell(command, typed)
        if typed:
            said = said.replace(": \n", ":\n")
        assert re.fullmatch(pattern(place.replace(expected)), said), f"{command}\n{said}"
        assert (code != 0) == bool(re.search(r"^(<[*~]\* |\*\*\*)", expected.replace("<~*", "<** "), re.MULTILINE)), (
            command
        )


def relayed(place: Site, n: int) -> None:
    place.server.wait(lambda: len(place.server.events("relayed")) >= n, f"{n} messages at the partner's")


@DOCUMENT.tries("The certificate")
def test_the_certificate(place: Site, section: Section) -> None:
    run(place, section.take("console"))


@DOCUMENT.tries("The server")
def test_the_server(place: Site, section: Section) -> None:
    configured = parse(section.take("toml"), Path("/"), "f")
    ports = {str(address).rpartition(":")[2]: row for row in configured.listener for address in row.address}
    assert {port: (row.role, row.tls) for port, row in ports.items()} == {
        "25": ("mx", "starttls"),
        "587": ("submission", "starttls"),
        "465": ("submission", "implicit"),
    }


@DOCUMENT.tries("The users")
def test_the_users(place: Site, section: Section) -> None:
    for _ in range(3):
        run(place, section.take("console"))


@DOCUMENT.tries("The first message")
def test_the_first_message(place: Site, section: Section) -> None:
    needs("systemd-analyze")
    unit = place.folder / "fastsmtp.service"
    unit.write_text(section.take("ini").replace("/usr/local/bin", f"{place.folder}/bin"))
    assert place.shell(f"systemd-analyze --recursive-errors=no verify {unit}") == ("", 0)
    run(place, section.take("console"))
    place.serve(MAIN)
    run(place, section.take("console"))
    run(place, section.take("console"))
    relayed(place, 2)
    run(place, section.take("console"))
    assert {line["host"] for line in place.server.events("relayed")} == {"mx.partner.example"}


@DOCUMENT.tries("Who may not")
def test_who_may_not(place: Site, section: Section) -> None:
    before = len(place.server.events("accepted"))
    for _ in range(3):
        run(place, section.take("console"), place.stranger)
    assert len(place.server.events("accepted")) == before
    refused = place.server.wait_for("refused", reason="relaying-denied")
    assert {line["client"] for line in refused} == {place.stranger}


@DOCUMENT.tries("What is done to a message")
def test_what_are_said_to_be_the_defaults_are_they(place: Site, section: Section) -> None:
    assert parse(section.take("toml"), Path("/"), "f").submission == config.Submission()


def outgoing(kind: Literal["xml", "zone"], place: Site, text: str) -> list[tuple[str, int]]:
    """Host and port of each place where mail programs are told to send, in their order."""
    if kind == "xml":
        servers = ElementTree.fromstring(text).iter("outgoingServer")
        return [(str(server.findtext("hostname")), int(server.findtext("port") or 0)) for server in servers]
    found = []
    with nameserver(place.folder / "srv", {"example.org": text}) as server:
        ip, _, port = server.rpartition(":")
        for name in ("_submissions._tcp.example.org", "_submission._tcp.example.org"):
            response = dns.query.udp(dns.message.make_query(name, "SRV"), ip, timeout=10, port=int(port))
            (record,) = response.answer[0]
            found.append((record.priority, record.target.to_text(omit_final_dot=True), record.port))
    return [(host, port) for _, host, port in sorted(found)]


@DOCUMENT.tries("Mail programs")
def test_mail_programs(place: Site, section: Section) -> None:
    (place.folder / ".msmtprc").write_text(place.replace(section.take("text")))
    (place.folder / ".msmtprc").chmod(0o600)
    (place.folder / ".password").write_text(f"{PASSWORD}\n")
    with (place.folder / ".msmtprc").open("a") as file:
        file.write(f"tls_trust_file {place.authority}\n")  # msmtp knows those of the system only
    before = len(place.server.events("relayed"))
    run(place, section.take("console"))
    relayed(place, before + 1)
    for kind in ("zone", "xml"):
        assert outgoing(kind, place, section.take(kind)) == [(HOST, 465), (HOST, 587)]


@DOCUMENT.tries("Machines without passwords")
def test_machines_without_passwords(place: Site, section: Section) -> None:
    trusted = section.take("toml").replace("192.0.2.40/32", f"{place.friend}/32")
    place.serve(re.sub(r"^\[relay\]\n.*\n", trusted, MAIN, flags=re.MULTILINE))
    console = section.take("console")
    run(place, console, place.friend)
    strangers = DOCUMENT.sections["Who may not"][2].text.replace("25,465,587", "25")
    run(place, re.sub(r"465/tcp.*authentication needed\n", "", strangers, flags=re.DOTALL), place.stranger)


def test_what_comes_for_us_is_delivered(site: Site) -> None:
    command = f"swaks --server {site.ip} --from eve@partner.example --to ann@example.org"
    assert site.shell(command)[1] == 0
    site.server.wait(lambda: mailbox(site.server.mail, "example.org", "ann"), "the message in the mailbox")


@DOCUMENT.tries("When it does not work")
def test_the_replies_are_those_of_the_server(place: Site, section: Section) -> None:
    rows = re.findall(r"^\| `(\d{3}) (\d\.\d+\.\d+) ([^`]+)` \|", DOCUMENT.text, re.MULTILINE)
    known = {
        (str(value.code), value.enhanced, value.text)
        for value in vars(reply).values()
        if isinstance(value, reply.Reply)
    }
    assert len(rows) > 5
    assert set(rows) <= known


def test_each_section_is_tried() -> None:
    DOCUMENT.check_all_tried()
    assert f"{CONFIG}`" in DOCUMENT.text
