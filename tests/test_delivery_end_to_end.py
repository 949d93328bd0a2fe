"""Whole servers with real ones around them: what becomes of each recipient, and what its sender is told.

One server relays by MX, with NSD for the zones, Postfix and sinks as the hosts of others, and has its own mailboxes in
Dovecot, where the reports arrive and are read with the standard library only. Another has short times, for delays and
the end of a lifetime. What waits is waited for in the server's log; nothing is decided by how long it took.
"""

from __future__ import annotations

import email
import email.policy
from collections.abc import Iterator
from contextlib import ExitStack
from email.message import EmailMessage, Message
from pathlib import Path
from typing import NamedTuple

import pytest
from dovecot import DOMAIN as HERE
from dovecot import Dovecot, dovecot
from nameserver import nameserver
from needs import needs_root
from peer import Peer, stuff
from postfix import DOMAIN as POSTFIX
from postfix import postfix
from queueing import queue, rows
from servers import Server, running, toml

from loadtest.sink_server import SinkProcess

ANN = f"ann@{HERE}"
OWN = "127.0.0.99"  # an address of ours, as the outside of a NAT is
LETTER = b"From: Ann\r\nSubject: a letter\r\nMessage-ID: <1@here>\r\n\r\nHi\r\n"
ZONE = f"""\
null IN MX 0 .
loop IN MX 10 own
own IN A {OWN}
behind IN MX 5 mx.one
behind IN MX 10 own
one IN MX 10 mx.one
mx.one IN A 127.0.0.11
two IN MX 10 mx.two
mx.two IN A 127.0.0.12
silent IN MX 10 mx.silent
mx.silent IN A 127.0.0.13
spare IN MX 10 mx.gone
spare IN MX 20 mx.two
gone IN MX 10 mx.gone
mx.gone IN A 127.0.0.14
unset IN MX 10 nowhere.other.zone.
"""


class Site(NamedTuple):
    server: Server
    mailboxes: Dovecot
    dns: str


