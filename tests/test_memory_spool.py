"""The store that keeps nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from keeping import Answers, finished, letter, octets, run

from fastsmtp.job import JOB_OCTETS, Job, Mark
from fastsmtp.memory_spool import MemorySpool
from fastsmtp.reply import R452_NO_ROOM
from fastsmtp.verdict import STORED, Refused


@asynccontextmanager
async def opened(memory: int = 1 << 20) -> AsyncIterator[tuple[MemorySpool, list[Job]]]:
    spool = MemorySpool(0, loop=asyncio.get_running_loop(), memory=memory)
    jobs: list[Job] = []
    spool.on_stored = jobs.extend
    spool.open()
    yield spool, jobs
    await spool.close()
    assert not spool.room()


def test_a_message_is_answered_at_once_and_handed_over_once_a_round() -> None:
    async def main() -> None:
        async with opened() as (spool, jobs):
            calls: list[int] = []
            spool.on_stored = lambda more: (jobs.extend(more), calls.append(len(more)))
            answers = Answers()
            for _ in range(3):
                spool.append(*letter(spool, octets(2000)), answers)
            assert answers.all == [STORED] * 3
            assert not jobs
            await asyncio.sleep(0)
            assert calls == [3]
            assert jobs[0].message.parts == [octets(2000)]
            assert spool.used == 3 * (JOB_OCTETS + 2000)
            spool.finish([mark for job in jobs for mark in finished(job)])
            assert (spool.backlog, spool.used) == (0, 0)
            spool.append(*letter(spool, b""), answers)
            await asyncio.sleep(0)
            assert calls == [3, 1]
            assert jobs[3].message.parts == []

    run(main())


@pytest.mark.parametrize("cut", [1, 511, 512, 5000])
def test_the_body_is_the_same_however_it_is_cut(cut: int) -> None:
    async def main() -> None:
        async with opened() as (spool, _):
            message, draft = letter(spool, b"")
            body = octets(5000)
            for place in range(0, 5000, cut):
                assert draft.write(body[place : place + cut])
            draft.header_done()
            assert draft.head == body
            spool.append(message, draft, Answers())
            assert b"".join(message.parts or []) == body

    run(main())


def test_over_the_budget_messages_are_refused_and_nothing_stays_counted() -> None:
    async def main() -> None:
        async with opened(10_000) as (spool, _):
            answers = Answers()
            assert spool.room(5000)
            assert not spool.room(10_000)
            message, draft = letter(spool, octets(9000))
            assert draft.write(octets(2000))
            assert draft.write(octets(2000))
            assert draft.head == b""
            spool.append(message, draft, answers)
            (answer,) = answers.all
            assert isinstance(answer, Refused)
            assert answer.reply is R452_NO_ROOM
            assert spool.used == 0
            for over in (False, True):
                _, draft = letter(spool, octets(20_000 if over else 10))
                draft.abandon()
                draft.abandon()
                assert spool.used == 0
            spool.append(*letter(spool), answers)
            assert answers.all[1] is STORED

    run(main())


def test_deferred_recipients_wait_and_finished_ones_do_not_come_back() -> None:
    async def main() -> None:
        async with opened() as (spool, jobs):
            for _ in range(2):
                spool.append(*letter(spool, recipients=3), Answers())
            await asyncio.sleep(0)
            one, two = jobs
            assert spool.next_due() is None
            spool.finish([Mark(one.key, 0), Mark(one.key, 2, 100.0, 1, "busy"), Mark(one.key, 1, 200.0, 1, "busy")])
            spool.drop(one)
            spool.release(one)
            spool.release(two)
            assert spool.next_due() == 0.0
            assert await spool.claim(50.0, 10) == [two]
            spool.finish(finished(two)[:3])
            spool.release(two)
            assert spool.next_due() == 100.0
            assert await spool.claim(99.9, 10) == []
            assert await spool.claim(100.0, 10) == [one]
            assert await spool.claim(100.0, 10) == []
            assert await spool.read(one)
            assert one.pending == [1, 2]
            tried = {number: (mark.attempts, mark.reason) for number, mark in one.tried.items()}
            assert tried == {1: (1, "busy"), 2: (1, "busy")}
            assert spool.backlog == 1
            assert not spool.over_budget

    run(main())


def test_a_draft_of_another_keeper_is_a_bug() -> None:
    async def main() -> None:
        async with opened() as (spool, _):
            message, _draft = letter(spool)
            with pytest.raises(TypeError, match="another keeper"):
                spool.append(message, object(), Answers())

    run(main())
