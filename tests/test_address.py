"""Paths and mailboxes: every form of RFC 5321 4.1.2, limits at N-1, N, N+1, relay tricks, fuzz."""

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastsmtp.address import (
    NULL,
    Address,
    AddressError,
    _parse_any_path,
    parse_address,
    parse_domain,
    parse_path,
)

ACCEPTED = [
    # raw, local, domain, wire form
    (b"<ann@example.org>", "ann", "example.org", "ann@example.org"),
    (b"<Ann.Smith@Example.ORG>", "Ann.Smith", "example.org", "Ann.Smith@example.org"),
    (b"<!#$%&'*+/=?^_`{|}~-@d>", "!#$%&'*+/=?^_`{|}~-", "d", "!#$%&'*+/=?^_`{|}~-@d"),
    (b"<SRS0=hash=tt=orig.example=user@fwd.example>", "SRS0=hash=tt=orig.example=user", "fwd.example", None),
    (b"<u@localhost>", "u", "localhost", None),
    (b"<u@_spf.mail_1.example>", "u", "_spf.mail_1.example", None),
    (b"<u@a--b.example>", "u", "a--b.example", None),
    (b"<u@1.example>", "u", "1.example", None),
    # quoted local-parts: the quotes are syntax, not name
    (b'<"ann"@d>', "ann", "d", "ann@d"),
    (b'<"a b"@d>', "a b", "d", '"a b"@d'),
    (b'<"\\a\\n\\n"@d>', "ann", "d", "ann@d"),
    (b'<"a\\"b\\\\c"@d>', 'a"b\\c', "d", '"a\\"b\\\\c"@d'),
    (b'<"a..b"@d>', "a..b", "d", '"a..b"@d'),
    (b'<".a"@d>', ".a", "d", '".a"@d'),
    (b'<"a>b"@d>', "a>b", "d", '"a>b"@d'),
    (b'<" "@d>', " ", "d", '" "@d'),
    (b'<"<x@y>"@d>', "<x@y>", "d", '"<x@y>"@d'),
    # address literals
    (b"<u@[192.0.2.1]>", "u", "[192.0.2.1]", "u@[192.0.2.1]"),
    (b"<u@[IPv6:2001:DB8:0:0:0:0:0:1]>", "u", "[ipv6:2001:db8::1]", "u@[ipv6:2001:db8::1]"),
    (b"<u@[ipv6:::ffff:192.0.2.1]>", "u", "[192.0.2.1]", "u@[192.0.2.1]"),
    (b"<u@[IPV6:::FFFF:c000:201]>", "u", "[192.0.2.1]", None),
    # source routes are stripped
    (b"<@a:u@d>", "u", "d", "u@d"),
    (b"<@a,@b:u@d>", "u", "d", "u@d"),
    (b"<@[IPv6:2001:db8::1],@[192.0.2.1]:u@d>", "u", "d", "u@d"),
    ("<@bücher.example:u@d>".encode(), "u", "d", "u@d"),
    (b'<@a:"x:y@z"@d>', "x:y@z", "d", '"x:y@z"@d'),
    # internationalised
    ("<jörg@d>".encode(), "jörg", "d", "jörg@d"),
    ('<"jörg b"@d>'.encode(), "jörg b", "d", '"jörg b"@d'),
    ("<u@Bücher.example>".encode(), "u", "xn--bcher-kva.example", "u@xn--bcher-kva.example"),
    (b"<u@XN--BCHER-KVA.example>", "u", "xn--bcher-kva.example", None),
    ("<u@bücher。example>".encode(), "u", "xn--bcher-kva.example", None),
    ("<u@ＥＸＡＭＰＬＥ.org>".encode(), "u", "example.org", None),
    ("<u@_x.bücher.example>".encode(), "u", "_x.xn--bcher-kva.example", None),
    ("<用户@例え.jp>".encode(), "用户", "xn--r8jz45g.jp", None),
    # an encoded-word is text
    (b"<=?utf-8?q?ann=40x?=@d>", "=?utf-8?q?ann=40x?=", "d", None),
    # bare postmaster
    (b"<postmaster>", "postmaster", "", "postmaster"),
    (b"<PostMaster>", "PostMaster", "", "PostMaster"),
    (b"<>", "", "", ""),
]


