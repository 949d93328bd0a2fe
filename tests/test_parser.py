"""Parser and oracle: each case whole, octet by octet, cut at every place; random streams and cuts.

After each piece the events so far must be the oracle's for what has been fed so far: nothing comes late,
nothing depends on where a read was cut, and at each event exactly the octets before it are used up.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import COMMAND, LOST_LINE, Bare, Event, Limits, Line, Lost, Mode, Partial, Server, Text, events

from fastsmtp._parser import Body, BodyEnd, FrameError, Parser
from fastsmtp._parser import Line as ParserLine
from fastsmtp.address import _parse_any_path

DEFAULT = Limits()
SMALL = Limits(command_line=16, auth_line=24, text_line=10, header=12, message=40)
POLICIES: tuple[Bare, ...] = ("reject", "normalize", "keep")
SETTINGS = [replace(limits, bare=bare) for limits in (DEFAULT, SMALL) for bare in POLICIES]


def parser_for(limits: Limits) -> Parser:
    return Parser(
        limits.barriers,
        command_line=limits.command_line,
        auth_line=limits.auth_line,
        text_line=limits.text_line,
        header=limits.header,
        bare=limits.bare,
    )


class Run:
    """The real parser and a Server: takes pieces, keeps in the oracle's words what the parser said."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.parser = parser_for(limits)
        self.server = Server()
        self.mode = COMMAND
        self.fed = 0
        self.events: list[Event] = []
        self.body = b""

    def feed(self, piece: bytes) -> None:
        self.fed += len(piece)
        self.parser.feed(piece)
        if self.events and isinstance(self.events[-1], Lost):
            return
        try:
            while (event := self.parser.next()) is not None:
                self.take(event)
        except FrameError as error:
            self.events.append(Lost(error.kind))
            return
        # What was fed is used up, or is the beginning of a line that may yet be taken.
        held = max(self.limits.command_line, self.limits.auth_line) if self.mode.name in ("command", "line") else 0
        assert self.parser.unread <= held

    def take(self, event: ParserLine | Body | BodyEnd) -> None:
        end = self.fed - self.parser.unread
        if isinstance(event, Body):
            assert event.chunk
            self.body += event.chunk
        elif isinstance(event, BodyEnd):
            self.body += event.chunk
            self.events.append(
                Text(
                    self.body,
                    event.size,
                    event.header_end,
                    event.last,
                    event.bare,
                    event.eight_bit,
                    event.eight_bit_header,
                    event.too_big,
                    event.long_line,
                    event.long_header,
                    end,
                )
            )
            self.go_on(COMMAND)
        else:
            self.events.append(Line(event.verb, event.rest, event.too_long, end))
            if self.mode.name == "line" or event.verb in self.limits.barriers:
                self.go_on(self.server.after_line(event.verb, event.rest, event.too_long))

    def go_on(self, mode: Mode) -> None:
        """Nothing comes at a barrier until a mode is set."""
        unread = self.parser.unread
        assert self.parser.stopped
        assert self.parser.next() is None
        assert self.parser.unread == unread
        self.mode = mode
        if mode.name == "data":
            self.body = b""
            self.parser.data(self.limits.message)
        elif mode.name == "bdat":
            self.body = b"" if mode.first else self.body
            self.parser.bdat(mode.size, mode.last, self.limits.message, mode.first)
        else:
            {"command": self.parser.command, "line": self.parser.line, "discard": self.parser.discard}[mode.name]()
        assert not self.parser.stopped

    def said(self) -> list[Event]:
        """The events, closed by the body under way."""
        if self.mode.name in ("data", "bdat") and not isinstance(self.events[-1], Lost):
            return [*self.events, Partial(self.body)]
        return self.events


def assert_same(said: Sequence[Event], wanted: Sequence[Event], limits: Limits) -> None:
    """A body over the limit may be cut off anywhere up to the limit; all else is equal."""
    shown: list[Event] = []
    for event, want in zip(said, wanted, strict=False):
        if isinstance(event, Text | Partial) and isinstance(want, Text | Partial) and len(want.body) > limits.message:
            assert len(event.body) <= limits.message
            assert want.body.startswith(event.body)
            event = event._replace(body=want.body)
        shown.append(event)
    assert shown == list(wanted[: len(shown)])
    assert len(said) == len(wanted)


