"""queue: jobs from a real spool into scripted transports; what is tried, when again, and what the spool is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
import uvloop
from scripted import LATER, NEVER, SCHEDULE, Bench, Kinds, Logged, Scripted, logged, play, turns, until

from fastsmtp.address import parse_address
from fastsmtp.delivery.discard import Discard
from fastsmtp.job import Job
from fastsmtp.memory_spool import MemorySpool
from fastsmtp.message import Content, Envelope, Message, Recipient
from fastsmtp.metrics import Counter
from fastsmtp.queue import FEW
from fastsmtp.reader import Reader
from fastsmtp.schedule import Schedule
from fastsmtp.spool import Spool

SOFT = SCHEDULE._replace(soft_bounce=True)


@pytest.fixture
def log() -> Iterator[Logged]:
    with logged() as pair:
        yield pair


@pytest.mark.parametrize("kind", Kinds)
def test_delivered_and_forgotten(kind: str, log: Logged, tmp_path: Path) -> None:
    box = Scripted()

    async def test(bench: Bench) -> None:
        await bench.keep("b@box.test", "c@box.test")
        await bench.settle()
        assert box.batches == [
            [("b@box.test", b"Subject: hello\r\n\r\nbody\r\n"), ("c@box.test", b"Subject: hello\r\n\r\nbody\r\n")]
        ]
        assert bench.spool.backlog == 0
        assert bench.counts == {Counter.RECIPIENTS_DELIVERED: 2}
        await bench.pass_time(10_000)
        assert len(box.batches) == 1

    play(kind, log[0], tmp_path, {"box": box}, test)
    assert [line["to"] for line in log[1]() if line["event"] == "delivered"] == ["b@box.test", "c@box.test"]


@pytest.mark.parametrize("kind", Kinds)
def test_a_transport_that_need_not_wait(kind: str, log: Logged, tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        for _ in range(20):
            await bench.keep("b@discard.test")
        await bench.settle()
        assert bench.spool.backlog == 0

    play(kind, log[0], tmp_path, {"discard": Discard()}, test)


@pytest.mark.parametrize("kind", Kinds)
def test_back_off_doubles_up_to_the_longest(kind: str, log: Logged, tmp_path: Path) -> None:
    box = Scripted(*[LATER] * 6)

    async def test(bench: Bench) -> None:
        await bench.keep("b@box.test")
        await bench.settle()
        for number, wait in enumerate([60, 120, 240, 480, 600, 600], 1):
            assert len(box.batches) == number
            await bench.pass_time(wait - 10)
            assert len(box.batches) == number, "too early"
            await bench.pass_time(12)
        assert len(box.batches) == 7
        assert bench.spool.backlog == 0

    play(kind, log[0], tmp_path, {"box": box}, test)
    deferred = [line for line in log[1]() if line["event"] == "deferred"]
    assert [line["attempts"] for line in deferred] == [1, 2, 3, 4, 5, 6]
    assert [line["retry"] for line in deferred] == [60, 120, 240, 480, 600, 600]
    assert deferred[0]["why"] == "not now"


def test_jitter_stays_within_a_tenth() -> None:
    schedule = Schedule(100.0, 1000.0)
    assert schedule.wait(1, lambda: 0.0) == pytest.approx(90.0)
    assert schedule.wait(1, lambda: 1.0) == pytest.approx(110.0)
    assert schedule.wait(500, lambda: 0.5) == pytest.approx(1000.0)


@pytest.mark.parametrize("kind", Kinds)
def test_only_the_recipient_that_failed_is_tried_again(kind: str, log: Logged, tmp_path: Path) -> None:
    good, bad = Scripted(), Scripted(LATER)

    async def test(bench: Bench) -> None:
        await bench.keep("b@good.test", "c@bad.test")
        await bench.settle()
        assert bench.spool.backlog == 1
        await bench.pass_time(70)
        assert good.tried == ["b@good.test"]
        assert bad.tried == ["c@bad.test"] * 2
        assert bench.spool.backlog == 0

    play(kind, log[0], tmp_path, {"good": good, "bad": bad}, test)


@pytest.mark.parametrize("kind", Kinds)
def test_recipients_with_different_times_are_tried_at_their_own(kind: str, log: Logged, tmp_path: Path) -> None:
    fast, slow = Scripted(LATER, LATER), Scripted(NEVER)

    async def test(bench: Bench) -> None:
        await bench.keep("b@fast.test", "c@slow.test")
        await bench.settle()
        await bench.pass_time(70)
        assert (len(fast.tried), len(slow.tried)) == (2, 1)
        await bench.pass_time(600)
        assert (len(fast.tried), len(slow.tried)) == (3, 2)

    play(kind, log[0], tmp_path, {"fast": fast, "slow": slow}, test, schedule=SOFT)


@pytest.mark.parametrize("options", [{"schedule": SOFT}, {"reports": False}])
@pytest.mark.parametrize("kind", Kinds)
def test_with_soft_bounce_or_without_reports_nothing_is_given_up(
    kind: str, options: dict[str, Any], log: Logged, tmp_path: Path
) -> None:
    box = Scripted(NEVER)

    async def test(bench: Bench) -> None:
        await bench.keep("b@box.test")
        await bench.settle()
        assert bench.spool.backlog == 1
        assert bench.counts == {Counter.RECIPIENTS_DEFERRED: 1}
        box.script = [LATER]
        await bench.pass_time(60_000)
        assert bench.spool.backlog == 1
        await bench.pass_time(610)
        assert len(box.tried) == 3
        assert bench.spool.backlog == 0

    play(kind, log[0], tmp_path, {"box": box}, test, **options)


@pytest.mark.parametrize("kind", Kinds)
def test_a_recipient_with_a_fault_reaches_no_transport(kind: str, log: Logged, tmp_path: Path) -> None:
    box, sender = Scripted(), Scripted()

    async def test(bench: Bench) -> None:
        await bench.keep("b@box.test", fault="Mail loop")
        await bench.settle()
        assert box.batches == []
        assert sender.tried == ["a@x.test"]
        assert bench.spool.backlog == 0

    play(kind, log[0], tmp_path, {"box": box, "x": sender}, test)
    assert [(line["status"], line["why"]) for line in log[1]() if line["event"] == "failed"] == [("5.4.6", "Mail loop")]


@pytest.mark.parametrize("kind", Kinds)
def test_a_transport_that_is_gone_defers(kind: str, log: Logged, tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.keep("b@gone.test")
        await bench.settle()
        assert bench.spool.backlog == 1

    play(kind, log[0], tmp_path, {}, test)
    assert [line["status"] for line in log[1]() if line["event"] == "deferred"] == ["4.3.5"]


@pytest.mark.parametrize("kind", Kinds)
def test_a_transport_that_raises_is_a_bug_and_loses_nothing(kind: str, log: Logged, tmp_path: Path) -> None:
    box = Scripted(RuntimeError("broken"))

    async def test(bench: Bench) -> None:
        await bench.keep("b@box.test")
        await bench.settle()
        assert bench.spool.backlog == 1
        await bench.pass_time(70)
        assert bench.spool.backlog == 0

    play(kind, log[0], tmp_path, {"box": box}, test)
    assert len([line for line in log[1]() if line["event"] == "bug"]) == 1


def test_a_slow_lane_delays_no_other(log: Logged, tmp_path: Path) -> None:
    slow, fast = Scripted(), Scripted()

    async def test(bench: Bench) -> None:
        slow.gate = asyncio.Event()
        await bench.keep("b@slow.test")
        for _ in range(10):
            await bench.keep("c@fast.test")
        await until(lambda: len(fast.tried) == 10 and bench.spool.backlog == 1)
        slow.gate.set()
        await bench.settle()
        assert bench.spool.backlog == 0

    play("disk", log[0], tmp_path, {"slow": slow, "fast": fast}, test)


def test_what_arrives_while_a_batch_is_delivered_makes_the_next_one(log: Logged, tmp_path: Path) -> None:
    box = Scripted()

    async def test(bench: Bench) -> None:
        box.gate = asyncio.Event()
        await bench.keep("first@box.test")
        await until(lambda: bool(box.batches))
        for number in range(25):
            await bench.keep(f"b{number}@box.test")
        box.gate.set()
        await bench.settle()
        assert [len(batch) for batch in box.batches] == [1, 25]

    play("disk", log[0], tmp_path, {"box": box}, test)


def test_a_restart_goes_on_where_it_was(log: Logged, tmp_path: Path) -> None:
    before, after = Scripted(LATER), Scripted()

    async def first(bench: Bench) -> None:
        await bench.keep("deferred@box.test")
        await bench.settle()
        before.gate = asyncio.Event()
        await bench.keep("under-way@box.test", body=b"first\r\n" * 30_000)
        await until(lambda: len(before.batches) == 2)
        before.gate.set()
        bench.queue._closing = True  # what is delivered now is never marked: the process is about to be gone
        before.script = [LATER]

    play("disk", log[0], tmp_path, {"box": before}, first)

    async def second(bench: Bench) -> None:
        bench.clock.ahead = 700.0
        for _ in range(5):
            await bench.pass_time(1)
        assert sorted(after.tried) == ["deferred@box.test", "under-way@box.test"]
        assert dict(batch for each in after.batches for batch in each)["under-way@box.test"] == b"first\r\n" * 30_000
        assert bench.spool.backlog == 0

    play("disk", log[0], tmp_path, {"box": after}, second)


def test_a_backlog_larger_than_memory_is_drained(log: Logged, tmp_path: Path) -> None:
    """Bodies are dropped, whole jobs given back, and all of them delivered in the end, each once."""
    box = Scripted()

    async def test(bench: Bench) -> None:
        assert isinstance(bench.spool, Spool)
        box.gate = asyncio.Event()
        bodies = {}
        for number in range(60):
            address = f"b{number}@box.test"
            bodies[address] = b"%d\r\n" % number * 20_000
            await bench.keep(address, body=bodies[address])
        assert bench.spool.backlog == 60
        box.gate.set()
        for _ in range(20):
            await bench.pass_time(0)
        delivered = [entry for batch in box.batches for entry in batch]
        assert len(delivered) == 60
        assert dict(delivered) == bodies
        assert bench.spool.backlog == 0

    async def main() -> None:
        loop = asyncio.get_running_loop()
        spool = Spool(tmp_path / "spool", 0, loop=loop, log=log[0], inline=1 << 20, min_free=0, memory=600_000)
        spool.open()
        bench = Bench(spool, log[0], {"box": box})
        await asyncio.wait_for(test(bench), 60)
        await bench.queue.close()
        await spool.close()

    uvloop.run(main())


def test_while_bodies_on_their_way_in_take_all_memory_mail_goes_out_a_few_at_a_time(
    log: Logged, tmp_path: Path
) -> None:
    box = Scripted()

    async def test(bench: Bench) -> None:
        assert isinstance(bench.spool, Spool)
        room = bench.spool._room
        box.gate = asyncio.Event()
        room.drafts += room.limit  # a client that sends slowly cannot be told to wait any more
        addresses = [f"b{number}@box.test" for number in range(3 * FEW)]
        for address in addresses:
            await bench.keep(address, body=f"{address}\r\n".encode())
        assert bench.queue._waiting == FEW
        box.gate.set()
        await bench.settle()
        assert sorted(box.tried) == sorted(addresses)
        assert all(body == f"{address}\r\n".encode() for batch in box.batches for address, body in batch)
        assert len(box.batches) <= 5
        room.drafts -= room.limit

    play("disk", log[0], tmp_path, {"box": box}, test)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_body_that_cannot_be_read_for_one_lane_while_another_has_the_job(
    lasting: bool, log: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody gets a message twice, and the marks of others that were delivered with it are not lost."""
    monkeypatch.setattr("fastsmtp.spool.RETRY_SECONDS", 0.05)
    box, slow = Scripted(), Scripted(needs_body=False)

    async def test(bench: Bench) -> None:
        assert isinstance(bench.spool, Spool)
        spool, reader = bench.spool, bench.spool._reader
        answers: list[tuple[bytes, int] | Exception] = [(b"damaged", 1) if lasting else apsw.IOError("disk I/O error")]

        def body(key: int) -> tuple[bytes | None, int]:
            if not answers:
                return Reader.body(reader, key)
            answer = answers.pop()
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(reader, "body", body)

        def forget(jobs: list[Job]) -> None:
            for job in jobs:
                spool.drop(job)
                spool.release(job)

        spool.on_stored = forget
        await bench.keep("b@box.test", "c@slow.test")
        await bench.keep("d@slow.test")
        spool.on_stored = bench.queue.offer
        slow.gate = asyncio.Event()
        bench.queue.tick()
        await until(lambda: slow.tried == ["c@slow.test", "d@slow.test"] and not answers)
        for _ in range(3):
            bench.queue.tick()
            await asyncio.sleep(0.1)
        assert box.tried == []
        slow.gate.set()
        await bench.settle()
        await bench.pass_time(1)
        assert slow.tried == ["c@slow.test", "d@slow.test"]
        assert box.tried == ([] if lasting else ["b@box.test"])
        assert (spool.backlog, spool.broken) == (0, int(lasting))

    play("disk", log[0], tmp_path, {"box": box, "slow": slow}, test)


def test_jobs_of_an_unhealthy_spool_are_not_delivered(log: Logged, tmp_path: Path) -> None:
    box = Scripted()

    async def test(bench: Bench) -> None:
        assert isinstance(bench.spool, MemorySpool)
        bench.spool.healthy = False
        job = Job(1, _message(bench), [0], checked=True)
        bench.spool._jobs[1] = job
        bench.queue.offer([job])
        await turns()
        assert box.batches == []
        bench.spool.healthy = True
        await bench.pass_time(1)
        assert box.tried == ["b@box.test"]

    play("memory", log[0], tmp_path, {"box": box}, test)


def _message(bench: Bench) -> Message:
    envelope = Envelope(parse_address("a@x.test"))
    envelope.id = bench.spool.next_id()
    envelope.recipients = [Recipient(parse_address("b@box.test"))]
    return Message(envelope, b"", [b"x"], 1, 1, Content.NONE, time.time())