@pytest.mark.parametrize(("raw", "local", "domain", "wire"), ACCEPTED)
def test_accepted_forms(raw: bytes, local: str, domain: str, wire: str | None) -> None:
    address, end = parse_path(raw + b" SIZE=1")
    assert (address.local, address.domain, end) == (local, domain, len(raw))
    assert str(address) == (f"{local}@{domain}" if wire is None else wire)
    assert parse_path(f"<{address}>".encode()) == (address, len(f"<{address}>".encode()))


REFUSED = [
    b"",
    b"<",
    b">",
    b"< >",
    b"<a",
    b"<a>",
    b"<a@>",
    b"<@>",
    b"<@d>",
    b"<a@b",
    b"<a@b ",
    b"<a@b >",
    b"< a@b>",
    b"<<a@b>>",
    b"a@b",
    b"a@b>",
    b"<a b@d>",
    b"<a@b c>",
    b"<a@b,c>",
    b"<(comment)a@b>",
    b"<a@b(comment)>",
    b"<a@b;c>",
    b"<a:b@d>",
    b"<a\\b@d>",
    b"<postmaster@>",
    b'<"postmaster">',
    b"<mailer-daemon>",
    # local-parts
    b"<@@d>",
    b"<.a@d>",
    b"<a.@d>",
    b"<a..b@d>",
    b'<""@d>',
    b'<"a@d>',
    b'<a"@d>',
    b'<a."b"@d>',
    b'<"a"b@d>',
    b'<"a".b@d>',
    b'<"a\\"@d>',
    # domains
    b"<a@.d>",
    b"<a@d.>",
    b"<a@d..e>",
    b"<a@.>",
    b"<a@-d>",
    b"<a@d->",
    b"<a@d-.e>",
    b"<a@d.-e>",
    b"<a@d/e>",
    b"<a@d+e>",
    b"<a@b@c>",
    b'<"a"@b@c>',
    # literals
    b"<a@[]>",
    b"<a@[192.0.2]>",
    b"<a@[192.0.2.256]>",
    b"<a@[192.0.2.01]>",
    b"<a@[192.0.2.1>",
    b"<a@192.0.2.1]>",
    b"<a@[192.0.2.1]x>",
    b"<a@x[192.0.2.1]>",
    b"<a@[192.0.2.1].example>",
    b"<a@[2001:db8::1]>",
    b"<a@[IPv6:]>",
    b"<a@[IPv6:192.0.2.1]>",
    b"<a@[IPv6:fe80::1%eth0]>",
    b"<a@[IPv6:1::2::3]>",
    b"<a@[tag:content]>",
    "<a@[١.1.1.1]>".encode(),
    # source routes
    b"<@a>",
    b"<@a:>",
    b"<@a:b>",
    b"<@a:postmaster>",
    b"<@a,b:c@d>",
    b"<@a,@:c@d>",
    b"<@a,:c@d>",
    b"<@a@b:c@d>",
    b"<@-a:c@d>",
    b"<@a.:c@d>",
    b"<@[1.2.3]:c@d>",
    b"<a,@b:c@d>",
    # octets that no address has
    b"<a\0@d>",
    b"<a@d\0>",
    b'<"a\0b"@d>',
    b'<"a\\\0b"@d>',
    b'<"a\rb"@d>',
    b'<"a\nb"@d>',
    b'<"a\tb"@d>',
    b'<"a\x7fb"@d>',
    b"<a\r\n@d>",
    b"<a\x1b@d>",
    b"<a@d\x7f>",
    b"<\xff@d>",
    b"<a@\xff>",
    b"<\xc0\x80@d>",
    b"<\xed\xa0\x80@d>",
    b'<"\\\xc3\xbc"@d>',
    "<a\x85@d>".encode(),
    '<"a\u2028b"@d>'.encode(),
    "<a\x9b@d>".encode(),
    # not IDNA
    "<a@ü-.example>".encode(),
    "<a@\u2602.example>".encode(),
    "<a@ü..example>".encode(),
    "<a@ü.example。>".encode(),
    "<a@ü.a＠b>".encode(),
    "<a@\u00ad>".encode(),
    "<a@\u202ed>".encode(),
]


