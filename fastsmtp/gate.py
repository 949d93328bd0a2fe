"""Where TLS begins with the first octet: clients are asked before the handshake whether they may come in.

In: a client that has just been accepted. Out: a connection with TLS under it, or nothing: a client over its limits, or
more than there may be sessions, is turned away without a word, for it would read none in clear, and nothing is made
for it. A handshake costs more than everything else that a session does, so it counts as one; one that fails gives the
client's place back.
Not here: the limits (policy/limits.py), TLS (tls_transport.py), listening (doors.py). RFC 8314 3.3.
"""

from __future__ import annotations

import asyncio
from typing import cast

from . import log as logs
from .connection import Connection, peer_of
from .metrics import Counter
from .service import Service
from .tls_transport import TlsTransport


class Gate(asyncio.Protocol):
    """One client, until it has come in. The service is the one of the moment at which it was accepted."""

    __slots__ = ("_connection", "_let_in", "_peer", "_service")

    def __init__(self, service: Service, peer: tuple[str, int] | None = None) -> None:
        """`peer`: who it is, where the limits have let it in before (doors.py)."""
        self._service = service
        self._let_in = peer is not None
        self._peer = peer or ("", 0)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        plain = cast("asyncio.Transport", transport)
        service = self._service
        if not self._let_in:
            peer = peer_of(plain)
            if peer is None:
                plain.abort()
                return
            self._peer = peer
            if service.limits is not None and service.limits.admit(self._peer[0]) is not None:
                service.turn_away()
                plain.abort()
                return
        if service.shared.open_session(service.worker) > service.session_limit or service.context is None:
            service.count(Counter.SESSIONS_REFUSED)
            self._dismiss()
            plain.abort()
            return
        service.handshakes += 1
        self._connection = Connection(service, self._peer)
        tls = TlsTransport(self._connection, service.context, service.loop, service.times.tls, self._on_handshake)
        plain.set_protocol(tls)
        tls.connection_made(plain)

    def _dismiss(self) -> None:
        service = self._service
        service.shared.close_session(service.worker)
        if service.limits is not None:
            service.limits.leave(self._peer[0])

    def _on_handshake(self, tls: TlsTransport, error: Exception | None) -> None:
        service = self._service
        service.handshakes -= 1
        if error is None:
            self._connection.connection_made(cast("asyncio.Transport", tls))
            return
        service.count(Counter.TLS_FAILURES)
        service.log.write(logs.TLS_FAILED, *self._peer, service.name, str(error))
        self._dismiss()