def cut(stream: bytes, places: Iterable[int]) -> Iterator[bytes]:
    """`stream` in pieces."""
    start = 0
    for place in [*sorted(place for place in places if place < len(stream)), len(stream)]:
        yield stream[start:place]
        start = place


def check(stream: bytes, limits: Limits, places: Iterable[int], run: type[Run] = Run) -> list[Event]:
    """Feeds the pieces and compares after each; returns what was said of the whole."""
    real = run(limits)
    fed = b""
    for piece in cut(stream, places):
        fed += piece
        real.feed(piece)
        assert_same(real.said(), events(fed, limits), limits)
    return real.said()


def check_everywhere(stream: bytes, limits: Limits, run: type[Run] = Run) -> list[Event]:
    """Whole, octet by octet, and in two pieces cut at each place."""
    for place in range(1, len(stream)):
        check(stream, limits, [place], run)
    check(stream, limits, range(1, len(stream)), run)
    return check(stream, limits, [], run)


END = b"\r\n.\r\n"

# wire form of what must never end a message
NO_END = [
    b"\n.\n",
    b"\n.\r\n",
    b"\r\n.\n",
    b"\n.\r",
    b"\r.\r",
    b"\r.\n",
    b"\r.\r\n",
    b"\r\n.\r",
    b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",
    b"\r\n.\r\r\n",
    b"\r\r\n.\r\r\n",
]

SMUGGLED = b"MAIL FROM:<mallory@x>\r\nRCPT TO:<b@y>\r\nDATA\r\nforged"

COMMANDS = [
    b"",
    b"\r\n",
    b"\r\n\r\n",
    b"EHLO host.example\r\n",
    b"ehlo Host.Example\r\nmail from:<A@b> size=1\r\nRCPT TO:<c@D>\r\n",
    b"NOOP \t \r\nNOOP\r\nNOOP x \r\n NOOP\r\n",
    b"NOOP\tx\r\nNOOP\t\r\n\t \r\n",
    b"MAIL  FROM:<a@b>  \r\n",
    b"NOOP a\rb\r\n",
    b"NOOP a\r\r\n",
    b"\r\r\n",
    b"\r",
    b"NOOP\n",
    b"NOOP x \nRSET\r\n",
    b"\nNOOP\r\n",
    b"NO\0OP \0\r\n",
    b"\xff\xfe \x80\r\n",
    b"\x16\x03\x01\x02\x00\x01",
    b"NOOP\r\n\x16\x03\x01\r\n",
    b"NOOP",
    b"x" * 17 + b"\r\n",
    b"x" * 40 + b"\r\nNOOP\r\n",
    b"noop " + b"x" * 40 + b"\r\nNOOP\r\n",
    b"NOOP " + b"x" * 40 + b"\nNOOP\r\n",
    b"NOOP " + b"x" * 40 + b"\r\r\nNOOP\r\n",
    b"DATA " + b"x" * 40 + b"\r\nNOOP\r\n",
    b"AUTH " + b"x" * 40 + b"\r\nNOOP\r\n",
    b"AUTHX " + b"x" * 13 + b"\r\nNOOP\r\n",
    b"auth PLAIN\r\nAGFubgBz\r\nNOOP\r\n",
    b"AUTH LOGIN\r\n\r\nNOOP\r\n",
    b"AUTH LOGIN\r\n * \r\nNOOP\r\n",
    b"AUTH LOGIN\r\nMAIL FROM: +\r\n+\r\nYQ==\nNOOP\r\n",
    b"AUTH LOGIN\r\n" + b"x" * 30 + b"\r\nNOOP\r\n",
    b"AUTH\r\nx\r\n",
    b"STARTTLS\r\nNOOP\r\n",
    b"QUIT\r\nNOOP\n\x16",
]

