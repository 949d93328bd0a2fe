"""What an operator asks of a spool and orders in it, while the queue works on the same messages."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import apsw
import pytest
from keeping import INLINE, Answers, Yard, finished, injected, keep, letter, octets, run, settle

from fastsmtp.administration import Changed
from fastsmtp.census import DOMAINS, OTHER, REASONS, Census
from fastsmtp.ids import key_of
from fastsmtp.job import HELD, Job, Mark
from fastsmtp.scan import LOAD
from fastsmtp.selection import EVERYTHING, Selection, parse_selection
from fastsmtp.spool import Spool
from fastsmtp.store import FORMAT

HOUR = 3600.0


async def last(progress: AsyncIterator[Changed]) -> Changed:
    """What an order has reached when it is done."""
    done = Changed()
    async for so_far in progress:
        done = so_far
    return done


async def deferred(spool: Spool, recipients: int = 1, wait: float = HOUR, body: bytes = b"Subject: x\r\n\r\n") -> str:
    """A message that was tried once, and given back; its id."""
    spool.on_stored = lambda jobs: None
    message = await keep(spool, body, recipients)
    job = spool._scan.held[key_of(message.id)]
    spool.finish([Mark(job.key, number, time.time() + wait, 1, "4.2.0 busy") for number in list(job.pending)])
    spool.release(job)
    await settle(spool)
    return message.id


def of(*ids: str) -> Selection:
    return Selection(ids)


# Selections


def test_a_selection_is_one_thing_and_says_so() -> None:
    one = Selection(("0p8pmvv1k000000abcde",))
    for selection in (one, Selection(domain="a.test"), EVERYTHING):
        assert parse_selection(json.loads(json.dumps(selection.render()))) == selection
    for wrong in (
        {},
        {"ids": []},
        {"ids": ["x"]},
        {"ids": "0p8pmvv1k000000abcde"},
        {"ids": list(one.ids), "everything": True},
        {"domain": "a.test", "everything": True},
        {"domain": 1},
        {"everything": "yes"},
    ):
        with pytest.raises(ValueError, match=r"."):
            parse_selection(wrong)


# Hold, release, retry


def test_what_is_on_hold_is_not_claimed_before_it_is_released(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def first() -> tuple[str, str]:
        async with yard.opened() as spool:
            one, other = await deferred(spool), await deferred(spool)
            assert await last(spool.administration.hold(of(one))) == Changed(1, 1, 0)
            assert await last(spool.administration.hold(of(one))) == Changed()
            assert [job.message.id for job in await spool.claim(time.time() + 2 * HOUR, 10)] == [other]
            return one, other

    async def second(one: str, other: str) -> None:
        async with yard.opened() as spool:  # a start changes nothing about it
            now = time.time()
            assert [job.message.id for job in await spool.claim(now + 2 * HOUR, 10)] == [other]
            assert spool.next_due() is None
            assert await last(spool.administration.retry(EVERYTHING, now)) == Changed(1, 1, 1)  # not what is on hold
            assert await last(spool.administration.release(of(one), now)) == Changed(1, 1, 0)
            (job,) = await spool.claim(now, 10)
            assert (job.message.id, job.tried[0].attempts, job.tried[0].reason) == (one, 1, "4.2.0 busy")

    run(second(*run(first())))


def test_new_mail_of_an_earlier_run_can_be_held_too(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def first() -> None:
        async with yard.opened() as spool:
            await keep(spool)
            await keep(spool)

    async def second() -> None:
        async with yard.opened() as spool:
            assert await last(spool.administration.hold(EVERYTHING)) == Changed(2, 2, 0)
            assert await spool.claim(time.time(), 10) == []
            assert await last(spool.administration.release(EVERYTHING, time.time())) == Changed(2, 2, 0)
            assert len(await spool.claim(time.time() + 1, 10)) == 2

    run(first())
    run(second())


def test_a_message_with_a_recipient_on_hold_is_not_over_without_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            message_id = await deferred(spool, recipients=2)
            spool._commit.hold([(key_of(message_id), 0)])
            await settle(spool)
            (job,) = await spool.claim(time.time() + 2 * HOUR, 10)
            assert job.pending == [0, 1]
            assert job.tried[0].due == HELD
            spool.finish([Mark(job.key, 1)])
            spool.release(job)
            await settle(spool)
            assert spool.backlog == 1
            assert await spool.claim(time.time() + 2 * HOUR, 10) == []
            assert await last(spool.administration.release(of(message_id), time.time())) == Changed(1, 1, 0)
            (job,) = await spool.claim(time.time(), 10)
            assert job.pending == [0]

    run(main())


def test_a_hold_of_what_is_under_way_takes_effect_behind_the_attempt(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            message = await keep(spool)
            (job,) = spool._scan.held.values()
            assert await last(spool.administration.hold(of(message.id))) == Changed(1, 1, 1)
            spool.finish([Mark(job.key, 0, time.time() - 1, 1, "4.2.0 busy")])
            spool.release(job)
            await settle(spool)
            assert await spool.claim(time.time(), 10) == []
            await last(spool.administration.release(of(message.id), time.time()))
            assert len(await spool.claim(time.time(), 10)) == 1

    run(main())


def test_a_retry_reaches_the_recipients_that_wait_beside_one_under_way(tmp_path: Path) -> None:
    """The job in memory knows the old time: it must not be found at that when it is given back."""

    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            message_id = await deferred(spool, recipients=2)
            spool._commit.wake([(key_of(message_id), 0)], time.time())
            await settle(spool)
            (job,) = await spool.claim(time.time(), 10)
            assert (job.tried[1].due or 0) > time.time() + HOUR / 2
            assert await last(spool.administration.retry(of(message_id), time.time())) == Changed(1, 2, 1)
            assert await spool.claim(time.time(), 10) == []
            spool.finish([Mark(job.key, 0, time.time() + HOUR, 2, "4.2.0 busy")])
            spool.release(job)
            await settle(spool)
            (job,) = await spool.claim(time.time(), 10)
            assert [(number, mark.attempts) for number, mark in job.tried.items()] == [(0, 2), (1, 1)]

    run(main())


def test_mail_that_comes_meanwhile_is_not_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an order for everything would never end where mail comes as fast as it is reached."""
    monkeypatch.setattr("fastsmtp.administration.SLICE", 2)

    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            before = [await deferred(spool) for _ in range(5)]
            late = 0
            async for done in spool.administration.hold(EVERYTHING):
                total = done
                if late < 5:
                    late += 1
                    await deferred(spool)
            assert total == Changed(5, 5, 0)
            held = [row["id"] async for row in spool.administration.messages("", "held")]
            assert held == before
            assert await last(spool.administration.hold(EVERYTHING)) == Changed(late, late, 0)

    run(main())


