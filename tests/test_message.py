"""Envelope, trace fields, loops."""

from __future__ import annotations

import email.utils
import os
import re
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsmtp.address import NULL, parse_address
from fastsmtp.message import (
    Content,
    Envelope,
    Message,
    Recipient,
    date,
    protocol_word,
    received,
    received_from,
    trace,
    traceable,
)
from fastsmtp.verdict import Client

DATE = "Tue, 14 Nov 2023 22:13:20 +0000"


def client(helo: str = "client.test", ip: str = "192.0.2.7", rdns: str = "", tls: str = "") -> Client:
    made = Client(ip, 25252, "test")
    made.helo, made.rdns, made.tls = helo, rdns, tls
    return made


def envelope(*recipients: str) -> Envelope:
    made = Envelope(NULL)
    made.id = "0" * 20
    made.protocol = "ESMTP"
    made.recipients = [Recipient(parse_address(text)) for text in recipients]
    return made


@pytest.mark.parametrize(
    ("base", "utf8", "tls", "authenticated", "word"),
    [
        ("SMTP", False, False, False, "SMTP"),
        ("SMTP", True, True, True, "SMTP"),
        ("ESMTP", False, False, False, "ESMTP"),
        ("ESMTP", False, True, False, "ESMTPS"),
        ("ESMTP", False, False, True, "ESMTPA"),
        ("ESMTP", False, True, True, "ESMTPSA"),
        ("LMTP", False, True, True, "LMTPSA"),
        ("ESMTP", True, False, False, "UTF8SMTP"),
        ("ESMTP", True, True, True, "UTF8SMTPSA"),
        ("LMTP", True, False, True, "UTF8LMTPA"),
    ],
)
def test_protocol_words(base: str, utf8: bool, tls: bool, authenticated: bool, word: str) -> None:
    assert protocol_word(base, utf8, tls, authenticated) == word


# RFC 5321 4.4: From-domain, By-domain, via and with, id, for; date-time
RECEIVED = re.compile(
    rb"Received: from (?P<helo>[^ ()]+) \((?P<peer>[^()]*)\)(?:\r\n\t\((?P<tls>[^()]*)\))?\r\n"
    rb"\tby (?P<by>\S+) with (?P<word>\w+) id (?P<id>\w+)(?:\r\n\tfor <(?P<to>[^>]*)>)?;\r\n\t(?P<date>[^\r\n]+)\r\n"
)


@pytest.mark.parametrize(
    ("peer", "shown"),
    [
        (client(), b"[192.0.2.7]"),
        (client(ip="2001:db8::1"), b"[IPv6:2001:db8::1]"),
        (client(ip=""), b"local"),
        (client(rdns="host.client.test"), b"host.client.test [192.0.2.7]"),
    ],
)
def test_received(peer: Client, shown: bytes) -> None:
    field = received(received_from(peer), "mx.here.test", envelope("ann@here.test"), DATE)
    match = RECEIVED.fullmatch(field)
    assert match is not None
    assert (match["helo"], match["peer"], match["tls"]) == (b"client.test", shown, None)
    assert (match["by"], match["word"], match["id"]) == (b"mx.here.test", b"ESMTP", b"0" * 20)
    assert (match["to"], match["date"]) == (b"ann@here.test", DATE.encode())


def test_received_in_tls() -> None:
    peer = client(tls="TLSv1.3 TLS_AES_256_GCM_SHA384")
    match = RECEIVED.fullmatch(received(received_from(peer), "mx.here.test", envelope("ann@here.test"), DATE))
    assert match is not None
    assert match["tls"] == b"TLSv1.3 TLS_AES_256_GCM_SHA384"


def test_recipients_are_shown_only_when_there_is_one() -> None:
    """A blind copy would tell the others."""
    field = received(received_from(client()), "mx.here.test", envelope("ann@here.test", "bob@here.test"), DATE)
    match = RECEIVED.fullmatch(field)
    assert match is not None
    assert match["to"] is None


def test_non_ascii_recipient() -> None:
    field = received(received_from(client()), "mx.here.test", envelope("jürgen@bücher.test"), DATE)
    assert "for <jürgen@xn--bcher-kva.test>;".encode() in field


@pytest.mark.parametrize("place", ["helo", "rdns"])
@given(text=st.text(min_size=1, max_size=300))
def test_nobody_forges_a_trace_field(place: str, text: str) -> None:
    peer = client(**{place: text})
    field = received(received_from(peer), "mx.here.test", envelope("ann@here.test"), DATE)
    assert RECEIVED.fullmatch(field)
    assert all(len(line) < 998 for line in field.split(b"\r\n"))


