"""The verb table, and how arguments are read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsmtp._parser import Line, Parser
from fastsmtp.address import NULL, Address
from fastsmtp.commands import (
    BARRIERS,
    FOREIGN,
    NOT_IMPLEMENTED,
    TABLE,
    VERBS,
    Argument,
    parse_bdat,
    parse_mail,
    parse_rcpt,
)
from fastsmtp.extensions import CommandError
from fastsmtp.reply import Then
from fastsmtp.session import HANDLERS


def line(text: bytes) -> Line:
    parser = Parser(BARRIERS)
    parser.feed(text + b"\r\n")
    event = parser.next()
    assert isinstance(event, Line)
    return event


def refusal(text: bytes, brackets: bool = True) -> str:
    """Code and enhanced code of the error."""
    parse = parse_mail if text[:4] == b"MAIL" else parse_rcpt
    with pytest.raises(CommandError) as caught:
        parse(line(text), brackets)
    return f"{caught.value.reply.code} {caught.value.reply.enhanced}"


def test_every_verb_has_a_row_and_a_handler() -> None:
    assert set(VERBS) == set(HANDLERS)
    assert len(VERBS) == len(TABLE)
    assert not set(VERBS) & (NOT_IMPLEMENTED | FOREIGN)


def test_barriers_are_the_verbs_whose_answer_decides_what_follows() -> None:
    ours = {b"DATA", b"BDAT", b"STARTTLS", b"ATRN", b"QUIT", b"AUTH"}
    assert ours | {b"GET", b"POST", b"CONNECT", b"PUT"} == BARRIERS


def test_what_submission_allows_before_auth() -> None:
    # BDAT too: it is refused once its octets are consumed.
    assert {verb.name for verb in TABLE if verb.open} == {
        "EHLO", "HELO", "LHLO", "BDAT", "RSET", "NOOP", "QUIT", "HELP", "STARTTLS", "AUTH",
    }  # fmt: skip


def test_what_may_come_before_helo() -> None:
    """RFC 5321 4.1.4: NOOP, HELP, EXPN, VRFY and RSET at any time."""
    assert {verb.name for verb in TABLE if verb.after_helo} == {"MAIL", "RCPT", "DATA", "ETRN", "ATRN"}


def test_what_is_known_where_mail_is_only_fetched() -> None:
    # BDAT too: it is refused once its octets are consumed.
    assert {verb.name for verb in TABLE if verb.odmr} == {
        "EHLO", "HELO", "BDAT", "RSET", "NOOP", "QUIT", "HELP", "STARTTLS", "AUTH", "ETRN", "ATRN",
    }  # fmt: skip


def test_verbs_without_an_argument() -> None:
    assert {verb.name for verb in TABLE if verb.argument is Argument.NONE} == {"DATA", "RSET", "QUIT", "STARTTLS"}


def test_mail() -> None:
    address, parameters = parse_mail(line(b"MAIL FROM:<A.b@C.Test> SIZE=5 body=8bitmime"), True)
    assert (address.local, address.domain) == ("A.b", "c.test")
    assert parameters == {"SIZE": 5, "BODY": "8BITMIME"}
    address, parameters = parse_mail(line(b"MAIL FROM:<>"), True)
    assert not address
    assert parameters == {}


@pytest.mark.parametrize(
    "text", [b"MAIL FROM:  <a@b.test>", b"mail From: <a@b.test>  ", b"MAIL FROM:<@x.test:a@b.test>"]
)
def test_mail_is_read_leniently(text: bytes) -> None:
    address, _ = parse_mail(line(text), True)
    assert str(address) == "a@b.test"


def test_brackets_can_be_left_out_where_that_is_allowed() -> None:
    assert refusal(b"MAIL FROM:a@b.test") == "501 5.1.7"
    address, parameters = parse_mail(line(b"MAIL FROM:a@b.test SIZE=1"), False)
    assert (str(address), parameters) == ("a@b.test", {"SIZE": 1})
    assert refusal(b"RCPT TO:a@b.test") == "501 5.1.3"
    address, _, _ = parse_rcpt(line(b"RCPT TO:a@b.test"), False)
    assert str(address) == "a@b.test"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"MAIL TO:<a@b.test>", "501 5.1.7"),
        (b"MAIL FROM<a@b.test>", "501 5.1.7"),
        (b"MAIL FROM :<a@b.test>", "501 5.1.7"),
        (b"MAIL FROM:<a@b.test>SIZE=1", "501 5.1.7"),
        (b"MAIL FROM:<a@b.test>\tSIZE=1", "501 5.1.7"),
        (b"MAIL FROM:<a\0@b.test>", "501 5.1.7"),
        (b"MAIL FROM:<a@b.test> FOO=1", "555 5.5.4"),
        (b"MAIL FROM:<a@b.test> SIZE=x", "501 5.5.4"),
        ("MAIL FROM:<ü@b.test>".encode(), "553 5.6.7"),
        ("MAIL FROM:<a@ü.test> SIZE=1".encode(), "553 5.6.7"),
        (b"RCPT FROM:<a@b.test>", "501 5.1.3"),
        (b"RCPT TO:<>", "501 5.1.3"),
        (b"RCPT TO: <>", "501 5.1.3"),
        (b"RCPT TO:<a@b.test>x", "501 5.1.3"),
        (b"RCPT TO:<a@b.test> SIZE=1", "555 5.5.4"),
        (b"RCPT TO:<a@b.test> NOTIFY=", "501 5.5.4"),
    ],
)
def test_what_is_refused(text: bytes, said: str) -> None:
    assert refusal(text) == said


def test_non_ascii_with_smtputf8() -> None:
    address, _ = parse_mail(line("MAIL FROM:<ü@ü.test> SMTPUTF8".encode()), True)
    assert str(address) == "ü@xn--tda.test"


def test_rcpt_says_whether_it_was_ascii() -> None:
    assert parse_rcpt(line(b"RCPT TO:<a@b.test>"), True)[1]
    assert not parse_rcpt(line("RCPT TO:<a@ü.test>".encode()), True)[1]
    # An address literal is not one of the plain paths that the parser reads itself.
    assert parse_rcpt(line(b"RCPT TO:<a@[192.0.2.1]>"), True)[1]


LOCALS = st.text('ab."\\ @%<>:,\xfc\0', max_size=8)


@given(local=LOCALS, domain=st.sampled_from(["b.test", "B.Test", "-b.test", "b..test", "[192.0.2.1]", "", "ü.test"]))
def test_the_parsers_reading_is_a_shortcut(local: str, domain: str) -> None:
    """A path that is read with its line is the path that is read from its text."""
    text = f"MAIL FROM:<{local}@{domain}> SMTPUTF8".encode()
    # Blanks before the path send it the slow way.
    slow = f"MAIL FROM: <{local}@{domain}> SMTPUTF8".encode()
    found: list[Address | str] = []
    for each in (text, slow):
        try:
            found.append(parse_mail(line(each), True)[0])
        except CommandError as error:
            found.append(error.reply.text)
    assert found[0] == found[1]
    if found[0] == NULL:
        assert found[0] is NULL


@pytest.mark.parametrize(
    ("rest", "size", "last"),
    [
        (b"0", 0, False),
        (b"10", 10, False),
        (b"007 LAST", 7, True),
        (b"7   last", 7, True),
        (b"9" * 20, 10**20 - 1, False),
    ],
)
def test_bdat(rest: bytes, size: int, last: bool) -> None:
    assert parse_bdat(rest) == (size, last)


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"x",
        b"-1",
        b"+1",
        b"1 ",
        b" 1",
        b"1 FIRST",
        b"1 LAST ",
        b"1\tLAST",
        b"0x1",
        b"1.0",
        b"1e3",
        b"9" * 21,
        b"1LAST",
        b"1 LAST\n",
        "١".encode(),
        b"1\0",
    ],
)
def test_bad_bdat_ends_the_connection(rest: bytes) -> None:
    with pytest.raises(CommandError) as caught:
        parse_bdat(rest)
    assert caught.value.reply.code == 501
    assert caught.value.reply.then is Then.CLOSE
