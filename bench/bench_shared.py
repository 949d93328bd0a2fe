"""Rates and open counts in shared memory, and the limit checks that are made of them: 2 µs at most for each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest

from fastsmtp._shared import Shared
from fastsmtp.config import Inbound
from fastsmtp.log import Log
from fastsmtp.metrics import Counter
from fastsmtp.policy.limits import Limits
from fastsmtp.verdict import Ask, Client, Stage

CLIENTS = 10_000
ALL = {
    "sessions_per_address": 1000, "sessions_per_network": 100_000, "new_sessions": "10000000/m",
    "messages": "10000000/m", "recipients": "10000000/m", "failures": "10000000/m",
}  # fmt: skip


@pytest.fixture
def shared() -> Shared:
    return Shared(4, len(Counter))


@pytest.fixture
def limits(shared: Shared) -> Iterator[Limits]:
    fd = os.memfd_create("log")
    log = Log(fd, False, time.time, threaded=False)
    section = Inbound.model_validate(ALL)
    yield Limits(section, lambda ip: False, hostname="mx.test", log=log, shared=shared, worker=0)
    log.close()
    os.close(fd)


def keys(shared: Shared) -> Callable[[], int]:
    return cycle([shared.key(1, number.to_bytes(4)) for number in range(CLIENTS)]).__next__


def bench_spend(benchmark: Any, shared: Shared) -> None:
    key = keys(shared)
    assert benchmark(lambda: shared.spend(key(), 0.001, 1000, 1000.0)) in (0.0, pytest.approx(0, abs=1))


def bench_key(benchmark: Any, shared: Shared) -> None:
    assert benchmark(lambda: shared.key(1, b"\xc0\0\2\1"))


def bench_enter_and_leave(benchmark: Any, shared: Shared) -> None:
    key = keys(shared)

    def come_and_go() -> bool:
        one = key()
        entered = shared.enter(1, one, 5)
        shared.leave(1, one)
        return entered

    assert benchmark(come_and_go)


def bench_a_session_of_a_client_that_is_known(benchmark: Any, limits: Limits) -> None:
    ips = cycle([f"192.0.{number >> 8}.{number & 255}" for number in range(CLIENTS - 1)])

    def come_and_go() -> bytes | None:
        ip = next(ips)
        refused = limits.admit(ip)
        limits.leave(ip)
        return refused

    assert benchmark(come_and_go) is None


@pytest.mark.parametrize("stage", [Stage.MAIL, Stage.RCPT])
def bench_check(benchmark: Any, limits: Limits, stage: Stage) -> None:
    check = next(check for check in limits.checks() if check.stage is stage)
    ask = Ask(stage, Client("192.0.2.1", 1, "listener"))
    assert benchmark(lambda: check(ask)) is None
