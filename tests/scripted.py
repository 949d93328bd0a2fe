"""What the tests of the queue share: scripted transports, and a queue over a real spool with clocks that can be set."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import uvloop

from fastsmtp._shared import Shared
from fastsmtp.address import NULL, Address, parse_address
from fastsmtp.delivery import DELIVERED, Delivery, Outcome, Result, Scope, Transport
from fastsmtp.dsn import Reporter
from fastsmtp.log import Log
from fastsmtp.memory_spool import MemorySpool
from fastsmtp.message import Content, Envelope, Message, Recipient
from fastsmtp.metrics import Counter
from fastsmtp.queue import Queue
from fastsmtp.reporting import Reports
from fastsmtp.schedule import Schedule
from fastsmtp.spool import Spool
from fastsmtp.verdict import STORED, Refused, Stored

LATER = Outcome(Result.DEFERRED, "4.2.0", "not now")
NEVER = Outcome(Result.FAILED, "5.1.1", "no such mailbox")
UNREACHED = Outcome(Result.DEFERRED, "4.4.1", "connection refused", Scope.HOST)

Lines: TypeAlias = Callable[[], list[dict[str, Any]]]
Logged: TypeAlias = tuple[Log, Lines]
Kinds = ("memory", "disk")
SCHEDULE = Schedule(60.0, 600.0, lifetime=50_000.0, report_lifetime=5_000.0, delay_report=0.0)


@contextmanager
def logged() -> Iterator[Logged]:
    """A log, and what was written to it."""
    with tempfile.TemporaryFile() as file:
        log = Log(file.fileno(), False, time.time, threaded=False)

        def lines() -> list[dict[str, Any]]:
            log.flush()
            size = os.fstat(file.fileno()).st_size
            return [json.loads(line) for line in os.pread(file.fileno(), size, 0).splitlines()]

        yield log, lines
        log.close()


class Scripted:
    """A transport that answers from a list, and remembers what it was given; without a script it delivers.

    With `concurrency` its destinations are domains. `running` and `most`: calls under way now, and at most, for each.
    """

    any_octets = True

    def __init__(self, *script: Outcome | Exception, needs_body: bool = True, concurrency: int = 0) -> None:
        self.script = list(script)
        self.always: Outcome | None = None  # when the script is over
        self.needs_body = needs_body
        self.concurrency = concurrency
        self.batches: list[list[tuple[str, bytes]]] = []
        self.gate: asyncio.Event | None = None
        self.gates: dict[str, asyncio.Event] = {}  # of single destinations
        self.down: set[str] = set()  # destinations that are not reached
        self.running: dict[str, int] = {}
        self.most: dict[str, int] = {}

    def destination(self, recipient: Address) -> str:
        return recipient.domain if self.concurrency else ""

    async def deliver(self, deliveries: Sequence[Delivery]) -> Sequence[Sequence[Outcome]]:
        self.batches.append(
            [
                (str(recipient.address), body_of(delivery.message))
                for delivery in deliveries
                for recipient in delivery.recipients
            ]
        )
        destination = self.destination(deliveries[0].recipients[0].address)
        self.running[destination] = running = self.running.get(destination, 0) + 1
        self.most[destination] = max(running, self.most.get(destination, 0))
        try:
            for gate in (self.gate, self.gates.get(destination)):
                if gate is not None:
                    await gate.wait()
            if destination in self.down:
                return [[UNREACHED] * len(delivery.recipients) for delivery in deliveries]
            step = self.script.pop(0) if self.script else self.always or DELIVERED
            if isinstance(step, Exception):
                raise step
            return [[step] * len(delivery.recipients) for delivery in deliveries]
        finally:
            self.running[destination] -= 1

    async def close(self) -> None:
        pass

    @property
    def tried(self) -> list[str]:
        return [address for batch in self.batches for address, _ in batch]


def body_of(message: Message) -> bytes:
    if message.parts is None:
        return Path(message.file).read_bytes() if message.file else b""
    return b"".join(message.parts)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for something to become true, however slow the machine is."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.005)


async def turns(n: int = 50) -> None:
    """Lets the loop go round: what needs neither a thread nor a clock has happened then."""
    for _ in range(n):
        await asyncio.sleep(0)


class Clock:
    """Both clocks of a machine, which can be set ahead."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def now(self) -> float:
        return time.time() + self.ahead

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


