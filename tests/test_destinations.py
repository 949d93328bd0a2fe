"""destinations: windows, caps and dead destinations; a queue over a real spool, and two that share a machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import uvloop
from scripted import (
    LATER,
    SCHEDULE,
    UNREACHED,
    Bench,
    Clock,
    Kinds,
    Logged,
    Scripted,
    logged,
    open_spool,
    play,
    turns,
    until,
)  # fmt: skip

from fastsmtp._shared import Shared
from fastsmtp.address import Address
from fastsmtp.delivery import DELIVERED, Outcome, Result, Scope
from fastsmtp.destinations import DEAD, NOT_NOW, Destinations, Lane, unreached
from fastsmtp.metrics import Counter
from fastsmtp.selection import EVERYTHING, Selection
from fastsmtp.spool import Spool

BOX = Address("b", "one.test")


@pytest.fixture
def log() -> Iterator[Logged]:
    with logged() as pair:
        yield pair


class Machine:
    """Destinations of several workers, with one clock."""

    def __init__(self, log: Logged, workers: int = 1, concurrency: int = 8, total: int = 100) -> None:
        self.shared = Shared(workers, 0)
        self.clock = 1000.0
        self.workers = [
            Destinations(
                {"net": Scripted(concurrency=concurrency), "box": Scripted()},
                SCHEDULE,
                self.shared,
                worker,
                total,
                log=log[0],
                count=lambda counter, n: None,
                monotonic=lambda: self.clock,
                chance=lambda: 0.5,
            )
            for worker in range(workers)
        ]

    def lane(self, worker: int = 0, name: str = "net", domain: str = "one.test") -> Lane:
        lane = self.workers[worker].lane(name, Address("b", domain))
        assert lane is not None
        return lane

    def call(self, failure: Outcome | None = None, worker: int = 0, name: str = "net") -> float:
        """One call, alone."""
        lane = self.lane(worker, name)
        destinations = self.workers[worker]
        place = destinations.enter(lane)
        assert place >= 0
        rest = 0.0
        if failure is None:
            destinations.reached(lane, place)
        else:
            rest = destinations.missed(lane, place, failure)
        destinations.leave(lane, place, 1)
        return rest


def test_a_window_grows_by_one_and_is_halved(log: Logged) -> None:
    machine = Machine(log)
    lane = machine.lane()
    windows = []
    for _ in range(8):
        machine.call()
        windows.append(lane.window)
    assert windows == [3, 4, 5, 6, 7, 8, 8, 8]
    destinations = machine.workers[0]
    places = [destinations.enter(lane) for _ in range(8)]
    assert destinations.enter(lane) == NOT_NOW
    windows = []
    for place in places[:2]:
        assert destinations.missed(lane, place, UNREACHED) == 0.0, "others of the same time may still get through"
        destinations.leave(lane, place, 1)
        windows.append(lane.window)
    assert windows == [4, 2]
    destinations.reached(lane, places[2])
    assert (lane.window, lane.misses) == (3, 0)


def test_a_destination_is_dead_when_as_many_missed_it_as_the_window_allows(log: Logged) -> None:
    machine = Machine(log)
    lane = machine.lane()
    lane.window = 8
    destinations = machine.workers[0]
    places = [destinations.enter(lane) for _ in range(8)]
    rests = []
    for place in places:
        rests.append(destinations.missed(lane, place, UNREACHED))
        destinations.leave(lane, place, 1)
    assert rests == [0.0, 0.0, *[60.0] * 6]
    assert len([line for line in log[1]() if line["event"] == "unreachable"]) == 1
    assert destinations.enter(lane) == DEAD


def test_one_attempt_finds_out_and_the_waits_double(log: Logged) -> None:
    machine = Machine(log)
    lane = machine.lane()
    rests = []
    for _ in range(6):
        rests.append(machine.call(UNREACHED))
        destinations = machine.workers[0]
        machine.clock += rests[-1] - 1
        assert destinations.enter(lane) == DEAD
        machine.clock += 2
        probe = destinations.enter(lane)
        assert probe >= 0
        assert destinations.enter(lane) == NOT_NOW, "a second attempt while the first is under way"
        destinations.leave(lane, probe, 0)
    assert rests == [60, 120, 240, 480, 600, 600]
    machine.call()
    assert lane.window == 2, "it begins anew, at one, and has grown by one"
    assert machine.call(UNREACHED) == 60
    events = [line["event"] for line in log[1]()]
    assert events.count("reachable") == 1


def test_a_transport_without_concurrency_has_a_lane_that_can_die_too(log: Logged) -> None:
    machine = Machine(log, workers=2)
    assert machine.call(UNREACHED, name="box") == 60
    assert machine.workers[1].enter(machine.lane(1, "box")) == DEAD
    machine.clock += 61
    machine.call(name="box")
    lanes = [machine.lane(worker, "box") for worker in (0, 1)]
    assert all(destinations.enter(lane) >= 0 for destinations, lane in zip(machine.workers, lanes, strict=True))


def test_caps_hold_over_workers(log: Logged) -> None:
    machine = Machine(log, workers=2, concurrency=3, total=4)
    first, second = machine.workers
    places = [first.enter(machine.lane(0)), second.enter(machine.lane(1)), first.enter(machine.lane(0))]
    assert min(places) >= 0
    assert first.enter(machine.lane(0)) == second.enter(machine.lane(1)) == NOT_NOW
    other = machine.lane(1, domain="two.test")
    assert second.enter(other) >= 0
    assert second.enter(other) == NOT_NOW, "four in all"
    first.leave(machine.lane(0), places[0], 1)
    assert second.enter(other) >= 0


def test_who_was_refused_goes_first(log: Logged) -> None:
    machine = Machine(log, workers=2, concurrency=1)
    lanes = [machine.lane(0), machine.lane(1)]
    turns = []
    place = machine.workers[0].enter(lanes[0])
    holder = 0
    for _ in range(6):
        other = 1 - holder
        assert machine.workers[other].enter(lanes[other]) == NOT_NOW
        machine.workers[holder].leave(lanes[holder], place, 1)
        assert machine.workers[holder].enter(lanes[holder]) == NOT_NOW, "it would have it for ever"
        place = machine.workers[other].enter(lanes[other])
        assert place >= 0
        holder = other
        turns.append(holder)
    assert turns == [1, 0, 1, 0, 1, 0]
    # One that asks no more holds nobody up for long.
    machine.workers[1 - holder].enter(lanes[1 - holder])
    machine.workers[holder].leave(lanes[holder], place, 1)
    machine.clock += 1.1
    assert machine.workers[holder].enter(lanes[holder]) >= 0


def test_a_lane_that_had_nothing_to_do_is_forgotten(log: Logged) -> None:
    machine = Machine(log)
    destinations = machine.workers[0]
    for number in range(100):
        machine.lane(domain=f"d{number}.test")
    lane = machine.lane()
    machine.call()
    assert len(destinations.states()) == 101
    destinations.sweep()
    machine.call()
    destinations.sweep()
    assert [(state.destination, state.window) for state in destinations.states()] == [("one.test", 4)]
    assert destinations.lane("net", BOX) is lane
    assert destinations.lane("gone", BOX) is None


def test_what_counts_as_not_reached() -> None:
    session = Outcome(Result.DEFERRED, "4.4.2", "lost", Scope.SESSION)
    unknown = Outcome(Result.FAILED, "5.1.2", "no such domain", Scope.HOST)
    assert unreached([[UNREACHED], [session, UNREACHED]]) is UNREACHED
    for answer in (DELIVERED, LATER, unknown):
        assert unreached([[UNREACHED], [answer]]) is None


@pytest.mark.parametrize("kind", Kinds)
def test_a_dead_destination_costs_one_attempt_an_interval(kind: str, log: Logged, tmp_path: Path) -> None:
    net = Scripted(concurrency=20)

    async def test(bench: Bench) -> None:
        net.down.add("net.dead.test")
        for number in range(200):
            await bench.keep(f"b{number}@net.dead.test")
        await bench.settle()
        calls = len(net.batches)
        assert calls <= 3, "two at once, and what they had"
        for _ in range(3):
            await bench.pass_time(1)
            assert len(net.batches) == calls
        await bench.keep("new@net.dead.test")
        await bench.keep("c@net.well.test")
        await bench.settle()
        assert net.tried[-1] == "c@net.well.test"
        calls += 1
        assert len(net.batches) == calls, "what comes meanwhile is not tried"
        for wait in (75, 150, 300):
            await bench.pass_time(wait)
            calls += 1
            assert len(net.batches) == calls
            assert len(net.batches[-1]) <= 10
        (state,) = [state for state in bench.queue.lanes() if state.destination == "net.dead.test"]
        assert (state.waiting, state.running, state.why) == (0, 0, "4.4.1 connection refused")
        assert bench.counts[Counter.DESTINATIONS_DEAD] == 4
        # Each of them has the reason, and comes back.
        net.down.clear()
        await bench.pass_time(700)
        await bench.pass_time(1)
        assert bench.spool.backlog == 0
        assert len(set(net.tried)) == 202

    play(kind, log[0], tmp_path, {"net": net}, test)
    deferred = [line for line in log[1]() if line["event"] == "deferred"]
    assert {line["why"] for line in deferred} == {"connection refused"}
    untried = [line for line in deferred if line["attempts"] == 0]
    assert len(untried) >= 170
    assert len({line["id"] for line in untried}) == len(untried), "told once, not at each interval"


def test_a_destination_that_recovers_is_drained_without_a_stampede(log: Logged, tmp_path: Path) -> None:
    net = Scripted(concurrency=20)
    windows: list[int] = []

    async def test(bench: Bench) -> None:
        net.down.add("net.test")
        for number in range(300):
            await bench.keep(f"b{number}@net.test")
        await bench.settle()
        net.down.clear()
        net.most.clear()
        net.gate = asyncio.Event()
        bench.clock.ahead += 80
        bench.queue.tick()
        for _ in range(30):
            await turns()
            windows.append(net.running["net.test"])
            gate, net.gate = net.gate, asyncio.Event()
            gate.set()
        net.gate.set()
        net.gate = None
        await bench.settle()
        assert bench.spool.backlog == 0

    play("memory", log[0], tmp_path, {"net": net}, test)
    assert windows[0] == 1, "one tries whether it is well"
    assert all(after <= 2 * before for before, after in pairwise(windows) if before)
    assert max(windows) <= 20


@pytest.mark.parametrize("kind", Kinds)
def test_a_slow_destination_delays_no_other_of_its_transport(kind: str, log: Logged, tmp_path: Path) -> None:
    net = Scripted(concurrency=5)

    async def test(bench: Bench) -> None:
        net.gates["net.slow.test"] = asyncio.Event()
        for number in range(50):
            await bench.keep(f"s{number}@net.slow.test")
            await bench.keep(f"f{number}@net.fast.test")
        await until(lambda: bench.spool.backlog == 50)
        assert [address for address in net.tried if address.endswith("fast.test")] == [
            f"f{number}@net.fast.test" for number in range(50)
        ]
        assert net.running["net.slow.test"] == 2
        net.gates["net.slow.test"].set()
        await bench.settle()
        assert bench.spool.backlog == 0

    play(kind, log[0], tmp_path, {"net": net}, test)


def test_what_is_too_much_for_a_slow_destination_goes_back_to_the_spool(
    log: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a bounded number waits in memory; the rest comes back in turn, and others pass."""
    monkeypatch.setattr("fastsmtp.queue.WAITING_LIMIT", 10)
    monkeypatch.setattr("fastsmtp.queue.IN_MEMORY", 40)
    net = Scripted(concurrency=2)

    async def test(bench: Bench) -> None:
        assert isinstance(bench.spool, Spool)
        net.gates["net.slow.test"] = asyncio.Event()
        for number in range(100):
            await bench.keep(f"s{number}@net.slow.test")
        held = bench.spool._scan.held
        for _ in range(3):
            bench.clock.ahead += 60
            bench.queue.tick()
            await until(lambda: len(held) < 40)
        await bench.keep("f@net.fast.test")
        await until(lambda: net.tried[-1] == "f@net.fast.test")
        net.gates["net.slow.test"].set()
        while bench.spool.backlog:
            await bench.pass_time(60)
        assert sorted(net.tried) == sorted(["f@net.fast.test", *[f"s{number}@net.slow.test" for number in range(100)]])

    play("disk", log[0], tmp_path, {"net": net}, test)
    assert {line["why"] for line in log[1]() if line["event"] == "deferred"} == {
        "much other mail waits for the same destination"
    }


