"""What EHLO offers, and the parameters of MAIL and RCPT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsmtp.extensions import (
    EXTENSIONS,
    MAIL_PARAMETERS,
    RCPT_PARAMETERS,
    CommandError,
    Offer,
    Parameter,
    decode_xtext,
    offered,
    parse_parameters,
    without_success,
)

ALL = Offer(
    message_size=1000, recipients=100, starttls=True, any_octets=True, reports=True, keeps_tls=True, fetches=True
)


def test_everything_is_offered_where_everything_can_be_done() -> None:
    assert list(offered(ALL).values()) == [
        "PIPELINING", "SIZE 1000", "8BITMIME", "SMTPUTF8", "CHUNKING", "BINARYMIME", "ENHANCEDSTATUSCODES",
        "DSN", "REQUIRETLS", "LIMITS RCPTMAX=100", "STARTTLS", "ETRN", "HELP",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("withheld", "gone"),
    [
        ({"8BITMIME"}, {"8BITMIME", "SMTPUTF8"}),  # RFC 6531 3.1
        ({"CHUNKING"}, {"CHUNKING", "BINARYMIME"}),  # RFC 3030 3
        ({"STARTTLS"}, {"STARTTLS"}),
        ({"SMTPUTF8", "BINARYMIME"}, {"SMTPUTF8", "BINARYMIME"}),
        ({"UNKNOWN"}, set()),
    ],
)
def test_what_is_withheld_takes_with_it_what_needs_it(withheld: set[str], gone: set[str]) -> None:
    offer = replace(ALL, withheld=frozenset(withheld))
    assert set(offered(ALL)) - set(offered(offer)) == gone


def test_what_cannot_be_done_is_not_offered() -> None:
    for lacks, keyword in (
        ("starttls", "STARTTLS"),
        ("any_octets", "BINARYMIME"),
        ("reports", "DSN"),
        ("keeps_tls", "REQUIRETLS"),
        ("fetches", "ETRN"),
    ):
        assert set(offered(ALL)) - set(offered(replace(ALL, **{lacks: False}))) == {keyword}
    assert not {"DSN", "REQUIRETLS"} & set(offered(Offer(1000, 100, starttls=True, any_octets=True)))


def test_where_mail_is_only_fetched() -> None:
    assert list(offered(replace(ALL, odmr=True))) == ["ENHANCEDSTATUSCODES", "STARTTLS", "ETRN", "ATRN", "HELP"]


def test_what_is_needed_stands_before_what_needs_it() -> None:
    keywords = [extension.keyword for extension in EXTENSIONS]
    assert len(set(keywords)) == len(keywords)
    for number, extension in enumerate(EXTENSIONS):
        assert not extension.needs or extension.needs in keywords[:number]


def test_xtext() -> None:
    assert decode_xtext("") == ""
    assert decode_xtext("a+2Bb+3D+20c") == "a+b= c"
    for bad in ("+", "+2", "+2b", "a=b", "a b", "+0D", "+0A", "+00", "+7F", "+80", "+C3+BC", "ü", "\x1f", "+GG"):
        with pytest.raises(ValueError, match="xtext"):
            decode_xtext(bad)


@given(st.text(max_size=30))
def test_xtext_decodes_to_printable_ascii_or_not_at_all(text: str) -> None:
    try:
        decoded = decode_xtext(text)
    except ValueError:
        return
    assert all(" " <= character <= "~" for character in decoded)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30))
def test_xtext_that_was_encoded_is_decoded(text: str) -> None:
    encoded = "".join(c if "!" <= c <= "~" and c not in "+=" else f"+{ord(c):02X}" for c in text)
    assert decode_xtext(encoded) == text


def test_parameters_by_keyword() -> None:
    assert parse_parameters(b" size=10  SMTPUTF8 Body=7bit ", MAIL_PARAMETERS) == {
        "SIZE": 10, "SMTPUTF8": 1, "BODY": "7BIT",
    }  # fmt: skip
    assert parse_parameters(b" NOTIFY=success,DELAY ORCPT=rfc822;a+2Bb@c", RCPT_PARAMETERS) == {
        "NOTIFY": "SUCCESS,DELAY", "ORCPT": "rfc822;a+2Bb@c",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("notify", "left"),
    [("SUCCESS", "NEVER"), ("SUCCESS,FAILURE", "FAILURE"), ("DELAY,SUCCESS,FAILURE", "DELAY,FAILURE")],
)
def test_notify_without_success(notify: str, left: str) -> None:
    assert without_success(notify) == left
    assert parse_parameters(f" NOTIFY={left}".encode(), RCPT_PARAMETERS)["NOTIFY"] == left


def code(raw: bytes, table: Mapping[str, Parameter]) -> int:
    with pytest.raises(CommandError) as caught:
        parse_parameters(raw, table)
    return caught.value.reply.code


@pytest.mark.parametrize("table", [MAIL_PARAMETERS, RCPT_PARAMETERS])
def test_unknown_keywords(table: Mapping[str, Parameter]) -> None:
    assert code(b" FOO", table) == 555
    assert code(b" FOO=1", table) == 555


VALUES = {
    "SIZE": "1",
    "BODY": "7BIT",
    "RET": "FULL",
    "ENVID": "x",
    "NOTIFY": "DELAY",
    "ORCPT": "rfc822;x",
    "SMTPUTF8": "",
    "REQUIRETLS": "",
    "AUTH": "<>",
}


@pytest.mark.parametrize("keyword", [*MAIL_PARAMETERS, *RCPT_PARAMETERS])
def test_every_parameter_once_and_with_or_without_its_value(keyword: str) -> None:
    table = MAIL_PARAMETERS if keyword in MAIL_PARAMETERS else RCPT_PARAMETERS
    value = VALUES[keyword]
    word = f" {keyword}={value}" if value else f" {keyword}"
    assert list(parse_parameters(word.encode(), table)) == [keyword]
    assert code((word + word.lower()).encode(), table) == 501
    assert code(f" {keyword}{'' if value else '=x'}".encode(), table) == 501
    assert code(f" {keyword}=".encode(), table) == 501
    longest = table[keyword].longest
    if longest:
        assert code(f" {keyword}={'1' * (longest + 1)}".encode(), table) == 501


@pytest.mark.parametrize(
    "raw",
    [
        b" SIZE=1\x1fBODY=7BIT",
        b" SIZE=1\tBODY=7BIT",
        b" SIZE=1\xa0",
        "\xa0SIZE=1".encode(),
        b" SIZE=\xff",
        b" =1",
        b" A=B=C",
    ],
)
def test_only_spaces_stand_between_parameters(raw: bytes) -> None:
    assert code(raw, MAIL_PARAMETERS) == 501


@given(st.binary(max_size=40))
def test_any_octets_are_parameters_or_refused(raw: bytes) -> None:
    for table in (MAIL_PARAMETERS, RCPT_PARAMETERS):
        try:
            values = parse_parameters(b" " + raw, table)
        except CommandError:
            continue
        for value in values.values():
            assert isinstance(value, int) or value.isprintable()


@given(st.text(max_size=20))
def test_orcpt_of_any_text(text: str) -> None:
    raw = f" ORCPT=utf-8;{text}".encode("utf-8", "surrogatepass")
    try:
        value = parse_parameters(raw, RCPT_PARAMETERS)["ORCPT"]
    except CommandError:
        return
    assert isinstance(value, str)
    assert value.isprintable()