@pytest.mark.parametrize("slice_", [1, 5000])
@pytest.mark.parametrize("overtaken", [1, 2, 3])
def test_a_queue_with_a_report_in_it_is_never_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overtaken: int, slice_: int
) -> None:
    """One commit ends a message and keeps the report on it, while somebody counts."""
    monkeypatch.setattr("fastsmtp.administration.SLICE", slice_)

    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            spool.on_stored = lambda jobs: None
            message = await keep(spool)
            administration = spool.administration
            read = administration._read
            reads = 0

            async def count_reads(work: Callable[[], object]) -> object:
                nonlocal reads
                found = await read(work)
                reads += 1
                if reads == overtaken:
                    answers = Answers()
                    spool.append(*letter(spool, b"Subject: report\r\n\r\n"), answers, [Mark(key_of(message.id), 0)])
                    await answers.wait(1)
                return found

            monkeypatch.setattr(administration, "_read", count_reads)
            assert (await administration.count(EVERYTHING)).messages > 0
            assert reads >= overtaken
            assert spool.backlog == 1

    run(main())


def test_of_many_ids_the_unknown_ones_are_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            known = await deferred(spool)
            others = tuple(spool.next_id() for _ in range(2 * LOAD))
            assert await spool.administration.unknown((*others, known)) == list(others)

    run(main())


