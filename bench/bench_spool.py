"""What keeping a message costs: `make bench`, or pytest bench/bench_spool.py.

Each round keeps a batch and waits for its commit; its messages are marked finished then, which goes into the commit of
the next, as it does under load. Times are wall clock for a batch; `cpu_us` is the CPU time of all threads for each
message, with its removal and with about 3 µs for making it; `commits` those of all rounds. The disk is the one of
the temporary folder (TMPDIR).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from pytest_benchmark.fixture import BenchmarkFixture

from fastsmtp.address import Address
from fastsmtp.job import Job, Mark
from fastsmtp.log import Log
from fastsmtp.memory_spool import MemorySpool
from fastsmtp.message import Content, Envelope, Message, Recipient
from fastsmtp.spool import Spool
from fastsmtp.verdict import STORED, Refused, Stored

PREFIX = b"Received: from a.test ([192.0.2.1]) by mx.test with ESMTP id x; Mon, 1 Jan 2024 00:00:00 +0000\r\n"
SENDER = Address("ann", "example.org")
RECIPIENT = Address("bob", "example.net")


class Load:
    """Keeps and removes batches; one event loop over all rounds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, spool: Spool | MemorySpool, batch: int, size: int) -> None:
        self.loop = loop
        self.spool = spool
        self.batch = batch
        self.body = os.urandom(size)
        self.messages = 0
        self._began = 0.0
        self._left = 0
        self._done: asyncio.Future[None]
        spool.on_stored = self._remove

    def round(self) -> None:
        if not self.messages:
            self._began = time.process_time()
        self.messages += self.batch
        self.loop.run_until_complete(self._round())

    def end(self, benchmark: BenchmarkFixture) -> None:
        """Waits until all is removed."""
        self.loop.run_until_complete(self.spool.close())
        cpu = time.process_time() - self._began
        benchmark.extra_info["cpu_us"] = round(cpu / self.messages * 1e6, 1)

    async def _round(self) -> None:
        spool = self.spool
        self._left = self.batch
        self._done = self.loop.create_future()
        for _ in range(self.batch):
            draft = spool.draft(spool.next_id(), _nothing)
            draft.write(self.body)
            envelope = Envelope(SENDER)
            envelope.id = draft.id
            envelope.recipients = [Recipient(RECIPIENT)]
            message = Message(envelope, PREFIX, None, len(self.body), 100, Content.NONE, 1.7e9)
            spool.append(message, draft, self._answered)
        await self._done

    def _answered(self, answer: Stored | Refused) -> None:
        assert answer is STORED

    def _remove(self, jobs: list[Job]) -> None:
        self.spool.finish([Mark(job.key, 0) for job in jobs])
        self._left -= len(jobs)
        if not self._left:
            self._done.set_result(None)


def _nothing() -> None:
    pass


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = uvloop.new_event_loop()
    yield loop
    loop.close()


@pytest.mark.parametrize("size", [1_000, 5_000, 50_000])
@pytest.mark.parametrize("batch", [1, 8, 64])
def bench_keep_and_remove(
    benchmark: BenchmarkFixture, tmp_path: Path, loop: asyncio.AbstractEventLoop, batch: int, size: int
) -> None:
    log = Log(2, False, time.time, threaded=False)
    spool = Spool(tmp_path, 0, loop=loop, log=log, inline=64 << 10, min_free=0, memory=64 << 20)
    spool.open()
    load = Load(loop, spool, batch, size)
    benchmark.pedantic(load.round, rounds=100, warmup_rounds=5)
    load.end(benchmark)
    benchmark.extra_info["commits"] = spool.commits[0]
    assert spool.backlog == 0


def bench_keep_and_remove_in_memory(benchmark: BenchmarkFixture, loop: asyncio.AbstractEventLoop) -> None:
    load = Load(loop, MemorySpool(0, loop=loop, memory=64 << 20), 64, 1_000)
    benchmark.pedantic(load.round, rounds=500, warmup_rounds=5)
    load.end(benchmark)
