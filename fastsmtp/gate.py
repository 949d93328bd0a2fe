"""Where TLS begins with the first octet: clients are asked before the handshake whether they may come in.

In: a listening socket. Out: connections with TLS under them, or nothing: a client over its limits, or more than there
may be sessions, is turned away without a word, for it would read none in clear, and no more is made for it than a
socket. A handshake costs more than everything else that a session does, so it counts as one; one that fails gives the
client's place back. Otherwise as an asyncio server.
Not here: the limits (policy/limits.py), when a door is open (doors.py). RFC 8314 3.3.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable

from . import log as logs
from .connection import Connection
from .metrics import Counter
from .service import Service

BATCH = 16  # clients accepted in a round of the loop


class Gate:
    """Accepts from `listening`, which is its own to close. `service` is the one of now, with a TLS context; `on_accept`
    is called for each client."""

    def __init__(self, service: Callable[[], Service], listening: socket.socket, on_accept: Callable[[], None]) -> None:
        self._service = service
        self._socket = listening
        self._on_accept = on_accept
        self._loop = service().loop
        listening.setblocking(False)
        self._loop.add_reader(listening, self._accept)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _accept(self) -> None:
        for _ in range(BATCH):
            try:
                client, peer = self._socket.accept()
            except OSError:  # nobody is there any more, or the client has gone
                return
            self._on_accept()
            service = self._service()
            ip, port = (peer[0].removeprefix("::ffff:"), peer[1]) if isinstance(peer, tuple) else ("", 0)
            if self._admits(service, ip):
                client.setblocking(False)
                service.run(self._shake_hands(service, client, ip, port))
            else:
                service.count(Counter.SESSIONS_REFUSED)
                client.close()

    def _admits(self, service: Service, ip: str) -> bool:
        if service.limits is not None and service.limits.admit(ip) is not None:
            return False
        if service.shared.open_session(service.worker) <= service.session_limit:
            return True
        self._dismiss(service, ip)
        return False

    def _dismiss(self, service: Service, ip: str) -> None:
        service.shared.close_session(service.worker)
        if service.limits is not None:
            service.limits.leave(ip)

    async def _shake_hands(self, service: Service, client: socket.socket, ip: str, port: int) -> None:
        connection = Connection(service, admitted=True)
        try:
            await service.loop.connect_accepted_socket(
                lambda: connection, client, ssl=service.context, ssl_handshake_timeout=service.times.tls
            )
        except (OSError, ssl.SSLError, TimeoutError) as error:
            service.count(Counter.TLS_FAILURES)
            service.log.write(logs.TLS_FAILED, ip, port, service.name, str(error))
        if not connection.opened:
            self._dismiss(service, ip)
