"""Lines of a message that are too long for SMTP, made quoted-printable part by part while it arrives.

In: a message's octets in any pieces. Out: the same octets, but that a part whose lines are longer than 998 octets is
encoded and its header says so; every other part, and what was signed, stays as it came: DKIM, ARC, S/MIME, OpenPGP, and
what lies in a message/* part. Decoding gives back the octets that were sent.
A part is held until its end or HELD octets; what has no long line up to there passes as it is, so that memory is
bounded. What cannot be read as MIME passes too, as do header lines: `feed` and `end` never fail.
RFC 5321 4.5.3.1.6; RFC 2045 6.7; RFC 2046 5.1; RFC 6409 8.4.
"""

from __future__ import annotations

import re
from binascii import b2a_qp
from email import message_from_bytes
from enum import Enum

from .header import read_header

LINE_LIMIT = 998  # octets without CRLF
HELD = 1 << 20
HEADER_LIMIT = 256 << 10
PIECE = 8192  # of a line that has not ended, as much is looked at together; a delimiter line is shorter
BOUNDARY_LIMIT = 1024

_LONG = re.compile(rb"[^\n]{%d}" % (LINE_LIMIT + 2))  # with its CR
_PGP = re.compile(rb"^-----BEGIN PGP ", re.MULTILINE)
SIGNATURES = {"dkim-signature", "domainkey-signature", "arc-message-signature"}
ENCODINGS = {"", "7bit", "8bit", "binary"}  # in which octets stand as they are
UNTOUCHED = re.compile(r"multipart/(?:signed|encrypted|digest)|message/.*|application/(?:x-)?(?:pkcs7|pgp).*")
# Of one message: nobody's mail has more, and a megabyte of empty parts, each in another, would take minutes. What
# comes behind them stays as it is.
PARTS = 1000
DEPTH = 50
# A type that everybody reads as the same: no comment, no encoded text.
_TOKEN = rb"[^\x00-\x20\x7f-\xff()<>@,;:\\\"/\[\]?=]+"
_PLAIN_TYPE = re.compile(rb"\s*%b/%b\s*(?:;|\Z)" % (_TOKEN, _TOKEN))
FIELD = b"Content-Transfer-Encoding: quoted-printable\r\n"


def quoted_printable(octets: bytes) -> bytes:
    """RFC 2045 6.7. Line by line: the library's text mode lets a bare CR pass, and makes CRLF of a bare LF."""
    lines = (b2a_qp(line, istext=False) for line in octets.split(b"\r\n"))
    return b"\r\n".join(line.replace(b"\n", b"\r\n") for line in lines)


class Mode(Enum):
    """What is being read."""

    HEADER = "the header of a part"
    HELD = "a part that may have to be encoded"
    ENCODED = "a part that is encoded"
    PASSED = "what stays as it is, up to the next delimiter"
    REST = "what stays as it is, up to the end"