@pytest.mark.parametrize("raw", REFUSED)
def test_refused_forms(raw: bytes) -> None:
    with pytest.raises(AddressError) as error:
        parse_path(raw)
    assert error.value.text.isascii()
    assert error.value.text.isprintable()
    assert str(error.value) == error.value.text


def test_error_texts_name_the_fault() -> None:
    def text(raw: bytes) -> str:
        with pytest.raises(AddressError) as error:
            parse_path(raw)
        return error.value.text

    assert "brackets" in text(b"a@b")
    assert "control" in text(b'<"a\0"@b>')
    assert "control" in text("<a\x80@b>".encode())
    assert "UTF-8" in text(b"<\xff@b>")
    assert "ends in a dot" in text(b"<a@b.>")
    assert "dot at its end" in text(b"<a.@b>")
    assert "local-part is empty" in text(b'<""@b>')
    assert "no domain" in text(b"<a>")
    assert "literal" in text(b"<a@[x]>")
    assert "route" in text(b"<@a:postmaster>")
    assert "label" in text(b"<a@b..c>")
    assert "63" in text(b"<a@" + b"b" * 64 + b">")
    assert "256" in text(b"<" + b"b" * 300 + b"@d>")
    assert "internationalised" in text("<a@ü-.b>".encode())


@pytest.mark.parametrize(
    ("raw", "local", "domain"),
    [
        (b"<u%foreign@served>", "u%foreign", "served"),
        (b'<"u@foreign"@served>', "u@foreign", "served"),
        (b"<@served:u@foreign>", "u", "foreign"),
        (b"<foreign!u@served>", "foreign!u", "served"),
        (b"<u@[192.0.2.25]>", "u", "[192.0.2.25]"),
        (b"<u@[IPv6:::ffff:192.0.2.25]>", "u", "[192.0.2.25]"),
        (b"<u@foreign@served>", None, None),
        (b"<u@foreign.>", None, None),
        (b"<u@served.>", None, None),
    ],
)
def test_relay_forms(raw: bytes, local: str | None, domain: str | None) -> None:
    """What routing decides on is `domain`: it must be the one that a message would really go to."""
    if local is None:
        with pytest.raises(AddressError):
            parse_path(raw)
        return
    address, _ = parse_path(raw)
    assert (address.local, address.domain) == (local, domain)


@pytest.mark.parametrize("form", ["<{}@d>", '<"{}"@d>', "<@x:{}@d>", "<{}@bü.example>", "<{}@[192.0.2.1]>"])
def test_path_limit_is_256_with_brackets(form: str) -> None:
    for size in (255, 256, 257):
        raw = form.replace("{}", "u" * (size - len(form.replace("{}", "").encode()))).encode()
        assert len(raw) == size
        if size > 256 or "bü" in form:  # as an A-label the domain is longer than it came
            with pytest.raises(AddressError, match="256"):
                parse_path(raw)
        else:
            assert parse_path(raw)[1] == size


def test_path_limit_counts_the_wire_form() -> None:
    grown = len("xn--b-xga.example") - len("bü.example".encode())
    for size in (255 - grown, 256 - grown, 257 - grown):
        raw = ("<" + "u" * (size - len("<@bü.example>".encode())) + "@bü.example>").encode()
        assert len(raw) == size
        if size + grown > 256:
            with pytest.raises(AddressError, match="256"):
                parse_path(raw)
        else:
            assert len(f"<{parse_path(raw)[0]}>") == size + grown


def test_path_limit_without_brackets_counts_them() -> None:
    assert parse_path(b"u" * 252 + b"@d", brackets=False)[1] == 254
    with pytest.raises(AddressError, match="256"):
        parse_path(b"u" * 253 + b"@d", brackets=False)


