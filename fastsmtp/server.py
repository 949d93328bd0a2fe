"""One worker: the only place that wires objects together, and the order in which they start and end.

In: a configuration and a seat (listening sockets, TLS contexts, shared counters) that the supervisor made before the
fork. Out: an exit code. Start: log, spools (a left-over spool of a worker that is no more is adopted and drained),
transports, queues, listeners; then the garbage collector is told that all of it stays. End, at SIGTERM or when the
supervisor is gone: listeners close, idle sessions hear 421, what is under way is finished within a limit, then queue
and spool close. Descriptors are counted: below a reserve the listeners close and clients wait in the kernel.
Not here: processes and privileges (supervisor), what a session does.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from ssl import SSLError

import uvloop

from . import log as logs
from .address import parse_address
from .config import Config, Discard, Listener, Maildir
from .connection import Connection
from .delivery import Transport
from .delivery import discard as discard_transport
from .delivery import maildir as maildir_transport
from .domains import Domain, Domains
from .log import Log
from .memory_spool import MemorySpool
from .metrics import Counter
from .policy import Policy
from .policy.recipients import Recipients
from .queue import Backoff, Queue
from .reply import R421_NOT_TAKING_MAIL, R452_NO_ROOM, Reply
from .seat import BACKLOG, EXIT_CANNOT_START, Seat
from .service import Service, Times
from .session import Terms
from .spool import Spool, SpoolError

LOG_SECONDS = 0.05  # 2 µs a line, on the loop: more at once would be felt by sessions
RESERVE = 64  # descriptors kept for mailboxes, bodies and whatever libraries open; a quarter where there are few
IDLE_TICKS = 5  # seconds without a message after which garbage is collected


def run(config: Config, seat: Seat) -> int:
    """Serves in this process until told to stop; the exit code."""
    # A thread that wants the GIL asks for it this often; 5 ms is Python's own figure.
    sys.setswitchinterval(0.0005)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's whole group; the supervisor sends SIGTERM
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the lower one is for programs that use select(2)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Worker(config, seat).serve())


def clock() -> Callable[[], float]:
    """Seconds since the epoch that never jump: the wall clock of the start, and the monotonic clock since."""
    base = time.time() - time.monotonic()
    return lambda: base + time.monotonic()


def identity(data_dir: Path) -> str:
    """A short word for a data directory on this machine."""
    return hashlib.sha256(f"{socket.gethostname()}:{data_dir.resolve()}".encode()).hexdigest()[:8]


class Worker:
    """Everything that one process serves with."""

    def __init__(self, config: Config, seat: Seat) -> None:
        self._config = config
        self._seat = seat
        self._loop: asyncio.AbstractEventLoop
        self._log: Log
        self._now = clock()
        self._spools: list[Spool | MemorySpool] = []  # the first is this worker's own
        self._queues: list[Queue] = []
        self._transports: dict[str, Transport] = {}
        self._services: list[Service] = []
        self._doors: list[Door] = []
        self._guard: Guard
        self._stop = asyncio.Event()
        self._accepted = 0  # messages, at the last tick
        self._idle = 0
        self._commits = (0, 0)  # flushed and failed, at the last tick

    async def serve(self) -> int:
        self._loop = asyncio.get_running_loop()
        self._log = logs.open_log(self._config.log.format)
        self._loop.set_exception_handler(self._on_exception)
        self._loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        self._loop.add_reader(self._seat.alive, self._on_orphaned)
        try:
            self._open()
        except (SpoolError, OSError) as error:
            self._log.write(logs.CANNOT_START, str(error))
            self._log.close()
            return EXIT_CANNOT_START
        for door in self._doors:
            await door.open()
        os.write(self._seat.ready, b"1")
        os.close(self._seat.ready)
        # Whatever lives now lives on: not to be looked through again. Full collections wait for a quiet moment
        # (28 ms with 100,000 sessions).
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 1_000_000)
        self._tick()
        self._flush_log()
        await self._stop.wait()
        await self._end()
        return 0

    # Start

    def _open(self) -> None:
        config, seat = self._config, self._seat
        for name, section in config.transport.items():
            self._transports[name] = self._open_transport(section)
        domains = self._make_domains()
        self._add_spool(self._open_spool(seat.index), domains)
        for left_over in self._left_over_spools():
            self._add_spool(self._open_spool(left_over), domains)
            for section in config.transport.values():
                if isinstance(section, Maildir):
                    folder = maildir_transport.temporary_folder(section.path, identity(config.data_dir))
                    maildir_transport.remove_leftovers(folder, left_over)
        self._guard = Guard(self._loop, self._doors, self._log)
        for number, listener in enumerate(config.listener):
            service = self._make_service(number, listener, domains)
            self._services.append(service)
            for owner, listening in seat.sockets:
                if owner == number:
                    implicit = listener.tls == "implicit"
                    self._doors.append(Door(service, listening, implicit, self._guard))

    def _open_transport(self, section: Maildir | Discard) -> Transport:
        if isinstance(section, Discard):
            return discard_transport.Discard()
        config = self._config
        return maildir_transport.Maildir(
            section.path, self._seat.index, config.hostname, identity(config.data_dir), section.sync
        )

    def _make_domains(self) -> Domains:
        config = self._config
        return Domains(
            (
                Domain(row.name, row.transport, None if row.recipients == "any" else row.recipients, row.case_sensitive)
                for row in config.domain
            ),
            config.hostname,
            parse_address(config.postmaster) if config.postmaster else None,
        )

    def _open_spool(self, number: int) -> Spool | MemorySpool:
        config = self._config
        if config.spool.durability == "none":
            return MemorySpool(number, loop=self._loop, memory=config.limits.memory, wall=self._now)
        spool = Spool(
            config.data_dir / "spool" / str(number),
            number,
            loop=self._loop,
            log=self._log,
            inline=config.spool.inline,
            min_free=config.spool.min_free,
            memory=config.limits.memory,
        )
        spool.open()
        return spool

    def _left_over_spools(self) -> list[int]:
        """Of workers beyond today's number; each has one worker that takes it over."""
        if self._config.spool.durability == "none":
            return []
        workers = self._seat.workers
        found = [int(entry.name) for entry in (self._config.data_dir / "spool").iterdir() if entry.name.isdecimal()]
        return [number for number in sorted(found) if number >= workers and number % workers == self._seat.index]

    def _add_spool(self, spool: Spool | MemorySpool, domains: Domains) -> None:
        self._spools.append(spool)
        config = self._config.queue
        self._queues.append(
            Queue(
                spool,
                self._transports,
                domains.route,
                log=self._log,
                count=self._count,
                now=self._now,
                backoff=Backoff(config.retry, config.retry_max),
            )
        )

    def _make_service(self, number: int, listener: Listener, domains: Domains) -> Service:
        config, seat = self._config, self._seat
        limits, timeouts = config.limits, config.timeouts
        keeper = self._spools[0]
        context = seat.contexts.get(number)
        policy = Policy([Recipients(domains)], self._log)
        terms = Terms(
            config.hostname,
            listener.role,
            next_id=keeper.next_id,
            room=self._make_room(keeper),
            now=self._now,
            asks=policy.stages,
            any_octets=all(self._transports[row.transport].any_octets for row in config.domain),
            tls=listener.tls == "starttls" and context is not None,
            brackets=listener.brackets,
            bare_data=listener.bare != "reject",
            bare_bdat=listener.bare_bdat == "keep",
            message_size=limits.message_size,
            recipients=limits.recipients,
            hops=limits.received,
            errors=limits.errors,
            useless=limits.useless,
        )
        return Service(
            str(listener.address[0]),
            terms,
            loop=self._loop,
            keeper=keeper,
            policy=policy,
            log=self._log,
            shared=seat.shared,
            worker=seat.index,
            times=Times(
                timeouts.command,
                timeouts.data,
                timeouts.data_rate,
                timeouts.tls,
                timeouts.session,
                timeouts.oversize,
                timeouts.write,
                listener.greet_delay,
            ),
            context=context,
            early_refused=listener.early_talker == "refuse",
            session_limit=limits.sessions,
            withheld=_withheld(listener),
            command_line=limits.command_line,
            auth_line=limits.auth_line,
            text_line=limits.text_line,
            header=limits.header,
            bare=listener.bare,
        )

    def _make_room(self, keeper: Spool | MemorySpool) -> Callable[[int], Reply | None]:
        def room(size: int) -> Reply | None:
            if keeper.room(size):
                return None
            return R452_NO_ROOM if keeper.healthy else R421_NOT_TAKING_MAIL

        return room

    # While it runs

    def _count(self, counter: Counter, n: int) -> None:
        self._seat.shared.add(self._seat.index, counter, n)

    def _tick(self) -> None:
        """Once a second."""
        self._loop.call_later(1.0, self._tick)
        self._seat.shared.beat(self._seat.index, time.monotonic())
        for service in self._services:
            service.tick()
        for queue in self._queues:
            queue.tick()
        self._guard.tick()
        self._count_commits()
        accepted = self._seat.shared.total(Counter.MESSAGES_ACCEPTED)
        self._idle = self._idle + 1 if accepted == self._accepted else 0
        self._accepted = accepted
        if self._idle == IDLE_TICKS:
            gc.collect()

    def _count_commits(self) -> None:
        totals = [spool.commits for spool in self._spools if isinstance(spool, Spool)]
        flushed, failed = sum(total[0] for total in totals), sum(total[1] for total in totals)
        self._count(Counter.COMMITS, flushed - self._commits[0])
        self._count(Counter.COMMITS_FAILED, failed - self._commits[1])
        self._commits = (flushed, failed)

    def _flush_log(self) -> None:
        self._loop.call_later(LOG_SECONDS, self._flush_log)
        dropped = self._log.flush()
        if dropped:
            self._count(Counter.LOG_LINES_DROPPED, dropped)

    def _on_exception(self, _: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """What no caller could take: a TLS handshake that failed, or a bug."""
        error = context.get("exception")
        if isinstance(error, (SSLError, ConnectionError, TimeoutError)):
            self._count(Counter.TLS_FAILURES, 1)
            self._log.write(logs.TLS_FAILED, "", 0, "", str(error))
        elif isinstance(error, BaseException):
            self._log.write(logs.BUG, str(context.get("message")), repr(error), logs.trace(error))
        else:
            self._log.write(logs.BUG, str(context.get("message")), "", ())

    # End

    def _on_orphaned(self) -> None:
        self._loop.remove_reader(self._seat.alive)
        self._stop.set()

    async def _end(self) -> None:
        for door in self._doors:
            door.close_for_good()
        for service in self._services:
            service.drain()
        # Half of the time is the transports': what one still has at the end is delivered and not marked, so twice.
        middle = time.monotonic() + self._config.timeouts.shutdown / 2
        deadline = middle + self._config.timeouts.shutdown / 2
        await self._sessions_ended(middle)
        queues = asyncio.gather(*[queue.close() for queue in self._queues])
        await self._sessions_ended(deadline)
        for service in self._services:
            for connection in service.connections():
                connection.abort("shutdown")
        await self._within(deadline, queues)
        for transport in self._transports.values():
            await self._within(deadline, transport.close())
        for spool in self._spools:
            await spool.close()
        self._log.close()

    async def _sessions_ended(self, deadline: float) -> None:
        while any(service.connections() for service in self._services) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def _within(self, deadline: float, work: Awaitable[object]) -> None:
        """Waits until the deadline, but always a moment: what is in the hands of the disk is nearly done."""
        try:
            await asyncio.wait_for(work, max(1.0, deadline - time.monotonic()))
        except TimeoutError:
            pass


class Door:
    """A listening socket, and the server that accepts from it while it is open.

    The socket itself stays open over a pause: clients wait in its queue.
    """

    def __init__(self, service: Service, listening: socket.socket, implicit_tls: bool, guard: Guard) -> None:
        self._service = service
        self._socket = listening
        self._implicit_tls = implicit_tls
        self._guard = guard
        self._server: asyncio.AbstractServer | None = None
        self._over = False
        self.is_open = False

    async def open(self) -> None:
        if self._over:
            return
        service = self._service
        guard = self._guard
        self.is_open = True
        listening = self._socket.dup()
        context = service.context if self._implicit_tls else None
        timeout = service.times.tls if context else None

        def accept() -> Connection:
            guard.admit()
            return Connection(service)

        if listening.family == socket.AF_UNIX:
            server: asyncio.AbstractServer = await service.loop.create_unix_server(
                accept, sock=listening, backlog=BACKLOG, ssl=context, ssl_handshake_timeout=timeout
            )
        else:
            server = await service.loop.create_server(
                accept, sock=listening, backlog=BACKLOG, ssl=context, ssl_handshake_timeout=timeout
            )
        if self.is_open:
            self._server = server
        else:
            server.close()

    def reopen(self) -> None:
        self._service.run(self.open())

    def close(self) -> None:
        self.is_open = False
        if self._server is not None:
            self._server.close()
            self._server = None

    def close_for_good(self) -> None:
        self._over = True
        self.close()
        self._socket.close()


class Guard:
    """Closes the doors before descriptors run out, and opens them when enough are free again.

    At the limit libuv would accept clients and drop them unheard. It accepts one client in a round of the loop, so a
    door that is closed at the end of the round is closed in time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, doors: list[Door], log: Log) -> None:
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        reserve = min(RESERVE, self._limit // 4)
        self._close_at = self._limit - reserve
        self._open_at = self._close_at - reserve // 2
        self._loop = loop
        self._doors = doors
        self._log = log
        self._closing = False
        self._since = 0.0  # when the pause began; 0: there is none

    def admit(self) -> None:
        """Called for each client accepted; takes 1 µs."""
        if not self._closing and self._lowest_free() >= self._close_at:
            self._closing = True
            self._loop.call_soon(self._close)

    def tick(self) -> None:
        """Called once a second."""
        if not self._since:
            return
        if all(door.is_open for door in self._doors):
            self._log.write(logs.ACCEPT_RESUMED, time.monotonic() - self._since)
            self._since = 0.0
        elif self._in_use() < self._open_at:
            for door in self._doors:
                if not door.is_open:
                    door.reopen()

    def _close(self) -> None:
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


def _withheld(listener: Listener) -> Callable[[str], frozenset[str]] | None:
    """The keywords that a client is not offered, by its address; None when every client is offered all."""
    rules = [(frozenset(rule.keywords), rule.networks) for rule in listener.withhold]
    if not rules:
        return None

    def withheld(ip: str) -> frozenset[str]:
        found: frozenset[str] = frozenset()
        for keywords, networks in rules:
            if not networks or (ip and any(ip_address(ip) in network for network in networks)):
                found |= keywords
        return found

    return withheld