class Rewriter:
    """One message. `header_end` is as in Message, of what was given out; -1 while that has not come."""

    __slots__ = (
        "_boundaries", "_buffer", "_delimiter", "_given", "_head", "_held", "_held_size", "_inside", "_long", "_mode",
        "_open", "_parts", "_searched", "header_end",
    )  # fmt: skip

    def __init__(self) -> None:
        self.header_end = -1
        self._mode = Mode.HEADER
        self._parts = 0  # that have begun, the message itself among them
        self._buffer = b""  # begins with a line, unless `_inside` one
        self._searched = 0  # octets of it that hold no end of a header
        self._inside = False
        self._boundaries: list[bytes] = []  # of the multiparts that are open
        self._delimiter: re.Pattern[bytes] | None = None
        self._head = b""  # of the part that is held
        self._held: list[bytes] = []
        self._held_size = 0
        self._long = False  # what is held has a long line
        self._open = False  # the line that was encoded last has not ended
        self._given = 0

    def feed(self, octets: bytes) -> bytes:
        """What can be given out by now."""
        self._buffer += octets
        out: list[bytes] = []
        while self._step(out, final=False):
            pass
        return b"".join(out)

    def end(self) -> bytes:
        """What is left."""
        out: list[bytes] = []
        while self._step(out, final=True):
            pass
        self._close_part(out)
        out.append(self._buffer)
        self._buffer = b""
        return b"".join(out)

    def _step(self, out: list[bytes], final: bool) -> bool:
        """Reads on; whether there may be more to read."""
        if self._mode is Mode.HEADER:
            return self._read_header(out)
        octets = self._buffer
        end = len(octets) if final or self._mode is Mode.REST else octets.rfind(b"\n") + 1
        if not end and len(octets) > PIECE:
            end = len(octets) - octets.endswith(b"\r")
        found = self._find_delimiter(octets, end)
        stop = found.start() if found else end
        if stop:
            self._take(out, octets[:stop])
            self._inside = not octets.endswith(b"\n", 0, stop)
        self._buffer = octets[stop:]
        if found is None:
            return False
        self._close_part(out)
        self._give(out, found[0])
        self._buffer = octets[found.end() :]
        self._inside = False
        closed = bool(found["closed"])
        del self._boundaries[self._boundaries.index(found["boundary"]) + (not closed) :]
        self._set_delimiter()
        self._mode = Mode.PASSED if closed else Mode.HEADER
        return True

    def _find_delimiter(self, octets: bytes, end: int) -> re.Match[bytes] | None:
        if self._delimiter is None or self._mode is Mode.REST:
            return None
        start = octets.find(b"\n", 0, end) + 1 if self._inside else 0
        return self._delimiter.search(octets, start, end) if start or not self._inside else None

    def _set_delimiter(self) -> None:
        names = b"|".join(map(re.escape, self._boundaries))
        line = rb"^--(?P<boundary>%s)(?P<closed>--)?[ \t]*(?:\r\n|\Z)" % names
        self._delimiter = re.compile(line, re.MULTILINE) if names else None

    # The header of a part

    def _read_header(self, out: list[bytes]) -> bool:
        buffer = self._buffer
        end = 2 if buffer.startswith(b"\r\n") else buffer.find(b"\r\n\r\n", self._searched) + 4
        if end == 3 or end > HEADER_LIMIT:
            self._searched = max(0, len(buffer) - 3)
            if len(buffer) > HEADER_LIMIT:
                self._mode = Mode.REST
            return self._mode is Mode.REST
        self._searched = 0
        self._head, self._buffer = buffer[:end], buffer[end:]
        self._mode = self._judge(self._head, top=self.header_end < 0)
        if self._mode is not Mode.HELD:
            self._give_head(out, self._head)
        return True

    def _judge(self, head: bytes, top: bool) -> Mode:
        """How a part with that header is to be read; the boundary of a multipart is noted."""
        self._parts += 1
        if self._parts > PARTS:
            return Mode.REST
        plain = Mode.REST if top else Mode.PASSED
        header = read_header(head)
        names = [field.name for field in header.fields]
        if head[header.end :] != b"\r\n" or (top and SIGNATURES.intersection(names)):
            return plain
        if max(names.count(name) for name in ("content-type", "content-transfer-encoding")) > 1:
            return plain
        if self._delimiter is not None and self._delimiter.search(head):
            return Mode.REST
        if any(field.name == "content-type" and not _PLAIN_TYPE.match(field.value) for field in header.fields):
            return plain
        # The library ends a header at an obsolete field ("Name :"), and would not see what stands behind it.
        part = message_from_bytes(b"".join([b"%b:%b" % (field.name.encode(), field.value) for field in header.fields]))
        kind = part.get_content_type()
        if UNTOUCHED.fullmatch(kind):
            return plain
        if kind.startswith("multipart/"):
            boundary = (part.get_boundary() or "").encode("utf-8", "surrogateescape")
            if boundary in self._boundaries or len(self._boundaries) == DEPTH:
                return Mode.REST
            if not 0 < len(boundary) <= BOUNDARY_LIMIT:
                return plain
            self._boundaries.append(boundary)
            self._set_delimiter()
            return Mode.PASSED
        encoding = re.sub(r"\([^()]*\)", "", str(part.get("Content-Transfer-Encoding", ""))).strip().lower()
        return Mode.HELD if encoding in ENCODINGS else plain

    def _encoded_head(self) -> bytes:
        """The header of the part that is held, as it is when the part is encoded."""
        head = self._head
        header = read_header(head)
        fields = {field.name: field for field in header.fields}
        # Only a part's header needs no version (RFC 2045 4).
        version = b"" if self.header_end >= 0 or "mime-version" in fields else b"MIME-Version: 1.0\r\n"
        if (old := fields.get("content-transfer-encoding")) is not None:
            return head[: old.start] + version + FIELD + head[old.end :]
        return head[: header.end] + version + FIELD + head[header.end :]

    # Its body

    def _take(self, out: list[bytes], octets: bytes) -> None:
        """Octets of a part's body: whole lines, or a piece of one that is too long."""
        if self._mode is Mode.ENCODED:
            self._encode(out, octets)
        elif self._mode is Mode.HELD:
            self._held.append(octets)
            self._held_size += len(octets)
            self._long = self._long or _LONG.search(octets) is not None
            if self._held_size > HELD:
                self._close_part(out)
        else:
            self._give(out, octets)

    def _close_part(self, out: list[bytes]) -> None:
        """Gives out what is held; what follows of its part is treated as that was."""
        if self._mode is not Mode.HELD:
            return
        held = b"".join(self._held)
        if self._long and not _PGP.search(held):
            self._mode = Mode.ENCODED
            self._open = False
            self._give_head(out, self._encoded_head())
            self._encode(out, held)
        else:
            self._mode = Mode.PASSED
            self._give_head(out, self._head)
            self._give(out, held)
        self._held, self._held_size, self._long = [], 0, False

    def _encode(self, out: list[bytes], octets: bytes) -> None:
        if self._open:
            self._give(out, b"=\r\n")
        self._give(out, quoted_printable(octets))
        self._open = not octets.endswith(b"\r\n")

    def _give_head(self, out: list[bytes], head: bytes) -> None:
        self._give(out, head)
        self._head = b""
        if self.header_end < 0:
            self.header_end = self._given

    def _give(self, out: list[bytes], octets: bytes) -> None:
        self._given += len(octets)
        out.append(octets)