def test_what_waits_for_this_machine_does_not_crowd_out_what_leaves_it(
    log: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mailbox server that stands still has all its mail in one lane; other destinations have as much room as ever."""
    monkeypatch.setattr("fastsmtp.queue.CROWDED", 30)
    monkeypatch.setattr("fastsmtp.queue.FEW", 2)
    box, net = Scripted(), Scripted(concurrency=1)

    async def test(bench: Bench) -> None:
        box.gate, net.gate = asyncio.Event(), asyncio.Event()
        for number in range(50):
            await bench.keep(f"b{number}@box.test")
        for number in range(20):
            await bench.keep(f"n{number}@net.test")
        await turns()
        waiting = {state.destination: state.waiting for state in bench.queue.lanes() if state.transport == "net"}
        assert waiting["net.test"] >= 10
        for number in range(20):
            await bench.keep(f"o{number}@net.other", f"p{number}@net.third")
        await turns()
        waiting = {state.destination: state.waiting for state in bench.queue.lanes() if state.transport == "net"}
        assert waiting["net.other"] < 10, "what leaves it does"
        box.gate.set()
        net.gate.set()
        await bench.settle()
        for _ in range(10):
            await bench.pass_time(600)
        assert bench.spool.backlog == 0
        assert (bench.queue._waiting, bench.queue._beyond) == (0, 0)

    play("memory", log[0], tmp_path, {"box": box, "net": net}, test)


def test_what_only_has_to_be_put_off_holds_up_nobody_who_is_due_behind_it(
    log: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsmtp.queue.CLAIM", 3)
    net = Scripted(concurrency=3)

    async def test(bench: Bench) -> None:
        net.down |= {"net.dead.test", "net.well.test"}
        for number in range(40):
            await bench.keep(f"b{number}@net.dead.test")
        await bench.settle()
        bench.clock.ahead += 10
        await bench.keep("c@net.well.test")
        await bench.settle()
        net.down.remove("net.well.test")
        await bench.pass_time(80)  # one tick
        assert net.tried[-1] == "c@net.well.test"
        assert bench.spool.backlog == 40

    play("disk", log[0], tmp_path, {"net": net}, test)


def test_a_small_batch_for_a_connection_and_all_recipients_of_a_message_together(log: Logged, tmp_path: Path) -> None:
    net = Scripted(concurrency=2)

    async def test(bench: Bench) -> None:
        net.gate = asyncio.Event()
        await bench.keep("a@net.test", "b@net.test", "c@net.other", "d@net.test")
        await turns()
        for number in range(60):
            await bench.keep(f"m{number}@net.test")
        await turns()
        net.gate.set()
        await bench.settle()

    play("memory", log[0], tmp_path, {"net": net}, test)
    assert [address for address, _ in net.batches[0]] == ["a@net.test", "b@net.test", "d@net.test"]
    assert [address for address, _ in net.batches[1]] == ["c@net.other"]
    assert max(len(batch) for batch in net.batches[2:]) == 10


def test_two_workers_share_caps_and_what_is_known_of_the_dead(log: Logged, tmp_path: Path) -> None:
    shared, clock = Shared(2, 0), Clock()
    net = Scripted(concurrency=3)

    async def main() -> None:
        benches = []
        for worker in (0, 1):
            spool = open_spool("memory", log[0], tmp_path, worker)
            bench = Bench(spool, log[0], {"net": net}, shared=shared, clock=clock, worker=worker, total=4)
            benches.append(bench)
        net.gate = asyncio.Event()
        for number in range(40):
            for worker, bench in enumerate(benches):
                await bench.keep(f"w{worker}-{number}@net.test", f"w{worker}-{number}@net.other")
        for _ in range(50):
            await asyncio.sleep(0.005)
            gate, net.gate = net.gate, asyncio.Event()
            gate.set()
        net.gate.set()
        net.gate = None
        for bench in benches:
            await bench.settle()
            assert bench.spool.backlog == 0
        assert net.most["net.test"] <= 3
        assert net.most["net.other"] <= 3
        assert len(net.tried) == len(set(net.tried)) == 160

        net.down.add("net.test")
        before = len(net.batches)
        await benches[0].keep("x0@net.test")
        await benches[0].settle()
        await benches[1].keep("x1@net.test")
        await benches[1].settle()
        assert len(net.batches) == before + 1
        clock.ahead += 80
        for bench in benches:
            bench.queue.tick()
        for bench in benches:
            await bench.settle()
        assert len(net.batches) == before + 2, "one of them tries"
        net.down.clear()
        clock.ahead += 200
        for _ in range(2):
            for bench in benches:
                await bench.pass_time(0)
        assert [bench.spool.backlog for bench in benches] == [0, 0]
        for bench in benches:
            await bench.queue.close()

    uvloop.run(main())


@pytest.mark.parametrize("what", ["id", "domain", "everything"])
def test_what_an_operator_wakes_is_tried_although_its_destination_is_dead(
    what: str, log: Logged, tmp_path: Path
) -> None:
    net = Scripted(concurrency=3)

    async def test(bench: Bench) -> None:
        assert isinstance(bench.spool, Spool)
        net.down.add("net.test")
        message_id = await bench.keep("b@net.test")
        await bench.settle()
        assert len(net.batches) == 1
        net.down.clear()
        selection = {"id": Selection((message_id,)), "domain": Selection(domain="net.test")}.get(what, EVERYTHING)
        bench.queue.wake(selection)
        async for _ in bench.spool.administration.retry(selection, bench.clock.now()):
            pass
        await bench.pass_time(0)
        assert len(net.batches) == 2
        assert bench.spool.backlog == 0

    play("disk", log[0], tmp_path, {"net": net}, test)


def test_what_waits_for_a_dead_destination_is_not_in_memory(log: Logged, tmp_path: Path) -> None:
    net = Scripted(concurrency=3)

    async def test(bench: Bench) -> None:
        assert isinstance(bench.spool, Spool)
        net.down.add("net.test")
        for number in range(1500):
            await bench.keep(f"b{number}@net.test")
        await bench.settle()
        assert bench.spool.backlog == 1500
        assert len(bench.spool._scan.held) == 0
        assert sum(state.waiting for state in bench.queue.lanes()) == 0

    play("disk", log[0], tmp_path, {"net": net}, test)


def test_other_transports(log: Logged) -> None:
    """After a reload: lanes of what stays are kept, and what is replaced is in use until nothing waits for it."""
    machine = Machine(log)
    (destinations,) = machine.workers
    net, box = machine.lane(), machine.lane(name="box")
    old, kept = net.transport, box.transport
    new = Scripted(concurrency=3)
    net.running = 1
    destinations.use({"net": new, "box": kept}, SCHEDULE, 50)
    assert machine.lane(name="box") is box
    assert machine.lane() is not net
    assert (machine.lane().transport, machine.lane().cap) == (new, 3)
    assert [destinations.uses(one) for one in (old, kept, new, Scripted())] == [True, True, True, False]
    net.running = 0
    assert not destinations.uses(old)
    destinations.use({"net": new}, SCHEDULE, 50)
    assert destinations.lane("box", BOX) is None
    assert [destinations.uses(one) for one in (kept, new)] == [False, True]
    machine.lane()
    destinations.use({}, SCHEDULE, 50)
    assert not destinations.uses(new)
