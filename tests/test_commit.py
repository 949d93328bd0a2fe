"""Group commit, and what becomes of a batch whose commit failed: real SQLite, with faults put between it and the
file system."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from errno import EROFS
from pathlib import Path

import apsw
import pytest
from keeping import CHILD_ENVIRONMENT, TESTS, Answers, Yard, finished, injected, keep, letter, octets, run, settle
from needs import needs

from fastsmtp._files import confirm
from fastsmtp.commit import FAILED, NO_ROOM, UNDECIDED
from fastsmtp.job import Job, Mark
from fastsmtp.reply import R451_LOCAL_ERROR, R452_NO_ROOM
from fastsmtp.spool import Spool
from fastsmtp.store import Store
from fastsmtp.verdict import STORED, Refused, Stored


def refused(answer: object) -> Refused:
    assert isinstance(answer, Refused)
    return answer


async def until(spool: Spool, healthy: bool = True) -> None:
    async with asyncio.timeout(20):
        while spool.healthy is not healthy:
            await asyncio.sleep(0.01)


async def failed(spool: Spool) -> None:
    """Until a commit has failed."""
    async with asyncio.timeout(20):
        while not spool.commits[1]:
            await asyncio.sleep(0.001)


async def room(spool: Spool) -> None:
    async with asyncio.timeout(20):
        while not spool.room():
            await asyncio.sleep(0.01)


def ids_in(yard: Yard) -> set[str]:
    with yard.database() as db:
        return {row[0] for row in db.execute("SELECT id FROM message")}


# --- order ---


def test_no_message_is_answered_before_the_flush_that_follows_its_write(tmp_path: Path) -> None:
    async def main() -> None:
        with injected() as faults:
            async with Yard(tmp_path).opened() as spool:
                for _ in range(5):
                    faults.calls.clear()
                    answers = Answers()

                    def answered(answer: Stored | Refused, answers: Answers = answers) -> None:
                        faults.calls.append(("answer", ""))
                        answers(answer)

                    spool.append(*letter(spool), answered)
                    assert ("answer", "") not in faults.calls
                    await answers.wait(1)
                    assert faults.calls.index(("answer", "")) > faults.calls.index(("synced", "spool.db-wal"))

    run(main())


def test_the_kernel_is_asked_to_flush_before_the_answer(tmp_path: Path) -> None:
    """The same, seen by strace: SQLite's own file system calls, and the answer written to a descriptor."""
    needs("strace")
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-y", "-e", "trace=fdatasync,fsync,fallocate,write", "-o", str(trace)]
    child = [sys.executable, str(TESTS / "spool_child.py"), str(tmp_path / "spool"), "20", "100"]
    done = subprocess.run([*command, *child], env=CHILD_ENVIRONMENT, capture_output=True, check=False)
    if b"ptrace" in done.stderr:
        pytest.skip("strace is not allowed here")
    assert done.returncode == 0, done.stderr
    flushed = confirmed = False
    acked = 0
    for line in trace.read_text(errors="replace").splitlines():
        if ("spool.db-wal" in line and "sync(" in line) or "<... fdatasync resumed>" in line or "sync resumed" in line:
            flushed = True
        elif flushed and "fallocate(" in line and "spool.db-shm>, FALLOC_FL_KEEP_SIZE, " in line:
            confirmed = True
        elif "write(1<" in line and '"acked' in line:
            assert confirmed
            flushed = confirmed = False
            acked += 1
    assert acked == 20


def test_what_comes_while_a_commit_runs_goes_into_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            answers = Answers()
            spool.append(*letter(spool), answers)
            await asyncio.sleep(0)  # the first batch has begun, with one message
            for _ in range(100):
                spool.append(*letter(spool), answers)
            assert set(await answers.wait(101)) == {STORED}
            assert spool.commits == (2, 0)

    run(main())


def test_an_idle_spool_commits_each_message_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            took = []
            for n in range(1, 11):
                began = time.monotonic()
                await keep(spool)
                took.append(time.monotonic() - began)
                assert spool.commits == (n, 0)
            assert min(took) < 0.05

    run(main())


def test_jobs_come_once_in_the_order_of_the_messages_and_after_the_answers(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            seen: list[str] = []
            spool.on_stored = lambda jobs: seen.extend(f"job {job.message.id}" for job in jobs)
            answers = Answers()
            ids = []
            for _ in range(3):
                message, draft = letter(spool)
                ids.append(message.id)
                spool.append(message, draft, lambda answer, name=message.id: (seen.append(name), answers(answer)))
            await answers.wait(3)
            await settle(spool)
            assert seen == ids + [f"job {name}" for name in ids]

    run(main())


def test_a_callback_that_raises_costs_nobody_else_the_answer(tmp_path: Path) -> None:
    async def main() -> None:
        reported = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["exception"]))
        async with Yard(tmp_path).opened() as spool:

            def bug(_: object) -> None:
                raise RuntimeError("bug")

            answers = Answers()
            spool.on_stored = bug
            spool.append(*letter(spool), bug)
            spool.append(*letter(spool), answers)
            await answers.wait(1)
            await keep(spool)
        assert [str(error) for error in reported] == ["bug"] * 3

    run(main())


