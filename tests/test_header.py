"""Header sections and address lists: what RFC 5322 has, what is obsolete, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsmtp.address import Address
from fastsmtp.header import VALUE_LIMIT, Header, HeaderError, parse_mailboxes, read_header

LISTS = {
    b"": [],
    b" ann@example.org\r\n": ["ann@example.org"],
    b" Ann <ann@example.org>": ["ann@example.org"],
    b"Ann\r\n\t<ann@example.org>\r\n": ["ann@example.org"],
    b'"Ann, <eve@evil.test>" <ann@example.org>': ["ann@example.org"],
    b"ann@example.org (eve@evil.test)": ["ann@example.org"],
    b"ann@example.org (a (nested \\) one) <eve@evil.test>)": ["ann@example.org"],
    b"=?utf-8?q?eve=40evil=2Etest?= <ann@example.org>": ["ann@example.org"],
    b"ann@example.org, Bob <bob@example.org>": ["ann@example.org", "bob@example.org"],
    b"Us: ann@example.org, Bob <bob@example.org>;": ["ann@example.org", "bob@example.org"],
    b"Us:ann@example.org;, eve@evil.test": ["ann@example.org", "eve@evil.test"],
    b"undisclosed-recipients:;": [],
    b"undisclosed-recipients: (none) ;": [],
    b"Us: ,,;": [],
    b",ann@example.org,,": ["ann@example.org"],  # obsolete from here
    b"ann @ example . org": ["ann@example.org"],
    b"ann (a) . (b) b @ (c) example.org": ["ann.b@example.org"],
    b'"ann" . b@example.org': ["ann.b@example.org"],
    b"<@a.test,@b.test:ann@example.org>": ["ann@example.org"],
    b"<@a.test, , @b.test : ann@example.org>": ["ann@example.org"],
    b"Ann B. Miller <ann@example.org>": ["ann@example.org"],
    b'"a\\"b c"@example.org': ['"a\\"b c"@example.org'],
    b'"a\r\n b"@example.org': ['"a b"@example.org'],
    b"ann@[192.0.2.1]": ["ann@[192.0.2.1]"],
    b"ANN@EXAMPLE.ORG": ["ANN@example.org"],
    b"=?utf-16be?b?AEE=?= <ann@example.org>": ["ann@example.org"],
    b"=?iso-2022-jp?B?GyRCJCIbKEI=?= <ann@example.org>": ["ann@example.org"],
    b"=?utf-8?b?A?= =?zlib?q?=41?= =?utf-8?x?=00?= =?utf-8?q?=0?= <ann@example.org>": ["ann@example.org"],
    "=?utf-8?q?\u0100?= <ann@example.org>".encode(): ["ann@example.org"],
    "jürgen@bücher.example".encode(): ["jürgen@xn--bcher-kva.example"],
    b"J\xfcrgen <ann@example.org>": ["ann@example.org"],  # not UTF-8, but no address either
}
NONE = {
    "words without an address": b"Ann",
    "two addresses and no comma": b"ann@example.org eve@evil.test",
    "two in brackets": b"<ann@example.org> <eve@evil.test>",
    "empty brackets": b"<>",
    "a bracket that stays open": b"Ann <ann@example.org",
    "a bracket that was not open": b"ann@example.org>",
    "a comment that stays open": b"ann@example.org (x",
    "a comment that was not open": b"ann@example.org x)",
    "a quote that stays open": b'"Ann <ann@example.org>',
    "two domains": b"ann@example.org@evil.test",
    "no local-part": b"@example.org",
    "no domain": b"ann@",
    "a group that stays open": b"Us: ann@example.org",
    "a group in a group": b"Us: them: ann@example.org;;",
    "a group without a name": b": ann@example.org;",
    "an end of no group": b"ann@example.org;",
    "dots in a row": b"ann..b@example.org",
    "a blank in a local-part": b"ann b@example.org",
    "an empty local-part": b'""@example.org',
    "an encoded-word for a local-part": b"=?utf-8?q?eve=40evil.test=2C?=@example.org",
    "an encoded-word for an address": b"=?utf-8?q?ann=40example.org?=",
    "an encoded-word with NUL": b"=?utf-8?q?eve=40evil.test=00?= <ann@example.org>",
    "an encoded-word with a line end": b"=?iso-8859-1*en?B?ZXZlQGV2aWwudGVzdAo=?= <ann@example.org>",
    "an encoded-word with a line end, cut short": b"=?utf-8?b?ZXZlQGV2aWwudGVzdAo?= <ann@example.org>",
    "such a one between quotes": b'"=?utf-8?Q?=0D?=" <ann@example.org>',
    "such a one in a comment": b"ann@example.org (=?utf-8?Q?=0a?=)",
    "such a one in UTF-7": b"=?utf-7?q?+AAo-?= <ann@example.org>",
    "such a one in UTF-16": b"=?UTF-16BE?b?AAo=?= <ann@example.org>",
    "octets that are not UTF-8": b"j\xfc@example.org",
    "NUL": b"ann@example.org\0",
    "a control character": b"ann\x01@example.org",
    "a backslash": b"ann\\@evil.test@example.org",
    "a route without an address": b"<@a.test>",
    "too long a field": b" " * VALUE_LIMIT + b"ann@example.org",
}


@pytest.mark.parametrize(("value", "mailboxes"), LISTS.items(), ids=map(repr, LISTS))
def test_an_address_list_is_read(value: bytes, mailboxes: list[str]) -> None:
    assert [address.wire for address in parse_mailboxes(value)] == mailboxes


@pytest.mark.parametrize("value", NONE.values(), ids=NONE)
def test_what_is_no_address_list_is_an_error(value: bytes) -> None:
    with pytest.raises(HeaderError) as error:
        parse_mailboxes(value)
    assert "evil" not in str(error.value)


@given(st.binary(max_size=60) | st.text(st.sampled_from('a1.@<>,:;()[]"\\ =?\r\n'), max_size=40).map(str.encode))
def test_any_octets_are_a_list_or_an_error(value: bytes) -> None:
    try:
        found = parse_mailboxes(value)
    except HeaderError:
        return
    assert parse_mailboxes(", ".join(address.wire for address in found).encode()) == found


@given(st.lists(st.tuples(st.text('ab ."\\@', min_size=1, max_size=8), st.sampled_from(["a.test", "[192.0.2.1]"]))))
def test_what_an_address_writes_is_read_back(parts: list[tuple[str, str]]) -> None:
    addresses = [Address(local, domain) for local, domain in parts]
    assert parse_mailboxes(", ".join(map(str, addresses)).encode()) == addresses


def names(header: Header) -> list[str]:
    return [field.name for field in header.fields]


def test_fields_say_where_they_stand() -> None:
    octets = b"From: a\r\nBcc :b,\r\n\tc\r\n \r\nX-Y:\r\n\r\nbody: no\r\n"
    header = read_header(octets)
    assert names(header) == ["from", "bcc", "x-y"]
    assert [octets[field.start : field.end] for field in header.fields] == [
        b"From: a\r\n",
        b"Bcc :b,\r\n\tc\r\n \r\n",
        b"X-Y:\r\n",
    ]
    assert header.fields[1].value == b"b,\r\n\tc\r\n \r\n"
    assert octets[header.end :] == b"\r\nbody: no\r\n"


@pytest.mark.parametrize(
    ("octets", "found", "start", "rest"),
    [
        (b"", [], 0, b""),
        (b"\r\nA: b\r\n", [], 0, b"\r\nA: b\r\n"),
        (b"A: b", ["a"], 0, b""),
        (b"A: b\r\nno field\r\nB: c\r\n\r\n", ["a"], 0, b"no field\r\nB: c\r\n\r\n"),
        (b" folded: nothing\r\nA: b\r\n", [], 0, b" folded: nothing\r\nA: b\r\n"),
        (b"From ann Mon Jan\r\nA: b\r\n\r\n", ["a"], 18, b"\r\n"),
        (b"From ann", [], 0, b"From ann"),
        (b"From : ann\r\n\r\n", ["from"], 0, b"\r\n"),
        (b"A: b\nB: c\r\n\r\n", ["a"], 0, b"\r\n"),
        ("Ä: b\r\n".encode(), [], 0, "Ä: b\r\n".encode()),
        (b": b\r\n", [], 0, b": b\r\n"),
    ],
)
def test_what_ends_a_header(octets: bytes, found: list[str], start: int, rest: bytes) -> None:
    header = read_header(octets)
    assert (names(header), header.start, octets[header.end :]) == (found, start, rest)