MESSAGES = [
    b".\r\n",
    b"\r\n.\r\n",
    b"..\r\n.\r\n",
    b".x\r\n.\r\n",
    b"...\r\n.\r\n",
    b"a: b\r\n\r\nbody\r\n.\r\n",
    b"a: b\r\n..\r\n\r\n.\r\n",
    b"\r\n\r\n.\r\n",
    b"a\r\n.\r\n.\r\n",
    b"a\n\nb\r\n.\r\n",
    b"a\n\r\nb\r\n.\r\n",
    b"\nb\r\n.\r\n",
    b"\rb\r\n.\r\n",
    b"\r\r\n.\r\n",
    b"a\r\n\r\r\n\r\n\xe4\r\n.\r\n",
    b"a\r\n.\r\n" + SMUGGLED + END,
    b"\xe4: b\r\n\r\nc\r\n.\r\n",
    b"a: b\r\n\r\n\xe4\r\n.\r\n",
    b"a: \xe4\r\n.\r\n",
    b"a\r\n\xe4\r\n\r\n\xe4\r\n.\r\n",
    b"12345678\r\n123456789\r\n.\r\n",
    b"12345678\r\n..2345678\r\n.\r\n",
    b"..234567\r\n.\r\n",
    b"123456789\n1234567890\n.\r\n.\r\n",
    b"12345678901234567890\r\n\r\n.\r\n",
    b"1234567\r\n\r\n1\r\n.\r\n",
    b"12345678\r\n\r\n1\r\n.\r\n",
    b"123456789\r\n\r\n1\r\n.\r\n",
    b"1234567\r\n" * 4 + b"12\r\n.\r\n",
    b"1234567\r\n" * 4 + b"1\r\n.\r\n",
    b"1234567\r\n" * 4 + b"123\r\n.\r\n",
    b"1234567\n" * 5 + b"\r\n.\r\n",
    b"1234567\r\n" * 44 + b"1\r\n.\r\n",
    b"1234567\r\n" * 44 + b"12\r\n.\r\n",
    b"1234567\r\n" * 44 + b"123\r\n.\r\n",
    b"..234567\r\n" * 40 + b".\r\n",
    b"..234567\r\n" * 40 + b".\r",
    b"..234567\r\n" * 40 + b"x\r\n.\r\n",
    b"\n" * 50 + END,
]

CHUNKS = [
    b"BDAT 0 LAST\r\nNOOP\r\n",
    b"BDAT 0\r\nBDAT 0\r\nBDAT 0 LAST\r\n",
    b"BDAT 5 LAST\r\n12345NOOP\r\n",
    b"BDAT 5\r\n12345BDAT 3 LAST\r\nabcNOOP\r\n",
    b"BDAT 5\r\n12345NOOP\r\nBDAT 3 LAST\r\nabc",
    b"BDAT 5 LAST\r\n\r\n.\r\nBDAT 7 LAST\r\n..\r\n.\r\n",
    b"BDAT 5\r\na: \xe4\rBDAT 5 LAST\r\n\n\r\n\xe4\n",
    b"BDAT 2\r\na\rBDAT 2\r\n\n\rBDAT 1 LAST\r\n\n",
    b"BDAT 2\r\na\rBDAT 1 LAST\r\nb",
    b"BDAT 2\r\na\rBDAT 0 LAST\r\n",
    b"BDAT 2\r\na\rBDAT 0\r\nBDAT 1 LAST\r\n\n",
    b"BDAT 1 LAST\r\n\rBDAT 1 LAST\r\n\n",
    b"BDAT 1 LAST\r\n\r",
    b"BDAT 1\r\n\rBDAT 1 LAST\r\n\n",
    b"BDAT 2\r\na\nBDAT 1 LAST\r\n\n",
    b"BDAT 2\r\n\r\nBDAT 1 LAST\r\n\xe4",
    b"BDAT 6\r\n123456BDAT 6 LAST\r\n7890\r\n",
    b"BDAT 6\r\n123456BDAT 4 LAST\r\n78\r\n",
    b"BDAT 10 LAST\r\n1234567890",
    b"BDAT 11 LAST\r\n12345678901",
    b"BDAT 3 LAST\r\n\n\n\nBDAT 3 LAST\r\n\0\r\0",
    b"BDAT 30\r\n" + b"x" * 30 + b"BDAT 10 LAST\r\n" + b"y" * 10 + b"NOOP\r\n",
    b"BDAT 30\r\n" + b"x" * 30 + b"BDAT 11 LAST\r\n" + b"y" * 11 + b"NOOP\r\n",
    b"BDAT 41\r\n" + b"x" * 41 + b"BDAT 1\r\nyBDAT 0 LAST\r\nBDAT 1 LAST\r\nz",
    b"BDAT 500 LAST\r\n" + b"x" * 500 + b"NOOP\r\n",
    b"BDAT 3\r\nabcDATA\r\nx\r\n.\r\nBDAT 2 LAST\r\nxy",
    b"BDAT x\r\nNOOP\r\n",
    b"bdat 3 LAST\r\nab",
]