def test_forgeries() -> None:
    assert traceable("x (mx.bank.test [192.0.2.99])\r\n\tby y; z") == "x??mx.bank.test?[192.0.2.99]????by?y??z"
    assert traceable("ümlaut_a-b.c:[d]") == "?mlaut_a-b.c:[d]"
    assert len(traceable("a" * 1000)) == 255


@pytest.fixture
def _zone(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    date.cache_clear()
    yield
    os.environ.pop("TZ", None)
    time.tzset()
    date.cache_clear()


@pytest.mark.parametrize(
    ("_zone", "shown"),
    [
        ("UTC", "Tue, 14 Nov 2023 22:13:20 +0000"),
        ("ABC-5:30", "Wed, 15 Nov 2023 03:43:20 +0530"),
        ("ABC+3:30", "Tue, 14 Nov 2023 18:43:20 -0330"),
        ("ABC-13", "Wed, 15 Nov 2023 11:13:20 +1300"),
    ],
    indirect=["_zone"],
)
@pytest.mark.usefixtures("_zone")
def test_dates(shown: str) -> None:
    assert date(1_700_000_000) == shown


@given(st.integers(0, 4_000_000_000))
def test_dates_are_read_back(seconds: int) -> None:
    assert email.utils.parsedate_to_datetime(date(seconds)).timestamp() == seconds


# Loops


@pytest.mark.parametrize(
    ("header", "hops", "mailboxes"),
    [
        (b"", 0, set()),
        (b"Received: x\r\nReceived: y\r\n", 2, set()),
        (b"rEcEiVeD : x\r\n", 1, set()),
        (b"Received-SPF: x\r\nX-Received: y\r\nReceivedx: z\r\n", 0, set()),
        (b"Subject: x\r\n Received: y\r\n\tReceived: z\r\n", 0, set()),
        (b"Delivered-To: a@b.test\r\n", 0, {"a@b.test"}),
        (b"DELIVERED-TO:A@B.Test\r\n", 0, {"a@b.test"}),
        (b"Delivered-To:\r\n <a@b.test>\r\n", 0, {"a@b.test"}),
        (b"Delivered-To:\r\n\ta@\r\n\tb.test\r\nReceived: x\r\n", 1, {"a@b.test"}),
        (b'Delivered-To: "a"@b.test\r\nDelivered-To: c@b.test\r\n', 0, {"a@b.test", "c@b.test"}),
        (b"Delivered-To: not an address\r\nDelivered-To:\r\nDelivered-To: a@b.test\r\n", 0, {"a@b.test"}),
        (b"X-Delivered-To: a@b.test\r\n", 0, set()),
        (b"Subject: x\r\n Delivered-To: a@b.test\r\n", 0, set()),
        ("Delivered-To: jürgen@bücher.test\r\n".encode(), 0, {"jürgen@xn--bcher-kva.test"}),
        (b"Delivered-To: \xff@b.test\r\n", 0, {"\ufffd@b.test"}),
        (b"Received: x\nReceived: y\nDelivered-To: a@b.test\n", 2, {"a@b.test"}),
        (b"Received: x\r\n" * 5000, 5000, set()),
    ],
)
def test_trace(header: bytes, hops: int, mailboxes: set[str]) -> None:
    assert trace(header, 100) == (hops, frozenset(mailboxes))


def test_trace_of_a_hostile_header_takes_no_time() -> None:
    header = b"delivered-to:" + b"\r\n " * 80_000 + b"\r"
    start = time.process_time()
    trace(header, 100)
    trace(b"delivered-to:" + b"\r" * 250_000, 100)
    trace(b"received" + b" " * 250_000, 100)
    trace(b"received \n" * 25_000, 100)
    trace(b"delivered-to:a@b\n" * 15_000, 100)
    trace(f"delivered-to:é@{'é.' * 100}x\n".encode() * 1000, 100)
    assert time.process_time() - start < 2


def test_too_many_deliveries_are_a_loop() -> None:
    assert trace(b"Delivered-To: a@b.test\r\n" * 3, 3) == (0, {"a@b.test"})
    assert trace(b"Delivered-To: a@b.test\r\n" * 4, 3) == (4, {"a@b.test"})


@given(st.lists(st.sampled_from([b"received", b"delivered-to", b":", b" ", b"\r\n", b"\n", b"\r", b"a@b.test", b"x"])))
def test_trace_never_fails(pieces: list[bytes]) -> None:
    hops, mailboxes = trace(b"".join(pieces), 100)
    assert hops <= len(pieces)
    assert mailboxes <= {"a@b.test", "aa@b.test"} | mailboxes


def test_what_may_be_converted() -> None:
    for content, convertible in (
        (Content.NONE, True),
        (Content.EIGHT_BIT | Content.EIGHT_BIT_HEADER, True),
        (Content.BARE, False),
        (Content.BINARY, False),
    ):
        assert Message(envelope(), b"", None, 0, 0, content, 0.0).convertible is convertible