def tables(dns: str, mailboxes: Dovecot, lines: str = "") -> str:
    return f"""\
[[domain]]
name = "{HERE}"
recipients = "any"
transport = "dovecot"
[transport.dovecot]
type = "lmtp"
address = "unix:{mailboxes.socket}"
[relay]
networks = ["127.0.0.1"]
transport = "internet"
own_addresses = ["{OWN}"]
[transport.internet]
type = "smtp"
[dns]
servers = ["{dns}"]
allow_loopback = true
{lines}
[queue]
retry = "1s"
retry_max = "1s"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    needs_root()
    folder = tmp_path_factory.mktemp("site")
    with ExitStack() as stack:
        mailboxes = stack.enter_context(dovecot({"ann": "", "bob": "", "full": "1", "crowded": "1"}))
        dns = stack.enter_context(nameserver(folder / "dns", ZONE))
        configuration = toml(folder, workers=2, domains="", tables=tables(dns, mailboxes))
        server = stack.enter_context(running(folder, configuration))
        yield Site(server, mailboxes, dns)


def send(server: Server, *recipients: str, sender: str = ANN, parameters: str = "", octets: bytes = LETTER) -> str:
    """Recipients may have parameters behind them, as in "a@b NOTIFY=NEVER". The id."""
    with Peer(server.address) as peer:
        assert peer.ask(f"MAIL FROM:<{sender}>{parameters}").startswith("250 ")
        for recipient in recipients:
            address, _, parameter = recipient.partition(" ")
            assert peer.ask(f"RCPT TO:<{address}> {parameter}".rstrip()).startswith("250 ")
        assert peer.ask("DATA").startswith("354 ")
        peer.send(stuff(octets))
        reply = peer.reply()
    assert reply.startswith("250 "), reply
    return reply.split()[-1]


class Report(NamedTuple):
    """A report as a program reads it: the fields about the message, those about each recipient, and what came back."""

    text: str
    message: dict[str, str]
    recipients: dict[str, dict[str, str]]
    returned: Message
    mail: EmailMessage


def read_report(octets: bytes) -> Report:
    mail = email.message_from_bytes(octets, policy=email.policy.default)
    assert isinstance(mail, EmailMessage)
    assert mail.get_content_type() == "multipart/report"
    assert mail["Auto-Submitted"] == "auto-replied"
    assert octets.startswith(b"Return-Path: <>") or b"\nReturn-Path: <>" in octets
    text, status, returned = mail.iter_parts()
    assert isinstance(text, EmailMessage)
    groups = status.get_payload()
    assert isinstance(groups, list)
    first, *others = [dict(group.items()) for group in groups if isinstance(group, Message)]
    named = {each["Final-Recipient"].partition("; ")[2]: each for each in others}
    assert len(named) == len(others)
    return Report(text.get_content(), first, named, returned, mail)


def reports(site: Site, message_id: str, n: int) -> list[Report]:
    """What Ann was sent about a message, once it was decided for `n` of its recipients."""
    server = site.server

    def told() -> list[str]:
        lines = server.events("reported", id=message_id)
        return [line["report"] for line in lines] if sum(len(line["recipients"]) for line in lines) >= n else []

    server.wait(told, f"a report about {message_id}")
    for report in told():
        server.wait_for("relayed", id=report, to=ANN)
    found = [read_report(octets) for octets in site.mailboxes.mails("ann") if b"\nFrom: Mail Delivery System" in octets]
    about = [report for report in found if message_id in report.mail.as_string()]
    assert len(about) == len(told())
    return about


def gone(server: Server, message_id: str) -> None:
    """Waits until nothing of a message is left in the queue."""
    server.wait(lambda: queue(server.folder, "show", message_id).exit_code == 1, f"{message_id} leaves the queue")


# By a smarthost, to Postfix


def test_one_of_three_is_refused_and_one_has_to_wait(site: Site, tmp_path: Path) -> None:
    answers = {"no": ["550 5.1.1 nobody of that name"], "late": ["450 4.2.0 come again"]}
    with postfix(answers=answers) as next_host:
        lines = f'[[route]]\ndomain = "{POSTFIX}"\ntransport = "next"\n[transport.next]\ntype = "smtp"\n'
        lines += f'smarthost = "{next_host.address}"\ntls = "off"\n'
        configuration = toml(tmp_path, domains="", tables=tables(site.dns, site.mailboxes, lines))
        with running(tmp_path, configuration) as server:
            message_id = send(server, *(f"{name}@{POSTFIX}" for name in ("yes", "no", "late")), parameters=" ENVID=xy")
            (report,) = reports(site._replace(server=server), message_id, 1)
            gone(server, message_id)
            (deferred,) = server.events("deferred", id=message_id)
            assert (deferred["to"], deferred["status"], deferred["attempts"]) == (f"late@{POSTFIX}", "4.2.0", 1)
            assert [line["to"] for line in server.wait_for("relayed", 2, transport="next")] == [
                f"yes@{POSTFIX}", f"late@{POSTFIX}",
            ]  # fmt: skip
        assert next_host.asked == ["yes", "no", "late", "late"]
        for name in ("yes", "late"):
            (kept,) = next_host.wait_mails(name, 1)
            assert kept.endswith(LETTER.replace(b"\r\n", b"\n"))
    assert list(report.recipients) == [f"no@{POSTFIX}"]
    assert report.message["Original-Envelope-Id"] == "xy"
    assert report.message["Reporting-MTA"] == "dns; mx.here.test"
    fields = report.recipients[f"no@{POSTFIX}"]
    assert (fields["Action"], fields["Status"]) == ("failed", "5.1.1")
    assert "550 5.1.1" in fields["Diagnostic-Code"]
    assert "nobody of that name" in fields["Diagnostic-Code"]


# What cannot be delivered


def test_full_mailboxes_are_one_report_in_the_mailbox_of_the_sender(site: Site) -> None:
    names = [f"{name}@{HERE}" for name in ("bob", "full", "crowded")]
    message_id = send(site.server, *names, parameters=" RET=FULL ENVID=abc+2Bd")
    (report,) = reports(site, message_id, 2)
    gone(site.server, message_id)
    assert list(report.recipients) == names[1:]
    for fields in report.recipients.values():
        assert (fields["Action"], fields["Status"]) == ("failed", "5.2.2")
        assert fields["Diagnostic-Code"].startswith("smtp; 552 5.2.2")
        assert fields["Final-Log-ID"] == message_id
    assert report.message["Original-Envelope-Id"] == "abc+d"
    assert report.mail["In-Reply-To"] == "<1@here>"
    assert "The mailbox is full." in report.text
    assert report.returned.get_content_type() == "message/rfc822"
    assert "\nHi" in report.returned.as_string()
    assert len(site.mailboxes.mails("bob")) == 1
    assert len(site.server.wait_for("failed", 2, id=message_id)) == 2


def test_what_the_dns_says_for_good(site: Site) -> None:
    """A null MX, a loop, no such domain, an MX without an address; but behind a better MX of others we are no loop."""
    with SinkProcess(address="127.0.0.11:25") as sink:
        wanted = {"a@null.test": "5.1.10", "b@loop.test": "5.4.6", "c@missing.test": "5.1.2"}
        message_id = send(site.server, *wanted, "d@behind.test")
        told = reports(site, message_id, 3)
        gone(site.server, message_id)
        seen = {name: fields["Status"] for report in told for name, fields in report.recipients.items()}
        assert seen == wanted
        assert [line["host"] for line in site.server.wait_for("relayed", id=message_id)] == ["mx.one.test"]
    assert sink.counts["messages"] == 1


def test_a_name_server_that_does_not_know_defers(site: Site) -> None:
    message_id = send(site.server, "a@example.org")  # refused by NSD: not its zone
    (line, *_) = site.server.wait_for("deferred", id=message_id)
    assert line["status"] == "4.4.3"
    assert queue(site.server.folder, "delete", "--yes", message_id).exit_code == 0


def test_nothing_is_reported_to_nobody(site: Site) -> None:
    message_id = send(site.server, "a@null.test", f"full@{HERE}", sender="")
    gone(site.server, message_id)
    assert {line["status"] for line in site.server.wait_for("unreported", 2, id=message_id)} == {"5.1.10", "5.2.2"}
    assert site.server.events("reported", id=message_id) == []


# Several hosts, several domains


def test_a_dead_first_mx_costs_no_time(site: Site) -> None:
    with SinkProcess(address="127.0.0.12:25") as sink:
        message_id = send(site.server, "a@spare.test")
        (line,) = site.server.wait_for("relayed", id=message_id)
        assert line["host"] == "mx.two.test"
        assert site.server.events("deferred", id=message_id) == []
    assert sink.counts["messages"] == 1


def test_a_domain_that_hangs_delays_no_other(site: Site) -> None:
    with (
        SinkProcess(address="127.0.0.11:25") as one,
        SinkProcess(address="127.0.0.12:25") as two,
        SinkProcess("--fault", "silence@banner", address="127.0.0.13:25"),
    ):
        ids = [send(site.server, f"{n}@silent.test", f"{n}@one.test", f"{n}@two.test") for n in range(10)]
        for message_id in ids:
            site.server.wait_for("relayed", 2, id=message_id)
        assert not any(site.server.events("deferred", id=message_id) for message_id in ids), "nobody has waited"
        left = rows(site.server.folder, "--domain", "silent.test")
        assert [row["id"] for row in left] == ids
        assert {recipient["to"].partition("@")[2] for row in left for recipient in row["recipients"]} == {"silent.test"}
    for message_id in ids:  # the sink is gone: refused connections now
        site.server.wait_for("deferred", id=message_id)
    assert f"{len(ids)} messages deleted" in queue(site.server.folder, "delete", "--yes", *ids).stdout
    assert (one.counts["messages"], two.counts["messages"]) == (10, 10)


def test_what_waits_outlives_a_restart(site: Site) -> None:
    """And a kill: it is tried again, from the beginning of the back-off or not, and delivered once."""
    ids = [send(site.server, f"{n}@gone.test") for n in range(5)]
    for message_id in ids:
        site.server.wait_for("deferred", id=message_id)
    assert site.server.stop() == 0
    assert [row["id"] for row in rows(site.server.folder)] == ids
    site.server.start()
    ids += [send(site.server, "5@gone.test")]
    site.server.wait_for("deferred", id=ids[-1])
    site.server.kill()
    with SinkProcess(address="127.0.0.14:25") as sink:
        site.server.start_again()
        for message_id in ids:
            gone(site.server, message_id)
    assert sink.counts["messages"] == len(ids)


# What the sender wants to know


def test_success_is_told_where_it_was_asked_for(site: Site) -> None:
    """Delivered by LMTP; relayed to a host without DSN; a host with DSN is handed the wish, and we say nothing."""
    asks = " NOTIFY=SUCCESS ORCPT=rfc822;first+2Bname@here"
    with SinkProcess(address="127.0.0.11:25"), SinkProcess("--without", "DSN", address="127.0.0.12:25"):
        message_id = send(
            site.server, f"bob@{HERE}{asks}", f"a@one.test{asks}", f"b@two.test{asks}", "quiet@two.test",
            "never@null.test NOTIFY=NEVER", "other@null.test NOTIFY=SUCCESS,DELAY",
        )  # fmt: skip
        gone(site.server, message_id)
        told = reports(site, message_id, 2)
    seen = {name: fields["Action"] for report in told for name, fields in report.recipients.items()}
    assert seen == {f"bob@{HERE}": "delivered", "b@two.test": "relayed"}
    for report in told:
        for fields in report.recipients.values():
            assert fields["Original-Recipient"] == "rfc822; first+name@here"
            assert fields["Status"].startswith("2.")
    assert len(site.server.wait_for("failed", 2, id=message_id)) == 2


def test_delays_and_the_end_of_a_lifetime(site: Site, tmp_path: Path) -> None:
    """A delay is reported once, and then the failure, for each that wants it; a restart begins nothing anew."""
    queue_table = '[queue]\nretry = "1s"\nretry_max = "1s"\ndelay_report = "2s"\nlifetime = "6s"\n'
    text = tables(site.dns, site.mailboxes).partition("[queue]")[0] + queue_table
    with running(tmp_path, toml(tmp_path, domains="", tables=text)) as server:
        wanted = {"both": "", "failure": " NOTIFY=FAILURE", "delay": " NOTIFY=DELAY", "never": " NOTIFY=NEVER"}
        message_id = send(server, *(f"{name}@gone.test{notify}" for name, notify in wanted.items()))
        server.wait_for("reported", action="delayed")
        assert server.stop() == 0
        server.start()
        queue(tmp_path, "retry", message_id)  # once more between the delay and the end
        gone(server, message_id)
        told = reports(site._replace(server=server), message_id, 4)
        assert len(server.wait_for("failed", 4, id=message_id)) == 4
    seen = [(fields["Action"], name) for report in told for name, fields in report.recipients.items()]
    assert sorted(seen) == [
        ("delayed", "both@gone.test"), ("delayed", "delay@gone.test"), ("failed", "both@gone.test"),
        ("failed", "failure@gone.test"),
    ]  # fmt: skip
    for report in told:
        for fields in report.recipients.values():
            assert fields["Status"] == "4.4.1"
            assert ("Will-Retry-Until" in fields) == (fields["Action"] == "delayed")


def test_a_careful_first_day(site: Site, tmp_path: Path) -> None:
    """With soft_bounce nothing is refused or returned for good; without it, the same mail is decided."""
    text = tables(site.dns, site.mailboxes) + "soft_bounce = true\n"
    with running(tmp_path, toml(tmp_path, domains="", tables=text)) as server:
        message_id = send(server, f"full@{HERE}", "a@null.test")
        assert {line["status"] for line in server.wait_for("deferred", 2, id=message_id)} == {"5.2.2", "5.1.10"}
        assert server.stop() == 0
        server.configuration = toml(tmp_path, domains="", tables=tables(site.dns, site.mailboxes))
        server.start()
        assert queue(tmp_path, "retry", "--all").exit_code == 0
        told = reports(site._replace(server=server), message_id, 2)
        gone(server, message_id)
    assert {name for report in told for name in report.recipients} == {f"full@{HERE}", "a@null.test"}
