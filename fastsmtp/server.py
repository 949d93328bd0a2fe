"""One worker: where objects are wired together, and the order in which they start and end.

In: a configuration and a seat (listening sockets, TLS contexts, shared counters) that the supervisor made before the
fork; later its orders to serve by another configuration. Out: an exit code. Start: log, spools (a left-over spool of a
worker that is no more is adopted and drained), what the configuration says (a Generation), queues, doors; then the
garbage collector is told that all of it stays. A reload makes a generation for new sessions; old ones end in theirs.
End, at SIGTERM or when the supervisor is gone: listeners close, idle sessions hear 421, what is under way is finished
within a limit, then queue and spool close.
Not here: processes and privileges (supervisor), checks and services (generation), what a session does.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import hashlib
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from ssl import SSLError

import uvloop

from . import log as logs
from .colleagues import Colleagues
from .config import Config, Maildir
from .control import Control, Desk, Place
from .delivery import maildir as maildir_transport
from .doors import Door, Guard
from .generation import LOCAL, Generation, Tools
from .list_watch import files_of, folder_of
from .lists import ListError, Lists
from .log import Log
from .memory_spool import MemorySpool
from .metrics import Counter, tell
from .queue import Queue
from .reload import Order, Orders
from .seat import EXIT_CANNOT_START, Bound, Seat, Settings
from .service import Service
from .spool import Spool, SpoolError
from .tls import Entrance, Pair

LOG_SECONDS = 0.05  # 2 µs a line, on the loop: more at once would be felt by sessions
# For mapping lists ahead, in seconds: 10,000,000 mailboxes take 0.02 when they are in memory.
MAPPING_AT_START = 1.0
MAPPING = 0.005  # of each second: a new version
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
        self._entrances = [Entrance(context) for context in seat.contexts]
        self._tools: Tools
        self._generation: Generation
        self._next: tuple[Generation, Order, list[socket.socket]] | None = None  # prepared, not adopted yet
        self._former: list[Generation] = []  # with sessions that began in them
        self._doors: list[Door] = []
        self._guard: Guard
        self._control: Control
        self._orders: Orders | None = None
        self._stop = asyncio.Event()
        self._accepted = 0  # messages, at the last tick
        self._idle = 0
        self._closing: set[asyncio.Task[None]] = set()
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
        except (SpoolError, ListError, OSError) as error:
            self._log.write(logs.CANNOT_START, str(error))
            self._log.close()
            return EXIT_CANNOT_START
        for door in self._doors:
            await door.open()
        try:
            os.write(self._seat.ready, b"1")
        except BrokenPipeError:  # the supervisor is gone meanwhile: `alive` says so in a moment, and this worker ends
            pass
        os.close(self._seat.ready)
        # Whatever lives now lives on: not to be looked through again. Full collections wait for a quiet moment
        # (28 ms with 100,000 sessions).
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 1_000_000)
        if self._seat.orders is not None:
            self._orders = Orders(self._seat.orders, self._loop, self, self._on_bug)
        self._tick()
        self._flush_log()
        await self._stop.wait()
        await self._end()
        return 0

    # Start

    def _open(self) -> None:
        config, seat = self._config, self._seat
        self._spools.append(self._open_spool(seat.index))
        for left_over in self._left_over_spools():
            self._spools.append(self._open_spool(left_over))
            for section in config.transport.values():
                if isinstance(section, Maildir):
                    folder = maildir_transport.temporary_folder(section.path, identity(config.data_dir))
                    maildir_transport.remove_leftovers(folder, left_over)
        self._tools = Tools(
            loop=self._loop,
            log=self._log,
            seat=seat,
            now=self._now,
            identity=identity(config.data_dir),
            keeper=self._spools[0],
            colleagues=Colleagues(config.data_dir, seat.workers),
            entrances=self._entrances,
            lists=Lists(folder_of(config)),
            ending=self._stop.is_set,
        )
        self._use_certificates(seat.settings)
        self._generation = Generation(seat.settings, self._tools, seat.asks)
        self._generation.build()
        self._tools.lists.map_ahead(MAPPING_AT_START)
        for spool in self._spools:
            self._queues.append(self._make_queue(spool))
        self._guard = Guard(self._loop, self._doors, self._log)
        for bound in seat.sockets:
            self._doors.append(self._make_door(self._generation, bound))
        self._open_control()

    def _open_control(self) -> None:
        """Where commands of this machine are heard: the operator's, and those that send mail."""
        config, seat = self._config, self._seat
        places: list[Place] = [
            (spool.administration, queue.wake)
            for spool, queue in zip(self._spools, self._queues, strict=True)
            if isinstance(spool, Spool)
        ]
        desk = Desk(places, seat.workers, self._now, self._log, self._reload, self._counters)
        self._control = Control(config.data_dir, seat.index, seat.workers, desk, self._log)
        self._doors.append(self._make_door(self._generation, Bound(LOCAL, LOCAL, self._control.submission())))

    def _make_door(self, generation: Generation, bound: Bound) -> Door:
        service = generation.services[bound.listener]
        return Door(bound.number, service, bound.socket, generation.is_implicit(bound.listener), self._guard)

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

    def _make_queue(self, spool: Spool | MemorySpool) -> Queue:
        generation = self._generation
        return Queue(
            spool,
            generation.ways.transports,
            generation.ways.route,
            log=self._log,
            count=self._count,
            now=self._now,
            schedule=generation.schedule(),
            reports=generation.reports(spool),
            shared=self._seat.shared,
            worker=self._seat.index,
            total=generation.config.queue.concurrency_total,
        )

    # Reload: what the supervisor orders

    def prepare(self, order: Order, sockets: Sequence[socket.socket], asks: socket.socket | None) -> None:
        """Makes what a configuration needs. Raises OSError and ValueError, and has changed nothing then."""
        self.forget()
        generation = Generation(order.settings, self._tools, asks, self._generation)
        try:
            generation.build()
        except BaseException:
            self._close_later(generation)
            raise
        self._next = (generation, order, list(sockets))

    def forget(self) -> None:
        """What was prepared is not wanted."""
        if self._next is not None:
            generation, _, sockets = self._next
            self._next = None
            for one in sockets:
                one.close()
            self._close_later(generation)

    def adopt(self) -> None:
        """Serves new sessions by what was prepared."""
        assert self._next is not None
        generation, order, sockets = self._next
        self._next = None
        former, self._generation = self._generation, generation
        self._use_certificates(order.settings)
        for spool, queue in zip(self._spools, self._queues, strict=True):
            queue.use(
                generation.ways.transports,
                generation.ways.route,
                generation.schedule(),
                generation.reports(spool),
                generation.config.queue.concurrency_total,
            )
        listeners = {LOCAL: LOCAL, **dict(order.bound)}
        for door in list(self._doors):
            if door.number in listeners:
                number = listeners[door.number]
                door.use(generation.services[number], generation.is_implicit(number))
            else:
                door.close_for_good()
                self._doors.remove(door)
        for number, fresh in zip(order.fresh, sockets, strict=True):
            door = self._make_door(generation, Bound(number, listeners[number], fresh))
            self._doors.append(door)
            door.reopen()
        self._former.append(former)

    def renew(self, pairs: tuple[Pair, ...]) -> None:
        """Certificates were exchanged, and nothing else."""
        self._generation.settings = replace(self._generation.settings, pairs=pairs)
        self._use_certificates(self._generation.settings)

    def _use_certificates(self, settings: Settings) -> None:
        for number, entrance in settings.tickets.items():
            self._entrances[entrance].use(settings.demands[number], settings.pairs)

    async def _reload(self, uid: int) -> dict[str, object]:
        """An operator asks for it; what became of it. Raises OSError and TimeoutError."""
        if self._orders is None:
            raise OSError(errno.ENOTSUP, "this server was started without a configuration file")
        return await self._orders.reload(uid)

    def _counters(self) -> list[dict[str, object]]:
        """Those of all workers."""
        return tell(self._seat.shared.total, self._generation.settings.rules)

    def _close_former(self) -> None:
        """Ends generations that nobody needs any more: neither sessions nor, for transports that have not gone over,
        queues."""
        for former in list(self._former):
            gone_over = self._generation.ways.transports.values()
            own = [one for one in former.ways.transports.values() if one not in gone_over]
            unused = not any(queue.uses(one) for queue in self._queues for one in own)
            if unused and not former.has_sessions:
                self._former.remove(former)
                self._close_later(former)

    def _close_later(self, generation: Generation) -> None:
        task = self._loop.create_task(self._close(generation))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, generation: Generation) -> None:
        """Ends what is no other generation's too."""
        shared = [part for other in (self._generation, *self._former) for part in other.parts()]
        for part in generation.parts():
            if part not in shared:
                await part.close()
        coming = [self._next[0]] if self._next is not None else []
        named = [one.config for one in (self._generation, *self._former, *coming)]
        self._tools.lists.keep({file for config in named for file in files_of(config)})

    # While it runs

    @property
    def _services(self) -> list[Service]:
        return [one for each in (self._generation, *self._former) for one in each.services.values()]

    def _count(self, counter: Counter, n: int) -> None:
        self._seat.shared.add(self._seat.index, counter, n)

    def _tick(self) -> None:
        """Once a second."""
        self._loop.call_later(1.0, self._tick)
        self._seat.shared.beat(self._seat.index, time.monotonic())
        for generation in (self._generation, *self._former):
            generation.tick()
        for service in self._services:
            service.tick()
        for queue in self._queues:
            queue.tick()
        self._guard.tick()
        self._refresh_lists()
        if self._former:
            self._close_former()
        self._count_commits()
        accepted = self._seat.shared.total(Counter.MESSAGES_ACCEPTED)
        self._idle = self._idle + 1 if accepted == self._accepted else 0
        self._accepted = accepted
        if self._idle == IDLE_TICKS:
            gc.collect()

    def _refresh_lists(self) -> None:
        for error in self._tools.lists.refresh():
            self._log.write(logs.LIST_KEPT, error.file, error.line, error.message)
            self._count(Counter.LIST_KEPT, 1)
        self._tools.lists.map_ahead(MAPPING)

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

    def _on_bug(self, error: Exception) -> None:
        self._log.write(logs.BUG, "reload", repr(error), logs.trace(error))

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
        if self._orders is not None:
            self._orders.close()
        self.forget()
        for door in self._doors:
            door.close_for_good()
        for service in self._services:
            service.drain()
        # Half of the time is the transports': what one still has at the end is delivered and not marked, so twice.
        middle = time.monotonic() + self._generation.config.timeouts.shutdown / 2
        deadline = middle + self._generation.config.timeouts.shutdown / 2
        await self._sessions_ended(middle)
        queues = asyncio.gather(*[queue.close() for queue in self._queues])
        await self._sessions_ended(deadline)
        for service in self._services:
            for connection in service.connections():
                connection.abort("shutdown")
        await self._within(deadline, queues)
        if self._closing:
            await self._within(deadline, asyncio.wait(self._closing))
        for part in dict.fromkeys(part for one in (*self._former, self._generation) for part in one.parts()):
            await self._within(deadline, part.close())
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
