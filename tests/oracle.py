"""What the parser must say about a stream of octets: slow, obvious, written from the specification.

In: everything a client sent, as one string, and a `Server` that sets the next mode after each event, as a
session would. Out: the list of events, with the offset in the stream at which each was complete. No state
goes from one octet to the next: ends are found by searching the whole string, message by message.
It knows no reads and no cuts; the tests feed the real parser in pieces and hold both lists equal.
Not here: how a body is cut into chunks (a message has one body).
RFC 5321 2.3.8, 4.1.1.4, 4.5.2; RFC 3030 2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

LOST_LINE = 65536  # octets of a line, with its end, after which the stream counts as lost
VERB = 16  # octets of an over-long line in which its verb is looked for

Bare = Literal["reject", "normalize", "keep"]


@dataclass(frozen=True)
class Limits:
    """The parser's settings; small, so that short streams reach them."""

    barriers: frozenset[bytes] = frozenset({b"DATA", b"BDAT", b"AUTH", b"STARTTLS", b"QUIT"})
    command_line: int = 2048
    auth_line: int = 12288
    text_line: int = 1 << 20
    header: int = 256 << 10
    bare: Bare = "reject"
    message: int = 1 << 20


class Line(NamedTuple):
    """A command, or with an empty verb a line of an AUTH exchange."""

    verb: bytes
    rest: bytes
    too_long: bool
    end: int


class Text(NamedTuple):
    """A message, or what has come of it by the end of a BDAT chunk. `body` is whole, also when too big."""

    body: bytes
    size: int
    header_end: int
    last: bool
    bare: bool
    eight_bit: bool
    eight_bit_header: bool
    too_big: bool
    long_line: bool
    long_header: bool
    end: int


class Partial(NamedTuple):
    """A message or chunk whose end has not come: what is known of its octets."""

    body: bytes


class Lost(NamedTuple):
    """FrameError."""

    kind: str


Event = Line | Text | Partial | Lost


class Mode(NamedTuple):
    """What the following octets are; the numbers are those of `bdat`."""

    name: Literal["command", "line", "data", "bdat", "discard"]
    size: int = 0
    last: bool = False
    first: bool = False


COMMAND = Mode("command")


class Server:
    """Sets modes as a session does that accepts everything; one for each stream."""

    def __init__(self) -> None:
        self.first = True  # the next BDAT begins a message

    def after_line(self, verb: bytes, rest: bytes, too_long: bool) -> Mode:
        """The mode behind a barrier, or behind a line of an AUTH exchange (which goes on after a "+")."""
        if too_long:
            return COMMAND
        if verb == b"DATA":
            self.first = True
            return Mode("data")
        if verb == b"BDAT" and (chunk := re.fullmatch(rb"(\d{1,6})( LAST)?", rest)):
            first, last = self.first, chunk[2] is not None
            self.first = last
            return Mode("bdat", int(chunk[1]), last, first)
        if verb == b"AUTH" or (not verb and rest.endswith(b"+")):
            return Mode("line")
        if verb in (b"STARTTLS", b"QUIT"):
            return Mode("discard")
        return COMMAND


def events(stream: bytes, limits: Limits) -> list[Event]:
    """Everything the parser must have said when it has been fed `stream`."""
    if stream.startswith(b"\x16"):
        return [Lost("tls")]
    server = Server()
    found: list[Event] = []
    mode = COMMAND
    at = 0
    chunks = b""  # of the BDAT message so far
    while True:
        event: Event | None
        if mode.name == "discard":
            return found
        if mode.name == "data":
            event = data(stream, at, limits)
        elif mode.name == "bdat":
            chunks = b"" if mode.first else chunks
            event = chunk(stream, at, chunks, mode, limits)
        else:
            event = line(stream, at, mode, limits)
        if event is None:
            return found
        found.append(event)
        if isinstance(event, Partial | Lost):
            return found
        at = event.end
        if isinstance(event, Text):
            chunks = event.body
            mode = COMMAND
        elif mode.name == "line" or event.verb in limits.barriers:
            mode = server.after_line(event.verb, event.rest, event.too_long)