def test_long_local_parts_are_accepted() -> None:
    for size in (63, 64, 65, 252):
        assert parse_path(b"<" + b"u" * size + b"@d>")[0].local == "u" * size


@pytest.mark.parametrize("size", [62, 63, 64])
def test_label_limit(size: int) -> None:
    for raw in (
        b"<u@" + b"a" * size + b">",
        b"<u@" + b"a" * size + b".example>",
        b"<u@x." + b"a" * size + b">",
    ):
        if size > 63:
            with pytest.raises(AddressError, match="63"):
                parse_path(raw)
        else:
            parse_path(raw)


def test_label_limit_counts_the_a_label() -> None:
    parse_domain("ü" + "a" * 55)
    assert len(parse_domain("ü" + "a" * 55)) == 63
    with pytest.raises(AddressError):
        parse_domain("ü" + "a" * 56)


def test_domain_limit() -> None:
    labels = ["a" * 63, "b" * 63, "c" * 63]
    assert len(parse_domain(".".join([*labels, "d" * 62]))) == 254
    assert len(parse_domain(".".join([*labels, "d" * 63]))) == 255
    with pytest.raises(AddressError, match="255"):
        parse_domain(".".join([*labels, "d" * 62, "e"]))
    with pytest.raises(AddressError, match="255"):
        parse_domain(".".join([*labels, "d" * 63, "é", "e"]))


def test_brackets_may_be_optional() -> None:
    assert parse_path(b"a@b", brackets=False) == (Address("a", "b"), 3)
    assert parse_path(b"a@b SIZE=1", brackets=False) == (Address("a", "b"), 3)
    assert parse_path(b'"a b"@c SIZE=1', brackets=False) == (Address("a b", "c"), 7)
    assert parse_path(b"<a@b> SIZE=1", brackets=False) == (Address("a", "b"), 5)
    assert parse_path(b"<>", brackets=False) == (NULL, 2)
    assert parse_path(b"postmaster", brackets=False) == (Address("postmaster", ""), 10)
    for raw in (b"", b" ", b"a@b>", b"a@b\tc", b"<a@b", b"@a:b@c", b"a@b\0", b"a@b<c>"):
        with pytest.raises(AddressError):
            parse_path(raw, brackets=False)


def test_null_is_false_and_others_are_not() -> None:
    assert not NULL
    assert str(NULL) == NULL.mailbox == ""
    assert parse_path(b"<>")[0] == NULL
    assert Address("a", "b")
    assert Address("postmaster", "")


def test_equality_is_local_and_domain() -> None:
    a, b = parse_path(b"<u@D.example>")[0], parse_path(b'<"u"@d.EXAMPLE>')[0]
    assert a == b
    assert len({a, b}) == 1
    assert a != parse_path(b"<U@d.example>")[0]
    assert a != parse_path(b"<u@e.example>")[0]
    assert a != "u@d.example"
    assert repr(a) == "Address('u', 'd.example')"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("<B@d>", '<"b"@D>'),
        ("<JÖRG@d>", "<jo\u0308rg@d>"),
        ("<u@BÜCHER.example>", "<u@xn--bcher-kva.example>"),
        ("<Σίσυφος@d>", "<ΣΊΣΥΦΟΣ@d>"),
        ("<\u1fb3@d>", "<\u03b1\u0345@d>"),
        ("<PostMaster>", "<postmaster>"),
    ],
)
def test_same_mailbox(one: str, other: str) -> None:
    a, b = parse_path(one.encode())[0], parse_path(other.encode())[0]
    assert a.mailbox == b.mailbox
    assert a.mailbox == a.mailbox


def test_different_mailboxes() -> None:
    raws = [b"<a@d>", b"<b@d>", b"<a@e>", b'<"a@d"@d>', b'<" a"@d>', b"<postmaster>", b"<postmaster@d>"]
    assert len({parse_path(raw)[0].mailbox for raw in raws}) == len(raws)


