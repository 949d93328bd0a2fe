"""Checks: the first verdict decides; what waits, raises or takes too long."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
from wire import DOMAINS, HOSTNAME

from fastsmtp.address import Address, parse_address
from fastsmtp.domains import Domain, Domains
from fastsmtp.log import Log
from fastsmtp.policy import ACCEPT, CHECK_FAILED, Check, Policy
from fastsmtp.policy.recipients import Recipients
from fastsmtp.reply import R550_UNKNOWN_MAILBOX
from fastsmtp.verdict import Ask, Client, NextHop, Stage, Verdict

REFUSED = Verdict("refused", R550_UNKNOWN_MAILBOX)
OTHER = Verdict("other")
Answer = Verdict | Awaitable[Verdict | None] | None


class Given:
    """A check that answers what it is given, and says that it was asked."""

    def __init__(self, stage: Stage, answer: Callable[[], Answer]) -> None:
        self.stage = stage
        self.answer = answer
        self.asked = 0

    def __call__(self, ask: Ask) -> Answer:
        self.asked += 1
        return self.answer()


async def later(verdict: Verdict | None) -> Verdict | None:
    await asyncio.sleep(0)
    return verdict


def raises() -> Answer:
    raise KeyError("a bug in a check")


async def raises_later() -> Verdict | None:
    await asyncio.sleep(0)
    raise KeyError("a bug in a check")


async def never() -> Verdict | None:
    await asyncio.sleep(3600)
    return None


class Book:
    """A log that can be read."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("log")
        self.log = Log(self.fd, human=False, clock=time.time, threaded=False)

    @property
    def bugs(self) -> int:
        self.log.flush()
        return os.pread(self.fd, 1 << 20, 0).count(b'"event":"bug"')


@pytest.fixture
def book() -> Iterator[Book]:
    made = Book()
    yield made
    made.log.close()
    os.close(made.fd)


ASK = Ask(Stage.RCPT, Client("192.0.2.7", 1, "test"), recipient=parse_address("ann@here.test"))


def decide(policy: Policy, ask: Ask = ASK) -> tuple[Verdict, bool]:
    """The verdict, and whether it had to be waited for."""

    async def run() -> tuple[Verdict, bool]:
        verdict = policy.evaluate(ask)
        if isinstance(verdict, Verdict):
            return verdict, False
        return await verdict, True

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("answers", "verdict", "waited", "asked"),
    [
        ([], ACCEPT, False, []),
        ([lambda: None], ACCEPT, False, [1]),
        ([lambda: REFUSED, lambda: OTHER], REFUSED, False, [1, 0]),
        ([lambda: None, lambda: OTHER], OTHER, False, [1, 1]),
        ([lambda: later(REFUSED), lambda: OTHER], REFUSED, True, [1, 0]),
        ([lambda: later(None), lambda: OTHER], OTHER, True, [1, 1]),
        ([lambda: later(None), lambda: later(None), lambda: later(OTHER)], OTHER, True, [1, 1, 1]),
        ([lambda: later(None), lambda: None], ACCEPT, True, [1, 1]),
        ([lambda: None, lambda: later(None)], ACCEPT, True, [1, 1]),
    ],
)
def test_the_first_verdict_decides(
    book: Book, answers: list[Callable[[], Answer]], verdict: Verdict, waited: bool, asked: list[int]
) -> None:
    checks = [Given(Stage.RCPT, answer) for answer in answers]
    assert decide(Policy(checks, book.log)) == (verdict, waited)
    assert [check.asked for check in checks] == asked
    assert book.bugs == 0


@pytest.mark.parametrize(
    "answers",
    [
        [raises],
        [lambda: None, raises],
        [raises_later],
        [lambda: later(None), raises],
        [lambda: later(None), raises_later],
        [never],
        [lambda: later(None), never],
    ],
)
def test_what_cannot_be_looked_up_is_neither_unknown_nor_welcome(
    book: Book, answers: list[Callable[[], Answer]]
) -> None:
    policy = Policy([Given(Stage.RCPT, answer) for answer in answers], book.log, patience=0.05)
    verdict, _ = decide(policy)
    assert verdict is CHECK_FAILED
    assert verdict.reply is not None
    assert verdict.reply.code == 451
    assert book.bugs == 1


