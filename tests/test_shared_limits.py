"""Rates and open counts in shared memory: what they let through, exactly, from several processes."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from itertools import count

import pytest
from forked import fork, wait

from fastsmtp._shared import Shared

NOW = 1_000_000.0
DAY = 86400.0


def keys_of(shared: Shared, kind: int, number: int) -> list[int]:
    return [shared.key(kind, each.to_bytes(4)) for each in range(number)]


def test_a_burst_is_let_through_and_then_one_for_each_interval() -> None:
    shared = Shared(1, 0)
    key = shared.key(1, b"\xc0\0\2\1")
    assert [shared.spend(key, 2.0, 3, NOW) for _ in range(5)] == [0.0, 0.0, 0.0, 2.0, 2.0]
    assert shared.spend(key, 2.0, 3, NOW + 1.5) == pytest.approx(0.5, abs=1e-4)
    assert [shared.spend(key, 2.0, 3, NOW + 2.0) for _ in range(2)] == [0.0, 2.0]
    assert [shared.spend(key, 2.0, 3, NOW + 100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 2.0]


def test_several_are_spent_together_or_not_at_all() -> None:
    shared = Shared(1, 0)
    key = shared.key(1, b"x")
    assert shared.spend(key, 1.0, 10, NOW, 7) == 0.0
    assert shared.spend(key, 1.0, 10, NOW, 4) == 1.0
    assert shared.spend(key, 1.0, 10, NOW, 3) == 0.0
    assert shared.spend(key, 1.0, 10, NOW + 1000, 11) == 1.0, "more than a burst never"


def test_what_is_given_back_can_be_spent_again() -> None:
    shared = Shared(1, 0)
    key = shared.key(1, b"x")
    assert shared.spend(key, 1.0, 3, NOW, -1) == 0.0
    assert shared.spend(key, 1.0, 3, NOW, 3) == 0.0
    assert shared.spend(key, 1.0, 3, NOW, -2) == 0.0
    assert shared.owes(key, 1.0, 3, NOW, 3) == 1.0
    assert shared.spend(key, 1.0, 3, NOW, -2) == 0.0
    assert shared.owes(key, 1.0, 3, NOW, 3) == 0.0, "nothing is owed"
    assert shared.owes(key, 1.0, 3, NOW, 4) == 1.0, "and nobody has more than the burst"


def test_what_is_only_asked_is_not_spent_and_what_is_forgiven_is_forgotten() -> None:
    shared = Shared(1, 0)
    key = shared.key(1, b"x")
    assert [shared.owes(key, 1.0, 1, NOW) for _ in range(3)] == [0.0] * 3
    assert shared.spend(key, 1.0, 1, NOW) == 0.0
    assert [shared.owes(key, 1.0, 1, NOW) for _ in range(3)] == [1.0] * 3
    shared.forgive(key)
    assert shared.owes(key, 1.0, 1, NOW) == 0.0
    shared.forgive(shared.key(1, b"of which nothing is known"))


def test_keys_do_not_touch_each_other() -> None:
    shared = Shared(1, 0)
    keys = [shared.key(kind, data) for kind in (0, 1, -1) for data in (b"", b"a", b"12345678", b"123456789", b"x" * 40)]
    assert len(set(keys)) == len(keys)
    assert [shared.spend(key, 1.0, 1, NOW) for key in keys] == [0.0] * len(keys)
    assert [shared.spend(key, 1.0, 1, NOW) for key in keys] == [1.0] * len(keys)


def test_keys_are_the_same_in_a_forked_process_and_others_in_other_memory() -> None:
    shared, other = Shared(1, 0), Shared(1, 0)
    key = shared.key(1, b"x")
    assert key != other.key(1, b"x")

    def same() -> None:
        assert shared.key(1, b"x") == key

    assert wait(fork(same)) == 0


def test_keys_are_spread_over_all_sets() -> None:
    shared = Shared(1, 0)
    keys = keys_of(shared, 1, 100_000)
    for low in (0, 24, 48):
        used = {key >> low & 0xFFFF for key in keys}
        assert 50_000 < len(used) < 53_000, "of 65,536, as chance has it"


@pytest.mark.parametrize(
    ("interval", "burst", "n"), [(0.0, 1, 1), (-1.0, 1, 1), (1.0, 0, 1), (1.0, 86401, 1), (1.0, 1, 0)]
)
def test_a_rate_that_makes_no_sense_is_an_error(interval: float, burst: float, n: int) -> None:
    shared = Shared(1, 0)
    with pytest.raises(ValueError, match="a day at most"):
        shared.spend(shared.key(1, b"x"), interval, burst, NOW, n)


def test_the_clock_of_rates_goes_round() -> None:
    shared = Shared(1, 0)
    key = shared.key(1, b"x")
    turn = 2.0**40 / 65536
    assert shared.spend(key, 10.0, 1, turn - 5) == 0.0
    assert shared.spend(key, 10.0, 1, turn + 4) == 1.0
    assert shared.spend(key, 10.0, 1, turn + 5) == 0.0
    for days in (2, 60, 150):
        late = turn + days * DAY
        assert [shared.spend(key, 10.0, 1, late) for _ in range(2)] == [0.0, 10.0]


def test_a_limit_of_a_day_holds_a_day() -> None:
    shared = Shared(1, 0)
    key = shared.key(1, b"x")
    assert [shared.spend(key, DAY, 1, NOW) for _ in range(2)] == [0.0, DAY]
    assert shared.owes(key, DAY, 1, NOW + DAY - 1) == 1.0


def test_when_all_places_are_taken_those_that_owe_least_are_forgotten() -> None:
    shared = Shared(1, 0)
    owing = keys_of(shared, 1, 1000)
    for key in owing:
        assert shared.spend(key, 1.0, 100, NOW, 100) == 0.0
    for key in keys_of(shared, 2, 1_000_000):
        assert shared.spend(key, 1.0, 100, NOW) == 0.0
    assert sum(shared.owes(key, 1.0, 100, NOW) > 0 for key in owing) == 1000
    assert sum(shared.owes(key, 1.0, 1, NOW) > 0 for key in keys_of(shared, 2, 1_000_000)) > 450_000


def test_a_rate_is_exact_over_processes() -> None:
    """So many that updates would be lost, were they not made in one step."""
    shared = Shared(4, 1)
    key = shared.key(1, b"x")
    start = time.monotonic() + 0.2

    def spend(worker: int) -> None:
        while time.monotonic() < start:
            pass
        let_through = sum(shared.spend(key, 0.0625, 400_000, NOW) == 0.0 for _ in range(200_000))
        shared.add(worker, 0, let_through)

    assert [wait(pid) for pid in [fork(partial(spend, worker)) for worker in range(4)]] == [0] * 4
    assert shared.total(0) == 400_000


def test_many_rates_that_several_processes_bring_in_together_are_exact() -> None:
    shared = Shared(4, 1)
    for key in keys_of(shared, 1, 400_000):  # they owe nothing any more: their places are taken over, one by one
        shared.spend(key, 1.0, 1, NOW)
    keys = keys_of(shared, 2, 30_000)
    start = time.monotonic() + 0.2

    def spend(worker: int) -> None:
        while time.monotonic() < start:
            pass
        for key in keys:
            for _ in range(2):
                if shared.spend(key, 1.0, 3, NOW + 10) == 0.0:
                    shared.add(worker, 0, 1)

    assert [wait(pid) for pid in [fork(partial(spend, worker)) for worker in range(4)]] == [0] * 4
    assert shared.total(0) == 90_000


def test_so_many_are_open_and_no_more() -> None:
    shared = Shared(2, 0)
    key, other = shared.key(1, b"x"), shared.key(1, b"y")
    assert [shared.enter(worker, key, 3) for worker in (0, 1, 1, 0, 1)] == [True, True, True, False, False]
    assert shared.enter(0, other, 1)
    assert (shared.entered(key), shared.entered(other), shared.entered(shared.key(1, b"z"))) == (3, 1, 0)
    shared.leave(1, key)
    assert shared.enter(0, key, 3)
    assert not shared.enter(0, key, 3)
    assert not shared.enter(0, shared.key(1, b"z"), 0)


def test_a_worker_closes_only_what_it_opened() -> None:
    shared = Shared(2, 0)
    key = shared.key(1, b"x")
    assert shared.enter(0, key, 5)
    shared.leave(1, key)
    shared.leave(0, shared.key(1, b"y"))
    assert shared.entered(key) == 1
    with pytest.raises(IndexError):
        shared.leave(2, key)
    with pytest.raises(IndexError):
        shared.enter(-1, key, 5)


def test_what_a_killed_worker_had_open_is_given_back() -> None:
    shared = Shared(2, 1)
    keys = keys_of(shared, 1, 1000)

    def open_all() -> None:
        for key in keys:
            shared.enter(1, key, 2)
        shared.add(1, 0, 1)
        signal.pause()

    assert shared.enter(0, keys[0], 2)
    pid = fork(open_all)
    while not shared.total(0):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert sum(shared.entered(key) for key in keys) == 1001
    shared.clear(1)
    assert [shared.entered(key) for key in keys] == [1] + [0] * 999


def test_open_counts_are_exact_over_processes_while_places_change_hands() -> None:
    """Never more than the cap. Each holds few at a time, of far more keys than there are places."""
    shared = Shared(4, 2)
    caps = keys_of(shared, 1, 50)

    def come_and_go(worker: int) -> None:
        numbers = count(worker * 1_000_000)
        for turn in range(4000):
            key = caps[turn % 50]
            if shared.enter(worker, key, 2):
                if shared.entered(key) > 2 + 3:  # the others, who are about to find it full
                    shared.add(worker, 0, 1)
                for _ in range(20):
                    passing = shared.key(2, next(numbers).to_bytes(4))
                    if shared.enter(worker, passing, 1):
                        shared.leave(worker, passing)
                    else:
                        shared.add(worker, 1, 1)
                shared.leave(worker, key)

    assert [wait(pid) for pid in [fork(partial(come_and_go, worker)) for worker in range(4)]] == [0] * 4
    assert shared.total(0) == 0
    # Of 320,000; how many depends on what else the machine does.
    assert shared.total(1) <= 320, "only a process that is stopped with a set in its hands keeps others out"
    assert [shared.entered(key) for key in caps] == [0] * 50


def test_of_those_that_come_together_not_fewer_get_in_by_more_than_the_workers() -> None:
    shared = Shared(4, 1)
    keys = keys_of(shared, 1, 500)
    cap = 50

    def enter(worker: int) -> None:
        for key in keys:
            for _ in range(20):
                if shared.enter(worker, key, cap):
                    shared.add(worker, 0, 1)

    assert [wait(pid) for pid in [fork(partial(enter, worker)) for worker in range(4)]] == [0] * 4
    counts = [shared.entered(key) for key in keys]
    assert max(counts) <= cap
    assert min(counts) >= cap - 4
    assert sum(counts) == shared.total(0)


def test_of_a_set_whose_holder_was_killed_nothing_is_lost() -> None:
    """Processes that bring keys in are killed at any instant: the keys that are left can all be used."""
    shared = Shared(3, 0)

    def churn(worker: int) -> None:
        for number in count(worker * 1_000_000_000):
            key = shared.key(3, number.to_bytes(8))
            shared.spend(key, 1.0, 1, NOW)
            if shared.enter(worker, key, 1):
                shared.leave(worker, key)

    for _ in range(30):
        pids = [fork(partial(churn, worker)) for worker in (1, 2)]
        time.sleep(0.02)
        for worker, pid in enumerate(pids, 1):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            shared.clear(worker)
    keys = keys_of(shared, 1, 30_000)
    assert sum(shared.enter(0, key, 1) for key in keys) == len(keys)
    # Of so many two have one place once in fifty runs (40 bits tell them apart): such a one owes what the other spent.
    late = [key for key in keys_of(shared, 4, 200_000) if shared.spend(key, 1.0, 1, NOW + 10)]
    assert [key for key in late if not shared.owes(key, 1.0, 1, NOW + 10)] == []
    assert len(late) <= 3