def test_parse_address() -> None:
    assert parse_address("Ann@Example.org") == Address("Ann", "example.org")
    assert parse_address('"a b"@bücher.example') == Address("a b", "xn--bcher-kva.example")
    for text in (
        "",
        "ann",
        "postmaster",
        "<a@b>",
        "<>",
        "a@b ",
        "a@b c",
        "@a:b@c",
        "a@b\n",
        "\ud800@d",
        "a@b@c",
    ):
        with pytest.raises(AddressError):
            parse_address(text)


def test_parse_domain() -> None:
    assert parse_domain("Example.ORG") == "example.org"
    assert parse_domain("bücher.example") == parse_domain("XN--bcher-KVA.example") == "xn--bcher-kva.example"
    assert parse_domain("[IPv6:2001:DB8::0:1]") == "[ipv6:2001:db8::1]"
    for text in (
        "",
        ".",
        "a.",
        ".a",
        "a b",
        "a\n",
        "*",
        "*.example.org",
        "a@b",
        "[",
        "[]",
        "[1.2.3.4",
        "\ud800",
    ):
        with pytest.raises(AddressError):
            parse_domain(text)


PIECES = st.sampled_from(
    [
        *b"""< > @ . .. : , " \\ [ ] - _ % ! a B.c [192.0.2.1] [IPv6:::1] postmaster xn--bcher-kva""".split(),
        *(b" ", b"\0", b"\r", b"\n", b"\t", b"\x7f", b"\xff", b"x" * 60),
        *(text.encode() for text in ("ü", "\u0345", "\u2028", "\u200d", "。")),
    ]
)
LOCALS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=80)
DOMAINS = st.lists(st.text("aB1_-ü", min_size=1, max_size=20), min_size=1, max_size=6).map(".".join)
RAW = st.one_of(
    st.lists(PIECES, max_size=12).map(b"".join),
    st.lists(PIECES, max_size=12).map(lambda pieces: b"<" + b"".join(pieces) + b">"),
    st.tuples(LOCALS, DOMAINS).map(lambda t: f"<{t[0]}@{t[1]}> X=1".encode()),
    st.tuples(LOCALS, DOMAINS).map(lambda t: f"<{Address(*t)}>".encode()),
    st.binary(max_size=40),
)


@settings(deadline=None)
@given(RAW, st.booleans())
@example(b"<a@b>", True)
@example("<\u037e@b>".encode(), True)  # NFC makes a semicolon of it
def test_nothing_but_address_or_address_error(raw: bytes, brackets: bool) -> None:
    try:
        address, end = parse_path(raw, brackets=brackets)
    except AddressError:
        return
    assert 0 < end <= len(raw)
    if raw.startswith(b"<"):
        assert raw[end - 1 : end] == b">"
    wire = f"<{address}>".encode()
    assert len(wire) <= 256
    assert parse_path(wire) == (address, len(wire))
    for text in (address.local, address.domain, address.mailbox, str(address), repr(address)):
        assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)
    assert address.domain.isascii()
    assert address.domain == address.domain.lower()
    if address.domain:
        assert parse_domain(address.domain) == address.domain
        assert parse_address(str(address)) == address
        assert address.mailbox.rpartition("@")[2] == address.domain


@settings(deadline=None)
@given(RAW)
@example(b"<" + b"a" * 253 + b"@b>")
@example(b"<" + b"a" * 252 + b"@b>")
@example(b"<a@" + b"b" * 63 + b">")
@example(b"<a@" + b"b" * 64 + b">")
@example(b"<a@" + b"b." * 32 + b"b>")
@example(b"<a@b.>")
@example(b"<a@-b>")
@example(b"<postmaster>")
def test_the_short_cut_is_the_slow_way(raw: bytes) -> None:
    def outcome(parse: object) -> object:
        assert callable(parse)
        try:
            return parse(raw)
        except AddressError as error:
            return error.text

    assert outcome(parse_path) == outcome(lambda raw: _parse_any_path(raw, True))


@settings(deadline=None)
@given(LOCALS, DOMAINS)
def test_the_wire_form_of_any_local_part_parses_back(local: str, domain: str) -> None:
    try:
        domain = parse_domain(domain)
        address, _ = parse_path(f"<{Address(local, domain)}>".encode())
    except AddressError:
        return
    assert address == Address(local, domain)