@pytest.mark.parametrize("limits", SETTINGS, ids=lambda limits: f"{limits.message}-{limits.bare}")
@pytest.mark.parametrize("stream", [*COMMANDS, *(b"DATA\r\n" + text + b"NOOP\r\n" for text in MESSAGES), *CHUNKS])
def test_each_case_everywhere(stream: bytes, limits: Limits) -> None:
    check_everywhere(stream, limits)


@pytest.mark.parametrize("bare", POLICIES)
@pytest.mark.parametrize("behind_data", [b"", b"x", b"a: b\r\n\r\nx"])
@pytest.mark.parametrize("sequence", [*NO_END, *(s[2:] for s in NO_END if s.startswith(b"\r\n"))])
def test_nothing_else_ends_a_message(sequence: bytes, behind_data: bytes, bare: Bare) -> None:
    """One end-of-data, one BodyEnd; what stands before it is the message's, whatever it looks like."""
    stream = b"DATA\r\n" + behind_data + sequence + SMUGGLED + END + b"QUIT\r\n"
    said = check_everywhere(stream, replace(DEFAULT, bare=bare))
    assert [type(event) for event in said] == [Line, Text, Line]
    text = said[1]
    assert isinstance(text, Text)
    assert text.body.endswith(SMUGGLED + b"\r\n")
    assert text.bare == (b"\0" not in sequence)
    assert said[2] == Line(b"QUIT", b"", False, len(stream))


@pytest.mark.parametrize("bare", POLICIES)
@pytest.mark.parametrize("size", range(6))
def test_every_short_sequence(size: int, bare: Bare) -> None:
    """All of CR, LF, dot and NUL up to five octets: only CR LF . CR LF ends the message."""
    limits = replace(DEFAULT, bare=bare)
    for octets in product(b"\r\n.\0", repeat=size):
        sequence = bytes(octets)
        for before in (b"DATA\r\n", b"DATA\r\nx"):
            stream = before + sequence + b"x" + END
            check(stream, limits, range(len(before), len(stream)))
            for place in range(len(before), len(before) + size + 1):
                said = check(stream, limits, [place])
            (end,) = (event.end for event in said if isinstance(event, Text))
            assert (end == len(stream)) == (END not in b"\r\n" + stream[6 : -len(END)])


EVIL = [*NO_END, END, b"\r\n..\r\n", b"\r\n.x", b"\r", b"\n", b"\xe4", b"\r\n\r\n"]


@pytest.mark.parametrize("bare", POLICIES)
@pytest.mark.parametrize("sequence", EVIL)
def test_at_the_edges_of_blocks(sequence: bytes, bare: Bare) -> None:
    """The scan works in blocks; a sequence across an edge of one, or of a read, is seen all the same."""
    limits = replace(DEFAULT, bare=bare)
    clean = b"".join(b"%071d\n".replace(b"\n", b"\r\n") % number for number in range(130))
    for edge in (64, 4096, 8192):
        for place in range(edge - 7, edge + 3):
            stream = b"DATA\r\n" + clean[:place] + sequence + clean[place:] + END + b"NOOP\r\n"
            check(stream, limits, [])
            check(stream, limits, [6])
            check(stream, limits, [6 + edge])
            check(stream, limits, [6 + place + 1, 6 + place + 3])


def test_a_long_body_octet_by_octet_is_the_same() -> None:
    lines = [b"x" * (number % 83) + (b".", b"\xe4", b"\0")[number % 3] for number in range(150)]
    stream = b"DATA\r\n" + b"\r\n.".join(lines) + END
    for limits in SETTINGS[:3]:
        run = Run(limits)
        for place in range(len(stream)):
            run.feed(stream[place : place + 1])
        assert run.said() == events(stream, limits) == check(stream, limits, range(0, len(stream), 1460))


@pytest.mark.parametrize("size", [2047, 2048, 2049])
@pytest.mark.parametrize("verb", [b"NOOP", b"DATA", b"BDAT"])
def test_command_line_limit(verb: bytes, size: int) -> None:
    stream = verb + b" " + b"x" * (size - 7) + b"\r\n"
    for places in ([], [size - 1], [size - 2], [4], [5], [1]):
        said = check(stream, DEFAULT, places)[0]
        rest = b"" if size > 2048 else b"x" * (size - 7)
        assert said == Line(verb, rest, size > 2048, size)


