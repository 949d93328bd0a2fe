"""The listening sockets of a worker, opened and closed to the loop; clients wait in the kernel meanwhile.

In: sockets that the supervisor bound, and the service of each. Out: connections. At its limit of descriptors libuv
would accept clients and drop them unheard; so descriptors are counted: below a reserve the doors close, above it they
open again. A closed door loses nobody: the socket stays open, and clients wait in its queue. In a flood of clients over
their limits a door turns them away by itself.
Not here: binding (claim.py), what a connection does.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time

from . import log as logs
from ._files import send_last
from .connection import Connection, name_peer
from .gate import Gate
from .log import Log
from .seat import BACKLOG
from .service import Service

RESERVE = 64  # descriptors kept for mailboxes, bodies and whatever libraries open; a quarter where there are few
FLOOD = 100  # clients turned away in a second, from which on the door accepts by itself
AT_ONCE = 16  # clients that it takes then before others have their turn: 0.3 ms when all are turned away


class Door:
    """A listening socket, and the server that accepts from it while it is open.

    The socket itself stays open over a pause: clients wait in its queue. `number` is that of the socket (seat.py).
    In a flood of clients that are over their limits the door itself accepts, and asks the limits before anything is
    made for a client: who is turned away costs down to half of what it costs with a transport, where many wait. Who is
    let in costs a Task more, so the server has the socket back when the flood is over.
    """

    def __init__(
        self, number: int, service: Service, listening: socket.socket, implicit_tls: bool, guard: Guard
    ) -> None:
        self.number = number
        self._service = service
        self._socket = listening
        self._implicit_tls = implicit_tls
        self._guard = guard
        self._server: asyncio.AbstractServer | None = None
        self._over = False
        self.flooded = False
        self._turned_away = service.turned_away  # at the last tick
        self.is_open = False

    async def open(self) -> None:
        if self._over:
            return
        service = self._service
        self.is_open = True
        listening = self._socket.dup()
        if listening.family == socket.AF_UNIX:
            server: asyncio.AbstractServer = await service.loop.create_unix_server(
                self._accept, sock=listening, backlog=BACKLOG
            )
        else:
            server = await service.loop.create_server(self._accept, sock=listening, backlog=BACKLOG)
        if self.is_open:
            self._server = server
        else:
            server.close()

    def _accept(self) -> Connection | Gate:
        self._guard.admit()
        service = self._service
        if service.turned_away >= self._turned_away + FLOOD and not self.flooded:
            self.flooded = True
            service.loop.call_soon(self._begin_flood)
        return self._answer(None)

    def _answer(self, peer: tuple[str, int] | None) -> Connection | Gate:
        return Gate(self._service, peer) if self._implicit_tls else Connection(self._service, peer)

    def use(self, service: Service, implicit_tls: bool) -> None:
        """Who connects from now on is of this service."""
        self._service = service
        self._implicit_tls = implicit_tls
        self._turned_away = service.turned_away

    def reopen(self) -> None:
        self._service.run(self._reopen())

    async def _reopen(self) -> None:
        try:
            await self.open()
        except OSError:  # descriptors have run out again: the guard looks once more
            self._guard.pause()

    def tick(self) -> None:
        """Called once a second."""
        calm = self._service.turned_away < self._turned_away + FLOOD // 2
        self._turned_away = self._service.turned_away
        if self.flooded and calm and self.is_open:
            self._end_flood()
            self.reopen()

    def close(self) -> None:
        self.is_open = False
        self._end_flood()
        if self._server is not None:
            self._server.close()
            self._server = None

    def close_for_good(self) -> None:
        self._over = True
        self.close()
        self._socket.close()

    # In a flood

    def _begin_flood(self) -> None:
        if self._server is None or not self.flooded:  # it was closed meanwhile
            self.flooded = False
            return
        self._server.close()
        self._server = None
        self._socket.setblocking(False)
        self._service.loop.add_reader(self._socket.fileno(), self._take)

    def _end_flood(self) -> None:
        if self.flooded:
            self.flooded = False
            self._service.loop.remove_reader(self._socket.fileno())

    def _take(self) -> None:
        """Takes clients out of the queue."""
        service = self._service
        limits = service.limits
        for _ in range(AT_ONCE):
            try:
                # accept() makes a socket of it, which takes 4 µs.
                fd, address = self._socket._accept()  # type: ignore[attr-defined]
            except ConnectionAbortedError:
                continue
            except BlockingIOError:
                return
            except OSError:  # descriptors have run out, of this process or of the machine
                self._guard.pause()
                return
            peer = name_peer(address)
            refusal = limits.admit(peer[0]) if limits is not None else None
            if refusal is None:
                self._guard.admit()
                client = socket.socket(fileno=fd)
                client.setblocking(False)
                service.run(_let_in(service.loop, client, self._answer(peer)))
                continue
            service.turn_away()
            if not self._implicit_tls:
                send_last(fd, refusal)
            os.close(fd)


async def _let_in(loop: asyncio.AbstractEventLoop, client: socket.socket, protocol: Connection | Gate) -> None:
    await loop.connect_accepted_socket(lambda: protocol, client)


class Guard:
    """Closes the doors before descriptors run out, and opens them when enough are free again.

    At the limit libuv would accept clients and drop them unheard. To look takes two system calls, 1.5 µs: it is done
    when clients may have taken an eighth of the reserve since the last time. libuv accepts one client in a round of the
    loop, so a door that is closed at the end of the round is closed in time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, doors: list[Door], log: Log) -> None:
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        reserve = min(RESERVE, self._limit // 4)
        self._close_at = self._limit - reserve
        self._open_at = self._close_at - reserve // 2
        self._unseen_limit = reserve // 8
        self._unseen = 0  # clients accepted since the last look
        self._loop = loop
        self._doors = doors
        self._log = log
        self._closing = False
        self._since = 0.0  # when the pause began; 0: there is none

    def admit(self) -> None:
        """Called for each client accepted."""
        self._unseen += 1
        if self._unseen < self._unseen_limit or self._closing:
            return
        self._unseen = 0
        if self._lowest_free() >= self._close_at:
            self._closing = True
            self._loop.call_soon(self.pause)

    def tick(self) -> None:
        """Called once a second."""
        for door in self._doors:
            door.tick()
        if not self._since:
            return
        if all(door.is_open for door in self._doors):
            self._log.write(logs.ACCEPT_RESUMED, time.monotonic() - self._since)
            self._since = 0.0
        elif self._in_use() < self._open_at:
            for door in self._doors:
                if not door.is_open:
                    door.reopen()

    def pause(self) -> None:
        """Closes the doors, for a second at least."""
        self._closing = False
        for door in self._doors:
            door.close()
        if not self._since:
            self._since = time.monotonic()
            self._log.write(logs.ACCEPT_PAUSED, f"{self._close_at} of {self._limit} descriptors are in use")

    def _lowest_free(self) -> int:
        """The kernel gives out the lowest free number: all below it are in use. Others may be, above a hole."""
        try:
            number = os.dup(0)
        except OSError:
            return self._limit
        os.close(number)
        return number

    def _in_use(self) -> int:
        """Exact, and as slow as they are many (1 ms for 1,000)."""
        try:
            return len(os.listdir("/proc/self/fd"))
        except OSError:
            return self._limit
