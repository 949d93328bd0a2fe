"""What a report gives back: which type and coding for which octets, whole fields only, and decoding gives them back."""

from __future__ import annotations

import quopri

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsmtp.address import Address
from fastsmtp.message import Content, Envelope, Message
from fastsmtp.returned import return_header, return_whole
from fastsmtp.rewrite import quoted_printable

PREFIX = b"Received: from a.test ([192.0.2.1])\r\n\tby mx.test with ESMTP id x; Mon, 1 Jan 2024 00:00:00 +0000\r\n"
LIMIT = 16 << 10


def message_of(body: bytes, prefix: bytes = PREFIX, cuts: tuple[tuple[int, int], ...] = ()) -> Message:
    """As the parser would describe it: the header ends at the first empty line, or with the message."""
    end = 2 if body.startswith(b"\r\n") else body.find(b"\r\n\r\n") + 4
    if end == 3:
        end = len(body)
    return Message(Envelope(Address("a", "b.test")), prefix, [body], len(body), end, Content.NONE, 0, cuts=cuts)


@pytest.mark.parametrize(
    ("body", "kind", "encoding"),
    [
        (b"Subject: x\r\n\r\nHello\r\n", "message/rfc822", "7bit"),
        (b"Subject: x\r\n\r\nno end of line", "message/rfc822", "7bit"),
        (b"\r\nno header\r\n", "message/rfc822", "7bit"),
        (b"", "message/rfc822", "7bit"),
        (b"Subject: x\r\n\r\nH\xe4llo\r\n", "message/rfc822", "8bit"),
        ("Subject: Grüße\r\n\r\nHällo\r\n".encode(), "message/global", "8bit"),
        ("Subject: Grüße\r\n\r\n".encode() + b"H\xe4llo\r\n", "message/global", "8bit"),
        (b"Subject: x\r\n\r\n" + b"x" * 998 + b"\r\n", "message/rfc822", "7bit"),
    ],
)
def test_whole(body: bytes, kind: str, encoding: str) -> None:
    part = return_whole(message_of(body), body)
    assert part is not None
    assert (part.type, part.encoding, part.octets) == (kind, encoding, PREFIX + body)


@pytest.mark.parametrize(
    "body",
    [
        b"Subject: x\r\n\r\nbare\nLF\r\n",
        b"Subject: x\r\n\r\nbare\rCR\r\n",
        b"Subject: x\r\n\r\n\0\r\n",
        b"Subject: Gr\xfc\xdfe\r\n\r\nLatin-1 in the header\r\n",
        b"Subject: x\r\n\r\n" + b"x" * 999 + b"\r\n",
    ],
)
def test_what_no_part_may_hold_whole(body: bytes) -> None:
    assert return_whole(message_of(body), body) is None


def test_part_of_a_body_is_not_the_whole() -> None:
    body = b"Subject: x\r\n\r\nHello\r\n"
    assert return_whole(message_of(body), body[:-1]) is None


@pytest.mark.parametrize(
    ("header", "kind", "encoding"),
    [
        (b"Subject: x\r\n", "text/rfc822-headers", "7bit"),
        ("Subject: Grüße\r\n".encode(), "message/global-headers", "8bit"),
        (b"Subject: Gr\xfc\xdfe\r\n", "text/rfc822-headers", "quoted-printable"),
        (b"Subject: a\nb\r\n", "text/rfc822-headers", "quoted-printable"),
        (b"Subject: a\rb \r\n", "text/rfc822-headers", "quoted-printable"),
        (b"Subject: \0\r\n", "text/rfc822-headers", "quoted-printable"),
        (b"Subject: " + b"x" * 1000 + b"\r\n", "text/rfc822-headers", "quoted-printable"),
    ],
)
def test_header(header: bytes, kind: str, encoding: str) -> None:
    body = header + b"\r\nThe body is not shown.\r\n"
    part = return_header(message_of(body), body, LIMIT)
    assert (part.type, part.encoding) == (kind, encoding)
    octets = part.octets
    if encoding == "quoted-printable":
        assert octets.isascii()
        octets = quopri.decodestring(octets)
    assert octets == PREFIX + header


HEADER = b"A: 1\r\nB: 2\r\n\tfolded\r\nC: 3\r\n"


@pytest.mark.parametrize(
    ("limit", "shown"),
    [
        (len(HEADER) + 2, HEADER),
        (len(HEADER) + 1, HEADER),
        (len(HEADER), HEADER),
        (len(HEADER) - 1, b"A: 1\r\nB: 2\r\n\tfolded\r\n"),
        (23, b"A: 1\r\nB: 2\r\n\tfolded\r\n"),
        (15, b"A: 1\r\n"),
        (12, b"A: 1\r\n"),
        (6, b"A: 1\r\n"),
        (5, b""),
        (0, b""),
    ],
)
def test_a_long_header_ends_behind_a_whole_field(limit: int, shown: bytes) -> None:
    body = HEADER + b"\r\nHello\r\n"
    assert return_header(message_of(body, prefix=b""), body, limit).octets == shown


@pytest.mark.parametrize("size", range(len(HEADER)))
def test_a_header_that_was_read_in_part_ends_behind_a_whole_field(size: int) -> None:
    body = HEADER + b"\r\nHello\r\n"
    shown = return_header(message_of(body, prefix=b""), body[:size], LIMIT).octets
    assert shown in (b"", b"A: 1\r\n", b"A: 1\r\nB: 2\r\n\tfolded\r\n")
    assert len(shown) <= size


def test_cuts_are_left_out() -> None:
    body = b"A: 1\r\nForged: x\r\nB: 2\r\nForged: y\r\n\r\nHello\r\n"
    message = message_of(body, cuts=((6, 17), (23, 34)))
    assert return_header(message, body, LIMIT).octets == PREFIX + b"A: 1\r\nB: 2\r\n"
    whole = return_whole(message, body)
    assert whole is not None
    assert whole.octets == PREFIX + b"A: 1\r\nB: 2\r\n\r\nHello\r\n"


@given(st.lists(st.sampled_from([b"\r\n", b"\r", b"\n", b" ", b"=", b".", b"\0", b"\xff", b"a" * 75]) | st.binary()))
def test_quoted_printable_keeps_every_octet(pieces: list[bytes]) -> None:
    octets = b"".join(pieces)
    coded = quoted_printable(octets)
    assert quopri.decodestring(coded) == octets
    assert coded.isascii()
    assert b"\0" not in coded
    lines = coded.split(b"\r\n")
    assert all(len(line) <= 76 and b"\r" not in line and b"\n" not in line for line in lines)