@pytest.mark.parametrize("size", [12287, 12288, 12289])
def test_auth_line_limit(size: int) -> None:
    command = b"auth " + b"x" * (size - 7) + b"\r\n"
    for places in ([], [size - 1], [size - 2], [3], [4], [5]):
        (said,) = check(command, DEFAULT, places)
        assert said == Line(b"AUTH", b"" if size > 12288 else b"x" * (size - 7), size > 12288, size)
        answer = b"AUTH X\r\n" + b"x" * (size - 2) + b"\r\n"
        _, said = check(answer, DEFAULT, [place + 8 for place in places])
        assert said == Line(b"", b"" if size > 12288 else b"x" * (size - 2), size > 12288, size + 8)


@pytest.mark.parametrize("bare", POLICIES)
@pytest.mark.parametrize("begin", [b"NOOP ", b"", b"AUTH ", b"AUTH X\r\n"])
def test_a_line_without_end_is_given_up(begin: bytes, bare: Bare) -> None:
    limits = replace(DEFAULT, bare=bare)
    line = begin.rpartition(b"\n")[2]
    fixed = len(begin) - len(line)
    for size in (LOST_LINE - 1, LOST_LINE, LOST_LINE + 1):
        for end in (b"\r\n", b"\n", b""):
            stream = begin + b"x" * (size - len(line) - len(end)) + end
            last = len(stream)
            for places in ([], [last - 1], [last - 2], [3000], [fixed + 12289], range(0, last, 1460)):
                said = check(stream, limits, places)
                assert (said[-1:] == [Lost("line_too_long")]) == (size > LOST_LINE)


@pytest.mark.parametrize(
    ("limits", "flag"),
    [
        (Limits(text_line=5000), "long_line"),
        (Limits(header=5000), "long_header"),
        (Limits(message=5000), "too_big"),
    ],
)
@pytest.mark.parametrize("form", ["data", "bdat"])
def test_text_limits(limits: Limits, flag: str, form: str) -> None:
    """A line, a header section and a message of N-1, N and N+1 octets, with the CRLF cut in two."""
    for size in (4999, 5000, 5001):
        rest = b"" if flag == "too_big" else b"y\r\n"
        text = b"x" * (size - 2) + b"\r\n"
        if flag == "long_header":
            text = b"x" * (size - 4) + b"\r\n\r\n"
        for stuffed in (b"", b"."):
            if form == "bdat":
                start = b"BDAT %d LAST\r\n" % len(text + rest)
                stream = start + text + rest
            elif stuffed:
                start = b"DATA\r\n"
                stream = start + b".." + text[1:] + rest + b".\r\n"
            else:
                start = b"DATA\r\n"
                stream = start + text + rest + b".\r\n"
            for place in ([], [len(start) + size - 1], [len(start) + size], [len(start) + 4096]):
                said = check(stream, limits, place)[1]
                assert getattr(said, flag) is (size > 5000)


def test_too_much_is_told_before_the_end() -> None:
    """Read on to the true end, for at most ten times the limit; nothing behind the limit is handed out."""
    limits = Limits(message=5000)
    run = Run(limits)
    run.feed(b"DATA\r\n")
    for _ in range(10):
        run.feed(b"x" * 4998 + b"\r\n")
    assert run.said()[-1] == Partial(run.body)
    assert len(run.body) <= 5000
    run.feed(b"x")
    assert run.said()[-1] == Lost("too_much")


def test_too_big_is_known_while_the_message_is_read() -> None:
    run = Run(Limits(message=6))
    for piece, too_big in ((b"DATA\r\n", False), (b"abcd\r\n", False), (b"x", True), (b"\r\n.\r", True)):
        run.feed(piece)
        assert run.parser.too_big is too_big


def test_bdat_of_a_message_that_is_not_kept() -> None:
    """A limit of 0: octets are counted and consumed, and none is handed out."""
    parser = Parser(frozenset({b"BDAT"}))
    parser.feed(b"BDAT 5 LAST\r\n12345NOOP\r\n")
    parser.next()
    parser.bdat(5, True, 0, True)
    end = parser.next()
    assert isinstance(end, BodyEnd)
    assert (end.size, end.too_big, end.last) == (5, True, True)
    parser.command()
    line = parser.next()
    assert isinstance(line, ParserLine)
    assert line.verb == b"NOOP"


