"""TLS between a plain transport and a protocol: to the one it is a protocol, to the other a transport.

In: octets of TLS from below, octets in clear from above. Out: the other way round. `done` is called once: with nothing
when the handshake is over, with the reason when it failed; from then on the protocol above is served. Tickets leave
with what is said first, in one write. All that has arrived is decrypted at once, so nothing waits in here but a part of
a record. A connection that ends says so to the client (close_notify) and waits some seconds for it to go: octets on
their way would else take our last words with them. A client's end without close_notify is none for the protocol above.
Here because asyncio's and uvloop's own take 100 µs of CPU more for a connection, a fifth of a resumed handshake: a
task, two futures, a buffer of 256 KB; and drop the alert that tells a client why its handshake failed.
Not here: contexts (tls.py), who may come in (gate.py). RFC 8446 6.1, RFC 5246 7.2.1.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, cast

RECORD = 16384  # octets, the most that a record holds: one is read at a time
LINGER = 5.0  # seconds that a client has to take our last words


class TlsTransport(asyncio.Protocol):
    """The server's side of TLS. `seconds` are those that the handshake may take."""

    __slots__ = (
        "_above", "_below", "_closing", "_context", "_done", "_error", "_incoming", "_loop", "_object", "_outgoing",
        "_read", "_seconds", "_timer", "secured",
    )  # fmt: skip

    def __init__(
        self,
        above: asyncio.Protocol,
        context: ssl.SSLContext,
        loop: asyncio.AbstractEventLoop,
        seconds: float,
        done: Callable[[TlsTransport, Exception | None], None],
    ) -> None:
        self._above: asyncio.Protocol | None = above
        self._context = context
        self._loop = loop
        self._seconds = seconds
        self._done: Callable[[TlsTransport, Exception | None], None] | None = done
        self._below: asyncio.Transport | None = None
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self.secured = False  # whether TLS is in use

    # To the plain transport below

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Waits for the client to begin."""
        self._below = cast("asyncio.Transport", transport)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = self._context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._read: Callable[[int], bytes] = self._object.read
        self._timer = self._loop.call_later(self._seconds, self._time_out)

    def data_received(self, data: bytes) -> None:
        self._incoming.write(data)
        if self._closing:
            self._skip()
        elif self.secured:
            self._take()
        else:
            self._shake_hands()

    def eof_received(self) -> bool:
        if not self.secured:
            self._fail(ConnectionResetError("the client has gone"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionResetError("the client has gone"))
        self._stop_timer()
        above = self._above
        self._below = self._above = None
        if above is not None:
            above.connection_lost(self._error or exc)

    def pause_writing(self) -> None:
        if self._above is not None:
            self._above.pause_writing()

    def resume_writing(self) -> None:
        if self._above is not None:
            self._above.resume_writing()

    def _shake_hands(self) -> None:
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            self._send()
            return
        except ssl.SSLError as error:
            self._fail(error)
            self._break_off()
            return
        self._stop_timer()
        self.secured = True
        done = self._done
        self._done = None
        assert done is not None
        done(self, None)
        # Tickets of TLS 1.3 leave with what is said first, those of 1.2 are waited for.
        self._loop.call_soon(self._send)
        if self._incoming.pending and not self._closing:
            self._take()

    def _take(self) -> None:
        """Hands up what has arrived."""
        octets: list[bytes] = []
        ended = False
        try:
            while self._incoming.pending or self._object.pending():
                chunk = self._read(RECORD)
                if not chunk:
                    ended = True
                    break
                octets.append(chunk)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self._error = error
        above = self._above
        assert above is not None
        if octets:
            above.data_received(octets[0] if len(octets) == 1 else b"".join(octets))
        if self._outgoing.pending:  # a new key, or an alert
            self._send()
        if self._closing:
            return
        if self._error is not None:
            self._break_off()
        elif ended and self._above is not None:
            self._above.eof_received()
            self.close()

    def _break_off(self) -> None:
        """Behind an error nothing can be said but the alert."""
        self._closing = True
        self._send()
        if self._below is not None:
            self._below.close()

    def _skip(self) -> None:
        """Nothing is of interest any more but the client's close_notify."""
        try:
            while self._read(RECORD):
                pass
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError:
            pass
        if self._below is not None:
            self._below.close()

    def _send(self) -> None:
        octets = self._outgoing.read()
        if octets and self._below is not None and not self._below.is_closing():
            self._below.write(octets)

    def _time_out(self) -> None:
        self._fail(TimeoutError(f"the handshake takes longer than {self._seconds:g} s"))
        self.abort()

    def _fail(self, error: Exception) -> None:
        done = self._done
        if done is not None:
            self._done = None
            self._error = error
            done(self, error)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # To the protocol above, as asyncio.Transport says

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "ssl_object":
            return self._object
        return default if self._below is None else self._below.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._above = cast("asyncio.Protocol", protocol)

    def is_closing(self) -> bool:
        return self._closing or self._below is None or self._below.is_closing()

    def pause_reading(self) -> None:
        if self._below is not None:
            self._below.pause_reading()

    def resume_reading(self) -> None:
        if self._below is not None:
            self._below.resume_reading()

    def write(self, data: bytes) -> None:
        if self.is_closing():
            return
        try:
            while data:
                data = data[self._object.write(data) :]
        except ssl.SSLError as error:  # not raised: others wait behind this write
            self._error = error
            self._break_off()
        else:
            self._send()

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        if self.is_closing():
            return
        self._closing = True
        below = self._below
        assert below is not None
        try:
            self._object.unwrap()
        except ssl.SSLError:  # the client's has not come yet; or octets before it that nobody reads any more
            self._send()
            self._timer = self._loop.call_later(LINGER, self.abort)
            below.resume_reading()
        else:
            self._send()
            below.close()

    def abort(self) -> None:
        self._closing = True
        if self._below is not None:
            self._below.abort()
