"""The parser's contract. See `_parser.pyx` for how it works."""

from typing import Literal

FrameKind = Literal["tls", "bare_lf", "line_too_long", "too_much"]

class FrameError(Exception):
    """The stream is lost: what follows cannot be interpreted, the connection must end.

    `kind`: "tls" (a TLS ClientHello on a plain port), "bare_lf" (a command line that ends in LF alone),
    "line_too_long" (a line of more than 64 KB), "too_much" (a message over ten times the size limit).
    """

    kind: FrameKind
    def __init__(self, kind: FrameKind) -> None: ...

class Line:
    """A line without its line end.

    In command mode `verb` is what stands before the first space, upper-cased, and `rest` what stands behind it
    without trailing blanks; in line mode `verb` is empty and `rest` the whole line. `too_long`: the line was
    over its limit and read on to its end; `verb` is its beginning's, `rest` is empty.

    MAIL FROM:<local@domain> and RCPT TO:<local@domain>, a plain ASCII path, or `<>`, come read: `local` as written,
    `domain` in lower case, both "" for `<>`, and `tail`, the offset in `rest` behind the path. Any other path is left
    to address.parse_path: `local` is None.
    """

    verb: bytes
    rest: bytes
    local: str | None
    domain: str
    tail: int
    too_long: bool

class Body:
    """Octets of a message, unstuffed; never empty."""

    chunk: bytes

class BodyEnd:
    """End-of-data, or the end of a BDAT chunk (`last`: of the LAST one; always true in DATA).

    `chunk`: the last octets of the message or chunk, as in Body; may be empty. `received`: how many lines of the
    header section begin like a Received field; `delivered`: whether one begins like Delivered-To.

    What is said of the message counts from its beginning, over all its chunks. `size` counts its octets as they
    are stored. `header_end` is the offset behind the first empty line (CRLF or LF at the start or behind a LF),
    or `size` when there is none. `bare`: a CR or LF that is no part of CRLF. `eight_bit`, `eight_bit_header`:
    an octet >= 0x80 behind, before `header_end`. `too_big`: over the limit; some of the octets were not handed
    out. `long_line`: a line over `text_line`; `long_header`: `header_end` over `header`.
    """

    chunk: bytes
    received: int
    delivered: bool
    size: int
    header_end: int
    last: bool
    bare: bool
    eight_bit: bool
    eight_bit_header: bool
    too_big: bool
    long_line: bool
    long_header: bool

class Parser:
    """Bytes in, events out: pull, not push.

    `barriers` are the verbs (upper-case) whose answer decides what the following octets mean. Limits are in
    octets with CRLF: `command_line`, `auth_line` (AUTH and its continuation lines), `text_line` (without the
    stuffed dot); `header` is the header section's. `bare`: what a bare CR or LF in DATA is ("reject": said in
    BodyEnd; "normalize": LF becomes CRLF and CR a space; "keep"), and whether a LF alone ends a command line.

    Starts in command mode.
    """

    def __init__(
        self,
        barriers: frozenset[bytes],
        *,
        command_line: int = 2048,
        auth_line: int = 12288,
        text_line: int = 1048576,
        header: int = 262144,
        bare: Literal["reject", "normalize", "keep"] = "reject",
    ) -> None: ...
    def another(self) -> Parser:
        """A new one with the same barriers and limits, without the 0.3 µs that a call by keywords takes."""

    @property
    def unread(self) -> int:
        """Octets fed and not yet interpreted."""

    @property
    def header_end(self) -> int:
        """Offset of the body proper in the message that is being read, -1 while it is not known."""

    @property
    def in_text(self) -> bool:
        """Whether octets of a message are what is awaited."""

    @property
    def too_big(self) -> bool:
        """Whether the message that is being read is over its limit already."""

    @property
    def stopped(self) -> bool:
        """Whether an event was a barrier and no mode has been set since."""

    def feed(self, data: bytes) -> None:
        """Stores octets; interprets nothing."""

    def next(self) -> Line | Body | BodyEnd | None:
        """The next event; None when more octets or, at a barrier, a mode is needed. Raises FrameError."""

    def command(self) -> None:
        """What follows is command lines."""

    def line(self) -> None:
        """What follows is one line that is no command (AUTH exchange)."""

    def data(self, limit: int) -> None:
        """What follows is a new message in DATA form; of more than `limit` octets nothing is handed out."""

    def bdat(self, size: int, last: bool, limit: int, first: bool) -> None:
        """What follows is `size` octets of a BDAT chunk; `first`: of a new message. `limit` is the whole
        message's; 0 hands nothing out."""

    def discard(self) -> None:
        """What follows is dropped, whatever it is."""
