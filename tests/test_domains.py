"""Served domains: which row is for an address, and which mailbox it stands for."""

from __future__ import annotations

import pytest

from fastsmtp.address import Address, parse_address
from fastsmtp.domains import Domain, Domains

HOST = "mx.here.test"


def names(*rows: str) -> Domains:
    return Domains([Domain(name, f"to {name}") for name in rows], HOST)


@pytest.mark.parametrize(
    ("rows", "domain", "found"),
    [
        (["here.test"], "here.test", "here.test"),
        (["here.test"], "else.test", None),
        (["here.test"], "sub.here.test", None),
        (["*.here.test"], "sub.here.test", "*.here.test"),
        (["*.here.test"], "a.b.c.here.test", "*.here.test"),
        (["*.here.test"], "here.test", None),
        (["*.here.test"], "nothere.test", None),
        (["here.test", "*.here.test"], "here.test", "here.test"),
        (["*.test", "*.here.test"], "a.here.test", "*.here.test"),
        (["*.test", "a.here.test", "*.here.test"], "a.here.test", "a.here.test"),
        (["*.test", "*.here.test"], "a.else.test", "*.test"),
        (["*"], "anything.test", "*"),
        (["*"], "[192.0.2.1]", "*"),
        (["*", "*.test"], "a.test", "*.test"),
        (["*", "*.test"], "test", "*"),
        (["*.2.1]"], "[192.0.2.1]", "*.2.1]"),
        ([], "here.test", None),
        (["xn--bcher-kva.test"], "xn--bcher-kva.test", "xn--bcher-kva.test"),
    ],
)
def test_find(rows: list[str], domain: str, found: str | None) -> None:
    row = names(*rows).find(domain)
    assert (row.name if row else None) == found


def resolve(domains: Domains, text: str) -> str | None:
    address = parse_address(text) if "@" in text else Address(text, "")
    mailbox = domains.resolve(address, domains.find(address.domain))
    return None if mailbox is None else str(mailbox)


def test_recipients() -> None:
    domains = Domains([Domain("here.test", "x", ["Ann", "o'neil", "jürgen"]), Domain("any.test", "x")], HOST)
    assert resolve(domains, "ann@here.test") == "ann@here.test"
    assert resolve(domains, "ANN@here.test") == "ANN@here.test"
    assert resolve(domains, '"ann"@here.test') == "ann@here.test"
    assert resolve(domains, "JÜRGEN@here.test") == "JÜRGEN@here.test"
    assert resolve(domains, "O'Neil@here.test") == "O'Neil@here.test"
    assert resolve(domains, "bob@here.test") is None
    assert resolve(domains, "whoever@any.test") == "whoever@any.test"
    assert resolve(domains, "ann@else.test") is None


def test_a_domain_without_recipients_has_its_postmaster() -> None:
    domains = Domains([Domain("here.test", "x", [])], HOST)
    assert resolve(domains, "ann@here.test") is None
    assert resolve(domains, "Postmaster@here.test") == "Postmaster@here.test"


def test_case_can_matter() -> None:
    domains = Domains([Domain("here.test", "x", ["Ann"], case_sensitive=True)], HOST)
    assert resolve(domains, "ann@here.test") is None
    mailbox = domains.resolve(parse_address("Ann@here.test"), domains.find("here.test"))
    assert mailbox is not None
    assert mailbox.mailbox == "Ann@here.test"
    # taken off the list, it still is another's mailbox than ann's
    emptied = Domains([Domain("here.test", "x", [], case_sensitive=True)], HOST)
    assert emptied.route(parse_address("Ann@here.test"))[1].mailbox == "Ann@here.test"
    assert resolve(domains, "POSTMASTER@here.test") == "POSTMASTER@here.test"


def test_where_case_does_not_matter_the_address_stays_the_same_value() -> None:
    address = parse_address("Ann@here.test")
    domains = names("here.test")
    assert domains.resolve(address, domains.find(address.domain)) is address


def test_postmaster() -> None:
    rows = [Domain("here.test", "x", ["ann"])]
    domains = Domains(rows, HOST, parse_address("admin@here.test"))
    for text in ("postmaster", "PostMaster@here.test", '"postmaster"@here.test'):
        assert resolve(domains, text) == "admin@here.test"
    assert resolve(Domains(rows, HOST), "postmaster") == "postmaster@here.test"


def test_route() -> None:
    domains = Domains([Domain("here.test", "boxes", ["ann"]), Domain("*.sub.test", "far")], HOST)
    assert domains.route(parse_address("ann@here.test"))[0] == "boxes"
    assert domains.route(parse_address("x@a.sub.test"))[0] == "far"
    # A list that has changed since it was accepted loses no mail.
    transport, mailbox = domains.route(parse_address("gone@here.test"))
    assert (transport, str(mailbox)) == ("boxes", "gone@here.test")
    assert domains.route(parse_address("ann@else.test"))[0] == ""
    with_detail = Domains([Domain("here.test", "boxes", ["ann"], detail="+")], HOST)
    assert with_detail.route(parse_address("ann+x@here.test"))[1].mailbox == "ann@here.test"


@pytest.mark.parametrize(
    ("rows", "home"),
    [
        (["*"], "mx.test"),
        (["here.test", "there.test"], "here.test"),
        (["*.test"], "mx.test"),
        (["*.else", "here.test"], "here.test"),
    ],
)
def test_a_bare_postmaster_is_at_home(rows: list[str], home: str) -> None:
    domains = Domains([Domain(name, "t") for name in rows], "mx.test")
    assert domains.route(Address("PostMaster", "")) == ("t", Address("postmaster", home))