@pytest.mark.parametrize("order", ["hold", "delete"])
def test_nothing_is_claimed_that_was_held_or_deleted_before(tmp_path: Path, order: str) -> None:
    """Orders and claims at the same time: what an order has reached and was not under way is never handed out."""
    chance = random.Random(7)

    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            ids = [await deferred(spool, wait=-1) for _ in range(60)]
            chance.shuffle(ids)
            claimed: set[str] = set()
            ordered: set[str] = set()
            over = False

            async def turn(mine: set[str], others: set[str]) -> None:
                """Neither is done before the other has begun, however the machine shares its time."""
                await asyncio.sleep(chance.random() / 500)
                while len(mine) > len(others) + 8 and not over:
                    await asyncio.sleep(0)

            async def claims() -> None:
                while len(claimed) + len(ordered) < len(ids):
                    for job in await spool.claim(time.time(), chance.randrange(1, 4)):
                        assert job.message.id not in ordered
                        claimed.add(job.message.id)
                    await turn(claimed, ordered)

            async def orders() -> None:
                for message_id in ids:
                    if message_id in claimed:
                        continue
                    administration = spool.administration
                    run_order = administration.hold if order == "hold" else administration.delete
                    done = await last(run_order(of(message_id)))
                    if done.under_way:
                        continue
                    assert message_id not in claimed or not done.messages
                    if done.messages:
                        ordered.add(message_id)
                    await turn(ordered, claimed)
                nonlocal over
                over = True

            async with asyncio.timeout(30):
                await asyncio.gather(claims(), orders())
            assert claimed
            assert ordered
            assert claimed | ordered == set(ids)

    run(main())