def test_a_check_is_asked_at_its_stage_only(book: Book) -> None:
    checks: list[Check] = [Given(Stage.MAIL, lambda: REFUSED), Given(Stage.RCPT, lambda: OTHER)]
    policy = Policy(checks, book.log)
    assert policy.stages == {Stage.MAIL, Stage.RCPT}
    assert decide(policy)[0] is OTHER
    assert decide(policy, Ask(Stage.MAIL, ASK.client))[0] is REFUSED
    assert decide(policy, Ask(Stage.CONNECT, ASK.client))[0] is ACCEPT
    assert Policy([], book.log).stages == frozenset()


@pytest.mark.parametrize(
    ("text", "reason", "code"),
    [
        ("ann@here.test", "known-mailbox", 0),
        ("ANN@here.test", "known-mailbox", 0),
        ("nobody@here.test", "unknown-mailbox", 550),
        ("ann@else.test", "relaying-denied", 550),
        ("postmaster@else.test", "relaying-denied", 550),
        ("Postmaster@here.test", "known-mailbox", 0),
        ("u%else.test@here.test", "unknown-mailbox", 550),
        ("else.test!u@here.test", "unknown-mailbox", 550),
        ('"u@else.test"@here.test', "unknown-mailbox", 550),
        ("ann@[192.0.2.1]", "relaying-denied", 550),
        ("ann@x.sub.test", "known-mailbox", 0),
    ],
)
def test_recipients(text: str, reason: str, code: int) -> None:
    verdict = Recipients(Domains(DOMAINS, HOSTNAME))(Ask(Stage.RCPT, ASK.client, recipient=parse_address(text)))
    assert verdict.reason == reason
    assert (verdict.reply.code if verdict.reply else 0) == code
    assert verdict.recipient is None


@pytest.mark.parametrize(
    ("utf8", "sender", "recipient", "reason"),
    [
        (True, "jürgen@a.test", "jürgen@hop.test", "known-mailbox"),
        (False, "a@a.test", "b@hop.test", "known-mailbox"),
        (False, "a@a.test", "jürgen@hop.test", "hop-needs-ascii"),
        (False, "jürgen@a.test", "b@hop.test", "hop-needs-ascii"),
        (False, "jürgen@a.test", "jürgen@xn--bcher-kva.test", "known-mailbox"),
    ],
)
def test_what_the_next_host_takes(utf8: bool, sender: str, recipient: str, reason: str) -> None:
    hop = NextHop(utf8=utf8)
    check = Recipients(Domains([*DOMAINS, Domain("hop.test", "far", hop=lambda: hop)], HOSTNAME))
    ask = Ask(Stage.RCPT, ASK.client, parse_address(sender), parse_address(recipient))
    verdict = check(ask)
    assert verdict.reason == reason
    assert (verdict.reply.enhanced if verdict.reply else "") == ("5.6.7" if "needs" in reason else "")
    assert (verdict.hop is hop) == (reason == "known-mailbox" and "hop" in recipient)


def test_recipients_are_replaced() -> None:
    check = Recipients(Domains(DOMAINS, HOSTNAME, parse_address("admin@any.test")))
    for address in (Address("PostMaster", ""), parse_address("postmaster@here.test")):
        verdict = check(Ask(Stage.RCPT, ASK.client, recipient=address))
        assert verdict.reply is None
        assert str(verdict.recipient) == "admin@any.test"
    verdict = check(Ask(Stage.RCPT, ASK.client, recipient=parse_address("Ann@case.test")))
    assert verdict.recipient is not None
    assert verdict.recipient.mailbox == "Ann@case.test"
