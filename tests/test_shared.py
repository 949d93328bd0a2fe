"""Shared memory: columns, totals, atomic access from several processes, and the table of counters."""

from __future__ import annotations

import os
import signal
import time

import pytest
from forked import fork, wait

from fastsmtp._shared import Shared, die_with_parent
from fastsmtp.metrics import Counter


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


def test_slots_are_given_up_to_the_cap_and_given_back() -> None:
    shared = Shared(3, 0)
    places = [shared.take(worker, 77, 4, 1.0) for worker in (0, 1, 1, 2)]
    assert len(set(places)) == 1
    assert shared.taken(77) == 4
    assert [shared.take(worker, 77, 4, 1.0) for worker in range(3)] == [-1, -1, -1]
    assert shared.take(0, -78, 1, 1.0) not in (-1, places[0]), "another destination"
    shared.give(1, places[0])
    assert shared.taken(77) == 3
    assert shared.taken(-78) == 1
    assert shared.taken(5) == 0


def test_a_dead_workers_slots_are_given_back() -> None:
    shared = Shared(2, 0)
    place = shared.take(0, 77, 3, 1.0)
    shared.take(1, 77, 3, 1.0)
    shared.take(1, 77, 3, 1.0)
    shared.clear(1)
    assert shared.taken(77) == 1
    shared.give(0, place)
    assert shared.taken(77) == 0


def test_a_destination_is_dead_until_its_time_and_has_one_slot_then() -> None:
    shared = Shared(2, 0)
    place = shared.take(0, 77, 5, 10.0)
    assert shared.dead_until(77) == 0.0
    assert shared.fail(place, 0, 20.5)
    assert not shared.fail(place, 0, 99.0), "another was quicker"
    assert (shared.failures(place), shared.dead_until(77)) == (1, 20.5)
    shared.give(0, place)
    assert [shared.take(worker, 77, 5, 20.4) for worker in (0, 1)] == [-2, -2]
    assert shared.taken(77) == 0
    assert shared.take(1, 77, 5, 20.6) == place
    assert [shared.take(worker, 77, 5, 20.6) for worker in (0, 1)] == [-1, -1]
    shared.well(place)
    assert (shared.failures(place), shared.dead_until(77)) == (0, 0.0)
    assert shared.take(1, 77, 5, 30.0) == place
    shared.fail(place, 0, 100.0)
    shared.forget(77)
    shared.forget(78)
    assert shared.take(0, 77, 5, 30.0) == place
    shared.fail(place, 0, 100.0)
    shared.forget_all()
    assert shared.take(0, 77, 5, 30.0) == place


def test_those_who_wait_have_equal_shares() -> None:
    shared = Shared(2, 0)
    places = [shared.take(0, 77, 5, 1.0) for _ in range(5)]
    assert shared.take(1, 77, 5, 1.0) == -1
    for _ in range(3):
        shared.give(0, places[0])
    assert shared.take(0, 77, 5, 1.1) == -1, "two are left, its share"
    taken = [shared.take(1, 77, 5, 1.1) for _ in range(4)]
    assert taken == [places[0], places[0], -1, places[0]], "of the one left over, whoever is second to ask has it"
    assert shared.taken(77) == 5


def test_a_full_bucket_forgets_the_one_that_died_longest_ago_and_never_one_in_use() -> None:
    shared = Shared(1, 0)
    keys = [3 + 2048 * number for number in range(9)]
    for number, key in enumerate(keys[:8]):
        place = shared.take(0, key, 1, 1.0)
        shared.fail(place, 0, 100.0 - number)
        if number != 7:
            shared.give(0, place)
    assert shared.take(0, keys[8], 1, 1.0) >= 0
    assert [shared.dead_until(key) for key in keys] == [100.0, 99.0, 98.0, 97.0, 96.0, 95.0, 0.0, 93.0, 0.0]
    shared = Shared(1, 0)
    places = [shared.take(0, key, 1, 1.0) for key in keys]
    assert len(set(places[:8])) == 8
    assert places[8] == -1
    shared.give(0, places[2])
    assert shared.take(0, keys[8], 1, 1.0) == places[2]


def test_a_place_that_does_not_exist_is_an_index_error() -> None:
    shared = Shared(1, 0)
    for place in (-1, 2048 * 8, 2**60):
        for call in (lambda p: shared.give(0, p), shared.failures, lambda p: shared.fail(p, 0, 1.0), shared.well):
            with pytest.raises(IndexError):
                call(place)
    for worker in (-1, 1):
        with pytest.raises(IndexError):
            shared.take(worker, 7, 1, 1.0)
        with pytest.raises(IndexError):
            shared.give(worker, 0)


def test_caps_are_exact_over_processes_that_are_killed_at_any_moment() -> None:
    shared = Shared(3, 2)
    keys = [5 + 2048 * number for number in range(12)]  # all in one bucket, which does not hold them all

    def work(worker: int) -> None:
        held: list[tuple[int, int]] = []
        number = worker
        while True:
            number += 1
            key = keys[number % len(keys)]
            place = shared.take(worker, key, 2, 1.0)
            if place >= 0:
                held.append((key, place))
                if shared.taken(key) > 2:
                    shared.add(worker, 0, 1)
                shared.add(worker, 1, 1)
            if len(held) > 3 or place < 0:
                while held:
                    shared.give(worker, held.pop()[1])

    for round_number in range(15):
        pids = [fork(lambda worker=worker: work(worker)) for worker in range(3)]
        time.sleep(0.01)
        for worker, pid in enumerate(pids):
            os.kill(pid, signal.SIGKILL)
            assert wait(pid) == -signal.SIGKILL
            shared.clear(worker)
        assert [shared.taken(key) for key in keys] == [0] * len(keys)
        assert shared.take(0, keys[round_number % 12], 2, 5.0) >= 0, "the bucket is nobody's"
        shared.clear(0)
    assert shared.total(0) == 0
    assert shared.total(1) > 1000


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
