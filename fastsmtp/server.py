"""One worker: where objects are wired together, and the order in which they start and end.

In: a configuration and a seat (listening sockets, TLS contexts, shared counters) that the supervisor made before the
fork. Out: an exit code. Start: log, spools (a left-over spool of a worker that is no more is adopted and drained),
transports, queues, listeners; then the garbage collector is told that all of it stays. End, at SIGTERM or when the
supervisor is gone: listeners close, idle sessions hear 421, what is under way is finished within a limit, then queue
and spool close.
Not here: processes and privileges (supervisor), transports and routes (outgoing), what a session does.
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

from . import local_socket
from . import log as logs
from .address import NULL, Address, parse_address
from .colleagues import Colleagues
from .config import Config, Listener, Maildir, Unix
from .control import Control, Desk, Place
from .customers import Customers, Fetch, QueueRun
from .delivery import maildir as maildir_transport
from .doors import Door, Guard
from .dsn import Reporter
from .log import Log
from .memory_spool import MemorySpool
from .metrics import Counter
from .outgoing import Ways
from .policy import Check, Policy
from .policy.recipients import Recipients
from .policy.relay import Relay, Trust
from .queue import Queue
from .reply import R421_NOT_TAKING_MAIL, R452_NO_ROOM, Reply
from .reporting import Reports
from .schedule import Schedule
from .seat import EXIT_CANNOT_START, Seat
from .service import Service, Times
from .session import Terms
from .spool import Spool, SpoolError

LOG_SECONDS = 0.05  # 2 µs a line, on the loop: more at once would be felt by sessions
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
        self._ways: Ways
        self._services: list[Service] = []
        self._doors: list[Door] = []
        self._guard: Guard
        self._control: Control
        self._customers: Customers
        self._colleagues: Colleagues
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
            await self._control.open()
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
        self._ways = Ways(config, seat, self._log, identity(config.data_dir))
        self._add_spool(self._open_spool(seat.index))
        for left_over in self._left_over_spools():
            self._add_spool(self._open_spool(left_over))
            for section in config.transport.values():
                if isinstance(section, Maildir):
                    folder = maildir_transport.temporary_folder(section.path, identity(config.data_dir))
                    maildir_transport.remove_leftovers(folder, left_over)
        self._guard = Guard(self._loop, self._doors, self._log)
        trust = Trust(config.relay.networks)
        self._customers = Customers(config.customer)
        self._colleagues = Colleagues(config.data_dir, seat.workers)
        for number, listener in enumerate(config.listener):
            # What comes by LMTP is for mailboxes of ours, whoever hands it over (RFC 2033 1).
            relays = bool(config.relay.networks) and listener.role not in ("lmtp", "odmr")
            service = self._make_service(number, listener, trust if relays else None)
            self._services.append(service)
            for owner, listening in seat.sockets:
                if owner == number:
                    implicit = listener.tls == "implicit"
                    self._doors.append(Door(service, listening, implicit, self._guard))
        self._open_control()

    def _open_control(self) -> None:
        """Where commands of this machine are heard: the operator's, and those that send mail."""
        config, seat = self._config, self._seat
        places: list[Place] = [
            (spool.administration, queue.wake)
            for spool, queue in zip(self._spools, self._queues, strict=True)
            if isinstance(spool, Spool)
        ]
        desk = Desk(places, seat.workers, self._now, self._log)
        self._control = Control(config.data_dir, seat.index, seat.workers, desk, self._log)
        where = Unix(config.data_dir / local_socket.SUBMIT / str(seat.index))
        local = Listener(address=(where,), early_talker="allow", bare="normalize")
        service = self._make_service(-1, local, lambda _: True)
        self._services.append(service)
        self._doors.append(Door(service, self._control.submission(), False, self._guard))

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

    def _add_spool(self, spool: Spool | MemorySpool) -> None:
        self._spools.append(spool)
        config = self._config.queue
        self._queues.append(
            Queue(
                spool,
                self._ways.transports,
                self._ways.route,
                log=self._log,
                count=self._count,
                now=self._now,
                schedule=Schedule(
                    config.retry,
                    config.retry_max,
                    config.lifetime,
                    config.report_lifetime,
                    config.delay_report,
                    config.soft_bounce,
                ),
                reports=self._make_reports(),
                shared=self._seat.shared,
                worker=self._seat.index,
                total=config.concurrency_total,
            )
        )

    def _make_reports(self) -> Reports:
        """All reports are kept in the worker's own spool, whichever spool they are about."""
        config = self._config
        postmaster = NULL
        if config.queue.report_postmaster:
            postmaster = parse_address(config.postmaster) if config.postmaster else Address("postmaster", "")
        return Reports(
            self._spools[0],
            Reporter(config.hostname),
            log=self._log,
            count=self._count,
            now=self._now,
            postmaster=postmaster,
        )

    def _make_service(self, number: int, listener: Listener, trusts: Callable[[str], bool] | None) -> Service:
        """`trusts`: who may send to any domain, by address; None: nobody."""
        config, seat = self._config, self._seat
        limits, timeouts = config.limits, config.timeouts
        keeper = self._spools[0]
        context = seat.contexts.get(number)
        ways = self._ways
        checks: list[Check] = [Recipients(ways.domains)]
        if trusts is not None:
            checks.insert(0, Relay(ways.domains, ways.route))
        fetches = bool(config.customer) and listener.role != "lmtp" and number >= 0
        if fetches:
            checks.append(QueueRun(self._customers, self._colleagues, self._log))
        if fetches and listener.role == "odmr":
            checks.append(self._make_fetch())
        policy = Policy(checks, self._log)
        terms = Terms(
            config.hostname,
            listener.role,
            next_id=keeper.next_id,
            room=self._make_room(keeper),
            now=self._now,
            asks=policy.stages,
            any_octets=ways.any_octets,
            reports="all" if listener.dsn else "trusted",
            keeps_tls=ways.keeps_tls,
            soft=config.queue.soft_bounce,
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
            trusts=trusts,
            fetches=self._customers.fetches if fetches else None,
            command_line=limits.command_line,
            auth_line=limits.auth_line,
            text_line=limits.text_line,
            header=limits.header,
            bare=listener.bare,
        )

    def _make_fetch(self) -> Fetch:
        config = self._config
        return Fetch(
            self._customers,
            self._colleagues,
            config.data_dir,
            config.hostname,
            waits=self._ways.waits,
            log=self._log,
            ending=self._stop.is_set,
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
        await self._control.close()
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
        for transport in self._ways.transports.values():
            await self._within(deadline, transport.close())
        await self._within(deadline, self._ways.close())
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
