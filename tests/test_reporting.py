"""fate, reporting: who is told what of which recipient, when a message is given up, and that he is told once."""

from __future__ import annotations

import asyncio
import errno
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from email import message_from_bytes
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from scripted import (
    LATER,
    NEVER,
    SCHEDULE,
    UNREACHED,
    Bench,
    Clock,
    Kinds,
    Logged,
    Scripted,
    logged,
    play,
    turns,
    until,
)

from fastsmtp.address import parse_address
from fastsmtp.delivery import DELIVERED, Outcome, Result
from fastsmtp.ids import key_of
from fastsmtp.job import Draft, Mark
from fastsmtp.message import Message
from fastsmtp.metrics import Counter
from fastsmtp.spool import Spool
from fastsmtp.store import Batch
from fastsmtp.verdict import STORED, Refused, Stored

TOLD = SCHEDULE._replace(delay_report=300.0)
PASSED_ON = Outcome(Result.DELIVERED, "2.0.0", "ok", host="mx.test", reply="250 ok", relayed=True)
REPORTED_THERE = Outcome(Result.DELIVERED, "2.0.0", "ok", host="mx.test", reply="250 ok", reports=True)
BY_LMTP = Outcome(Result.DELIVERED, "2.0.0", "ok", host="lmtp.test", reply="250 ok")


@pytest.fixture
def log() -> Iterator[Logged]:
    with logged() as pair:
        yield pair


def told(box: Scripted) -> list[tuple[str, str, str]]:
    """The reports that a sender got: action, recipient, status; one for each recipient named."""
    found = []
    for batch in box.batches:
        for _, body in batch:
            report = message_from_bytes(body)
            if report.get_content_type() == "multipart/report":
                fields = report.get_payload(1).as_string()  # type: ignore[union-attr]
                actions = re.findall(r"Action: (\S+)", fields)
                statuses = re.findall(r"Status: (\S+)", fields)
                recipients = re.findall(r"Final-Recipient: rfc822; (\S+)", fields)
                found += list(zip(actions, recipients, statuses, strict=True))
    return found


@pytest.mark.parametrize("kind", Kinds)
def test_what_fails_comes_back_in_one_report(kind: str, log: Logged, tmp_path: Path) -> None:
    box, sender = Scripted(NEVER), Scripted()

    async def test(bench: Bench) -> None:
        await bench.keep("b@box.test", "c@box.test", "d@ok.test")
        await bench.settle()
        assert sorted(told(sender)) == [("failed", "b@box.test", "5.1.1"), ("failed", "c@box.test", "5.1.1")]
        assert sender.tried == ["a@x.test"]
        assert bench.spool.backlog == 0
        assert bench.counts[Counter.REPORTS] == 1
        assert bench.counts[Counter.RECIPIENTS_FAILED] == 2

    play(kind, log[0], tmp_path, {"box": box, "ok": Scripted(), "x": sender}, test)
    (line,) = [line for line in log[1]() if line["event"] == "reported"]
    assert (line["action"], line["to"], line["recipients"]) == ("failed", "a@x.test", ["b@box.test", "c@box.test"])


def test_what_fails_by_several_ways_comes_back_in_one_report(log: Logged, tmp_path: Path) -> None:
    fast, slow, good, sender = Scripted(NEVER), Scripted(NEVER), Scripted(DELIVERED), Scripted()
    slow.gate = asyncio.Event()

    async def test(bench: Bench) -> None:
        assert slow.gate is not None
        await bench.keep("b@fast.test", "c@slow.test", "d@good.test")
        await until(lambda: bool(fast.tried and slow.tried and good.tried))
        await turns()
        assert (fast.tried, slow.tried, good.tried) == (["b@fast.test"], ["c@slow.test"], ["d@good.test"])
        assert told(sender) == []
        slow.gate.set()
        await bench.settle()
        assert sorted(told(sender)) == [("failed", "b@fast.test", "5.1.1"), ("failed", "c@slow.test", "5.1.1")]
        assert bench.counts[Counter.REPORTS] == 1
        assert bench.spool.backlog == 0

    play("disk", log[0], tmp_path, {"fast": fast, "slow": slow, "good": good, "x": sender}, test)


