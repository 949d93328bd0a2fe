"""The octets of a message as they leave: equal to a slow and obvious way, wherever the message lies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsmtp.address import NULL
from fastsmtp.delivery import body as module
from fastsmtp.delivery.body import PIECE, BodyError, OutgoingBody, sent_size
from fastsmtp.message import Content, Envelope, Message


def make(
    parts: list[bytes] | None,
    prefix: bytes = b"",
    cuts: tuple[tuple[int, int], ...] = (),
    file: str = "",
    size: int = -1,
) -> Message:
    length = size if parts is None else sum(map(len, parts))
    return Message(Envelope(NULL), prefix, parts, length, 0, Content.NONE, 0.0, file, cuts)


def read_all(message: Message, stuffed: bool) -> tuple[bytes, int]:
    """All of it, and in how many pieces."""
    body = OutgoingBody(message, stuffed)
    pieces = []
    while not body.finished:
        pieces.append(body.read())
        assert len(pieces) < 100_000
    return b"".join(pieces), len(pieces)


def stuff(octets: bytes) -> bytes:
    """The slow and obvious way (RFC 5321 4.5.2; bare CR a space, bare LF a line end)."""
    lines = re.split(rb"\r\n|\n", octets)
    if lines[-1] == b"":
        lines.pop()
    out = b"".join((b"." if line.startswith(b".") else b"") + line.replace(b"\r", b" ") + b"\r\n" for line in lines)
    return out + b".\r\n"


CASES = [
    b"",
    b"x",
    b"x\r\n",
    b".",
    b".\r\n",
    b"..\r\n.",
    b"\r\n.\r\n",
    b"a\r\n.\r\nb\r\n",
    b"a\n.\nb",
    b"a\r.\rb",
    b"\r",
    b"\r\r\n.",
    b"\n.\r\n.\r.\n",
    b"x\r\n\r",
]


@pytest.mark.parametrize("octets", CASES)
def test_stuffed(octets: bytes) -> None:
    assert read_all(make([octets]), True)[0] == stuff(octets)
    assert read_all(make([octets]), False)[0] == octets


PIECES = st.lists(st.sampled_from([b"\r\n", b"\r", b"\n", b".", b"ab", b"\r\n.", b"\xff\0"]), max_size=30)


@settings(max_examples=300)
@given(PIECES, PIECES, st.integers(1, 7), st.data())
def test_in_pieces_of_any_size(prefix: list[bytes], parts: list[bytes], piece: int, data: st.DataObject) -> None:
    """With the pieces so small that every cut falls everywhere; also with cuts in the header."""
    octets = b"".join(parts)
    edges = sorted(data.draw(st.lists(st.integers(0, len(octets)), max_size=4)))[:4]
    cuts = tuple(zip(edges[::2], edges[1::2], strict=False))
    kept = octets
    for start, end in reversed(cuts):
        kept = kept[:start] + kept[end:]
    wanted = b"".join(prefix) + kept
    message = make(parts, b"".join(prefix), cuts)
    assert sent_size(message) == len(wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        assert read_all(message, True)[0] == stuff(wanted)
        assert read_all(message, False)[0] == wanted


def test_no_stuffed_octets_hold_an_end_before_the_end() -> None:
    for octets in CASES:
        sent = b"\r\n" + read_all(make([octets]), True)[0]
        assert sent.index(b"\r\n.\r\n") == len(sent) - 5
        assert not re.search(rb"\r(?!\n)|(?<!\r)\n", sent)


def test_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "body"
    octets = b"a line of text\r\n.\r\n" * 100_000
    file.write_bytes(octets)
    message = make(None, b"Received: x\r\n", ((3, 10),), str(file), len(octets))
    wanted = b"Received: x\r\n" + octets[:3] + octets[10:]
    assert OutgoingBody(message, False).blocking
    assert read_all(message, False) == (wanted, -(-len(wanted) // PIECE))
    assert read_all(message, True)[0] == stuff(wanted)


def test_pieces_are_bounded_however_the_message_lies() -> None:
    message = make([b"x" * (3 * PIECE + 1), b"y", b"z" * PIECE])
    body = OutgoingBody(message, False)
    sizes = []
    while not body.finished:
        sizes.append(len(body.read()))
    assert sizes == [PIECE] * 4 + [2]


def test_a_message_of_one_piece_is_read_at_once() -> None:
    assert read_all(make([b"x" * PIECE]), False)[1] == 1
    assert read_all(make([b"x" * PIECE, b"y"]), False)[1] == 2


BROKEN = {
    "the file is gone": lambda tmp: make(None, file=str(tmp / "none"), size=10),
    "the file is short": lambda tmp: make(None, file=str(short(tmp)), size=10),
    "the parts are short": lambda tmp: lengthened(make([b"x"]), 10),
    "the parts are long": lambda tmp: lengthened(make([b"x" * 20]), 10),
    "the parts are short, with cuts": lambda tmp: lengthened(make([b"x"], cuts=((0, 1),)), 10),
}


def short(folder: Path) -> Path:
    file = folder / "short"
    file.write_bytes(b"x" * 9)
    return file


def lengthened(message: Message, size: int) -> Message:
    message.size = size
    return message


@pytest.mark.parametrize("stuffed", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_message_that_cannot_be_read(name: str, stuffed: bool, tmp_path: Path) -> None:
    """Never said to be finished: the host must not hear an end."""
    body = OutgoingBody(BROKEN[name](tmp_path), stuffed)
    handed_out = 0
    with pytest.raises(BodyError) as raised:  # noqa: PT012 - the piece in which it shows differs
        for _ in range(5):
            handed_out += len(body.read())
            assert not body.finished
    assert "\n" not in raised.value.text
    assert not body.finished
    # More than BDAT announced would be read as commands.
    assert handed_out <= body.size
