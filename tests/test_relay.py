"""Who may send to any domain, and the way that such mail takes: trust by address, the check, what a session offers."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire import ARRIVED, DOMAINS, HOSTNAME, bench

from fastsmtp._parser import Line, Parser
from fastsmtp.address import Address, parse_address
from fastsmtp.commands import BARRIERS
from fastsmtp.domains import Domain, Domains
from fastsmtp.policy.relay import REMEMBERED, Relay, Trust
from fastsmtp.record import parse_envelope, render_envelope
from fastsmtp.reply import R550_UNKNOWN_MAILBOX, R554_LOOP, Reply, Then, reason, softened
from fastsmtp.routes import Routes
from fastsmtp.session import Session
from fastsmtp.terms import Terms
from fastsmtp.verdict import Ask, Client, Stage

NETWORKS = [ip_network(text) for text in ("127.0.0.0/8", "::1", "198.51.100.0/25", "2001:db8:1::/48", "fe80::/10")]
TRUST = Trust(NETWORKS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ip", "trusted"),
    [
        ("127.0.0.1", True),
        ("127.255.255.255", True),
        ("128.0.0.1", False),
        ("198.51.100.127", True),
        ("198.51.100.128", False),
        ("::1", True),
        ("::2", False),
        ("2001:db8:1:ffff::1", True),
        ("2001:db8:2::1", False),
        ("fe80::1%eth0", True),
        ("", False),  # a unix socket
        ("localhost", False),
        ("127.0.0.1 ", False),
    ],
)
def test_trust(ip: str, trusted: bool) -> None:
    assert TRUST(ip) is trusted
    assert TRUST(ip) is trusted, "what was kept is the same"


def test_nobody_is_trusted_without_networks() -> None:
    assert not Trust([])("127.0.0.1")


def test_trust_keeps_a_bounded_number_of_answers() -> None:
    trust = Trust([ip_network("10.0.0.0/9")])
    for n in range(REMEMBERED + 10):
        assert trust(f"10.{n % 256}.{n // 256}.1") == (n % 256 < 128)
    assert len(trust._known) <= REMEMBERED


@given(st.ip_addresses())
def test_trust_is_what_the_networks_say(ip: object) -> None:
    assert TRUST(str(ip)) == any(ip in network for network in NETWORKS)


# The check


def ask(text: str, trusted: bool = True) -> Ask:
    client = Client("192.0.2.7", 1, "test")
    client.trusted = trusted
    return Ask(Stage.RCPT, client, recipient=parse_address(text) if "@" in text else Address(text, ""))


@pytest.mark.parametrize("text", ["u@else.test", "postmaster@else.test", "u@[192.0.2.1]", "ann@here.test.else"])
def test_a_trusted_client_may_send_to_any_domain(text: str) -> None:
    check = Relay(Domains(DOMAINS, HOSTNAME), lambda address: ("net", address))
    verdict = check(ask(text))
    assert verdict is not None
    assert (verdict.reply, verdict.reason, verdict.ours) == (None, "relayed", False)
    assert verdict.recipient == parse_address(text)
    assert check(ask(text, trusted=False)) is None, "nothing is said: the next check refuses"


@pytest.mark.parametrize("text", ["ann@here.test", "nobody@here.test", "x@a.sub.test", "postmaster"])
def test_of_our_own_domains_nothing_is_said(text: str) -> None:
    assert Relay(Domains(DOMAINS, HOSTNAME), lambda address: ("net", address))(ask(text)) is None


def test_where_no_way_leads_nothing_is_taken() -> None:
    domains = Domains(DOMAINS, HOSTNAME)
    check = Relay(domains, Routes(domains, {"partner.test": "net"}).route)
    assert check(ask("u@partner.test")) is not None
    assert check(ask("u@else.test")) is None


def test_the_key_keeps_its_case() -> None:
    verdict = Relay(Domains(DOMAINS, HOSTNAME), lambda address: ("net", address))(ask("Ann@Else.test"))
    assert verdict is not None
    assert verdict.recipient is not None
    assert verdict.recipient.mailbox == "Ann@else.test"


# Who is trusted on a connection


@pytest.mark.parametrize(
    ("peer", "code"),
    [
        (("198.51.100.7", 1), "250"),
        (("198.51.100.200", 1), "550"),
        (("::ffff:198.51.100.7", 1, 0, 0), "250"),
        (("::ffff:198.51.100.200", 1, 0, 0), "550"),
        (("2001:db8:1::7", 1, 0, 0), "250"),
        (("2001:db8:7::7", 1, 0, 0), "550"),
        ("", "550"),
    ],
)
def test_a_connection_is_trusted_by_its_address(peer: object, code: str) -> None:
    with bench(trusts=TRUST, early_refused=False) as made:
        client = made.connect(peer)
        client.take()
        said = client.say("HELO client.test", "MAIL FROM:<a@b.test>", "RCPT TO:<u@else.test>")
        assert said[-1][:3] == code


def test_without_trust_nobody_relays() -> None:
    with bench(early_refused=False) as made:
        client = made.connect(("127.0.0.1", 1))
        client.take()
        assert client.say("HELO c.test", "MAIL FROM:<a@b.test>", "RCPT TO:<u@else.test>")[-1].startswith("550 5.7.1")


@pytest.mark.parametrize(
    ("reports", "trusted", "kept"),
    [
        ("trusted", True, ["SUCCESS,FAILURE", "SUCCESS", "NEVER", ""]),
        ("trusted", False, ["FAILURE", "NEVER", "NEVER", ""]),
        ("all", False, ["SUCCESS,FAILURE", "SUCCESS", "NEVER", ""]),
        ("nobody", True, ["FAILURE", "NEVER", "NEVER", ""]),
    ],
)
def test_reports_of_success_are_for_those_who_were_offered_them(reports: str, trusted: bool, kept: list[str]) -> None:
    with bench(trusts=lambda ip: trusted, reports=reports) as made:
        client = made.connect()
        client.take()
        offered = client.say("EHLO client.test")
        assert ("250-DSN" in offered) == (kept[1] == "SUCCESS")
        client.say("MAIL FROM:<a@b.test>", *(
            f"RCPT TO:<{local}@here.test>{notify}"
            for local, notify in (
                ("ann", " NOTIFY=SUCCESS,FAILURE"), ("bob", " NOTIFY=success"), ("carl", " NOTIFY=NEVER"),
                ("postmaster", ""),
            )
        ))  # fmt: skip
        client.say("DATA")
        assert client.say("x", ".")[0].startswith("250")
        (message,) = made.keeper.kept
        assert [recipient.notify for recipient in message.message.envelope.recipients] == kept


def test_a_client_from_whom_dsn_is_withheld_was_not_offered_it() -> None:
    with bench(reports="all", withheld=frozenset({"DSN"})) as made:
        client = made.connect()
        client.take()
        assert "250-DSN" not in client.say("EHLO client.test")
        client.say("MAIL FROM:<a@b.test>", "RCPT TO:<ann@here.test> NOTIFY=SUCCESS")
        client.say("DATA")
        client.say("x", ".")
        (message,) = made.keeper.kept
        assert message.message.envelope.recipients[0].notify == "NEVER"


# REQUIRETLS (RFC 8689): in TLS only, and where it can be kept


def answers(keeps_tls: str, tls: str, trusted: bool) -> tuple[bool, str]:
    """Whether the keyword is offered, and how a message that wants it is answered."""
    terms = Terms(
        HOSTNAME, "mx", next_id=lambda: "1" * 20, room=lambda size: None, now=lambda: ARRIVED,
        keeps_tls=keeps_tls,  # type: ignore[arg-type]
    )  # fmt: skip
    client = Client("192.0.2.7", 1, "test")
    client.tls = tls
    client.trusted = trusted
    session = Session(terms, client)
    parser = Parser(BARRIERS)
    said = []
    for line in (b"EHLO c.test", b"MAIL FROM:<a@b.test> REQUIRETLS"):
        parser.feed(line + b"\r\n")
        event = parser.next()
        assert isinstance(event, Line)
        reply = session.receive(event)
        assert isinstance(reply, Reply)
        said.append(reply.wire.decode())
        parser.command()
    if said[1].startswith("250"):
        assert session.transaction is not None
        assert session.transaction.envelope.require_tls
    return "250-REQUIRETLS\r\n" in said[0], said[1][:3]


@pytest.mark.parametrize(
    ("keeps_tls", "tls", "trusted", "offered"),
    [
        ("all", "TLSv1.3 X", True, True),
        ("all", "TLSv1.3 X", False, True),
        ("strangers", "TLSv1.3 X", False, True),
        ("strangers", "TLSv1.3 X", True, False),
        ("nobody", "TLSv1.3 X", False, False),
        ("all", "", False, False),
    ],
)
def test_require_tls(keeps_tls: str, tls: str, trusted: bool, offered: bool) -> None:
    assert answers(keeps_tls, tls, trusted) == (offered, "250" if offered else "555")


# TLS-Required: No (RFC 8689 5)


@pytest.mark.parametrize(
    ("field", "waived"),
    [
        ("TLS-Required: No", True),
        ("tls-required:NO\t", True),
        ("TLS-Required:\r\n No", True),
        ("TLS-Required: Nope", False),
        ("TLS-Required: yes", False),
        ("X-TLS-Required: No", False),
        ("Subject: TLS-Required: No", False),
        ("Subject: x\r\n TLS-Required: No", False),
        ("Subject: x\r\n\r\nTLS-Required: No", False),
    ],
)
@pytest.mark.parametrize("waivable", [True, False])
@pytest.mark.parametrize("command", ["DATA", "BDAT"])
def test_what_a_header_waives_goes_with_the_message(field: str, waived: bool, waivable: bool, command: str) -> None:
    octets = f"{field}\r\n\r\nbody\r\n"
    with bench(trusts=lambda ip: True, early_refused=False, waivable=waivable) as made:
        client = made.connect()
        client.take()
        client.say("EHLO c.test", "MAIL FROM:<a@b.test>", "RCPT TO:<u@else.test>")
        if command == "DATA":
            client.say("DATA")
            client.say(*f"{octets}.".split("\r\n"))
        else:
            client.say(f"BDAT {len(octets)} LAST\r\n{octets}"[:-2])
        (message,) = made.keeper.kept
        envelope = message.message.envelope
        assert envelope.waives_tls is (waived and waivable)
        kept = parse_envelope(render_envelope(envelope), "0abc")
        assert (kept.waives_tls, kept.require_tls, kept.utf8) == (waived and waivable, False, False)


def test_what_requires_tls_waives_nothing() -> None:
    with bench(trusts=lambda ip: True, early_refused=False, waivable=True, keeps_tls="all") as made:
        client = made.connect()
        client.take()
        client.connection.session.client.tls = "TLSv1.3 X"
        client.say("EHLO c.test", "MAIL FROM:<a@b.test> REQUIRETLS", "RCPT TO:<u@else.test>", "DATA")
        client.say("TLS-Required: No", "", "x", ".")
        (message,) = made.keeper.kept
        envelope = message.message.envelope
        assert (envelope.require_tls, envelope.waives_tls) == (True, False)
        kept = parse_envelope(render_envelope(envelope), "0abc")
        assert (kept.require_tls, kept.waives_tls) == (True, False)


# Refusals for now


def test_softened() -> None:
    soft = softened(R550_UNKNOWN_MAILBOX)
    assert soft.wire == b"450 4.1.1 No such mailbox here\r\n"
    assert softened(soft) is soft
    assert softened(R554_LOOP).wire.startswith(b"451 4.4.6 ")
    assert reason(soft) == reason(R550_UNKNOWN_MAILBOX) == "unknown-mailbox"
    assert softened(Reply(552, "5.3.4", "Gone", Then.CLOSE)).then is Then.CLOSE
    for code in (500, 503, 555, 250, 421, 452):
        same = Reply(code, "", "text")
        assert softened(same) is same


def test_softened_in_lmtp_each_recipient_for_itself() -> None:
    with bench("lmtp", soft=True, early_refused=False) as made:
        client = made.connect("")
        client.take()
        client.say("LHLO c.test", "MAIL FROM:<a@b.test>", "RCPT TO:<ann@here.test>", "RCPT TO:<bob@here.test>", "DATA")
        said = client.say("Delivered-To: ann@here.test", "", "x", ".")
        assert [line[:9] for line in said] == ["451 4.4.6", "250 2.0.0"]


# The way


ROUTES = {"partner.test": "exact", "*.partner.test": "below", "*.test": "wide"}


def routes(rows: dict[str, str], relay: str = "") -> Routes:
    ours = [Domain("here.test", "boxes", ["ann"]), Domain("*.sub.test", "far")]
    return Routes(Domains(ours, HOSTNAME, parse_address("admin@here.test")), rows, relay)


@pytest.mark.parametrize(
    ("rows", "relay", "address", "way"),
    [
        (ROUTES, "net", "ann@here.test", "boxes"),
        (ROUTES, "net", "gone@here.test", "boxes"),
        (ROUTES, "net", "u@a.sub.test", "far"),
        (ROUTES, "net", "u@partner.test", "exact"),
        (ROUTES, "net", "u@a.b.partner.test", "below"),
        (ROUTES, "net", "u@else.test", "wide"),
        (ROUTES, "net", "u@else.example", "net"),
        (ROUTES, "", "u@else.example", ""),
        ({**ROUTES, "*": "rest"}, "net", "u@else.example", "rest"),
        ({"here.test": "never"}, "net", "ann@here.test", "boxes"),
        ({}, "net", "u@[192.0.2.1]", "net"),
        ({}, "net", "postmaster", "boxes"),
        ({}, "", "u@else.test", ""),
    ],
)
def test_the_way_of_an_address(rows: dict[str, str], relay: str, address: str, way: str) -> None:
    given_address = parse_address(address) if "@" in address else Address(address, "")
    found, mailbox = routes(rows, relay).route(given_address)
    assert found == way
    assert str(mailbox) == ("admin@here.test" if address == "postmaster" else address)


def test_a_bare_postmaster_whom_nobody_serves_goes_nowhere() -> None:
    nowhere = Routes(Domains([], HOSTNAME), {"*": "rest"}, "net")
    way, mailbox = nowhere.route(Address("postmaster", ""))
    assert (way, mailbox.domain) == ("rest", HOSTNAME), "our own name is a domain like any other there"


def test_a_relayed_address_is_kept_as_it_came() -> None:
    with bench(trusts=lambda ip: True, early_refused=False) as made:
        client = made.connect()
        client.take()
        client.say("EHLO c.test", "MAIL FROM:<a@b.test>", 'RCPT TO:<@r.test:"a b"@ELSE.test>')
        client.say("DATA")
        client.say("x", ".")
        (message,) = made.keeper.kept
        assert [str(one.address) for one in message.message.envelope.recipients] == ['"a b"@else.test']
        assert not message.message.envelope.require_tls