def test_a_report_does_not_wait_for_ever_for_what_hangs(
    log: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsmtp.telling.TOGETHER", 0.05)
    fast, slow, sender = Scripted(NEVER), Scripted(), Scripted()
    slow.gate = asyncio.Event()

    async def test(bench: Bench) -> None:
        assert slow.gate is not None
        await bench.keep("b@fast.test", "c@slow.test")
        await until(lambda: bool(sender.batches))
        assert told(sender) == [("failed", "b@fast.test", "5.1.1")]
        slow.gate.set()
        await bench.settle()

    play("memory", log[0], tmp_path, {"fast": fast, "slow": slow, "x": sender}, test)


def test_recipients_that_wait_for_one_reason_come_back_together(log: Logged, tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        draws = iter([0.1, 0.9, 0.5])
        bench.queue._fates._chance = lambda: next(draws)
        waits: list[list[int]] = []
        finish = bench.tap.finish

        def spy(marks: Sequence[Mark]) -> None:
            if marks:
                waits.append([round((mark.due or 0.0) - bench.clock.now()) for mark in marks])
            finish(marks)

        bench.tap.finish = spy
        await bench.keep("b@box.test", "c@box.test")
        await bench.keep("d@box.test")
        await bench.settle()
        (first, second), (third,) = waits
        assert first == second
        assert first < third

    play("memory", log[0], tmp_path, {"box": Scripted(LATER, LATER)}, test)


@pytest.mark.parametrize(
    ("notify", "answer", "expected"),
    [
        ("", NEVER, "failed"),
        ("FAILURE", NEVER, "failed"),
        ("NEVER", NEVER, ""),
        ("SUCCESS,DELAY", NEVER, ""),
        ("", DELIVERED, ""),
        ("FAILURE", DELIVERED, ""),
        ("SUCCESS", DELIVERED, "delivered"),
        ("SUCCESS,FAILURE", BY_LMTP, "delivered"),
        ("SUCCESS", PASSED_ON, "relayed"),
        ("SUCCESS", REPORTED_THERE, ""),
        ("FAILURE", PASSED_ON, ""),
    ],
)
def test_the_sender_is_told_what_it_asked_for(
    notify: str, answer: Outcome, expected: str, log: Logged, tmp_path: Path
) -> None:
    box, sender = Scripted(answer), Scripted()

    async def test(bench: Bench) -> None:
        await bench.keep("b@box.test", notify=notify)
        await bench.settle()
        assert [action for action, _, _ in told(sender)] == ([expected] if expected else [])
        assert bench.spool.backlog == 0

    play("memory", log[0], tmp_path, {"box": box, "x": sender}, test)


@pytest.mark.parametrize("kind", Kinds)
@pytest.mark.parametrize("notify", ["", "FAILURE"])
def test_a_delay_is_told_once(kind: str, notify: str, log: Logged, tmp_path: Path) -> None:
    box, sender = Scripted(), Scripted()
    box.always = LATER

    async def test(bench: Bench) -> None:
        await bench.keep("b@box.test", notify=notify)
        for _ in range(8):
            await bench.pass_time(200)
        assert len(box.tried) > 3
        assert told(sender) == ([] if notify else [("delayed", "b@box.test", "4.2.0")])
        box.always = None
        await bench.pass_time(2000)
        assert bench.spool.backlog == 0

    play(kind, log[0], tmp_path, {"box": box, "x": sender}, test, schedule=TOLD)


def test_a_delay_is_told_once_over_restarts(log: Logged, tmp_path: Path) -> None:
    box, sender, clock = Scripted(), Scripted(), Clock()
    box.always = LATER

    async def first(bench: Bench) -> None:
        await bench.keep("b@box.test")
        await bench.pass_time(400)
        await bench.pass_time(400)

    async def later(bench: Bench) -> None:
        for _ in range(4):
            await bench.pass_time(700)

    for test in (first, later, later):
        play("disk", log[0], tmp_path, {"box": box, "x": sender}, test, schedule=TOLD, clock=clock)
    assert len(box.tried) > 5
    assert told(sender) == [("delayed", "b@box.test", "4.2.0")]


def test_mail_for_a_dead_destination_is_delayed_and_given_up_too(log: Logged, tmp_path: Path) -> None:
    net, sender = Scripted(concurrency=3), Scripted()

    async def test(bench: Bench) -> None:
        net.down.add("net.test")
        for number in range(30):
            await bench.keep(f"b{number}@net.test")
        await bench.settle()
        for _ in range(4):
            await bench.pass_time(200)
        assert sorted(told(sender)) == sorted(("delayed", f"b{number}@net.test", "4.4.1") for number in range(30))
        tried = len(net.batches)
        await bench.pass_time(50_000)
        assert len(net.batches) == tried + 1, "one attempt for all of them"
        await bench.pass_time(700)
        assert bench.spool.backlog == 0
        failed = [(address, status) for action, address, status in told(sender) if action == "failed"]
        assert sorted(failed) == sorted((f"b{number}@net.test", "4.4.1") for number in range(30))

    play("disk", log[0], tmp_path, {"net": net, "x": sender}, test, schedule=TOLD)


@pytest.mark.parametrize("heals", [False, True])
def test_what_is_too_old_is_tried_once_after_a_start(heals: bool, log: Logged, tmp_path: Path) -> None:
    box, sender, clock = Scripted(UNREACHED), Scripted(), Clock()

    async def before(bench: Bench) -> None:
        await bench.keep("b@box.test")
        await bench.settle()

    async def after(bench: Bench) -> None:
        clock.ahead += 10 * SCHEDULE.lifetime
        box.always = None if heals else UNREACHED
        await bench.pass_time(0)
        assert box.tried == ["b@box.test"] * 2
        assert told(sender) == ([] if heals else [("failed", "b@box.test", "4.4.1")])
        assert bench.spool.backlog == 0

    for test in (before, after):
        play("disk", log[0], tmp_path, {"box": box, "x": sender}, test, clock=clock)


@pytest.mark.parametrize("kind", Kinds)
def test_without_a_transport_nothing_is_given_up(kind: str, log: Logged, tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.keep("b@gone.test")
        await bench.settle()
        await bench.pass_time(2 * SCHEDULE.lifetime)
        assert bench.spool.backlog == 1

    play(kind, log[0], tmp_path, {}, test)
    assert "failed" not in [line["event"] for line in log[1]()]


def test_mail_without_a_sender_has_its_own_lifetime_and_is_only_logged(log: Logged, tmp_path: Path) -> None:
    box, sender = Scripted(), Scripted()
    box.always = LATER

    async def test(bench: Bench) -> None:
        await bench.keep("b@box.test", sender="", notify="SUCCESS,FAILURE,DELAY")
        await bench.keep("c@box.test")
        await bench.settle()
        await bench.pass_time(SCHEDULE.report_lifetime - 100)
        assert bench.spool.backlog == 2
        await bench.pass_time(700)
        assert bench.spool.backlog == 1
        assert sender.batches == []

    play("disk", log[0], tmp_path, {"box": box, "x": sender}, test, schedule=TOLD._replace(delay_report=0.0))
    (line,) = [line for line in log[1]() if line["event"] == "unreported"]
    assert (line["to"], line["why"]) == ("b@box.test", "not now")


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("postmaster", [False, True])
def test_a_report_that_no_way_leads_to_fails_at_once(postmaster: bool, soft: bool, log: Logged, tmp_path: Path) -> None:
    """Where all mail is for our own domains, a sender elsewhere cannot be told; mail that came from elsewhere waits."""
    box, post = Scripted(NEVER, NEVER), Scripted()
    told_late = Outcome(Result.DEFERRED, "4.2.0", "not now")
    box.always = told_late

    async def test(bench: Bench) -> None:
        ways = {"box.test": "box", "post.test": "post"}
        bench.queue._route = lambda address: (ways.get(address.domain, ""), address)
        await bench.keep("b@box.test")
        bounce = await bench.keep("c@gone.test", sender="", protocol="ESMTP")
        await bench.settle()
        if not soft:
            assert post.tried == ["pm@post.test"] * postmaster
            assert told(post) == [("failed", "a@x.test", "5.4.4")] * postmaster
        assert [line["id"] for line in log[1]() if line["event"] == "deferred"][-1:] == [bounce] or soft
        assert bench.spool.backlog == (2 if soft else 1)

    schedule = SCHEDULE._replace(soft_bounce=soft)
    options = {"postmaster": parse_address("pm@post.test")} if postmaster else {}
    play("disk", log[0], tmp_path, {"box": box, "post": post}, test, schedule=schedule, **options)
    unreported = [(line["to"], line["status"]) for line in log[1]() if line["event"] == "unreported"]
    assert unreported == ([] if soft or postmaster else [("a@x.test", "5.4.4")])


@pytest.mark.parametrize("kind", Kinds)
def test_a_report_that_fails_goes_to_the_postmaster_where_one_is_set(kind: str, log: Logged, tmp_path: Path) -> None:
    box, sender, post = Scripted(NEVER), Scripted(NEVER), Scripted(NEVER)

    async def test(bench: Bench) -> None:
        await bench.keep("b@box.test")
        await bench.settle()
        assert sender.tried == ["a@x.test"]
        assert post.tried == ["Postmaster@post.test"]
        assert told(post) == [("failed", "a@x.test", "5.1.1")]
        assert bench.spool.backlog == 0, "what fails at the postmaster ends there"

    transports = {"box": box, "x": sender, "post": post}
    play(kind, log[0], tmp_path, transports, test, postmaster=parse_address("Postmaster@post.test"))
    assert [line["to"] for line in log[1]() if line["event"] == "unreported"] == ["Postmaster@post.test"]


def test_a_report_shows_the_message_wherever_its_body_is(log: Logged, tmp_path: Path) -> None:
    """In memory, in a file, or dropped from memory and read back."""
    box, sender = Scripted(needs_body=False), Scripted()
    box.always = NEVER

    async def test(bench: Bench) -> None:
        assert isinstance(bench.spool, Spool)
        for subject, size in (("small", 10), ("large", 200_000)):
            await bench.keep("b@box.test", body=b"Subject: %s\r\n\r\n%s\r\n" % (subject.encode(), b"x" * size))
        await bench.settle()
        spool, offer = bench.spool, bench.spool.on_stored

        def forget(jobs: Any) -> None:
            for job in jobs:
                spool.drop(job)
            offer(jobs)

        spool.on_stored = forget
        await bench.keep("b@box.test", body=b"Subject: dropped\r\n\r\nx\r\n")
        await until(lambda: not spool._commit._busy)
        spool.on_stored = offer
        await bench.settle()
        shown = b"".join(body for batch in sender.batches for _, body in batch)
        for subject in (b"small", b"large", b"dropped"):
            assert shown.count(b"Subject: " + subject) == 1
        assert bench.spool.backlog == 0

    play("disk", log[0], tmp_path, {"box": box, "x": sender}, test)


class Spy:
    """Notes what is kept with which marks, and marks that are made alone; refuses the first reports when told to."""

    def __init__(self, bench: Bench, refuse: int = 0) -> None:
        self.steps: list[str] = []
        self.bench = bench
        self.refuse = refuse
        bench.tap.append = self.on_append
        bench.tap.finish = self.on_finish

    def on_append(
        self, message: Message, draft: Draft, answer: Callable[[Stored | Refused], None], marks: Sequence[Mark]
    ) -> None:
        if self.refuse and not message.envelope.reverse_path:
            self.refuse -= 1
            draft.abandon()
            self.steps.append("refused")
            answer(Refused("no", None))
            return

        def on_answer(stored: Stored | Refused) -> None:
            self.steps.append(f"kept with {len(marks)}" if stored is STORED else "not kept")
            answer(stored)

        self.bench.spool.append(message, draft, on_answer, marks)

    def on_finish(self, marks: Sequence[Mark]) -> None:
        self.steps += ["mark"] * len(marks)
        self.bench.spool.finish(marks)


@pytest.mark.parametrize("kind", Kinds)
@pytest.mark.parametrize(("notify", "answer"), [("", NEVER), ("SUCCESS", DELIVERED), ("DELAY", LATER)])
def test_a_report_is_kept_with_the_mark_that_it_tells_of(
    kind: str, notify: str, answer: Outcome, log: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsmtp.reporting.AGAIN_SECONDS", 0.01)
    box, sender = Scripted(answer), Scripted()

    async def test(bench: Bench) -> None:
        spy = Spy(bench, refuse=2)
        await bench.keep("b@box.test", notify=notify)
        await bench.settle()
        assert spy.steps == ["refused", "refused", "kept with 1", "mark"], "the mark alone is the report's own"
        assert len(told(sender)) == 1

    play(kind, log[0], tmp_path, {"box": box, "x": sender}, test, schedule=TOLD._replace(delay_report=1e-9))


class Faulty:
    """A spool in which the keeping of reports is broken from the `good`-th on, until it is mended."""

    def __init__(self, bench: Bench, good: int = 0) -> None:
        self.bench = bench
        self.good = good
        self.mended = False
        bench.tap.append = self.on_append

    def on_append(self, message: Message, draft: Draft, *rest: Any) -> None:
        if not message.envelope.reverse_path and not self.mended:
            if not self.good:
                raise RuntimeError("broken")
            self.good -= 1
        self.bench.spool.append(message, draft, *rest)


@pytest.mark.parametrize("kind", Kinds)
@pytest.mark.parametrize(("notify", "answer", "action"), [("", NEVER, "failed"), ("DELAY", LATER, "delayed")])
def test_where_nobody_can_be_told_a_recipient_is_put_off_and_told_later(
    kind: str, notify: str, answer: Outcome, action: str, log: Logged, tmp_path: Path
) -> None:
    box, sender = Scripted(answer, answer), Scripted()

    async def test(bench: Bench) -> None:
        faulty = Faulty(bench)
        await bench.keep("b@box.test", notify=notify)
        await bench.settle()
        assert (told(sender), bench.spool.backlog) == ([], 1)
        assert not isinstance(bench.spool, Spool) or not bench.spool._scan.held, "it is not kept in memory"
        await bench.pass_time(10)
        assert box.tried == ["b@box.test"], "put off"
        faulty.mended = True
        await bench.pass_time(2 * TOLD.retry_max)
        assert box.tried == ["b@box.test"] * 2
        assert told(sender) == [(action, "b@box.test", answer.status)]
        await bench.pass_time(2 * TOLD.retry_max)
        assert len(told(sender)) == 1
        assert bench.spool.backlog == 0

    play(kind, log[0], tmp_path, {"box": box, "x": sender}, test, schedule=TOLD._replace(delay_report=1e-9))
    lines = log[1]()
    assert [line["where"] for line in lines if line["event"] == "bug"] == ["report"]
    untold = [line for line in lines if line["event"] == "deferred" and "could not be told" in line["why"]]
    assert [(line["to"], line["attempts"]) for line in untold] == [("b@box.test", 1)]


def test_what_was_delivered_is_not_delivered_again_because_nobody_can_be_told(log: Logged, tmp_path: Path) -> None:
    box, sender = Scripted(), Scripted()

    async def test(bench: Bench) -> None:
        Faulty(bench)
        await bench.keep("b@box.test", notify="SUCCESS")
        await bench.settle()
        assert (box.tried, bench.spool.backlog) == (["b@box.test"], 0)

    play("disk", log[0], tmp_path, {"box": box, "x": sender}, test)
    assert [line["where"] for line in log[1]() if line["event"] == "bug"] == ["report"]


def test_what_could_not_be_told_before_the_end_is_tried_again_after_the_start(log: Logged, tmp_path: Path) -> None:
    box, sender = Scripted(NEVER, NEVER), Scripted()

    async def afterwards(bench: Bench) -> None:
        await bench.pass_time(1)
        assert told(sender) == [("failed", "b@box.test", "5.1.1")]

    async def first(bench: Bench) -> None:
        box.gate = asyncio.Event()
        Faulty(bench)
        await bench.keep("b@box.test")
        await until(lambda: bool(box.batches))
        closing = asyncio.create_task(bench.queue.close())
        await turns()
        box.gate.set()
        await closing
        box.gate = None

    play("disk", log[0], tmp_path, {"box": box, "x": sender}, first)
    play("disk", log[0], tmp_path, {"box": box, "x": sender}, afterwards)


def test_of_two_reports_the_one_that_was_kept_is_not_repeated(log: Logged, tmp_path: Path) -> None:
    box, late, sender = Scripted(NEVER), Scripted(LATER), Scripted()

    async def test(bench: Bench) -> None:
        faulty = Faulty(bench, good=1)
        await bench.keep("b@box.test", "c@late.test", notify="FAILURE,DELAY")
        await bench.settle()
        faulty.mended = True
        assert told(sender) == [("failed", "b@box.test", "5.1.1")]
        late.script.append(LATER)
        await bench.pass_time(2 * TOLD.retry_max)
        assert told(sender) == [("failed", "b@box.test", "5.1.1"), ("delayed", "c@late.test", "4.2.0")]
        assert box.tried == ["b@box.test"]

    transports = {"box": box, "late": late, "x": sender}
    play("disk", log[0], tmp_path, transports, test, schedule=TOLD._replace(delay_report=1e-9))


@pytest.mark.parametrize("kind", Kinds)
def test_the_recipients_of_a_report_end_with_it_whatever_becomes_of_the_others(
    kind: str, log: Logged, tmp_path: Path
) -> None:
    """Of one message: failed, delivered and asked about, waiting, delivered while the reports are being kept."""
    bad, told_of, late, good, sender = Scripted(NEVER), Scripted(PASSED_ON), Scripted(), Scripted(), Scripted()
    late.always = LATER

    async def test(bench: Bench) -> None:
        await bench.keep("a@bad.test", "b@told.test", "c@late.test", "d@good.test", notify="SUCCESS,FAILURE")
        await bench.settle()
        assert sorted(action for action, _, _ in told(sender)) == ["delivered", "failed", "relayed"]
        assert bench.spool.backlog == 1
        late.always = None
        await bench.pass_time(700)
        assert bench.spool.backlog == 0
        assert len(bad.tried) == len(told_of.tried) == len(good.tried) == 1

    transports = {"bad": bad, "told": told_of, "late": late, "good": good, "x": sender}
    play(kind, log[0], tmp_path, transports, test)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("case", "notify", "answer"),
    [("failed", "", NEVER), ("delivered", "SUCCESS", DELIVERED), ("delayed", "", LATER), ("expired", "", UNREACHED)],
)
def test_killed_behind_any_commit_the_sender_is_told_once(
    case: str, notify: str, answer: Outcome, fails: bool, log: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spool is copied as it stands behind each commit, and every copy is served by another life. `fails`: the first
    commit of a report does."""
    monkeypatch.setattr("fastsmtp.reporting.AGAIN_SECONDS", 0.3)
    copies: list[tuple[Path, bool]] = []  # with whether the report may have left
    box, sender = Scripted(), Scripted()
    box.always = answer
    sender.gate = asyncio.Event()  # no report leaves in the first life
    schedule = {
        "delayed": TOLD._replace(delay_report=1e-9),
        "expired": SCHEDULE._replace(lifetime=1e-9),
    }.get(case, SCHEDULE)

    async def first(bench: Bench) -> None:
        assert isinstance(bench.spool, Spool)
        store = bench.spool._store
        commit, write = store.commit, store.write
        failing = [fails]

        def write_and_note(batch: Batch) -> None:
            write(batch)
            failing.append(any(failing) and bool(batch.messages) and bool(batch.done or batch.partly or batch.later))

        def commit_and_copy() -> bool:
            if failing[-1]:
                failing.clear()
                raise OSError(errno.EIO, "the disk")
            grown = commit()
            assert sender.gate is not None
            copy = copytree(tmp_path / "spool-0", tmp_path / f"copy-{len(copies)}" / "spool-0").parent
            copies.append((copy, sender.gate.is_set()))
            return grown

        store.write = write_and_note  # type: ignore[method-assign]
        store.commit = commit_and_copy  # type: ignore[method-assign]
        await bench.keep("b@box.test", "c@box.test", "d@stay.test", notify=notify)
        await until(lambda: bool(sender.batches))
        assert sender.gate is not None
        sender.gate.set()
        await bench.settle()

    transports = {"box": box, "stay": Scripted(LATER, LATER), "x": sender}
    play("disk", log[0], tmp_path, transports, first, schedule=schedule)
    expected = sorted((case if case != "expired" else "failed", f"{name}@box.test") for name in "bc")
    assert [left for _, left in copies].count(False) >= 2
    first_sender = sender
    for copy, left in copies:
        sender = Scripted()

        async def again(bench: Bench) -> None:
            for _ in range(3):
                await bench.pass_time(1)

        play("disk", log[0], copy, {"box": box, "x": sender}, again, schedule=schedule)
        found = sorted((action, address) for action, address, _ in told(sender) if address != "d@stay.test")
        assert found == expected or (left and not found), f"{copy.name}: {found}"
    assert len(first_sender.batches) == 1


@pytest.mark.parametrize("durable", [False, True])
def test_a_report_whose_commit_failed_is_there_with_its_marks_or_not_at_all(
    durable: bool, log: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A COMMIT that fails may have reached the disk, or not: the senders of what came with it hear "no" either way."""
    monkeypatch.setattr("fastsmtp.reporting.AGAIN_SECONDS", 0.01)
    box, sender = Scripted(NEVER), Scripted()

    async def test(bench: Bench) -> None:
        assert isinstance(bench.spool, Spool)
        store = bench.spool._store
        commit, write = store.commit, store.write
        failed: list[bool] = []

        def write_and_note(batch: Batch) -> None:
            write(batch)
            store.commit = fails if batch.messages and batch.done and not failed else commit  # type: ignore[method-assign]

        def fails() -> bool:
            failed.append(True)
            if durable:
                commit()
            raise OSError(errno.EIO, "the disk")

        store.write = write_and_note  # type: ignore[method-assign]
        sender.gate = asyncio.Event()
        await bench.keep("b@box.test")
        await until(lambda: bool(sender.batches))
        copytree(tmp_path / "spool-0", tmp_path / "copy" / "spool-0")
        sender.gate.set()
        await bench.settle()
        assert failed
        assert told(sender) == [("failed", "b@box.test", "5.1.1")]
        assert bench.spool.backlog == 0
        assert not bench.spool._scan.held
        assert bench.spool._room.jobs == 0

    async def afterwards(bench: Bench) -> None:
        assert bench.spool.backlog == 0
        await bench.pass_time(1)

    play("disk", log[0], tmp_path, {"box": box, "x": sender}, test)
    play("disk", log[0], tmp_path, {"box": box, "x": sender}, afterwards)
    assert box.tried == ["b@box.test"]
    assert len(told(sender)) == 1
    play("disk", log[0], tmp_path / "copy", {"x": sender}, lambda bench: bench.pass_time(1))
    assert len(told(sender)) == 2, "killed before it left"


def test_what_is_delivered_while_a_report_is_committed_ends_the_message_too(log: Logged, tmp_path: Path) -> None:
    passed, good, sender = Scripted(PASSED_ON), Scripted(REPORTED_THERE), Scripted()
    good.gate = asyncio.Event()
    marked = threading.Event()

    async def test(bench: Bench) -> None:
        assert isinstance(bench.spool, Spool)
        store = bench.spool._store
        commit, write = store.commit, store.write
        loop = asyncio.get_running_loop()

        def write_and_note(batch: Batch) -> None:
            write(batch)
            if batch.messages and batch.partly:
                store.commit = commit_late  # type: ignore[method-assign]

        def commit_late() -> bool:
            store.commit = commit  # type: ignore[method-assign]
            assert good.gate is not None
            loop.call_soon_threadsafe(good.gate.set)
            assert marked.wait(20)
            return commit()

        def finish(marks: Sequence[Mark]) -> None:
            bench.spool.finish(marks)
            if any(mark.number == 1 for mark in marks):
                marked.set()

        store.write = write_and_note  # type: ignore[method-assign]
        bench.tap.finish = finish
        await bench.keep("b@passed.test", "c@good.test", notify="SUCCESS")
        await bench.settle()
        assert marked.is_set()
        assert bench.spool.backlog == 0
        assert not bench.spool._scan.held
        assert store._number("SELECT count(*) FROM message") == 0

    play("disk", log[0], tmp_path, {"passed": passed, "good": good, "x": sender}, test)


def test_what_is_deleted_or_set_aside_while_it_is_told_of_leaves_nothing_behind(log: Logged, tmp_path: Path) -> None:
    box, sender = Scripted(), Scripted()
    box.always = NEVER

    async def test(bench: Bench) -> None:
        assert isinstance(bench.spool, Spool)
        spool = bench.spool
        append = spool.append

        def disturb(message: Message, *rest: Any) -> None:
            for key in list(spool._scan.held):
                if "deleted" in subjects[key]:
                    spool.administration.doomed[key] = {0}
                else:
                    spool._set_aside(key, "a test")
            append(message, *rest)

        subjects: dict[int, str] = {}
        bench.tap.append = disturb
        for word in ("deleted", "aside"):
            message_id = await bench.keep("b@box.test", body=b"Subject: %s\r\n\r\n" % word.encode())
            subjects[key_of(message_id)] = word
            await bench.settle()
        assert spool.administration.doomed == {}
        assert (spool.backlog, spool.broken) == (0, 1)
        assert len(told(sender)) == 2

    play("disk", log[0], tmp_path, {"box": box, "x": sender}, test)