class Tap:
    """A spool as the queue sees it, with methods that a test can replace."""

    def __init__(self, spool: Spool | MemorySpool) -> None:
        self.spool = spool
        self.next_id: Callable[[], str] = spool.next_id
        self.append: Callable[..., None] = spool.append
        self.finish: Callable[..., None] = spool.finish

    def __getattr__(self, name: str) -> Any:
        return getattr(self.spool, name)

    @property
    def on_stored(self) -> Callable[..., None]:
        return self.spool.on_stored

    @on_stored.setter
    def on_stored(self, take: Callable[..., None]) -> None:
        self.spool.on_stored = take


class Bench:
    """A spool, a queue that reports, and a clock. The first label of a domain names its transport."""

    def __init__(
        self,
        spool: Spool | MemorySpool,
        log: Log,
        transports: Mapping[str, Transport],
        *,
        schedule: Schedule = SCHEDULE,
        clock: Clock | None = None,
        shared: Shared | None = None,
        worker: int = 0,
        total: int = 500,
        postmaster: Address = NULL,
        reports: bool = True,
    ) -> None:
        self.spool = spool
        self.tap = tap = Tap(spool)
        self.clock = clock or Clock()
        self.counts: dict[Counter, int] = {}
        now = self.clock.now
        self.reports = Reports(tap, Reporter("mx.test"), log=log, count=self.count, now=now, postmaster=postmaster)
        self.queue = Queue(
            tap,
            transports,
            self.route,
            log=log,
            count=self.count,
            now=now,
            schedule=schedule,
            reports=self.reports if reports else None,
            shared=shared,
            worker=worker,
            total=total,
            monotonic=self.clock.monotonic,
            chance=lambda: 0.5,
        )

    def route(self, address: Address) -> tuple[str, Address]:
        return address.domain.partition(".")[0], address

    def count(self, counter: Counter, n: int) -> None:
        self.counts[counter] = self.counts.get(counter, 0) + n

    async def keep(
        self,
        *recipients: str,
        body: bytes = b"Subject: hello\r\n\r\nbody\r\n",
        fault: str = "",
        notify: str = "",
        sender: str = "a@x.test",
        protocol: str = "",
    ) -> str:
        """Keeps a message; its id."""
        envelope = Envelope(parse_address(sender) if sender else NULL)
        envelope.id = self.spool.next_id()
        envelope.protocol = protocol
        envelope.recipients = [Recipient(parse_address(one), notify=notify, fault=fault) for one in recipients]
        draft = self.spool.draft(envelope.id, lambda: None)
        draft.write(body)
        answered: asyncio.Future[Stored | Refused] = asyncio.get_running_loop().create_future()
        header_end = body.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in body else len(body)
        message = Message(envelope, b"", None, len(body), header_end, Content.NONE, self.clock.now())
        self.spool.append(message, draft, answered.set_result)
        assert await answered is STORED
        return envelope.id

    async def settle(self) -> None:
        """Until nothing happens any more."""
        quiet = 0
        for _ in range(4000):
            await asyncio.sleep(0.005 if quiet else 0.001)
            # Marks and jobs given back pass through a commit.
            committing = isinstance(self.spool, Spool) and self.spool._commit._busy
            quiet = quiet + 1 if self.queue.idle and not committing else 0
            if quiet == 5:
                return
        raise AssertionError("the queue does not come to rest")

    async def pass_time(self, seconds: float) -> None:
        self.clock.ahead += seconds
        self.queue.tick()
        await self.settle()


def play(
    kind: str,
    log: Log,
    folder: Path,
    transports: Mapping[str, Transport],
    test: Callable[[Bench], Awaitable[None]],
    **options: Any,
) -> None:
    """Runs a test over a spool of its kind in `folder`."""

    async def main() -> None:
        spool = open_spool(kind, log, folder)
        bench = Bench(spool, log, transports, **options)
        await asyncio.wait_for(test(bench), 60)
        await bench.queue.close()
        await spool.close()

    uvloop.run(main())


def open_spool(kind: str, log: Log, folder: Path, worker: int = 0, memory: int = 1 << 26) -> Spool | MemorySpool:
    loop = asyncio.get_running_loop()
    spool: Spool | MemorySpool
    if kind == "memory":
        spool = MemorySpool(worker, loop=loop, memory=memory)
    else:
        directory = folder / f"spool-{worker}"
        spool = Spool(directory, worker, loop=loop, log=log, inline=1 << 16, min_free=0, memory=memory)
    spool.open()
    return spool
