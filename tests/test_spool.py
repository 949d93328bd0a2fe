"""The spool as connections and the queue see it: what is kept, found again, set aside, refused; over restarts,
kills, full disks and power cuts."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from zlib import crc32

import apsw
import pytest
from keeping import (
    CHILD_ENVIRONMENT,
    INLINE,
    TESTS,
    Answers,
    Yard,
    finished,
    keep,
    letter,
    octets,
    run,
    settle,
)
from needs import volume

from fastsmtp.address import Address
from fastsmtp.commit import NO_ROOM
from fastsmtp.ids import key_of
from fastsmtp.job import JOB_OCTETS, Job, Mark
from fastsmtp.message import Content, Envelope, Message, Recipient
from fastsmtp.reply import R452_NO_ROOM
from fastsmtp.spool import Spool, SpoolError, SpoolLockedError
from fastsmtp.store import FORMAT
from fastsmtp.verdict import STORED, Refused

LARGE = INLINE + 1


def body_of(message: Message) -> bytes:
    """The octets a transport would send."""
    return Path(message.file).read_bytes() if message.file else b"".join(message.parts or [])


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


# --- kept and found again ---


@pytest.mark.parametrize("size", [0, 1, 1000, INLINE, LARGE, 3_000_000])
def test_a_message_is_found_again_as_it_was_kept(tmp_path: Path, size: int) -> None:
    yard = Yard(tmp_path)
    body = octets(size)

    async def first() -> tuple[str, list[Job]]:
        async with yard.opened() as spool:
            jobs: list[Job] = []
            spool.on_stored = jobs.extend
            message = await keep(spool, body)
            assert body_of(message) == body
            assert bool(message.file) == (size > INLINE)
            return message.id, jobs

    async def second() -> list[Job]:
        async with yard.opened() as spool:
            assert spool.backlog == 1
            jobs = await spool.claim(time.time(), 10)
            assert await spool.claim(time.time(), 10) == []  # it is held
            assert [await spool.read(job) for job in jobs] == [True]
            assert [body_of(job.message) for job in jobs] == [body]
            return jobs

    message_id, (kept,) = run(first())
    (job,) = run(second())
    assert (job.key, job.message.id) == (kept.key, message_id) == (key_of(message_id), message_id)
    assert job.pending == kept.pending == [0]
    assert job.message.prefix == kept.message.prefix
    assert job.message.arrived == kept.message.arrived
    assert (job.message.size, job.message.header_end) == (size, kept.message.header_end)


def attributes(of: type) -> set[str]:
    """Names of its slots and properties, also when it is compiled."""
    return {name for name in dir(of) if not name.startswith("_")}


def test_every_field_of_the_envelope_is_kept(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def first() -> Message:
        async with yard.opened() as spool:
            message_id = spool.next_id()
            draft = spool.draft(message_id, lambda: None)
            draft.write(b"x")
            envelope = Envelope(Address("ännchen x", "[ipv6:2001:db8::1]"))
            envelope.id = message_id
            envelope.recipients = [
                Recipient(Address("postmaster", "")),
                Recipient(Address('a@b"c', "example.org"), "SUCCESS,DELAY", "rfc822;a+2Bb@c", "a loop"),
            ]
            envelope.body, envelope.utf8, envelope.size = "BINARYMIME", True, 12345
            envelope.ret, envelope.envid, envelope.client = "HDRS", "QQ314159", "2001:db8::2"
            envelope.helo, envelope.protocol = "h\udcff\ttab", "UTF8SMTPS"
            message = Message(
                envelope,
                b"\xff\x00prefix\r\n",
                None,
                1,
                1,
                Content.BARE | Content.BINARY,
                1.25,
                cuts=((3, 9), (20, 30)),
            )
            answers = Answers()
            spool.append(message, draft, answers)
            assert await answers.wait(1) == [STORED]
            return message

    async def second() -> Message:
        async with yard.opened() as spool:
            (job,) = await spool.claim(time.time(), 10)
            assert job.pending == [0, 1]
            return job.message

    kept, found = run(first()), run(second())
    for name in attributes(Envelope) - {"recipients"}:
        assert getattr(found.envelope, name) == getattr(kept.envelope, name), name
    for one, other in zip(found.envelope.recipients, kept.envelope.recipients, strict=True):
        for name in attributes(Recipient):
            assert getattr(one, name) == getattr(other, name), name
    for name in attributes(Message) - {"envelope", "parts"}:
        assert getattr(found, name) == getattr(kept, name), name


@pytest.mark.parametrize("spoil", ["line", "nobody"])
def test_an_envelope_that_cannot_be_written_down_is_refused_before_anything_is_written(
    tmp_path: Path, spoil: str
) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            message, draft = letter(spool)
            if spoil == "line":
                message.envelope.helo = "a\nb"
            else:
                message.envelope.recipients = []
            with pytest.raises(ValueError, match="envelope"):
                spool.append(message, draft, Answers())
            assert spool.commits == (0, 0)
            assert spool._room.drafts == 0
            await keep(spool)

    run(main())


def test_files_and_folders_are_the_owners_alone(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def main() -> None:
        async with yard.opened() as spool:
            await keep(spool, octets(LARGE))
            for path in [yard.directory, *yard.directory.rglob("*")]:
                assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path

    run(main())


# --- finished, deferred, given back ---


def test_a_finished_message_leaves_row_file_and_memory(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def main() -> None:
        async with yard.opened() as spool:
            jobs: list[Job] = []
            spool.on_stored = jobs.extend
            await keep(spool, octets(1000), recipients=3)
            await keep(spool, octets(LARGE))
            assert names(yard.directory / "body") == [jobs[1].message.id]
            assert spool._room.jobs == 2 * JOB_OCTETS + 1000
            assert spool.backlog == 2
            spool.finish([Mark(jobs[0].key, 1)])
            assert jobs[0].pending == [0, 2]
            await settle(spool)
            assert spool.backlog == 2
            spool.finish([*finished(jobs[0]), *finished(jobs[1])])
            await settle(spool)
            assert spool.backlog == 0
            assert (spool._room.jobs, spool._room.drafts) == (0, 0)

    run(main())
    assert names(yard.directory / "body") == []
    with yard.database() as db:
        assert db.execute("SELECT count(*) FROM message").get == 0
        assert db.execute("SELECT count(*) FROM recipient").get == 0


def test_finished_recipients_stay_finished_and_deferred_ones_wait(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    now = time.time()

    async def first() -> None:
        async with yard.opened() as spool:
            jobs: list[Job] = []
            spool.on_stored = jobs.extend
            await keep(spool, recipients=3)
            (job,) = jobs
            spool.finish([Mark(job.key, 0), Mark(job.key, 2, now + 100, 3, "mailbox busy")])
            assert {n: mark.due for n, mark in job.tried.items()} == {2: now + 100}

    async def second() -> None:
        async with yard.opened() as spool:
            (job,) = await spool.claim(now, 10)  # for recipient 1, which was never tried
            assert job.pending == [1, 2]
            assert list(job.tried) == [2]
            mark = job.tried[2]
            assert (mark.attempts, mark.reason) == (3, "mailbox busy")
            assert mark.due is not None
            assert abs(mark.due - (now + 100)) < 0.001
            spool.finish([Mark(job.key, 1)])
            spool.release(job)
            await settle(spool)
            assert await spool.claim(now + 99, 10) == []
            due = spool.next_due()
            assert due is not None
            assert abs(due - (now + 100)) < 0.001
            (job,) = await spool.claim(now + 100, 10)
            assert job.pending == [2]

    run(first())
    run(second())


def test_a_released_job_is_not_claimable_before_its_marks_are_durable(tmp_path: Path) -> None:
    """The reader sees what was committed last: recipient 0 as pending."""

    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            jobs: list[Job] = []
            spool.on_stored = jobs.extend
            await keep(spool, recipients=2)
            (job,) = jobs
            claims = [asyncio.ensure_future(spool.claim(time.time(), 10))]
            await asyncio.sleep(0)
            spool.finish([Mark(job.key, 0)])
            spool.release(job)
            claimed: list[Job] = []
            async with asyncio.timeout(10):
                while not claimed:
                    claimed = await claims[-1]
                    claims.append(asyncio.ensure_future(spool.claim(time.time(), 10)))
            assert [job.pending for job in claimed] == [[1]]
            assert await claims[-1] == []

    for _ in range(20):
        run(main())
        (tmp_path / "spool" / "spool.db").unlink()


def test_memory_is_counted_and_bodies_can_be_dropped_and_read_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path, memory=95_000).opened() as spool:
            jobs: list[Job] = []
            spool.on_stored = jobs.extend
            body = octets(30_000)
            assert spool.room()
            for _ in range(3):
                await keep(spool, body)
            assert spool.over_budget
            assert not spool.room()  # 452 before what cannot be kept
            message = await keep(spool, octets(20_000, 7))  # who was let in before goes to a file
            assert message.file
            for job in jobs:
                spool.drop(job)
                spool.drop(job)
            assert spool._room.jobs == 4 * JOB_OCTETS
            assert not spool.over_budget
            assert spool.room()
            assert jobs[0].message.parts is None
            assert await spool.read(jobs[0])
            assert await spool.read(jobs[0])
            assert jobs[0].message.parts == [body]
            assert spool._room.jobs == 4 * JOB_OCTETS + 30_000
            spool.release(jobs[0])
            spool.release(jobs[3])
            await settle(spool)
            assert spool._room.jobs == 2 * JOB_OCTETS
            again = await spool.claim(time.time(), 10)
            assert [job.message.id for job in again] == [jobs[0].message.id, message.id]
            assert [await spool.read(job) for job in again] == [True, True]
            assert [body_of(job.message) for job in again] == [body, octets(20_000, 7)]

    run(main())


# --- the claims ---


def test_ten_thousand_deferred_messages_come_in_the_order_of_their_times(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    now = time.time()
    shuffled = list(range(10_000))
    random.Random(1).shuffle(shuffled)

    async def main() -> None:
        async with yard.opened() as spool:
            places = iter(shuffled)

            def defer(jobs: list[Job]) -> None:
                for job in jobs:
                    spool.finish([Mark(job.key, 0, now + next(places), 1, "later")])
                    spool.release(job)

            spool.on_stored = defer
            answers = Answers()
            for _ in range(10_000):
                spool.append(*letter(spool), answers)
            await answers.wait(10_000)
            await settle(spool)
            assert spool._room.jobs == 0
            began = time.monotonic()
            seen: list[float] = []
            while jobs := await spool.claim(now + 5_000, 100):
                assert len(jobs) == 100 or len(seen) == 5_000
                seen += [job.tried[0].due or 0.0 for job in jobs]
            assert seen == sorted(seen)
            assert len(seen) == 5_001
            due = spool.next_due()
            assert due is not None
            assert 5_000 < due - now < 5_002
            assert time.monotonic() - began < 20
            held = await spool.claim(now + 5_001, 100)
            assert len(held) == 1
            for job in held:
                spool.release(job)
            await settle(spool)
            assert [job.key for job in await spool.claim(now + 5_001, 100)] == [job.key for job in held]

    run(main())


def test_mail_of_an_earlier_run_is_claimed_in_its_order_and_once(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def first() -> list[int]:
        async with yard.opened() as spool:
            answers = Answers()
            keys = []
            for n in range(3000):
                message, draft = letter(spool, recipients=1 + n % 3)
                keys.append(key_of(message.id))
                spool.append(message, draft, answers)
            await answers.wait(3000)
            return keys

    async def second(keys: list[int]) -> None:
        async with yard.opened() as spool:
            assert spool.next_due() == 0.0
            await keep(spool)  # new mail of this run is not claimed
            seen: list[int] = []
            while jobs := await spool.claim(time.time(), 70):
                assert len(jobs) <= 70
                seen += [job.key for job in jobs]
            assert seen == keys
            assert spool.next_due() is None

    keys = run(first())
    run(second(keys))


def test_times_that_a_wrong_clock_wrote_count_as_now_after_a_start(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    now = time.time()
    ten_years = 10 * 365 * 86_400

    async def first() -> None:
        async with yard.opened(wall=lambda: now + ten_years) as spool:
            for seconds in (ten_years + 60, 3600):
                await keep(spool)
                *_, job = spool._scan.held.values()
                spool.finish([Mark(job.key, 0, now + seconds, 1, "later")])

    async def second() -> None:
        async with yard.opened() as spool:
            assert len(await spool.claim(time.time(), 10)) == 1

    run(first())
    run(second())


def test_ids_go_up_over_restarts_whatever_the_clock_does(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    seen: list[str] = []

    async def main(wall: float) -> None:
        async with yard.opened(worker=33, wall=lambda: wall) as spool:
            seen.append((await keep(spool)).id)
            seen.append((await keep(spool)).id)

    for wall in (2e9, 1e9, 0.0, 2e9 + 1, 9e9, 1.0):
        run(main(wall))
    assert len(set(seen)) == len(seen)
    assert [name[:13] for name in seen] == sorted({name[:13] for name in seen})
    assert {len(name) for name in seen} == {20}
    assert {name[13:15] for name in seen} == {"11"}


# --- opening ---


def test_a_spool_in_use_is_locked_and_free_afterwards(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def main() -> None:
        async with yard.opened() as spool:
            await keep(spool)
            with pytest.raises(SpoolLockedError, match="another process"):
                yard.spool(1).open()
            await keep(spool)
        async with yard.opened(worker=1) as adopted:  # left behind by worker 0
            assert adopted.backlog == 2
            (one, two) = await adopted.claim(time.time(), 10)
            adopted.finish([*finished(one), *finished(two)])
            await settle(adopted)
            assert adopted.backlog == 0

    run(main())


def test_a_spool_whose_worker_was_killed_is_adopted(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    command = [sys.executable, str(TESTS / "spool_child.py"), str(yard.directory), "1000000", "1000"]
    with subprocess.Popen(command, env=CHILD_ENVIRONMENT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()

        async def locked() -> None:
            with pytest.raises(SpoolLockedError):
                yard.spool(1).open()

        run(locked())
        child.kill()

    async def main() -> None:
        async with yard.opened(worker=1) as adopted:
            assert adopted.backlog == len(await adopted.claim(time.time(), 1_000_000))

    run(main())


def test_an_open_that_fails_gives_the_lock_back_and_says_why_in_one_line(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def refuse(text: str) -> None:
        with pytest.raises(SpoolError, match=text) as caught:
            yard.spool().open()
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, SpoolLockedError)

    async def main() -> None:
        async with yard.opened():
            pass
        database = yard.directory / "spool.db"
        with yard.database() as db:
            db.pragma("user_version", FORMAT + 1)
        await refuse(f"spool.db: format {FORMAT + 1} was made by a newer version")
        with yard.database() as db:
            db.pragma("user_version", FORMAT)
            assert db.execute("PRAGMA quick_check").get == "ok"
        database.unlink()
        with yard.database() as db:
            db.pragma("application_id", 7)
            db.execute("CREATE TABLE theirs (a)")
        before = database.read_bytes()
        await refuse("another program")
        assert database.read_bytes() == before
        database.unlink()
        async with yard.opened() as spool:
            await keep(spool)
        (yard.directory / "lock").unlink()
        (yard.directory / "lock").mkdir()
        await refuse("lock: Is a directory")

    run(main())


def test_an_old_sqlite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: "3.51.2")

    async def main() -> None:
        with pytest.raises(SpoolError, match=r"SQLite 3\.51\.2 is too old"):
            Yard(tmp_path).spool().open()

    run(main())
    assert not (tmp_path / "spool" / "spool.db").exists()


def test_importing_and_making_a_spool_opens_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        Yard(tmp_path).spool()

    run(main())
    assert names(tmp_path) == ["log"]


def test_the_database_is_set_up_as_designed(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            number = spool._store._number
            assert number("PRAGMA journal_mode") == "wal"
            assert number("PRAGMA synchronous") == 2
            assert number("PRAGMA auto_vacuum") == 2
            assert number("PRAGMA wal_autocheckpoint") == 0
            assert number("PRAGMA secure_delete") == 0
            assert number("PRAGMA busy_timeout") == 0
            assert number("PRAGMA page_size") == 4096
            assert number("PRAGMA locking_mode") == "normal"

    run(main())


# --- the log, and free pages ---


def test_the_log_is_checkpointed_and_free_pages_go_back_in_small_steps(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def main() -> None:
        async with yard.opened(memory=256 << 20) as spool:
            jobs: list[Job] = []
            spool.on_stored = jobs.extend
            answers = Answers()
            for n in range(800):
                spool.append(*letter(spool, octets(60_000)), answers)
                await answers.wait(n - 30)
            await answers.wait(800)
            log = yard.directory / "spool.db-wal"
            assert log.stat().st_size < 16 << 20
            size = (yard.directory / "spool.db").stat().st_size
            assert size > 40 << 20
            for job in jobs:
                spool.finish(finished(job))
            async with asyncio.timeout(30):
                while spool.backlog or spool._commit._busy:
                    await asyncio.sleep(0.01)
            await keep(spool)

    run(main())
    assert (yard.directory / "spool.db").stat().st_size < 20 << 20


def test_a_reader_that_stays_open_is_noticed_and_the_log_shrinks_when_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsmtp.commit.LONG_LOG_PAGES", 8 << 8)
    yard = Yard(tmp_path)

    async def main() -> None:
        async with yard.opened() as spool:
            spool.on_stored = lambda jobs: [spool.finish(finished(job)) for job in jobs]

            async def load(n: int) -> None:
                answers = Answers()
                for k in range(n):
                    spool.append(*letter(spool, octets(60_000)), answers)
                    await answers.wait(k - 20)
                await answers.wait(n)

            await load(10)
            other = apsw.Connection(str(yard.directory / "spool.db"), flags=apsw.SQLITE_OPEN_READONLY)
            other.execute("BEGIN").fetchall()
            other.execute("SELECT count(*) FROM message").fetchall()
            await load(400)
            log = yard.directory / "spool.db-wal"
            assert log.stat().st_size > 20 << 20
            other.close()
            await load(200)
            assert log.stat().st_size <= 17 << 20
            assert spool.healthy

    run(main())
    (line,) = yard.lines("spool-warning")
    assert "a reader keeps" in line["why"]


# --- what is found damaged ---


def spoil(yard: Yard, what: str) -> str:
    """Keeps a message, damages it at rest; its id."""

    async def main() -> str:
        async with yard.opened() as spool:
            return (await keep(spool, octets(LARGE if what.startswith("file") else 1000))).id

    name: str = run(main())
    path = yard.directory / "body" / name
    key = key_of(name)
    match what:
        case "file missing":
            path.unlink()
        case "file short":
            os.truncate(path, LARGE - 1)
        case "file long":
            os.truncate(path, LARGE + 1)
        case "file flipped":
            with path.open("r+b") as file:
                file.seek(40_000)
                file.write(b"\x00")
        case "file fifo":
            path.unlink()
            os.mkfifo(path)
        case "file symlink":
            path.rename(tmp := yard.path / "moved")
            path.symlink_to(tmp)
        case "file folder":
            path.unlink()
            path.mkdir()
        case _:
            statement = {
                "body flipped": "UPDATE message SET body = zeroblob(1000)",
                "body short": "UPDATE message SET body = substr(body, 2)",
                "body gone": "UPDATE message SET body = NULL",
                "envelope": "UPDATE message SET envelope = 'x'",
                "envelope format": "UPDATE message SET envelope = '2' || substr(envelope, 2)",
                "recipients": "UPDATE recipient SET n = 7",
                "text": "UPDATE message SET id = CAST(x'ff00' AS TEXT)",
                "id": "UPDATE message SET id = '../../../../etc/passwd'",
            }[what]
            with yard.database() as db:
                db.execute(f"{statement} WHERE {'message' if 'recipient' in statement else 'key'} = {key}")
    return name


DAMAGE = [
    "file missing", "file short", "file long", "file flipped", "file fifo", "file symlink", "file folder",
    "body flipped", "body short", "body gone", "envelope", "envelope format", "recipients", "text", "id",
]  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_is_set_aside_and_all_else_is_delivered(tmp_path: Path, what: str) -> None:
    yard = Yard(tmp_path)

    async def good() -> str:
        async with yard.opened() as spool:
            return (await keep(spool, octets(500))).id

    async def look(aside: bool) -> None:
        async with yard.opened() as spool:
            readable = []
            while jobs := await spool.claim(time.time() + 10, 10):
                readable += [job.message.id for job in jobs if await spool.read(job)]
            assert readable == good_ids
            await settle(spool)
            assert (spool.backlog, spool.broken) == (2, 1)
            assert spool._room.jobs == 2 * (JOB_OCTETS + 500)

    good_ids = [run(good())]
    bad = spoil(yard, what)
    good_ids.append(run(good()))
    run(look(False))
    run(look(True))  # not tried again
    assert len(yard.lines("set-aside")) == 1
    with yard.database() as db:
        key, why, pending = db.execute("SELECT message, why, pending FROM broken").fetchone()
        assert key == key_of(bad)
        assert why == yard.lines("set-aside")[0]["why"]
        assert pending == ("[7]" if what == "recipients" else "[0]")
        assert db.execute("SELECT count(*) FROM message WHERE key = ?", (key,)).get == 1  # nothing was deleted
    if what in ("file short", "file flipped", "file fifo"):
        assert names(yard.directory / "body") == [bad]


def test_files_that_nobody_was_told_of_are_removed_and_strange_ones_left(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def first() -> None:
        async with yard.opened() as spool:
            await keep(spool, octets(LARGE))
            draft = spool.draft(spool.next_id(), lambda: None)
            draft.write(octets(2_000_000))
            await asyncio.sleep(0.2)
            assert len(names(yard.directory / "body")) == 2

    run(first())
    body = yard.directory / "body"
    strange = ["README", "v" * 20, "u" * 20, "t" * 20, "x" * 20]
    (body / strange[0]).write_text("not ours")
    os.mkfifo(body / strange[1])
    (body / strange[2]).mkdir()
    (body / strange[3]).symlink_to("/etc/passwd")
    (body / strange[4]).write_text("no digit of ours")
    for n in range(3):
        (body / f"{n:020}").write_text("an orphan")
    (yard.directory / "lock").write_bytes(b"")  # as if it had been killed

    async def second() -> None:
        async with yard.opened() as spool:
            assert spool.backlog == 1

    run(second())
    left = names(body)
    assert set(strange) < set(left)
    assert len(left) == 6
    assert yard.lines("spool-warning")[0]["why"] == "5 entries are not of the spool; left alone"


def test_a_reader_in_trouble_claims_nothing_and_loses_nothing(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def main() -> None:
        async with yard.opened() as spool:
            await keep(spool)
            (job,) = spool._scan.held.values()
            spool.drop(job)
            spool._reader.close()
            assert not await spool.read(job)  # will be released in a while
            spool.release(job)
            await settle(spool)
            now = time.time()
            assert await spool.claim(now, 10) == []
            due = spool.next_due()
            assert due is not None
            assert due > now  # not at full speed
            spool._reader.open()
            (again,) = await spool.claim(now, 10)
            assert again.key == job.key
            assert await spool.read(again)

    run(main())
    assert {line["where"] for line in yard.lines("spool-warning")} == {"read", "claim"}


# --- room ---


def test_a_message_is_not_taken_when_min_free_would_be_touched(tmp_path: Path) -> None:
    state = os.statvfs(tmp_path)
    free = state.f_bavail * state.f_frsize

    async def main() -> None:
        yard = Yard(tmp_path)
        async with yard.opened(min_free=free // 2) as spool:
            assert spool.room()
            assert spool.room(free // 4)
            assert not spool.room(free)
        async with yard.opened(min_free=free * 2) as spool:
            assert not spool.room()
            await keep(spool)  # who is in already is served

    run(main())


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_on_a_full_disk_mail_is_refused_marks_go_on_and_service_resumes(tmp_path: Path, kind: str) -> None:
    with volume(kind, tmp_path / "small", "20M") as disk:
        yard = Yard(tmp_path)
        yard.directory = disk.path / "spool"

        async def main() -> None:
            async with yard.opened() as spool:
                jobs: list[Job] = []
                spool.on_stored = jobs.extend
                for _ in range(60):
                    await keep(spool, octets(30_000))
                with (disk.path / "filler").open("wb", buffering=0) as filler:
                    try:
                        while filler.write(bytes(4096)):
                            pass
                    except OSError:
                        pass
                answers = Answers()
                for size in (60_000, 500_000) * 10:
                    spool.append(*letter(spool, octets(size)), answers)
                for n in range(30):
                    spool.append(*letter(spool, octets(60_000)), answers)
                    await answers.wait(n)
                await answers.wait(50)
                refused = [answer for answer in answers.all if isinstance(answer, Refused)]
                assert refused
                assert {(answer.reason, answer.reply) for answer in refused} == {(NO_ROOM, R452_NO_ROOM)}
                assert not spool.room()
                before = spool.backlog
                for job in jobs[:60]:
                    spool.finish(finished(job))
                async with asyncio.timeout(20):
                    while spool.backlog > before - 60 or not spool.healthy:
                        await asyncio.sleep(0.01)
                os.unlink(disk.path / "filler")
                async with asyncio.timeout(20):
                    while not spool.room():
                        await asyncio.sleep(0.05)
                await keep(spool, octets(60_000))
                assert spool.backlog == before - 60 + 1
                kept = {job.message.id for job in jobs[60:]}
                assert len(kept) == spool.backlog
            async with yard.opened() as spool:
                found = await spool.claim(time.time(), 1000)
                assert {job.message.id for job in found} == kept
                assert all([await spool.read(job) for job in found])

        run(main())
        yard.log.flush()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_spool_on_a_full_disk_can_be_opened(tmp_path: Path, kind: str) -> None:
    with volume(kind, tmp_path / "small", "20M") as disk:
        yard = Yard(tmp_path)
        yard.directory = disk.path / "spool"

        async def first() -> None:
            async with yard.opened() as spool:
                await keep(spool)

        async def second() -> None:
            async with yard.opened() as spool:
                assert not spool.room(1)
                (job,) = await spool.claim(time.time(), 10)
                spool.finish(finished(job))
                await settle(spool)
                assert spool.backlog == 0
                os.unlink(disk.path / "filler")

        run(first())
        with (disk.path / "filler").open("wb", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                pass
        run(second())


# --- kills and power cuts ---


def check_promises(yard: Yard, told: list[str], before: dict[str, int]) -> dict[str, int]:
    """Every acked message that was not said to be finished is there, whole. What is there now, by id."""
    acked = dict(before)
    finishing = set()
    for line in told:
        word, name, *crc = line.split(" ")
        if word == "acked":
            acked[name] = int(crc[0])
        else:
            finishing.add(name)

    async def main() -> dict[str, int]:
        async with yard.opened() as spool:
            found = {}
            while jobs := await spool.claim(time.time(), 100):
                for job in jobs:
                    assert await spool.read(job)
                    found[job.message.id] = crc32(body_of(job.message))
                    spool.drop(job)
            return found

    found: dict[str, int] = run(main())
    for name, crc in acked.items():
        if name not in finishing:
            assert found.get(name) == crc, name
    return {name: crc for name, crc in found.items() if name in acked}


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    kept: dict[str, int] = {}
    acked = 0
    chance = random.Random()
    for _ in range(8):
        command = [sys.executable, str(TESTS / "spool_child.py"), str(yard.directory), "1000000", "300000", "50"]
        with subprocess.Popen(
            command, env=CHILD_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline()]
            end = time.monotonic() + chance.random() * 0.5
            while time.monotonic() < end:
                lines.append(child.stdout.readline())
            child.kill()
            lines += child.stdout.readlines()
        assert child.returncode == -signal.SIGKILL
        told = b"".join(lines).decode().split("\n")[:-1]
        acked += sum(line.startswith("acked") for line in told)
        kept = check_promises(yard, told, kept)
    assert acked > 8


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_nothing_acknowledged_is_lost_when_the_power_is_cut(tmp_path: Path, kind: str) -> None:
    with volume(kind, tmp_path / "disk", "300M") as disk:
        yard = Yard(tmp_path)
        yard.directory = disk.path / "a" / "new" / "spool"  # its parents must be durable as well
        command = [sys.executable, str(TESTS / "spool_child.py"), str(yard.directory), "1000000", "300000", "20"]
        told: list[str] = []
        for seconds in (0.0, 0.3):
            with subprocess.Popen(
                command, env=CHILD_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as child:
                assert child.stdout is not None
                lines = [child.stdout.readline()]
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    lines.append(child.stdout.readline())
                child.kill()
                lines += child.stdout.readlines()
            disk.cut_power()
            told += b"".join(lines).decode().split("\n")[:-1]
            assert sum(line.startswith("acked") for line in told)
            check_promises(yard, told, {})


def test_the_check_of_promises_sees_a_loss(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def main() -> str:
        async with yard.opened() as spool:
            return (await keep(spool, b"abc")).id

    name = run(main())
    check_promises(yard, [f"acked {name} {crc32(b'abc')}"], {})
    with pytest.raises(AssertionError):
        check_promises(yard, [f"acked {name} {crc32(b'abd')}"], {})
    with pytest.raises(AssertionError):
        check_promises(yard, [f"acked {'0' * 20} 1"], {})
    check_promises(yard, [f"acked {'0' * 20} 1", f"finishing {'0' * 20}"], {})


def test_it_works_on_asyncios_own_loop(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            await keep(spool)
            await keep(spool, octets(LARGE))
            assert isinstance(spool, Spool)

    asyncio.run(main())
