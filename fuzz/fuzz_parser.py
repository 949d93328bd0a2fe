"""Fuzzes the parser with atheris: `python fuzz/fuzz_parser.py [-max_total_time=60] [CORPUS]`.

In: octets that libFuzzer makes; the first few choose the settings and where the reads are cut, those from 0xc0 on stand
for words of SMTP: the parser is C and gives no coverage that would lead to them. The events of the whole
stream and of the stream cut in pieces must be equal, every limit must hold, and nothing but FrameError may be raised.
What the events must be is held against the oracle by tests/test_parser.py.
"""

from __future__ import annotations

import re
import sys

import atheris

with atheris.instrument_imports():
    from fastsmtp._parser import Body, BodyEnd, FrameError, Line, Parser

BARRIERS = frozenset({b"DATA", b"BDAT", b"AUTH", b"STARTTLS", b"QUIT"})
COMMAND_LINE, AUTH_LINE, MESSAGE = 64, 128, 200
BDAT = re.compile(rb"([0-9]{1,3})( LAST)?")
WORDS = (
    b"DATA\r\n",
    b"BDAT 5\r\n",
    b"BDAT 7 LAST\r\n",
    b"BDAT 0 LAST\r\n",
    b"MAIL FROM:<a.b@c.test>\r\n",
    b"RCPT TO:<",
    b">\r\n",
    b"MAIL FROM:<",
    b"@c.test> SIZE=1\r\n",
    b"AUTH PLAIN\r\n",
    b"STARTTLS\r\n",
    b"QUIT\r\n",
    b"NOOP\r\n",
    b"\r\n.\r\n",
    b"\r\n",
    b"\n.\n",
    b"\r.\r",
    b"\n.\r\n",
    b"\r\n.\n",
    b"\r\n..",
    b"\r\n.\r",
    b"\r",
    b"\n",
    b".",
    b"\0",
    b"x" * 50,
    b"x" * 100,
    b"\r\n\r\n",
    b"Received: x\r\n",
    b"Delivered-To:",
    b"x" * 70000,
    b"\x16",
    b"\xc3\xbc",
)
BARE = ("reject", "normalize", "keep")


class Reader:
    """Sets modes as a session does that accepts everything; `events` has what was said, bodies joined."""

    def __init__(self, bare: str) -> None:
        self.parser = Parser(
            BARRIERS, command_line=COMMAND_LINE, auth_line=AUTH_LINE, text_line=80, header=100, bare=bare
        )
        self.events: list[tuple[object, ...]] = []
        self.body = b""
        self.first = True
        self.lost = False

    @atheris.instrument_func
    def feed(self, octets: bytes) -> None:
        self.parser.feed(octets)
        while not self.lost:
            try:
                event = self.parser.next()
            except FrameError as error:
                self.events.append(("lost", error.kind))
                self.lost = True
                return
            if event is None:
                return
            if isinstance(event, Line):
                self.on_line(event)
            elif isinstance(event, Body):
                assert event.chunk
                self.body += event.chunk
            else:
                self.on_end(event)

    @atheris.instrument_func
    def on_line(self, line: Line) -> None:
        assert len(line.verb) + len(line.rest) <= AUTH_LINE
        self.events.append(("line", line.verb, line.rest, line.local, line.too_long))
        parser = self.parser
        if not parser.stopped:
            return
        chunk = BDAT.fullmatch(line.rest)
        if line.verb == b"DATA" and not line.too_long:
            self.body = b""
            parser.data(MESSAGE)
        elif line.verb == b"BDAT" and chunk:
            if self.first:
                self.body = b""
            parser.bdat(int(chunk[1]), chunk[2] is not None, MESSAGE, self.first)
            self.first = chunk[2] is not None
        elif line.verb == b"AUTH" and not line.too_long:
            parser.line()
        elif line.verb == b"QUIT":
            parser.discard()
        else:
            parser.command()

    @atheris.instrument_func
    def on_end(self, end: BodyEnd) -> None:
        self.body += end.chunk
        assert len(self.body) <= MESSAGE
        assert end.too_big or len(self.body) == end.size
        assert end.header_end <= end.size
        # Of a message over its limit, how much is handed out depends on the cuts.
        self.events.append(
            ("end", b"" if end.too_big else self.body, end.size, end.header_end, end.last, end.bare, end.eight_bit,
             end.eight_bit_header, end.too_big, end.long_line, end.long_header, end.received, end.delivered)
        )  # fmt: skip
        self.parser.command()


def test_one(data: bytes) -> None:
    if len(data) < 4:
        return
    bare = BARE[data[0] % 3]
    stream = b"".join([WORDS[(octet - 0xC0) % len(WORDS)] if octet >= 0xC0 else bytes([octet]) for octet in data[4:]])
    cuts = sorted(cut * len(stream) // 256 for cut in data[1:4])
    whole = Reader(bare)
    whole.feed(stream)
    for size in (1, None):
        pieces = Reader(bare)
        if size is None:
            for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
                pieces.feed(stream[start:end])
        else:
            for at in range(min(len(stream), 5000)):
                pieces.feed(stream[at : at + 1])
            pieces.feed(stream[5000:])
        assert pieces.events == whole.events, (pieces.events, whole.events)


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one)
    atheris.Fuzz()