def test_header_end_is_known_while_the_message_is_read() -> None:
    parser = Parser(frozenset({b"DATA"}))
    parser.feed(b"DATA\r\n")
    parser.next()
    parser.data(1000)
    assert parser.header_end == -1
    parser.feed(b"a: b\r\n\r")
    while parser.next():
        pass
    assert parser.header_end == -1
    parser.feed(b"\nx")
    while parser.next():
        pass
    assert parser.header_end == 8


@pytest.mark.parametrize(
    ("stream", "kind"), [(b"\x16", "tls"), (b"NOOP\n", "bare_lf"), (b"x" * (LOST_LINE + 1), "line_too_long")]
)
def test_a_lost_stream_stays_lost(stream: bytes, kind: str) -> None:
    parser = Parser(frozenset())
    parser.feed(stream)
    with pytest.raises(FrameError) as error:
        parser.next()
    assert error.value.kind == kind
    parser.feed(b"NOOP\r\n")
    assert parser.next() is None
    assert parser.unread == 0


def test_pipelined_octets_wait_behind_a_barrier() -> None:
    parser = Parser(frozenset({b"DATA"}))
    parser.feed(b"DATA\r\nNOOP\r\n")
    assert isinstance(parser.next(), ParserLine)
    assert parser.stopped
    parser.feed(b"RSET\r\n")
    assert parser.next() is None
    assert parser.unread == 12
    parser.command()
    assert [line.verb for line in (parser.next(), parser.next()) if isinstance(line, ParserLine)] == [
        b"NOOP",
        b"RSET",
    ]
    assert parser.next() is None
    assert parser.unread == 0


def test_discard_drops_what_is_there_and_what_comes() -> None:
    parser = Parser(frozenset({b"QUIT"}))
    parser.feed(b"QUIT\r\nNOOP\r\n")
    parser.next()
    parser.discard()
    assert parser.next() is None
    parser.feed(b"x" * 100_000)
    assert parser.next() is None
    assert parser.unread == 0


def test_unknown_bare_policy() -> None:
    policy: Any = "sometimes"
    with pytest.raises((KeyError, ValueError)):
        Parser(frozenset(), bare=policy)


@pytest.mark.parametrize("data", [bytearray(b"x"), memoryview(b"x"), "x", None])
def test_only_bytes_are_fed(data: Any) -> None:
    """The parser keeps a reference: what it is fed must not change."""
    with pytest.raises(TypeError):
        Parser(frozenset()).feed(data)


class Lenient(Run):
    """Takes NUL for LF."""

    def feed(self, piece: bytes) -> None:
        super().feed(piece.replace(b"\0", b"\n"))


class Late(Run):
    """Holds the last octet of each piece back."""

    held = b""

    def feed(self, piece: bytes) -> None:
        piece = self.held + piece
        self.held = piece[-1:]
        super().feed(piece[:-1])


class Forgetful(Run):
    """Loses a CR at the end of a read."""

    def feed(self, piece: bytes) -> None:
        super().feed(piece[:-1] + piece[-1:].replace(b"\r", b" "))


class Blind(Run):
    """Sees no bare CR or LF."""

    def take(self, event: ParserLine | Body | BodyEnd) -> None:
        super().take(event)
        last = self.events[-1]
        if isinstance(last, Text):
            self.events[-1] = last._replace(bare=False)


@pytest.mark.parametrize("run", [Lenient, Late, Forgetful, Blind])
def test_the_comparison_sees_a_wrong_parser(run: type[Run]) -> None:
    with pytest.raises(AssertionError):
        check_everywhere(b"DATA\r\nx\r\0.\r\ny\nz\r\n.\r\n", DEFAULT, run)


