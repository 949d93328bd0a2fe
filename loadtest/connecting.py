"""Connections of one process: from which address, how many at a time, and TLS on them.

In: Options and the addresses that this process connects from. Out: connections, given to protocols; connect latencies;
what limit of the machine was hit, in words. Always: at most AT_ONCE connections are under way, far fewer than any
listen queue holds, and each ends by itself in time. When an address has no ports left the next one is taken.
TLS takes any certificate: a load test measures servers, it trusts none. Resumption offers the newest session again.
Not here: what is said on a connection. On failure: a word to whoever asked for the connection.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

from .options import Options
from .proxy import render_proxy
from .tally import Tally

Factory: TypeAlias = Callable[[float], asyncio.Protocol]  # is given when the connection was begun
Failed: TypeAlias = Callable[[str], None]  # is given why, in words
Secured: TypeAlias = Callable[[asyncio.Transport, bool], None]  # whether the TLS session was resumed

AT_ONCE = 100
IP_BIND_ADDRESS_NO_PORT = 24  # ip(7): the port is chosen by connect, so that only the pair of both ends must be free
_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RESERVE = 0.9  # of the ports: some wait for their end (TIME_WAIT), some are others'


def ports_of_an_address() -> int:
    """How many connections one address can have to one server."""
    low, high = map(int, _PORTS.read_text().split())
    return int((high - low + 1) * _RESERVE)


def loopback_sources(count: int) -> tuple[str, ...]:
    """127.0.0.2 and on: all of 127.0.0.0/8 is this machine's."""
    return tuple(f"127.0.{number // 250}.{number % 250 + 2}" for number in range(count))


class ResumingContext(ssl.SSLContext):
    """A client's context that offers the TLS session which it was given last."""

    latest: ssl.SSLSession | None = None

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        return super().wrap_bio(*arguments, **{**named, "session": self.latest})


def make_context(resumption: bool) -> ssl.SSLContext:
    context = (ResumingContext if resumption else ssl.SSLContext)(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class _Wanted(NamedTuple):
    factory: Factory
    failed: Failed
    opened: Callable[[], None] | None
    tls: bool


class Connector:
    """`address` is numeric; `sources` may be empty: the kernel chooses."""

    def __init__(self, options: Options, tally: Tally, address: tuple[str, int], sources: tuple[str, ...]) -> None:
        self._loop = asyncio.get_running_loop()
        self._proxy = options.proxy
        self._timeout = options.connect_timeout
        self.address = address
        self._sources = sources
        self._given = bool(options.source)
        self._turn = 0
        self._wanted: deque[_Wanted] = deque()
        self._begun = 0
        self._under_way: dict[int, tuple[asyncio.Task[None], float]] = {}  # and since when
        self._handshakes: set[asyncio.Task[None]] = set()
        self._context = make_context(options.resumption) if options.tls != "off" else None
        self._closed = False
        self.note_connect = tally.values("connect").append
        self.limits: dict[str, None] = {}

    def open(
        self, factory: Factory, failed: Failed, opened: Callable[[], None] | None = None, tls: bool = False
    ) -> None:
        """A connection, now or when it is its turn. With `tls` the protocol begins behind the handshake."""
        wanted = _Wanted(factory, failed, opened, tls)
        if len(self._under_way) < AT_ONCE:
            self._begin(wanted)
        else:
            self._wanted.append(wanted)

    def close(self) -> None:
        """No more connections; nobody hears of those that are under way."""
        self._closed = True
        self._wanted.clear()
        for task in [*(task for task, _ in self._under_way.values()), *self._handshakes]:
            task.cancel()

    def check_time(self, now: float) -> None:
        """Ends connections that take too long."""
        for task, begun in list(self._under_way.values()):
            if now - begun > self._timeout:
                task.cancel()

    def preface(self, transport: asyncio.BaseTransport) -> bytes:
        """The PROXY header that goes first, where one is asked for."""
        if not self._proxy:
            return b""
        return render_proxy(
            self._proxy, transport.get_extra_info("sockname")[:2], transport.get_extra_info("peername")[:2]
        )

    def start_tls(
        self, transport: asyncio.Transport, protocol: asyncio.Protocol, secured: Secured, failed: Callable[[], None]
    ) -> None:
        task = self._loop.create_task(self._start_tls(transport, protocol, secured, failed))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    def remember_tls(self, transport: asyncio.Transport) -> None:
        """At a session's end, because in TLS 1.3 tickets come after the handshake."""
        if isinstance(self._context, ResumingContext):
            self._context.latest = transport.get_extra_info("ssl_object").session

    async def _start_tls(
        self, transport: asyncio.Transport, protocol: asyncio.Protocol, secured: Secured, failed: Callable[[], None]
    ) -> None:
        assert self._context is not None
        if transport.is_closing():  # the server said more than 220
            failed()
            return
        try:
            done = await self._loop.start_tls(
                transport, protocol, self._context, ssl_handshake_timeout=self._timeout, server_hostname=None
            )
        except (OSError, EOFError):  # ssl.SSLError is an OSError
            failed()
            return
        # Where the connection ends amid the handshake uvloop gives a transport all the same.
        secured_object = done.get_extra_info("ssl_object") if done else None
        if done is None or secured_object is None:
            failed()
        else:
            secured(done, bool(secured_object.session_reused))

    def _begin(self, wanted: _Wanted) -> None:
        self._begun += 1
        # No callback at the task's end: it takes itself out, and a connection for each message is what this is for.
        task = self._loop.create_task(self._open(self._begun, wanted))
        self._under_way[self._begun] = (task, perf_counter())

    async def _open(self, number: int, wanted: _Wanted) -> None:
        born = perf_counter()
        tls = self._context if wanted.tls else None
        try:
            if self._sources:
                await self._connect_from(self._next_source(), wanted.factory, born, tls)
            else:
                host, port = self.address
                await self._loop.create_connection(lambda: wanted.factory(born), host, port, ssl=tls)
            if wanted.opened is not None:
                wanted.opened()
        except asyncio.CancelledError:
            if not self._closed:
                wanted.failed("no answer in time")
        except OSError as error:
            if not self._closed:
                wanted.failed(self._describe(error))
        finally:
            del self._under_way[number]
            if self._wanted and not self._closed:
                self._begin(self._wanted.popleft())

    def _next_source(self) -> str:
        self._turn += 1
        return self._sources[self._turn % len(self._sources)]

    async def _connect_from(self, source: str, factory: Factory, born: float, tls: ssl.SSLContext | None) -> None:
        connection = socket.socket(socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET)
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            connection.bind((source, 0))
            await self._loop.sock_connect(connection, self.address)
            await self._loop.create_connection(
                lambda: factory(born), sock=connection, ssl=tls, server_hostname="" if tls else None
            )
        except BaseException:
            connection.close()
            raise

    def _describe(self, error: OSError) -> str:
        """In words; a limit of this machine is noted, and the next try has it easier where it can."""
        if error.errno == errno.EADDRNOTAVAIL and not self._given and self.address[0].startswith("127."):
            self._sources = loopback_sources(len(self._sources) + 1)
            self.limits[f"the ports of an address ran out: connecting from {', '.join(self._sources)}"] = None
        elif error.errno == errno.EADDRNOTAVAIL:
            self.limits["the ports of the source addresses ran out: give more with --source"] = None
        elif error.errno in (errno.EMFILE, errno.ENFILE):
            self.limits["descriptors ran out: more --processes, or a higher limit (ulimit -n)"] = None
        return error.strerror or str(error)
