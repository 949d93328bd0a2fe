"""How a sink's session reads: lines, the text of DATA, the chunks of BDAT.

In: octets, cut anywhere. Out: one line or one whole message after the other; what is pipelined is read in one pass.
Always: the same octets give the same lines and messages however they were cut. Only CRLF.CRLF ends a message; stuffed
dots are still in it (RFC 5321 4.5.2). Not here: what they mean (sink_protocol), how it is answered (sink_replies).
"""

from __future__ import annotations

import asyncio

from .sink_replies import R500_LONG, R503_PIPELINING, Speaker
from .sink_service import Service

LONGEST_LINE = 12_288  # octets of a command, AUTH's included: RFC 4954 4
_END = b"\r\n.\r\n"


class Reader(Speaker):
    """The half of a session that listens. Nothing is taken from `_unread` while it is `_waiting`."""

    __slots__ = ("_chunks", "_follows", "_left", "_octets", "_reading", "_tail", "_tls_due", "_unread")

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(service, loop)
        self._unread = b""
        self._follows = False  # more octets came with this command
        self._tls_due = False  # TLS begins when all replies are out
        self._read_lines()

    def _read_lines(self) -> None:
        """What comes next is a command."""
        self._reading = False  # the text of DATA
        self._left = 0  # octets of BDAT that are still to come
        self._chunks: list[bytes] = []
        self._octets = 0
        self._tail = b"\r\n"  # the last octets of the text so far

    def _take_line(self, line: bytes) -> None:
        raise NotImplementedError

    def _finish(self, dotted: bool) -> None:
        """A message is whole; `dotted` is one of DATA, with its final dot."""
        raise NotImplementedError

    def _end_chunk(self) -> None:
        raise NotImplementedError

    def _begin_tls(self) -> None:
        raise NotImplementedError

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        if self._waiting or self._unread:
            self._unread += data
            if not self._waiting:
                self._advance()
            return
        # What a client that waits for each reply sends: one line, or one whole message. Half the cost of _advance.
        if self._reading and data.endswith(_END):
            at = self._take_text(data, 0)
        elif data.find(b"\n") + 1 == len(data) and not (self._reading or self._left):
            self._follows = False
            self._take_line(data)
            at = len(data)
        else:
            at = 0
        if at < len(data) or self._tls_due or len(self._out) != 1:
            self._unread = data[at:]
            self._advance()
        else:
            self._write(self._out.pop())

    def _advance(self) -> None:
        data = self._unread
        size = len(data)
        at = 0
        while at < size and not (self._waiting or self._tls_due):
            if self._reading:
                at = self._take_text(data, at)
            elif self._left:
                at = self._take_chunk(data, at)
            else:
                end = data.find(b"\n", at) + 1
                if not end:
                    break
                self._follows = end < size
                if at and "PIPELINING" not in self._service.offered:
                    self._refuse(R503_PIPELINING)
                else:
                    self._take_line(data[at:end])
                at = end
        self._unread = data[at:]
        if len(self._unread) > LONGEST_LINE and not self._waiting:
            self._refuse(R500_LONG)
            self._end()
        self._flush()
        if self._tls_due and not self._waiting:
            self._begin_tls()

    def _take_text(self, data: bytes, at: int) -> int:
        """Up to the final dot; where the next octet stands."""
        tail = self._tail
        found = (tail + data[at : at + 4]).find(_END)
        if found >= 0:
            end = at + found + len(_END) - len(tail)
        else:
            end = data.find(_END, at) + len(_END)
            if end < len(_END):
                self._hold(data[at:])
                self._tail = data[-4:] if len(data) - at >= 4 else (tail + data[at:])[-4:]
                return len(data)
        self._hold(data[at:end])
        self._octets -= 3
        self._reading = False
        self._finish(dotted=True)
        return end

    def _take_chunk(self, data: bytes, at: int) -> int:
        end = min(len(data), at + self._left)
        self._left -= end - at
        self._hold(data[at:end])
        if not self._left:
            self._end_chunk()
        return end

    def _hold(self, octets: bytes) -> None:
        self._octets += len(octets)
        if self._service.recorder is not None:
            self._chunks.append(octets)
        if self._service.size and self._octets > self._service.size + 3:
            self._chunks.clear()