PIECES = st.sampled_from(
    [
        *(bytes([octet]) for octet in b"\r\n. \t\0\x80ab\x16"),
        *(b"\r\n", b"\r\n\r\n", b"\r\n.", b"..", END, *NO_END),
        *(
            b"DATA\r\n",
            b"data\r\n",
            b"AUTH X\r\n",
            b"+\r\n",
            b"NOOP \r\n",
            b"MAIL FROM:<a@b>\r\n",
            b"QUIT\r\n",
        ),
        *(b"BDAT 0 LAST\r\n", b"BDAT 3\r\n", b"BDAT 3 LAST\r\n", b"BDAT 9 LAST\r\n", b"BDAT 45\r\n"),
        *(b"x" * size for size in (7, 8, 9, 10, 11, 14, 30, 64, 200)),
    ]
)
STREAMS = st.one_of(
    st.lists(PIECES, max_size=25).map(b"".join),
    st.lists(PIECES, max_size=25).map(lambda pieces: b"DATA\r\n" + b"".join(pieces)),
    st.lists(PIECES, max_size=25).map(lambda pieces: b"BDAT 20\r\n" + b"".join(pieces)),
)


@settings(deadline=None)
@given(STREAMS, st.lists(st.integers(0, 300), max_size=12), st.sampled_from(SETTINGS))
@example(b"DATA\r\n" + b"x" * 200 + b"\r\n.\r", [6], SETTINGS[3])
def test_random_streams(stream: bytes, places: list[int], limits: Limits) -> None:
    check(stream, limits, places)


PATHS = st.one_of(
    st.lists(
        st.sampled_from(
            [b"<", b">", b"@", b".", b"-", b"_", b"a", b"Z", b"0", b"+", b"=", b'"', b" ", b"\\", b",", b":", b"%"]
        ),
        max_size=14,
    ).map(b"".join),
    st.tuples(
        st.from_regex(rb"[a-zA-Z0-9.+=_-]{1,70}", fullmatch=True),
        st.from_regex(rb"[a-zA-Z0-9._-]{1,260}", fullmatch=True),
    ).map(lambda pair: b"<" + pair[0] + b"@" + pair[1] + b">"),
)


@given(st.sampled_from([b"MAIL FROM:", b"rcpt to:"]), PATHS, st.sampled_from([b"", b" SIZE=1", b"x"]))
def test_a_path_is_read_as_the_address_parser_reads_it(command: bytes, path: bytes, behind: bytes) -> None:
    """The shortcut never accepts what the long way refuses, and never reads it otherwise."""
    parser = Parser(frozenset())
    parser.feed(command + path + behind + b"\r\n")
    line = parser.next()
    assert isinstance(line, ParserLine)
    if line.local is None:
        return
    address, end = _parse_any_path(path + behind, True)
    assert (address.local, address.domain) == (line.local, line.domain)
    assert line.rest[line.tail :] == (path + behind)[end:].rstrip()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"<a@b.test>", ("a", "b.test")),
        (b"<A.b+c=d@X-1.TEST>", ("A.b+c=d", "x-1.test")),
        (b"<>", ("", "")),
        (b"<" + b"l" * 190 + b"@" + b"d" * 63 + b">", ("l" * 190, "d" * 63)),
        (b"<" + b"l" * 191 + b"@" + b"d" * 63 + b">", None),
        (b"<a@" + b"d" * 64 + b">", None),
        (b"<a@b..test>", None),
        (b"<a@b.test.>", None),
        (b"<a@-b.test>", None),
        (b"<a@b-.test>", None),
        (b"<.a@b.test>", None),
        (b"<a..b@b.test>", None),
        (b"<a.@b.test>", None),
        (b"<@x:a@b.test>", None),
        (b"<postmaster>", None),
        (b"<a@[192.0.2.1]>", None),
        (b"<a@b.test", None),
        (b"a@b.test", None),
    ],
)
def test_which_paths_are_read(path: bytes, expected: tuple[str, str] | None) -> None:
    parser = Parser(frozenset())
    parser.feed(b"MAIL FROM:" + path + b"\r\n")
    line = parser.next()
    assert isinstance(line, ParserLine)
    assert (None if line.local is None else (line.local, line.domain)) == expected


def test_trace_fields_are_counted_wherever_the_reads_are_cut() -> None:
    header = b"Received: a\r\nreceived-SPF: x\r\nX: Received: no\r\nreceive: no\r\nDELIVERED-TO: b@c\r\n\r\n"
    header += b"Received: body\r\n"
    for cut in range(1, len(header)):
        parser = Parser(frozenset())
        parser.data(1 << 20)
        for piece in (header[:cut], header[cut:] + b".\r\n"):
            parser.feed(piece)
            while (event := parser.next()) is not None:
                last = event
        assert isinstance(last, BodyEnd)
        assert (last.received, last.delivered) == (2, True)
