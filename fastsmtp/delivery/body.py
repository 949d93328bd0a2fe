"""The octets of a message as they leave: prefix + body minus cuts, dot-stuffed for DATA or as they are for BDAT.

In: a Message, its body in memory or in its file. Out: pieces of at most PIECE octets (stuffing adds to that), so a
large message is never held twice. Over DATA no bare CR or LF leaves, whatever the message was said to hold: a LF
becomes CRLF and a CR a space, for a stream in which two hosts see line ends in different places can be split in two.
The last piece for DATA has the missing final CRLF and the final dot.
On failure: BodyError, when the file is missing, unreadable or shorter than the message. `read` waits for the disk when
`blocking`. RFC 5321 2.3.8, 4.1.1.4, 4.5.2; RFC 3030 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..message import Message

PIECE = 524_288


class BodyError(Exception):
    """The message cannot be read. `text` says why, on one line."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def sent_size(message: Message) -> int:
    """Octets of the message as it is sent, before stuffing (RFC 1870 5)."""
    size = len(message.prefix) + message.size
    for start, end in message.cuts:
        size -= end - start
    return size


class OutgoingBody:
    """A message that is being sent. `stuffed`: for DATA. `size` is as in sent_size; `finished`: all was read."""

    __slots__ = ("_left", "_line_start", "_pieces", "_return", "blocking", "finished", "message", "size", "stuffed")

    def __init__(self, message: Message, stuffed: bool) -> None:
        self.message = message
        self.stuffed = stuffed
        self.blocking = message.parts is None
        self.size = sent_size(message)
        self.finished = False
        self._left = self.size
        self._pieces: Iterator[bytes] | None = None
        self._line_start = True
        self._return = False  # a CR stood at the end of the last piece and waits for what follows it

    def read(self) -> bytes:
        """The next piece; of a message up to PIECE octets the whole. Raises BodyError."""
        message = self.message
        if self.size <= PIECE and message.parts is not None and not message.cuts:
            piece = b"".join((message.prefix, *message.parts))
            whole = True
        else:
            if self._pieces is None:
                self._pieces = _pieces(message)
            piece = next(self._pieces, b"")
            whole = not piece
        self._left -= len(piece)
        if self._left and whole:
            raise _not_whole(message)
        self.finished = not self._left
        return self._stuff(piece) if self.stuffed else piece

    def _stuff(self, piece: bytes) -> bytes:
        """In the form of DATA. Three counts tell that there is no bare CR or LF: 0.2 µs for 1 KB."""
        if self._return:
            piece = b"\r" + piece
            self._return = False
        if piece.endswith(b"\r") and not self.finished:
            piece = piece[:-1]
            self._return = True
        pairs = piece.count(b"\r\n")
        if piece.count(b"\n") != pairs or piece.count(b"\r") != pairs:
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b" ").replace(b"\n", b"\r\n")
        stuffed = piece.replace(b"\r\n.", b"\r\n..")
        if self._line_start and piece.startswith(b"."):
            stuffed = b"." + stuffed
        if piece:
            self._line_start = piece.endswith(b"\r\n")
        if self.finished:
            stuffed += b".\r\n" if self._line_start else b"\r\n.\r\n"
        return stuffed


def _not_whole(message: Message) -> BodyError:
    return BodyError(f"{message.file or message.id}: not as long as the message")


def _pieces(message: Message) -> Iterator[bytes]:
    """All octets, in pieces of PIECE and a shorter last one."""
    held: list[bytes | memoryview] = []
    room = PIECE
    for segment in _segments(message):
        left = memoryview(segment)
        while len(left) >= room:
            held.append(left[:room])
            left = left[room:]
            yield b"".join(held)
            held = []
            room = PIECE
        if left:
            held.append(left)
            room -= len(left)
    if held:
        yield b"".join(held)


def _segments(message: Message) -> Iterator[bytes]:
    """The prefix, then the body without the cuts, as it lies in memory or comes from the file."""
    yield message.prefix
    edges = [0, *(edge for cut in message.cuts for edge in cut), message.size]
    kept = zip(edges[::2], edges[1::2], strict=True)
    if message.parts is None:
        for start, end in kept:
            while start < end:
                piece = _read_file(message.file, start, min(end - start, PIECE))
                if not piece:
                    raise _not_whole(message)
                yield piece
                start += len(piece)
        return
    ranges = list(kept)
    offset = 0
    for part in message.parts:
        for start, end in ranges:
            piece = part[max(start - offset, 0) : max(end - offset, 0)]
            if piece:
                yield piece
        offset += len(part)


def _read_file(name: str, start: int, size: int) -> bytes:
    """Opened for each piece: a session that ends while a thread reads has nothing to close under it."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(descriptor, size, start)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BodyError(f"{name}: {error.strerror}") from None
