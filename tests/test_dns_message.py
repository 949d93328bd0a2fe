"""DNS messages: what is written is read by dnspython; what is read is our values, whatever the octets are."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest
from nameserver import response

from fastsmtp.dns import MX, Answer, Kind, Status
from fastsmtp.dns_message import (
    RECORDS,
    Alias,
    Fault,
    matches,
    read_message,
    render_query,
    render_question,
    truncated,
)

SOA = "test. 900 IN SOA ns.test. h.test. 1 3600 600 86400 300"
NS = "test. 900 IN NS ns.test."


def ask(name: str, kind: Kind) -> tuple[bytes, dns.message.Message]:
    question = render_question(name, kind)
    assert question is not None
    return question, dns.message.from_wire(render_query(7, question, edns=True))


def read(kind: Kind, *answers: str, name: str = "d.test", **more: Any) -> Answer[Any] | Alias | Fault:
    _, query = ask(name, kind)
    return read_message(response(query, *answers, **more).to_wire(max_size=65_535), kind)


@pytest.mark.parametrize("edns", [True, False])
def test_a_query_as_dnspython_reads_it(edns: bool) -> None:
    question = render_question("Mail.Example.test", Kind.MX)
    assert question is not None
    query = dns.message.from_wire(render_query(0xABCD, question, edns))
    assert query.id == 0xABCD
    assert query.flags == dns.flags.RD
    assert query.question[0].to_text() == "mail.example.test. IN MX"
    assert (query.edns, query.payload) == ((0, 1232) if edns else (-1, 0))


@pytest.mark.parametrize(
    "name", ["a..b", ".a", "x" * 64 + ".test", "a." * 128, "grün.test", "\\999.test", "\\25"], ids=ascii
)
def test_no_domain_name(name: str) -> None:
    assert render_question(name, Kind.A) is None


READ = {
    "MX, by preference": (
        Kind.MX,
        ["d.test. 600 IN MX 20 B.test.", "d.test. 600 IN MX 10 a.TEST."],
        (MX(10, "a.test"), MX(20, "b.test")),
    ),
    "null MX": (Kind.MX, ["d.test. 600 IN MX 0 ."], (MX(0, ""),)),
    "MX with odd octets": (Kind.MX, [r"d.test. 600 IN MX 0 a\010\200b.test."], (MX(0, r"a\010\200b.test"),)),
    "A": (Kind.A, ["d.test. 600 IN A 192.0.2.1"], (IPv4Address("192.0.2.1"),)),
    "AAAA": (Kind.AAAA, ["d.test. 600 IN AAAA 2001:db8::1"], (IPv6Address("2001:db8::1"),)),
    "AAAA that is an A": (Kind.AAAA, ["d.test. 600 IN AAAA ::ffff:127.0.0.1"], (IPv4Address("127.0.0.1"),)),
    "PTR": (Kind.PTR, ["d.test. 600 IN PTR Mail.test."], ("mail.test",)),
    "TXT": (Kind.TXT, ['d.test. 600 IN TXT "v=spf1 " "-all"'], (b"v=spf1 -all",)),
}


@pytest.mark.parametrize(("kind", "lines", "records"), READ.values(), ids=READ)
def test_records(kind: Kind, lines: list[str], records: tuple[object, ...]) -> None:
    answer = read(kind, *lines)
    assert isinstance(answer, Answer)
    assert answer.status is Status.RECORDS
    assert answer.records == records
    assert answer.ttl == 600
    assert answer.octets > 12


def test_the_ttl_is_the_least_of_the_chain() -> None:
    answer = read(Kind.A, "d.test. 30 IN CNAME e.test.", "e.test. 600 IN A 192.0.2.1")
    assert isinstance(answer, Answer)
    assert (answer.status, answer.ttl) == (Status.RECORDS, 30)


def test_many_records_are_bounded_and_the_best_are_kept() -> None:
    answer = read(Kind.MX, *(f"d.test. 600 IN MX {n} m{n}.test." for n in range(900, 0, -1)))
    assert isinstance(answer, Answer)
    assert [record.preference for record in answer.records] == list(range(1, RECORDS + 1))


ABSENT: dict[str, tuple[dict[str, Any], Status, int]] = {
    "no such name": ({"code": dns.rcode.NXDOMAIN, "authority": [SOA]}, Status.NO_NAME, 300),
    "no such name, without SOA": ({"code": dns.rcode.NXDOMAIN}, Status.NO_NAME, 0),
    "no such records": ({"authority": [SOA]}, Status.NO_RECORDS, 300),
    "no such records, SOA's own TTL is less": ({"authority": [SOA.replace("900", "20")]}, Status.NO_RECORDS, 20),
    "no such records, without SOA": ({}, Status.NO_RECORDS, 0),
    "no such records, by authority, without SOA": ({"authority": [NS], "flags": dns.flags.AA}, Status.NO_RECORDS, 0),
}


@pytest.mark.parametrize(("more", "status", "ttl"), ABSENT.values(), ids=ABSENT)
def test_what_is_not_there(more: dict[str, Any], status: Status, ttl: int) -> None:
    answer = read(Kind.MX, **more)
    assert isinstance(answer, Answer)
    assert (answer.status, answer.ttl, answer.records) == (status, ttl, ())


def test_what_an_alias_leads_to_is_not_there() -> None:
    answer = read(Kind.MX, "d.test. 30 IN CNAME e.test.", code=dns.rcode.NXDOMAIN, authority=[SOA])
    assert isinstance(answer, Answer)
    assert (answer.status, answer.ttl) == (Status.NO_NAME, 30)


def test_an_alias_whose_target_is_left_out() -> None:
    assert read(Kind.MX, "d.test. 30 IN CNAME e.Other.") == Alias("e.other", 30)


def test_aliases_in_a_circle() -> None:
    answer = read(Kind.MX, "d.test. 30 IN CNAME e.test.", "e.test. 30 IN CNAME d.test.")
    assert isinstance(answer, Answer)
    assert answer.status is Status.FAILED


def test_a_referral_is_no_absence() -> None:
    assert isinstance(read(Kind.MX, authority=[NS]), Fault)


@pytest.mark.parametrize(
    ("code", "edns"),
    [(dns.rcode.SERVFAIL, False), (dns.rcode.REFUSED, False), (dns.rcode.FORMERR, True), (dns.rcode.NOTIMP, True)],
)
def test_other_codes_are_faults(code: dns.rcode.Rcode, edns: bool) -> None:
    assert read(Kind.MX, code=code) == Fault(dns.rcode.to_text(code), edns)


def test_a_name_that_is_denied_and_has_records_is_a_fault() -> None:
    assert isinstance(read(Kind.A, "d.test. 600 IN A 192.0.2.1", code=dns.rcode.NXDOMAIN), Fault)


def test_what_matches() -> None:
    question, query = ask("d.test", Kind.MX)
    good = response(query).to_wire()
    assert matches(good, question)
    assert matches(good.replace(b"\1d\4test", b"\1D\4tEst"), question)
    refused = dns.message.from_wire(good)
    refused.question = []
    refused.set_rcode(dns.rcode.FORMERR)
    assert matches(refused.to_wire(), question)
    refused.set_rcode(dns.rcode.NXDOMAIN)
    assert not matches(refused.to_wire(), question)
    assert not matches(render_query(7, question, edns=False), question), "a query"
    assert not matches(response(ask("e.test", Kind.MX)[1]).to_wire(), question), "another name"
    assert not matches(response(ask("d.test", Kind.TXT)[1]).to_wire(), question), "another type"
    for end in range(12 + len(question)):
        assert not matches(good[:end], question)


def test_truncation_is_a_flag() -> None:
    _, query = ask("d.test", Kind.MX)
    assert truncated(response(query, flags=dns.flags.TC).to_wire())
    assert not truncated(response(query).to_wire())


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_no_octets_raise(kind: Kind) -> None:
    """Messages with octets changed, taken away and put in: an answer, an alias or a fault."""
    lines = {
        Kind.A: "A 192.0.2.1",
        Kind.AAAA: "AAAA 2001:db8::1",
        Kind.MX: "MX 10 m.test.",
        Kind.PTR: "PTR m.test.",
        Kind.TXT: 'TXT "a" "b"',
    }
    _, query = ask("d.test", kind)
    good = response(query, "d.test. 60 IN CNAME e.test.", f"e.test. 60 IN {lines[kind]}", authority=[SOA]).to_wire()
    chance = random.Random(kind)
    seen = set()
    for _ in range(1_500):
        octets = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(2, len(octets))
            match chance.randrange(3):
                case 0:
                    octets[place] = chance.choice((0, 1, 0xC0, 0xFF, chance.randrange(256)))
                case 1:
                    del octets[place : place + chance.randrange(4)]
                case 2:
                    octets[place:place] = chance.randbytes(2)
            if len(octets) < 13:
                break
        seen.add(type(read_message(bytes(octets), kind)))
    assert {Answer, Fault} <= seen
