"""The replies of a host: what is one, what is not, and that no cut of the octets makes a difference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsmtp.delivery.replies import LINE_LIMIT, LINES_LIMIT, REPLY_LIMIT, TEXT_LIMIT, Reply, ReplyParser


def read(octets: bytes, size: int = 0) -> tuple[list[tuple[int, list[bytes]]], str, bool]:
    parser = ReplyParser()
    found: list[Reply] = []
    size = size or max(len(octets), 1)
    for at in range(0, len(octets), size):
        found += parser.feed(octets[at : at + size])
    return [(reply.code, reply.lines) for reply in found], parser.error, parser.unread


GOOD = {
    "one line": (b"250 ok\r\n", [(250, [b"ok\r"])]),
    "no text": (b"250\r\n", [(250, [b""])]),
    "a blank and no text": (b"250 \r\n", [(250, [b"\r"])]),
    "a LF alone": (b"250 ok\n", [(250, [b"ok"])]),
    "several": (b"250 a\r\n354 b\r\n", [(250, [b"a\r"]), (354, [b"b\r"])]),
    "of several lines": (b"250-a\r\n250-\r\n250 c\r\n", [(250, [b"a\r", b"\r", b"c\r"])]),
    "the last line is bare": (b"250-a\r\n250\r\n", [(250, [b"a\r", b""])]),
    "octets that are no text": (b"550 \0\xff\r\n", [(550, [b"\0\xff\r"])]),
}


@pytest.mark.parametrize("name", GOOD)
def test_replies(name: str) -> None:
    octets, wanted = GOOD[name]
    for size in range(len(octets) + 1):
        assert read(octets, size) == (wanted, "", False)


BAD = {
    "letters": b"OK\r\n",
    "two digits": b"25 ok\r\n",
    "four digits": b"2500 ok\r\n",
    "a code that means nothing": b"150 ok\r\n",
    "no blank": b"250ok\r\n",
    "an empty line": b"\r\n",
    "a blank before": b" 250 ok\r\n",
    "codes that differ": b"250-a\r\n251 b\r\n",
    "a line of another kind within": b"250-a\r\nb\r\n",
}


@pytest.mark.parametrize("octets", BAD.values(), ids=BAD)
def test_what_is_no_reply(octets: bytes) -> None:
    """What came before it counts; nothing behind it does."""
    for size in range(len(octets) + 1):
        found, error, unread = read(b"220 hi\r\n" + octets + b"250 ok\r\n", size)
        assert found == [(220, [b"hi\r"])]
        assert error
        assert not unread


def test_the_longest_line() -> None:
    line = b"250 " + b"x" * (LINE_LIMIT - 6) + b"\r\n"
    assert len(line) == LINE_LIMIT
    for size in (0, 1, 1000, LINE_LIMIT - 1):
        assert read(line, size)[1:] == ("", False)
        assert read(b"250 x" + line[4:], size) == ([], "a reply line is too long", False)


def test_a_line_without_end_is_not_kept() -> None:
    parser = ReplyParser()
    for _ in range(100):
        parser.feed(b"2" * 10_000)
    assert parser.error
    assert not parser.unread


def test_as_many_lines_as_may_be() -> None:
    lines = b"250-x\r\n" * (LINES_LIMIT - 1) + b"250 x\r\n"
    assert read(lines)[1] == ""
    assert read(b"250-x\r\n" + lines)[:2] == ([], "a reply is too long")


def test_a_reply_of_too_many_octets() -> None:
    line = b"250-" + b"x" * 10_000 + b"\r\n"
    assert read(line * (REPLY_LIMIT // 10_001))[1:] == ("", True)
    assert read(line * (REPLY_LIMIT // 10_001 + 1))[1] == "a reply is too long"


def test_two_long_replies_are_not_one() -> None:
    """What is counted is forgotten with its reply."""
    reply = b"250-" + b"x" * 10_000 + b"\r\n250 x\r\n"
    assert len(read(reply * 10)[0]) == 10


STATUS = {
    b"5.1.1 nobody": "5.1.1",
    b"5.1.1": "5.1.1",
    b"5.1.1\r": "5.1.1",
    b"5.7.509 x": "5.7.509",
    b"5.1.1x": "",
    b"5.1.1234 x": "",
    b"5.1 x": "",
    b"4.1.1 x": "",
    b"2.0.0 x": "",
    b" 5.1.1 x": "",
    b"x 5.1.1": "",
    b"": "",
}


@pytest.mark.parametrize("text", STATUS)
def test_enhanced_status(text: bytes) -> None:
    assert Reply(550, [text]).status == STATUS[text]


def test_text_is_short_printable_and_on_one_line() -> None:
    assert Reply(550, [b"5.1.1 a \r", b" 5.1.1 b\r"]).text == "550 5.1.1 a 5.1.1 b"
    assert Reply(550, ["grün\x85\x1b[0m\u202e\0".encode() + b"\xff\r"]).text == "550 grün??[0m??\ufffd"
    assert len(Reply(550, [b"x" * 10_000]).text) == TEXT_LIMIT + 4


@given(
    st.lists(st.sampled_from([b"250 ok\r\n", b"250-x\r\n", b"550 5.1.1 no\n", b"2", b"\r", b"\n", b"25", b"-", b"OK"]))
)
def test_any_cut_is_the_same(pieces: list[bytes]) -> None:
    octets = b"".join(pieces)
    whole = read(octets)
    assert read(octets, 1) == whole
    for size in (2, 3, 5, 7):
        assert read(octets, size) == whole