def line(stream: bytes, at: int, mode: Mode, limits: Limits) -> Line | Lost | None:
    """The line that begins at `at`."""
    lf = stream.find(b"\n", at)
    size = (lf + 1 if lf >= 0 else len(stream)) - at
    if size > LOST_LINE:
        return Lost("line_too_long")
    if lf < 0:
        return None
    whole = stream[at : lf + 1]
    if whole.endswith(b"\r\n"):
        text = whole[:-2]
    elif limits.bare == "reject":
        return Lost("bare_lf")
    else:
        text = whole[:-1]
    if mode.name == "line":
        verb, rest = b"", text
        limit = limits.auth_line
    else:
        verb, _, rest = text.rstrip(b" \t").partition(b" ")
        verb = verb.upper()
        limit = limits.auth_line if re.match(rb"(?i)AUTH[ \r\n]", whole) else limits.command_line
    if size > limit:
        return Line(verb and whole[:VERB].split(b" ")[0].upper(), b"", True, lf + 1)
    return Line(verb, rest, False, lf + 1)


def data(stream: bytes, at: int, limits: Limits) -> Text | Partial | Lost:
    """The message in DATA form that begins at `at`: as if CRLF had just been seen, up to CRLF "." CRLF."""
    text = b"\r\n" + stream[at:]
    dot = text.find(b"\r\n.\r\n")
    read = dot + 3 if dot >= 0 else len(text) - 2
    if read > 10 * limits.message:
        return Lost("too_much")
    if dot < 0:
        # What may yet be the end, or the first half of CRLF, is not known to be the message's.
        known = re.sub(rb"(?<=\r\n)\.\r?\Z|\r\Z", b"", text)
        return Partial(stored(known, limits))
    body = stored(text[: dot + 2], limits)
    return text_of(body, bare_in(unstuffed(text[: dot + 2])), True, at + dot + 3, limits)


def unstuffed(text: bytes) -> bytes:
    """`text` begins with the CRLF before the message, which goes away."""
    return text.replace(b"\r\n.", b"\r\n")[2:]


def stored(text: bytes, limits: Limits) -> bytes:
    """The octets that are handed out for `text`, which begins with the CRLF before the message."""
    body = unstuffed(text)
    if limits.bare == "normalize":
        body = re.sub(rb"(?<!\r)\n", b"\r\n", body)
        body = re.sub(rb"\r(?!\n)", b" ", body)
    return body


def bare_in(octets: bytes) -> bool:
    """Whether a CR or LF is no part of CRLF."""
    return re.search(rb"\r(?!\n)|(?<!\r)\n", octets) is not None


def chunk(stream: bytes, at: int, before: bytes, mode: Mode, limits: Limits) -> Text | Partial:
    """The BDAT chunk that begins at `at`, behind the chunks `before` of the same message."""
    end = at + mode.size
    body = before + stream[at:end]
    if len(stream) < end:
        return Partial(body)
    # A CR at the end of a chunk may be completed by the next one.
    judged = body if mode.last else body.removesuffix(b"\r")
    return text_of(body, bare_in(judged), mode.last, end, limits)


def text_of(body: bytes, bare: bool, last: bool, end: int, limits: Limits) -> Text:
    """What is said of a message's octets."""
    empty_line = re.search(rb"(?:\A|(?<=\n))\r?\n", body)
    header_end = empty_line.end() if empty_line else len(body)
    return Text(
        body=body,
        size=len(body),
        header_end=header_end,
        last=last,
        bare=bare,
        eight_bit=not body[header_end:].isascii(),
        eight_bit_header=not body[:header_end].isascii(),
        too_big=len(body) > limits.message,
        long_line=any(len(part) > limits.text_line for part in re.findall(rb"[^\n]*\n|[^\n]+\Z", body)),
        long_header=header_end > limits.header,
        end=end,
    )