class Slow:
    """Lets the reading thread wait between what it has read of messages and its answer."""

    def __init__(self, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self._has_read = threading.Event()
        read = spool._reader.messages

        def messages(keys: Sequence[int]) -> str:
            text = read(keys)
            self._has_read.set()
            assert self.go_on.wait(30)
            return text

        monkeypatch.setattr(spool._reader, "messages", messages)

    async def has_read(self) -> None:
        while not self._has_read.is_set():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("order", ["hold", "retry"])
def test_a_claim_that_has_read_too_early_passes_over_what_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            message_id = await deferred(spool, wait=-1)
            slow = Slow(spool, monkeypatch)
            claim = asyncio.ensure_future(spool.claim(time.time(), 10))
            await slow.has_read()
            if order == "hold":
                spool._commit.hold([(key_of(message_id), 0)])
            else:
                spool._commit.wake([(key_of(message_id), 0)], time.time())
            assert await spool._commit.flushed()
            slow.go_on.set()
            assert await claim == []
            again = await spool.claim(time.time(), 10)
            assert [job.message.id for job in again] == ([] if order == "hold" else [message_id])

    run(main())


def test_what_is_given_back_while_it_is_taken_is_taken_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            one, other = await deferred(spool), await deferred(spool, wait=-1)
            (job,) = await spool.claim(time.time(), 10)
            assert job.message.id == other
            slow = Slow(spool, monkeypatch)
            take = asyncio.ensure_future(spool._scan.take([key_of(one), key_of(other)]))
            await slow.has_read()
            spool.release(job)
            assert await spool._commit.flushed()
            slow.go_on.set()
            assert {job.message.id for job in await take} == {one, other}

    run(main())


# Delete


def test_deleted_mail_is_gone_with_its_file(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def main() -> None:
        async with yard.opened() as spool:
            small, large = await deferred(spool), await deferred(spool, body=octets(INLINE + 1))
            kept = await deferred(spool)
            assert (yard.directory / "body" / large).exists()
            assert await spool.administration.count(of(small, large)) == Changed(2, 2, 0)
            assert await last(spool.administration.delete(of(small, large))) == Changed(2, 2, 0)
            assert spool.backlog == 1
            assert (spool._room.jobs, spool._room.drafts) == (0, 0)
            assert await spool.administration.unknown((small, large, kept)) == [small, large]
            await settle(spool)
            assert not (yard.directory / "body" / large).exists()

    run(main())
    with yard.database() as db:
        assert db.execute("SELECT count(*) FROM message").get == 1
        assert db.execute("SELECT count(*) FROM recipient").get == 1


def test_a_delete_by_domain_leaves_the_other_recipients(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            spool.on_stored = lambda jobs: None
            message, draft = letter(spool, recipients=3)
            message.envelope.recipients[1].address.domain = "other.test"
            answers = Answers()
            spool.append(message, draft, answers)
            await answers.wait(1)
            (job,) = spool._scan.held.values()
            spool.finish([Mark(job.key, n, time.time() + HOUR, 1, "4.2.0 busy") for n in range(3)])
            spool.release(job)
            await settle(spool)
            assert await last(spool.administration.delete(Selection(domain="example.net"))) == Changed(1, 2, 0)
            (job,) = await spool.claim(time.time() + 2 * HOUR, 10)
            assert job.pending == [1]

    run(main())


@pytest.mark.parametrize("end", ["deferred", "delivered", "one of two"])
def test_a_delete_of_what_is_under_way_takes_effect_behind_the_attempt(tmp_path: Path, end: str) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            message = await keep(spool, recipients=2)
            (job,) = spool._scan.held.values()
            assert await last(spool.administration.delete(of(message.id))) == Changed(0, 0, 1)
            assert spool.backlog == 1
            if end == "delivered":
                spool.finish(finished(job))
            else:
                spool.finish([Mark(job.key, 0, time.time(), 1, "4.2.0 busy")])
                spool.finish([Mark(job.key, 1) if end == "one of two" else Mark(job.key, 1, time.time(), 1, "x")])
                spool.release(job)
            await settle(spool)
            assert spool.backlog == 0
            assert spool.administration.doomed == {}
            assert await spool.claim(time.time() + 1, 10) == []
            assert await spool.administration.unknown((message.id,)) == [message.id]

    run(main())


def test_what_was_set_aside_can_be_seen_and_deleted(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def first() -> str:
        async with yard.opened() as spool:
            return await deferred(spool, body=octets(INLINE + 1))

    async def second(message_id: str) -> None:
        async with yard.opened() as spool:
            assert spool.broken == 1
            shown = await spool.administration.show(message_id)
            assert shown is not None
            assert "octets" in shown["set_aside"]["why"]
            assert await spool.administration.count(of(message_id)) == Changed(1, 0, 0)
            assert await last(spool.administration.delete(EVERYTHING)) == Changed()
            assert spool.broken == 1
            assert await last(spool.administration.delete(of(message_id))) == Changed(1, 0, 0)
            assert spool.broken == 0
            assert await spool.administration.show(message_id) is None
            assert list((yard.directory / "body").iterdir()) == []

    message_id = run(first())
    with (yard.directory / "body" / message_id).open("ab") as file:
        file.truncate(10)
    run(second(message_id))


@pytest.mark.parametrize("call", ["write", "sync"])
@pytest.mark.parametrize("order", ["hold", "delete"])
def test_an_order_whose_commit_fails_is_done_when_the_store_works_again(tmp_path: Path, order: str, call: str) -> None:
    yard = Yard(tmp_path)

    async def main() -> None:
        with injected() as faults:
            async with yard.opened() as spool:
                message_id = await deferred(spool)
                faults.fail(apsw.IOError, call, times=1)
                administration = spool.administration
                done = await last(
                    administration.hold(EVERYTHING) if order == "hold" else administration.delete(EVERYTHING)
                )
                assert done == Changed(1, 1, 0)
                assert spool.commits[1] == 1
                assert await spool.claim(time.time() + 2 * HOUR, 10) == []
                assert (await administration.show(message_id) is None) == (order == "delete")

    run(main())


# Questions


def test_a_list_tells_of_every_recipient_and_its_state(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            one = await deferred(spool, recipients=2)
            held = await deferred(spool)
            await last(spool.administration.hold(of(held)))
            new = await keep(spool)

            async def ids(domain: str = "", state: str = "") -> list[str]:
                return [row["id"] async for row in spool.administration.messages(domain, state)]

            assert await ids() == [one, held, new.id]
            assert await ids("example.net") == [one, held, new.id]
            assert await ids("example.org") == []
            assert await ids(state="deferred") == [one]
            assert await ids(state="held") == [held]
            assert await ids(state="new") == [new.id]
            rows = {row["id"]: row async for row in spool.administration.messages("", "")}
            recipient = rows[one]["recipients"][1]
            assert abs(recipient.pop("next") - time.time() - HOUR) < 60
            assert recipient == {
                "to": "bob1@example.net",
                "domain": "example.net",
                "state": "deferred",
                "attempts": 1,
                "reason": "4.2.0 busy",
                "delay_reported": False,
            }
            assert [rows[x]["under_way"] for x in (one, held, new.id)] == [False, False, True]
            assert rows[held]["recipients"][0]["state"] == "held"

    run(main())


@pytest.mark.parametrize("size", [14, INLINE + 1])
def test_the_header_section_comes_from_row_or_file(tmp_path: Path, size: int) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            body = octets(size)
            message = await keep(spool, body)
            assert await spool.administration.head(message.id) == body[:14]

    run(main())


def test_slices_hold_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsmtp.administration.SLICE", 3)

    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            ids = [await deferred(spool, recipients=1 + n % 5) for n in range(12)]
            assert [row["id"] async for row in spool.administration.messages("", "")] == ids
            census = (await spool.administration.summary(time.time() + 7200)).render()
            assert (census["messages"], census["recipients"]) == (12, sum(1 + n % 5 for n in range(12)))
            (place,) = census["domains"].values()
            assert place["ages"] == [0, 0, census["recipients"], 0, 0]
            assert place["reasons"] == {"4.2.0 busy": census["recipients"]}
            assert abs(place["next"] - time.time() - HOUR) < 60
            assert await last(spool.administration.hold(EVERYTHING)) == Changed(12, census["recipients"], 0)

    run(main())


def test_a_census_stays_small_and_can_be_added_up() -> None:
    one = Census(messages=5, set_aside=1)
    one.add((f"d{n}.test", "", 0, 1, 0, 1, n, None) for n in range(DOMAINS + 10))
    assert len(one.places) == DOMAINS + 1
    assert one.places[OTHER].recipients == 10
    one.add(("d0.test", f"reason {n}", 4, 2, 1, 0, 50, 1000 * n) for n in range(REASONS + 10))
    assert one.places["d0.test"].reasons[OTHER] == 22
    both = Census()
    both.merge(one.render())
    both.merge(json.loads(json.dumps(one.render())))
    assert both.messages == 10
    assert both.render()["recipients"] == 2 * one.render()["recipients"]
    place = both.places["d0.test"]
    assert (place.recipients, place.held, place.oldest, place.due) == (162, 80, 0, 0.0)
    assert place.ages == [2, 0, 0, 0, 160]


# The format


def test_a_spool_of_the_first_format_is_brought_to_todays(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def first() -> str:
        async with yard.opened() as spool:
            return await deferred(spool, recipients=2)

    async def second(message_id: str) -> None:
        async with yard.opened() as spool:
            census = await spool.administration.summary(time.time() + 10 * 86_400)
            assert census.places["example.net"].ages == [0, 0, 0, 0, 2]
            assert await last(spool.administration.hold(of(message_id))) == Changed(1, 2, 0)
            assert await spool.claim(time.time() + 2 * HOUR, 10) == []

    message_id = run(first())
    with yard.database() as db:
        db.execute(
            """
            BEGIN;
            DROP INDEX recipient_due;
            CREATE TABLE old (
                message INTEGER NOT NULL, n INTEGER NOT NULL, domain TEXT NOT NULL, due INTEGER,
                attempts INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '', PRIMARY KEY (message, n)
            ) WITHOUT ROWID;
            INSERT INTO old SELECT message, n, domain, due, attempts, reason FROM recipient;
            DROP TABLE recipient;
            ALTER TABLE old RENAME TO recipient;
            CREATE INDEX recipient_due ON recipient (due) WHERE due IS NOT NULL;
            PRAGMA user_version = 1;
            COMMIT;
            """
        )
    run(second(message_id))
    with yard.database() as db:
        assert db.execute("PRAGMA user_version").get == FORMAT
        assert "held" in db.execute("SELECT sql FROM sqlite_schema WHERE name = 'recipient_due'").get


def test_the_report_of_a_delay_is_remembered(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def first() -> None:
        async with yard.opened() as spool:
            jobs: list[Job] = []
            spool.on_stored = jobs.extend
            await keep(spool, recipients=2)
            spool.finish([Mark(jobs[0].key, 0, time.time(), 3, "x", reported=True)])
            spool.finish([Mark(jobs[0].key, 1, time.time(), 3, "x")])

    async def second() -> None:
        async with yard.opened() as spool:
            (job,) = await spool.claim(time.time(), 1)
            assert [job.tried[number].reported for number in (0, 1)] == [True, False]

    run(first())
    run(second())
