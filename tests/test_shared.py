"""Shared memory: columns, totals, atomic access from several processes, and the table of counters."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from fastsmtp._shared import Shared, die_with_parent
from fastsmtp.metrics import Counter


def fork(job: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        job()
        os._exit(0)
    finally:
        os._exit(1)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_everything_is_zero_at_first() -> None:
    shared = Shared(3, 5)
    assert (shared.workers, shared.counters) == (3, 5)
    assert shared.open_sessions() == 0
    assert [shared.total(counter) for counter in range(5)] == [0] * 5
    assert [shared.heartbeat(worker) for worker in range(3)] == [0.0] * 3


def test_totals_are_sums_over_the_columns_and_slots_do_not_overlap() -> None:
    shared = Shared(3, 20)
    for worker in range(3):
        shared.beat(worker, 1000.5 + worker)
        assert shared.open_session(worker) == worker + 1
        for counter in range(20):
            shared.add(worker, counter, 10**worker * (counter + 1))
    assert [shared.total(counter) for counter in range(20)] == [111 * (counter + 1) for counter in range(20)]
    assert [shared.heartbeat(worker) for worker in range(3)] == [1000.5, 1001.5, 1002.5]
    assert shared.open_sessions() == 3
    shared.close_session(1)
    assert shared.open_sessions() == 2


def test_counters_are_64_bit() -> None:
    shared = Shared(1, 1)
    shared.add(0, 0, 2**62)
    shared.add(0, 0, 1)
    assert shared.total(0) == 2**62 + 1


def test_a_dead_workers_sessions_are_taken_off_but_not_what_it_counted() -> None:
    shared = Shared(2, 1)
    for worker in (0, 1, 1, 1):
        shared.open_session(worker)
    shared.beat(1, 5.0)
    shared.add(1, 0, 7)
    assert shared.clear(1) == 3
    assert shared.open_sessions() == 1
    assert shared.heartbeat(1) == 0.0
    assert shared.total(0) == 7
    assert shared.clear(1) == 0


def test_what_does_not_exist_is_an_index_error() -> None:
    shared = Shared(2, 3)
    for worker in (-1, 2, 2**30):
        for call in (shared.heartbeat, shared.open_session, shared.close_session, shared.clear):
            with pytest.raises(IndexError):
                call(worker)
        with pytest.raises(IndexError):
            shared.beat(worker, 1.0)
        with pytest.raises(IndexError):
            shared.add(worker, 0, 1)
    for counter in (-1, 3, 2**30):
        with pytest.raises(IndexError):
            shared.add(0, counter, 1)
        with pytest.raises(IndexError):
            shared.total(counter)


def test_a_size_that_makes_no_sense_is_refused() -> None:
    for workers, counters in ((0, 1), (-1, 1), (1, -1)):
        with pytest.raises(ValueError, match="at least one worker"):
            Shared(workers, counters)
    with pytest.raises(OSError, match="allocate memory"):
        Shared(2**31 - 1, 2**30)


def test_forked_processes_share_it_and_lose_no_addition() -> None:
    shared = Shared(2, 1)

    def count() -> None:
        for _ in range(20_000):
            shared.add(0, 0, 1)  # all in one slot: only atomic additions add up
            shared.open_session(1)

    for pid in [fork(count) for _ in range(4)]:
        assert wait(pid) == 0
    assert shared.total(0) == 80_000
    assert shared.open_sessions() == 80_000


def test_a_limit_on_open_sessions_is_exact_over_processes() -> None:
    shared = Shared(4, 1)
    limit = 50

    def open_some(worker: int) -> None:
        for _ in range(1000):
            if shared.open_session(worker) > limit:
                shared.close_session(worker)
            else:
                shared.add(worker, 0, 1)

    for pid in [fork(lambda worker=worker: open_some(worker)) for worker in range(4)]:
        assert wait(pid) == 0
    assert shared.total(0) == shared.open_sessions() == limit


def test_a_process_dies_with_its_parent() -> None:
    """Parent and child by two forks: the parent's end must reach the child as the signal it asked for."""
    read, write = os.pipe()

    def parent() -> None:
        ready_read, ready_write = os.pipe()

        def child() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            die_with_parent(signal.SIGTERM)
            os.write(ready_write, b"r")
            if signal.sigtimedwait([signal.SIGTERM], 10):
                os.write(write, b"told")

        fork(child)
        os.read(ready_read, 1)

    assert wait(fork(parent)) == 0
    os.close(write)
    started = time.monotonic()
    assert os.read(read, 10) == b"told"
    assert time.monotonic() - started < 8
    os.close(read)


def test_a_signal_that_does_not_exist_is_an_os_error() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        die_with_parent(1000)


def test_the_counters_are_numbered_without_gaps_and_explained() -> None:
    assert [int(counter) for counter in Counter] == list(range(len(Counter)))
    assert all(counter.help and counter.help[0].isupper() for counter in Counter)
    assert len({counter.help for counter in Counter}) == len(Counter)
    shared = Shared(1, len(Counter))
    shared.add(0, Counter.MESSAGES_ACCEPTED, 2)
    assert shared.total(Counter.MESSAGES_ACCEPTED) == 2