def test_a_batch_is_bounded_in_rows_and_in_octets(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            answers = Answers()
            for _ in range(5):
                spool.append(*letter(spool, recipients=600), answers)
            await answers.wait(5)
            assert spool.commits == (5, 0)
            for _ in range(64):
                spool.append(*letter(spool, octets(60_000)), answers)
            await answers.wait(69)
            assert spool.commits == (7, 0)

    run(main())


# --- a commit that failed ---


@pytest.mark.parametrize("call", ["sync", "write"])
def test_after_a_failed_commit_the_sender_hears_4xx_and_the_message_is_gone(tmp_path: Path, call: str) -> None:
    yard = Yard(tmp_path)

    async def main() -> str:
        with injected() as faults:
            async with yard.opened() as spool:
                kept = await keep(spool)
                jobs: list[Job] = []
                spool.on_stored = jobs.extend
                faults.fail(apsw.IOError, call, times=1)
                answers = Answers()
                spool.append(*letter(spool), answers)
                spool.append(*letter(spool), answers)
                for answer in map(refused, await answers.wait(2)):
                    assert (answer.reason, answer.reply) == (FAILED, R451_LOCAL_ERROR)
                await until(spool)
                assert spool.commits[1] == 1
                await keep(spool)  # it keeps mail again
                await settle(spool)
                assert len(jobs) == spool.backlog - 1
        return kept.id

    first = run(main())
    assert first in ids_in(yard)
    assert len(ids_in(yard)) == 2
    (trouble,) = yard.lines("spool-trouble")
    assert trouble["where"] == "commit"
    assert len(yard.lines("spool-well")) == 1


def test_an_undecided_batch_would_be_back_if_nothing_were_done(tmp_path: Path) -> None:
    """What the recovery is for, and that the fault used here is the real one."""
    with injected() as faults:
        db = apsw.Connection(str(tmp_path / "x.db"))
        db.execute("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE t (a)").fetchall()
        db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        faults.fail(apsw.IOError, "sync", "x.db-wal")
        with pytest.raises(apsw.IOError):
            db.execute("INSERT INTO t VALUES (1)")
        faults.heal()
        db.close(True)
        db = apsw.Connection(str(tmp_path / "x.db"))
        assert db.execute("SELECT a FROM t").get == 1
        db.close()


@pytest.mark.parametrize("moment", ["refused", "undecided"])
def test_killed_after_a_failed_commit_what_was_refused_does_not_come_back(tmp_path: Path, moment: str) -> None:
    """A child that is killed at once after it told 4xx has nothing of the batch; one killed before may have."""
    child = TESTS / "spool_failing_child.py"
    command = [sys.executable, str(child), str(tmp_path), moment]
    done = subprocess.run(command, env=CHILD_ENVIRONMENT, capture_output=True, check=False)
    told = dict(line.split(" ", 1)[::-1] for line in done.stdout.decode().splitlines())
    assert done.returncode == 9, done.stderr
    yard = Yard(tmp_path)

    async def main() -> set[str]:
        async with yard.opened() as spool:
            return {job.message.id for job in await spool.claim(time.time(), 100)}

    found = run(main())
    acked = {name for name, outcome in told.items() if outcome == "acked"}
    assert acked
    assert acked <= found
    if moment == "refused":
        assert "4xx" in told.values()
        assert found == acked
    else:
        assert set(told.values()) == {"acked"}
        assert len(found) == len(acked) + 1  # the flush failed, the rows are there: this is "undecided"


def test_while_recovery_fails_nobody_is_told_and_no_mail_is_taken(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def main() -> None:
        with injected() as faults:
            async with yard.opened() as spool:
                kept = await keep(spool, octets(100_000))
                (job,) = spool._scan.held.values()
                faults.fail(apsw.IOError, "sync")
                answers = Answers()
                message, draft = letter(spool)
                spool.append(message, draft, answers)
                await asyncio.sleep(0)
                spool.finish(finished(job))  # for the next batch; must not be lost
                spool.append(*letter(spool), answers)  # decided: it was in no transaction
                undecided, waiting = map(refused, await answers.wait(2))
                assert (undecided.reason, undecided.reply) == (UNDECIDED, None)
                assert (waiting.reason, waiting.reply) == (FAILED, R451_LOCAL_ERROR)
                assert not spool.healthy
                assert not spool.room()
                assert await spool.claim(time.time(), 10) == []
                later = Answers()
                spool.append(*letter(spool), later)
                assert refused(later.all[0]).reason == FAILED
                spool.append(*letter(spool, octets(100_000)), later)
                assert refused((await later.wait(2))[1]).reply in (R451_LOCAL_ERROR, R452_NO_ROOM)
                faults.heal()
                await until(spool)
                await room(spool)
                await settle(spool)
                assert spool.backlog == 0
                assert kept.id not in [entry.name for entry in os.scandir(yard.directory / "body")]
                assert list(os.scandir(yard.directory / "body")) == []
                assert spool._room.drafts == spool._room.jobs == 0

    run(main())
    assert ids_in(yard) == set()


def test_marks_of_a_failed_batch_go_into_the_next(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def main() -> None:
        with injected() as faults:
            async with yard.opened() as spool:
                for _ in range(3):
                    await keep(spool, recipients=3)
                one, two, three = spool._scan.held.values()
                faults.fail(apsw.IOError, "sync", times=1)
                spool.finish([*finished(one), Mark(two.key, 0), Mark(two.key, 1, time.time() + 60, 1, "busy")])
                spool.finish(finished(three)[:1])
                spool.release(two)
                await failed(spool)
                await until(spool)
                await settle(spool)
                assert spool.backlog == 2
                assert two.key not in spool._scan.held

    run(main())
    with yard.database() as db:
        rows = db.execute("SELECT n, due IS NULL, attempts, reason FROM recipient ORDER BY message, n").fetchall()
    assert rows == [(1, 0, 1, "busy"), (2, 1, 0, ""), (1, 1, 0, ""), (2, 1, 0, "")]


def test_when_the_disk_is_full_the_ballast_is_given_up_and_the_sender_hears_452(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def main() -> None:
        with injected() as faults:
            async with yard.opened() as spool:
                ballast = yard.directory / "ballast"
                assert ballast.stat().st_size == 2 << 20
                faults.fail(apsw.FullError, "write", times=1)
                answers = Answers()
                spool.append(*letter(spool), answers)
                answer = refused((await answers.wait(1))[0])
                assert (answer.reason, answer.reply) == (NO_ROOM, R452_NO_ROOM)
                assert not ballast.exists()
                await until(spool)
                assert not spool.room()  # not before the ballast is there again, which this call begins
                await room(spool)
                assert ballast.stat().st_size == 2 << 20
                await keep(spool)

    run(main())


def test_a_store_that_opens_but_never_commits_is_not_tried_at_full_speed(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def main() -> None:
        with injected() as faults:
            async with yard.opened() as spool:
                await keep(spool)
                (job,) = spool._scan.held.values()

                def rule(call: str, name: str) -> None:  # the recovery has nothing to delete, so it writes nothing
                    if (call, name) == ("write", "spool.db-wal"):
                        raise apsw.FullError("injected")

                faults.rule = rule
                spool.finish(finished(job))
                await asyncio.sleep(2.2)
                assert 2 <= spool.commits[1] <= 4
                assert not spool.healthy
                faults.heal()
                await until(spool)
                await settle(spool)
                assert spool.backlog == 0

    run(main())
    assert len(yard.lines("spool-trouble")) == 1


def test_a_statement_that_fails_is_a_failed_commit(tmp_path: Path) -> None:
    async def main() -> None:
        async with Yard(tmp_path).opened() as spool:
            await keep(spool)
            other = apsw.Connection(str(tmp_path / "spool" / "spool.db"))
            other.execute("BEGIN IMMEDIATE")  # nobody may do this; it is the nearest way to an error of a statement
            answers = Answers()
            spool.append(*letter(spool), answers)
            answer = refused((await answers.wait(1))[0])
            other.execute("ROLLBACK")
            other.close()
            assert answer.reply in (None, R451_LOCAL_ERROR)
            await until(spool)
            await keep(spool)

    run(main())


def test_a_failed_checkpoint_costs_nothing_but_a_line(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def main() -> None:
        with injected() as faults:
            async with yard.opened() as spool:
                faults.fail(apsw.IOError, "sync", "spool.db")
                for _ in range(120):
                    await keep(spool, octets(60_000))
                assert spool.healthy
                assert spool.commits == (120, 0)
                faults.heal()

    run(main())
    (line,) = yard.lines("spool-warning")
    assert line["where"] == "checkpoint"
    assert len(ids_in(yard)) == 120


# --- flushes that are not confirmed ---


class Unconfirmed:
    """Lets the next `times` confirmations fail, as those of a file system that has given up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        self.asked = 0
        monkeypatch.setattr("fastsmtp.store.confirm", self)

    def __call__(self, fd: int, place: int) -> None:
        confirm(fd, place)
        self.asked += 1
        if self.times:
            self.times -= 1
            raise OSError(EROFS, os.strerror(EROFS))


@pytest.mark.parametrize("sizes", [(20, 20, 20), (100_000,)])
def test_a_commit_that_is_not_confirmed_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    yard = Yard(tmp_path)
    unconfirmed = Unconfirmed(monkeypatch)

    async def main() -> set[str]:
        async with yard.opened() as spool:
            kept = {(await keep(spool)).id}
            unconfirmed.times = 1
            answers = Answers()
            for size in sizes:
                spool.append(*letter(spool, octets(size)), answers)
            for answer in map(refused, await answers.wait(len(sizes))):
                assert (answer.reason, answer.reply) == (FAILED, R451_LOCAL_ERROR)
            await until(spool)
            await room(spool)
            return kept | {(await keep(spool)).id}

    kept = run(main())
    assert ids_in(yard) == kept
    assert list(os.scandir(yard.directory / "body")) == []
    (line,) = yard.lines("spool-trouble")
    assert (line["where"], line["why"]) == ("commit", f"[Errno {EROFS}] {os.strerror(EROFS)}")


def test_what_is_taken_back_must_be_confirmed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yard = Yard(tmp_path)
    unconfirmed = Unconfirmed(monkeypatch)

    async def main() -> None:
        async with yard.opened() as spool:
            unconfirmed.times = 2  # of the commit, and of the recovery
            answers = Answers()
            spool.append(*letter(spool), answers)
            (answer,) = map(refused, await answers.wait(1))
            assert (answer.reason, answer.reply) == (UNDECIDED, None)
            await until(spool, healthy=False)
            await until(spool)

    run(main())
    assert ids_in(yard) == set()


def test_behind_a_checkpoint_that_is_not_confirmed_the_log_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next commit would begin it anew: what the database does not hold would be nowhere."""
    yard = Yard(tmp_path)
    unconfirmed = Unconfirmed(monkeypatch)
    checkpoint, recover = Store.checkpoint, Store.recover
    steps: list[object] = []
    kept: set[str] = set()

    def fail(store: Store) -> int:
        steps.append("checkpoint")
        unconfirmed.times = 1
        return checkpoint(store)

    def note(store: Store, *keys: Sequence[int]) -> bool:
        held = Path(f"{store.path}-wal").read_bytes()
        steps.append((keys, [one for one in kept if one.encode() not in held]))
        return recover(store, *keys)

    monkeypatch.setattr(Store, "checkpoint", fail)
    monkeypatch.setattr(Store, "recover", note)

    async def main() -> None:
        async with yard.opened() as spool:
            while not steps:
                kept.add((await keep(spool, octets(60_000))).id)
                await settle(spool)
            await until(spool)
            assert steps == ["checkpoint", (([], []), [])]  # nobody's message is taken back, and the log has all
            await room(spool)
            kept.add((await keep(spool)).id)
            assert spool.backlog == len(kept)

    run(main())
    assert ids_in(yard) == kept


def test_closing_commits_what_waits(tmp_path: Path) -> None:
    yard = Yard(tmp_path)

    async def main() -> Answers:
        answers = Answers()
        async with yard.opened() as spool:
            for size in (10, 100_000, 2_000_000, 10):
                spool.append(*letter(spool, octets(size)), answers)
        return answers

    answers = run(main())
    assert answers.all == [STORED] * 4
    assert (yard.directory / "spool.db-wal").stat().st_size == 0
    assert len(ids_in(yard)) == 4


@pytest.mark.parametrize("rounds", [0, 1, 2, 1000])
def test_a_mark_that_comes_while_or_after_it_closes_opens_nothing_again(tmp_path: Path, rounds: int) -> None:
    """Of a transport that the end was not waited for."""
    yard = Yard(tmp_path)

    async def main() -> None:
        spool = yard.spool()
        spool.open()
        await keep(spool)
        (key,) = spool._scan.held
        closing = asyncio.create_task(spool.close())
        for _ in range(rounds):
            await asyncio.sleep(0)
        spool.finish([Mark(key, 0)])
        await closing
        await asyncio.sleep(0.05)
        assert not [link for link in descriptors() if str(yard.directory) in link]

    def descriptors() -> list[str]:
        numbers = os.listdir("/proc/self/fd")
        return [os.readlink(f"/proc/self/fd/{n}") for n in numbers if os.path.exists(f"/proc/self/fd/{n}")]

    run(main())
    assert not yard.lines("spool-trouble")


def test_closing_does_not_wait_for_a_store_that_does_not_work(tmp_path: Path) -> None:
    async def main() -> None:
        with injected() as faults:
            spool = Yard(tmp_path).spool()
            spool.open()
            await keep(spool)
            faults.fail(apsw.IOError, "sync")
            answers = Answers()
            spool.append(*letter(spool), answers)
            await asyncio.sleep(0)
            async with asyncio.timeout(15):
                await spool.close()
            assert refused(answers.all[0]).reply is None
            faults.heal()

    run(main())
