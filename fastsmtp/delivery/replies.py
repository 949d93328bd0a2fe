"""The replies of a host that we speak to: octets in, one Reply for each whole reply out.

The host is not trusted: a line, a reply's lines and its octets are bounded, codes within a reply must agree, and what
is kept of a text is short, printable and on one line. What is no reply is told in `error`, behind the replies that
came whole before it; nothing is read after that. The same octets give the same replies however the reads were cut.
A LF alone ends a line too: some hosts send it, and no third party's octets stand in a reply.
Not here: what a reply means (failures.py), which command it answers (dialogue.py).
RFC 5321 4.2, 4.5.3.1.5; RFC 2034; RFC 4954 4.
"""

from __future__ import annotations

import re

LINE_LIMIT = 12_288  # octets with the line end; 512 by RFC 5321, but a challenge of AUTH may be this long
REPLY_LIMIT = 65_536  # octets of the lines of one reply
LINES_LIMIT = 256
TEXT_LIMIT = 1_000  # octets of a reply that are kept for people

_LINE = re.compile(rb"([2-5][0-9][0-9])(?:([ -])([^\n]*))?\r?\n")
_STATUS = re.compile(rb"([245])\.([0-9]{1,3})\.([0-9]{1,3})(?![^ \r])")


class Reply:
    """`lines` are the octets behind the code of each line, perhaps with blanks at their ends."""

    __slots__ = ("code", "lines")

    def __init__(self, code: int, lines: list[bytes]) -> None:
        self.code = code
        self.lines = lines

    @property
    def status(self) -> str:
        """The enhanced status code, "" where there is none or its class is not the code's."""
        match = _STATUS.match(self.lines[0])
        return match[0].decode() if match is not None and int(match[1]) == self.code // 100 else ""

    @property
    def text(self) -> str:
        """Code and text for people: printable, on one line, not longer than TEXT_LIMIT."""
        lines = self.lines
        raw = lines[0] if len(lines) == 1 else b" ".join([line.strip() for line in lines])
        text = f"{self.code} {raw[:TEXT_LIMIT].decode('utf-8', 'replace').strip()}"
        if not text.isprintable():
            text = "".join([each if each.isprintable() else "?" for each in text])
        return text


class ReplyParser:
    """`error` says what was no reply, in our words; it is empty while all is well."""

    __slots__ = ("_code", "_kept", "_lines", "_partial", "error")

    def __init__(self) -> None:
        self.error = ""
        self._partial = b""  # of a line
        self._code = 0  # of the reply whose lines are being read
        self._lines: list[bytes] = []
        self._kept = 0  # octets in them

    @property
    def unread(self) -> bool:
        """Whether a reply has begun and is not whole."""
        return bool(self._partial or self._lines)

    @property
    def begun(self) -> str:
        """The code of a reply that is not whole, or what has come of it; empty: there is none."""
        return str(self._code) if self._lines else self._partial[:3].decode("latin-1")

    def feed(self, data: bytes) -> list[Reply]:
        """The replies that are whole now."""
        replies: list[Reply] = []
        if self.error:
            return replies
        if self._partial:
            data = self._partial + data
        at = 0
        while (match := _LINE.match(data, at)) is not None:
            end = match.end()
            if end - at > LINE_LIMIT:
                return self._stop("a reply line is too long", replies)
            code, dash, text = match.groups()
            at = end
            if dash != b"-" and not self._lines:
                replies.append(Reply(int(code), [text or b""]))
            elif not self._add(int(code), text or b"", dash == b"-", replies):
                return replies
        rest = data[at:] if at else data
        if b"\n" in rest:
            return self._stop("not a reply", replies)
        if len(rest) > LINE_LIMIT:
            return self._stop("a reply line is too long", replies)
        self._partial = rest
        return replies

    def _add(self, code: int, text: bytes, more: bool, replies: list[Reply]) -> bool:
        """A line of a reply of several lines. False: nothing more is to be read."""
        if self._lines and code != self._code:
            self._stop("the lines of a reply differ in their code", replies)
            return False
        self._code = code
        self._lines.append(text)
        self._kept += len(text)
        if len(self._lines) > LINES_LIMIT or self._kept > REPLY_LIMIT:
            self._stop("a reply is too long", replies)
            return False
        if not more:
            replies.append(Reply(code, self._lines))
            self._lines = []
            self._kept = 0
        return True

    def _stop(self, why: str, replies: list[Reply]) -> list[Reply]:
        self.error = why
        self._partial = b""
        self._lines = []
        return replies
