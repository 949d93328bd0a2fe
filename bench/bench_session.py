"""A whole transaction without sockets: octets in, session, policy, a keeper that keeps nothing, reply octets out.

What the loop and the kernel cost comes on top; `loadtest` measures that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastsmtp._shared import Shared
from fastsmtp.connection import Connection
from fastsmtp.domains import Domain, Domains
from fastsmtp.job import Mark
from fastsmtp.log import Log
from fastsmtp.memory_spool import MemorySpool
from fastsmtp.metrics import Counter
from fastsmtp.policy import Policy
from fastsmtp.policy.recipients import Recipients
from fastsmtp.service import Service
from fastsmtp.terms import Terms

MESSAGE = b"Subject: bench\r\n\r\n" + (b"X" * 78 + b"\r\n") * 12 + b".\r\n"
STEPS = (b"MAIL FROM:<a@x.test>\r\n", b"RCPT TO:<b@y.test>\r\n", b"DATA\r\n", MESSAGE)


class Transport:
    """Takes replies and forgets them."""

    def get_extra_info(self, name: str) -> object:
        return ("192.0.2.1", 1) if name == "peername" else None

    def is_closing(self) -> bool:
        return False

    def write(self, octets: bytes) -> None:
        pass

    def close(self) -> None:
        pass


class Loop:
    """Never goes round: the benchmark does what would be done at a round's end."""

    def call_soon(self, work: Callable[[], None]) -> None:
        pass


@pytest.fixture
def connect() -> Iterator[Callable[[], Connection]]:
    loop: Any = Loop()
    sink = os.open(os.devnull, os.O_WRONLY)
    log = Log(sink, False, time.time, threaded=False)
    keeper = MemorySpool(0, loop=loop, memory=1 << 40)
    keeper.on_stored = lambda jobs: keeper.finish([Mark(job.key, 0) for job in jobs])
    policy = Policy([Recipients(Domains([Domain("*", "discard")], "mx.test"))], log)
    terms = Terms(
        "mx.test", "mx", next_id=keeper.next_id, room=lambda _: None, now=time.time, asks=policy.stages, any_octets=True
    )
    service = Service("bench", terms, loop=loop, keeper=keeper, policy=policy, log=log, shared=Shared(1, len(Counter)))

    def make() -> Connection:
        log.flush()
        keeper._hand_over()
        connection = Connection(service)
        transport: Any = Transport()
        connection.connection_made(transport)
        connection.data_received(b"EHLO client.test\r\n")
        return connection

    yield make
    log.close()
    os.close(sink)


def bench_transaction(benchmark: Any, connect: Callable[[], Connection]) -> None:
    connection = connect()

    def run() -> None:
        for step in STEPS:
            connection.data_received(step)
            connection.service.send()

    benchmark.pedantic(run, rounds=5000, warmup_rounds=500)
    benchmark.extra_info["transactions/s"] = round(1 / benchmark.stats.stats.median)


def bench_connection_with_one_transaction(benchmark: Any, connect: Callable[[], Connection]) -> None:
    def run() -> None:
        connection = connect()
        for step in STEPS:
            connection.data_received(step)
            connection.service.send()
        connection.data_received(b"QUIT\r\n")
        connection.connection_lost(None)

    benchmark.pedantic(run, rounds=3000, warmup_rounds=300)
    benchmark.extra_info["transactions/s"] = round(1 / benchmark.stats.stats.median)
