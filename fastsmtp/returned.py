"""What a report gives back of the message that it is about, as a part that may stand in any message.

In: the message and the first octets of its body. Out: a `Part`: the whole message, or as many whole fields of its
header as fit a limit, as it would have been passed on: trace fields first, cuts left out. The octets are those of
the sender, or encoded so that decoding gives them back; nothing is repaired. Not here: which of the two it is to be.
Failure: no whole part, where a message may not hold one (NUL, bare CR or LF, lines of more than 998 octets, a
header that is neither ASCII nor UTF-8); a header part there is always, and it may be empty.
RFC 2045 2.7, 2.8, 6.7; RFC 2046 5.2.1; RFC 6522 4; RFC 6532 3.7; RFC 6533 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .message import Message
from .rewrite import quoted_printable

LINE_LIMIT = 998


class Part(NamedTuple):
    """A part of a MIME message: what its header says, and its octets, already encoded."""

    type: str
    description: str
    encoding: str
    octets: bytes


def return_whole(message: Message, head: bytes) -> Part | None:
    """The message as it was sent, when `head` is all of its body and a part may hold it. Never encoded: RFC 2046
    5.2.1 forbids that for message/rfc822, so 8-bit octets make the report 8bit."""
    header = _header(message, head)
    octets = header + head[message.header_end : message.size]
    if len(head) < message.size or not (_is_text(octets) and _is_utf8(header)):
        return None
    kind = "message/rfc822" if header.isascii() else "message/global"
    return Part(kind, "Your message", "7bit" if octets.isascii() else "8bit", octets)


def return_header(message: Message, head: bytes, limit: int) -> Part:
    """The fields of the header that stand whole in its first `limit` octets."""
    octets = _whole_fields(_header(message, head), limit, len(head) >= message.header_end)
    description = "Header of your message"
    if not (_is_text(octets) and _is_utf8(octets)):
        return Part("text/rfc822-headers", description, "quoted-printable", quoted_printable(octets))
    if octets.isascii():
        return Part("text/rfc822-headers", description, "7bit", octets)
    return Part("message/global-headers", description, "8bit", octets)


def _header(message: Message, head: bytes) -> bytes:
    """The header with its empty line, as far as it is in `head`."""
    return message.prefix + _without(message.cuts, head[: message.header_end])


def _without(cuts: Iterable[tuple[int, int]], octets: bytes) -> bytes:
    kept = []
    place = 0
    for start, end in cuts:
        kept.append(octets[place:start])
        place = end
    return b"".join([*kept, octets[place:]])


def _whole_fields(header: bytes, limit: int, complete: bool) -> bytes:
    """Without the empty line. A header that is not `complete` may end within a field."""
    if complete and len(header) <= limit:
        return header[:-2] if header.endswith(b"\r\n\r\n") else header
    end = header.rfind(b"\r\n", 0, limit)
    # A field goes on where a line begins with a blank; with nothing behind the line's end, it may.
    while end >= 0 and header[end + 2 : end + 3] in (b"", b" ", b"\t"):
        end = header.rfind(b"\r\n", 0, end)
    return header[: end + 2] if end >= 0 else b""


def _is_text(octets: bytes) -> bool:
    """Whether it may stand in a 7bit or 8bit part: no NUL, no bare CR or LF, no line too long."""
    ends = octets.count(b"\r\n")
    if b"\0" in octets or octets.count(b"\r") != ends or octets.count(b"\n") != ends:
        return False
    return max(map(len, octets.split(b"\r\n"))) <= LINE_LIMIT


def _is_utf8(octets: bytes) -> bool:
    try:
        octets.decode()
    except UnicodeDecodeError:
        return False
    return True
