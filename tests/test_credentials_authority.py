"""The Authority: who may try, what is asked of a store, what is remembered, and how long a no takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from authority import Bench, settled

from fastsmtp._shared import Shared
from fastsmtp.config_values import Rate
from fastsmtp.credentials import (
    Account,
    Answer,
    Asked,
    Denied,
    UnavailableError,
    canonical,
    own_rights,
)
from fastsmtp.credentials.guessing import Attempt, network_of
from fastsmtp.credentials.memory import LIMIT, Memory
from fastsmtp.metrics import Counter
from fastsmtp.rights import Rights
from fastsmtp.verdict import Client, Identity, Keys, Password, Proved, ScramKeys, Token

RIGHT = Password("ann@x.test", "right")
WRONG = Password("ann@x.test", "wrong")


def run(test: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20.0))


class Scripted:
    """A store in which the password of everybody is "right". `asked` are the questions that came through."""

    label = "scripted"
    questions: frozenset[type] = frozenset((Password, ScramKeys, Identity, Token))
    mechanisms: frozenset[str] = frozenset(("PLAIN",))

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.known: list[bool] = []
        self.down = ""
        self.stamps: dict[str, int] = {}
        self.gate: asyncio.Event | None = None
        self.closed = False
        self.found: Account | None = Account("ann@x.test", Rights(frozenset(("sales@x.test",))))
        self.waits = False

    def stamp(self, name: str) -> object:
        return self.stamps.get(name)

    async def check(self, question: Asked, client: Client, known: bool = False) -> Answer:
        self.asked.append(question)
        self.known.append(known)
        if self.gate is not None:
            await self.gate.wait()
        if self.down:
            raise UnavailableError(self.down)
        match question:
            case Password():
                return Account(question.name.lower()) if question.password == "right" else Denied()
            case Token():
                return Account("ann@x.test", seconds=5.0) if question.token == "right" else Denied("invalid_token")
            case ScramKeys():
                return Account("", keys=Keys(b"salt", 4096, b"", b""))
            case Identity():
                return Account(question.name)

    def find(self, name: str) -> Any:
        async def wait() -> Account | None:
            return self.found

        if self.down:
            raise UnavailableError(self.down)
        return wait() if self.waits else self.found

    async def close(self) -> None:
        self.closed = True


def test_right_and_wrong() -> None:
    async def test() -> None:
        bench = Bench([store := Scripted()])
        yes, no = await bench.ask(Password("Ann@X.test", "right")), await bench.ask(WRONG)
        assert (yes.reason, yes.reply, yes.user) == ("authenticated", None, "ann@x.test")
        assert no.reply is not None
        assert (no.reason, no.reply.code, no.reply.enhanced, no.user) == ("bad-credentials", 535, "5.7.8", "")
        assert bench.authority.mechanisms == {"PLAIN"}
        await bench.authority.close()
        assert store.closed

    run(test)


def test_what_no_store_answers_is_no_yes() -> None:
    async def test() -> None:
        bench = Bench([])
        verdict = await bench.ask(RIGHT)
        assert verdict.reply is not None
        assert verdict.reply.code == 454
        assert verdict.user == ""

    run(test)


def test_a_no_takes_the_longer_the_more_there_were() -> None:
    async def test() -> None:
        bench = Bench([Scripted()], cache=0)
        for _ in range(5):
            await bench.ask(WRONG)
        assert bench.slept == pytest.approx([1.0, 1.25, 1.5, 1.75, 2.0], abs=0.01)
        bench.now += 600.0
        await bench.ask(WRONG)
        assert bench.slept[-1] == pytest.approx(1.0, abs=0.01)

    run(test)


def test_a_no_is_counted_from_the_question_on() -> None:
    """So a store that is quick with users it does not know tells nothing."""

    async def test() -> None:
        bench = Bench([store := Scripted()])
        store.gate = asyncio.Event()
        waiting = asyncio.create_task(bench.ask(WRONG))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        bench.now += 0.4
        store.gate.set()
        await waiting
        assert bench.slept == pytest.approx([0.6], abs=0.01)

    run(test)


def test_an_address_is_stopped_before_the_store_is_asked() -> None:
    async def test() -> None:
        bench = Bench([store := Scripted()], cache=0)
        guesses = [Password(f"u{n}@x.test", "wrong") for n in range(7)]
        assert await bench.words(*guesses) == ["bad-credentials"] * 5 + ["too-many-failures"] * 2
        assert len(store.asked) == 5
        verdict = await bench.ask(RIGHT)
        assert verdict.reply is not None
        assert (verdict.reply.code, verdict.reply.enhanced) == (454, "4.7.0")
        assert await bench.words(RIGHT, ip="192.0.2.2") == ["authenticated"]
        bench.now += 121.0  # one more after two minutes
        assert await bench.words(RIGHT) == ["authenticated"]

    run(test)


def test_who_is_stopped_learns_nothing_of_who_was_just_here() -> None:
    """A right password that is remembered would tell a guesser whose bucket is full."""

    async def test() -> None:
        bench = Bench([Scripted()])
        assert await bench.words(RIGHT) == ["authenticated"]
        await bench.words(*[Password("ann@x.test", f"wrong{n}") for n in range(5)])
        assert await bench.words(RIGHT) == ["too-many-failures"]

    run(test)


def test_a_telephone_with_an_old_password_does_not_lock_its_office_out() -> None:
    """Behind one NAT: who was right there lately goes on; who guesses there does so no longer than elsewhere."""

    async def test() -> None:
        bench = Bench([store := Scripted()], cache=0)
        bob, eve, new = (Password(f"{name}@x.test", "right") for name in ("bob", "eve", "new"))
        assert await bench.words(bob, eve) == ["authenticated"] * 2
        phone = [Password("ann@x.test", f"old{n}") for n in range(7)]
        assert await bench.words(*phone) == ["bad-credentials"] * 5 + ["too-many-failures"] * 2
        assert await bench.words(bob, eve) == ["authenticated"] * 2
        assert await bench.words(new) == ["too-many-failures"]
        # Bob was right here lately; guessing his password here ends all the same, and stops nobody but him.
        asked = len(store.asked)
        guesses = [Password("bob@x.test", f"guess{n}") for n in range(9)]
        assert await bench.words(*guesses, bob) == ["bad-credentials"] * 5 + ["too-many-failures"] * 5
        assert len(store.asked) == asked + 5
        assert await bench.words(eve) == ["authenticated"]
        bench.now += 121.0
        assert await bench.words(bob) == ["authenticated"]

    run(test)


def test_a_bucket_for_one_user_is_not_the_address() -> None:
    """What one user fails by, where he was right lately, costs the others there nothing."""

    async def test() -> None:
        bench = Bench([Scripted()], cache=0)
        assert await bench.words(RIGHT) == ["authenticated"]
        await bench.words(*[Password("ann@x.test", f"old{n}") for n in range(9)])
        assert await bench.words(Password("new@x.test", "right")) == ["authenticated"]

    run(test)


def test_a_proof_gives_back_only_what_its_keys_cost() -> None:
    """Let in although the user's bucket was full: then nothing was taken there."""

    async def test() -> None:
        bench = Bench([Scripted()], user=Rate(3, 3600.0), cache=0.0)
        assert await bench.words(RIGHT) == ["authenticated"]
        assert await bench.words(*[WRONG] * 3, ip="192.0.2.9") == ["bad-credentials"] * 3
        for _ in range(3):
            paid = (await bench.ask(ScramKeys("ann@x.test"))).paid
            assert await bench.words(Proved("ann@x.test", True, paid)) == ["authenticated"]
        assert await bench.words(WRONG, ip="192.0.2.9") == ["too-many-failures"]
        assert await bench.words(Proved("ann@x.test", True)) == ["auth-unavailable"]

    run(test)


def test_right_passwords_are_not_counted() -> None:
    async def test() -> None:
        bench = Bench([store := Scripted()], cache=0)
        assert set(await bench.words(*[RIGHT] * 30)) == {"authenticated"}
        assert len(store.asked) == 30

    run(test)


def test_as_many_at_once_as_the_bucket_holds() -> None:
    async def test() -> None:
        bench = Bench([store := Scripted()])
        store.gate = asyncio.Event()
        asks = [asyncio.create_task(bench.ask(Password(f"u{n}@x.test", "right"))) for n in range(9)]
        await asyncio.sleep(0.01)
        store.gate.set()
        words = [(await each).reason for each in asks]
        assert sorted(words) == ["authenticated"] * 5 + ["too-many-failures"] * 4
        assert len(store.asked) == 5

    run(test)


def test_a_network_of_ipv6_is_one_address() -> None:
    assert network_of("2001:db8:0:1::1") == network_of("2001:db8:0:1:ffff::2") != network_of("2001:db8:0:2::1")
    assert network_of("fe80::1%eth0") == network_of("fe80::2")
    assert network_of("192.0.2.1") != network_of("192.0.2.2")

    async def test() -> None:
        bench = Bench([Scripted()], cache=0)
        for n in range(5):
            await bench.ask(Password("u@x.test", f"wrong{n}"), f"2001:db8::{n + 1:x}")
        assert await bench.words(RIGHT, ip="2001:db8::ffff") == ["too-many-failures"]
        assert await bench.words(RIGHT, ip="2001:db8:0:1::1") == ["authenticated"]

    run(test)


def test_a_unix_socket_and_a_webmail_have_no_bucket() -> None:
    async def test() -> None:
        bench = Bench([Scripted()], cache=0, unlimited=("192.0.2.9",))
        for ip in ("", "192.0.2.9"):
            guesses = [Password(f"u{n}@x.test", "wrong") for n in range(12)]
            assert set(await bench.words(*guesses, ip=ip)) == {"bad-credentials"}

    run(test)


def test_nobody_locks_another_out() -> None:
    """A user's full bucket stops only addresses that have not succeeded within a day."""

    async def test() -> None:
        bench = Bench([store := Scripted()], cache=0, user=Rate(20, 3600.0))
        home, cafe = "198.51.100.1", "198.51.100.2"
        assert await bench.words(RIGHT, ip=home) == ["authenticated"]
        for n in range(20):
            assert await bench.words(WRONG, ip=f"203.0.113.{n}") == ["bad-credentials"]
        bench.now += 80_000.0
        for n in range(20):
            assert await bench.words(WRONG, ip=f"203.0.113.{n}") == ["bad-credentials"]
        asked = len(store.asked)
        assert await bench.words(WRONG, ip="203.0.113.99") == ["too-many-failures"]
        assert await bench.words(RIGHT, ip=cafe) == ["too-many-failures"]
        assert len(store.asked) == asked
        assert await bench.words(RIGHT, RIGHT, ip=home) == ["authenticated"] * 2
        assert await bench.words(Password("bob@x.test", "right"), ip=cafe) == ["authenticated"]
        # A day from the last success on, and not for ever: then the bucket is full for all.
        for seconds, words in ((80_000.0, "authenticated"), (86_401.0, "too-many-failures")):
            bench.now += seconds
            for n in range(20):
                await bench.ask(WRONG, f"203.0.113.{n}")
            assert await bench.words(RIGHT, ip=home) == [words]

    run(test)


def test_a_worker_that_was_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the question whether a bucket is full and the spending, another one may have spent the last."""
    monkeypatch.setattr(Attempt, "refused", lambda self: False)

    async def test() -> None:
        bench = Bench([store := Scripted()], cache=0, user=Rate(2, 3600.0))
        assert await bench.words(*[WRONG] * 9) == ["bad-credentials"] * 2 + ["too-many-failures"] * 7
        # What was refused for the user's sake cost the address nothing: it had five.
        others = [Password(f"u{n}@x.test", "wrong") for n in range(4)]
        assert await bench.words(*others) == ["bad-credentials"] * 3 + ["too-many-failures"]
        assert len(store.asked) == 5

    run(test)


def test_what_stops_by_user_costs_the_address_nothing() -> None:
    async def test() -> None:
        bench = Bench([Scripted()], cache=0, user=Rate(1, 3600.0))
        await bench.ask(WRONG, "203.0.113.1")
        assert set(await bench.words(*[WRONG] * 9, ip="203.0.113.2")) == {"too-many-failures"}
        assert await bench.words(Password("bob@x.test", "right"), ip="203.0.113.2") == ["authenticated"]

    run(test)


def test_workers_share_the_buckets() -> None:
    async def test() -> None:
        shared = Shared(2, len(Counter))
        one, other = Bench([Scripted()], shared=shared), Bench([Scripted()], shared=shared)
        for n in range(5):
            await (one if n % 2 else other).ask(Password(f"u{n}@x.test", "wrong"))
        assert await one.words(RIGHT) == await other.words(RIGHT) == ["too-many-failures"]

    run(test)


def test_an_answer_is_remembered_until_its_time_is_over() -> None:
    async def test() -> None:
        bench = Bench([store := Scripted()], cache=60.0)
        store.stamps["ann@x.test"] = 7
        assert set(await bench.words(*[RIGHT] * 10, Password("ANN@x.test", "right"))) == {"authenticated"}
        assert len(store.asked) == 1
        await bench.words(Password("ann@x.test", "right"), ip="192.0.2.2")  # it may let in from some places only
        assert len(store.asked) == 2
        bench.now += 61.0
        await bench.ask(RIGHT)
        assert len(store.asked) == 3

    run(test)


def test_the_same_wrong_password_is_one_failure() -> None:
    """A telephone that does not know of the new password is no guesser."""

    async def test() -> None:
        bench = Bench([store := Scripted()])
        assert await bench.words(*[WRONG] * 10) == ["bad-credentials"] * 10
        assert len(store.asked) == 1
        assert len(bench.slept) == 10
        assert await bench.words(RIGHT) == ["authenticated"]

    run(test)


def test_what_changes_is_forgotten_at_once() -> None:
    async def test() -> None:
        bench = Bench([store := Scripted()])
        await bench.words(RIGHT, WRONG, Password("bob@x.test", "right"))
        store.stamps["ann@x.test"] = 1
        await bench.words(RIGHT, WRONG, Password("bob@x.test", "right"))
        assert [question.name for question in store.asked] == [
            "ann@x.test", "ann@x.test", "bob@x.test", "ann@x.test", "ann@x.test"
        ]  # fmt: skip

    run(test)


def test_what_changes_while_it_is_asked_is_not_remembered() -> None:
    async def test() -> None:
        bench = Bench([store := Scripted()])
        store.gate = asyncio.Event()
        waiting = asyncio.create_task(bench.ask(RIGHT))
        await asyncio.sleep(0.01)
        store.stamps["ann@x.test"] = 1
        store.gate.set()
        await waiting
        await bench.ask(RIGHT)
        assert len(store.asked) == 2

    run(test)


def test_many_who_ask_the_same_ask_once() -> None:
    """A program that opens thirty connections at once: one hash, one attempt."""

    async def test() -> None:
        bench = Bench([store := Scripted()])
        store.gate = asyncio.Event()
        asks = [asyncio.create_task(bench.ask(RIGHT)) for _ in range(30)]
        await asyncio.sleep(0.01)
        asks[0].cancel()  # who asked first goes away, the others do not
        await asyncio.sleep(0.01)
        store.gate.set()
        assert {(await each).user for each in asks[1:]} == {"ann@x.test"}
        assert len(store.asked) == 1

    run(test)


def test_who_goes_away_has_guessed_all_the_same() -> None:
    async def test() -> None:
        bench = Bench([store := Scripted()], cache=0)
        store.gate = asyncio.Event()
        for n in range(5):
            waiting = asyncio.create_task(bench.ask(Password("ann@x.test", f"wrong{n}")))
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.sleep(0)
        store.gate.set()
        await asyncio.sleep(0.01)
        assert await bench.words(RIGHT) == ["too-many-failures"]

    run(test)


def test_trouble_is_no_failure_and_is_told_once() -> None:
    async def test() -> None:
        bench = Bench([store := Scripted()])
        store.down = "it is down"
        for _ in range(10):
            verdict = await bench.ask(RIGHT)
            assert verdict.reply is not None
            assert (verdict.reason, verdict.reply.code) == ("auth-unavailable", 454)
        assert bench.lines == [("auth-trouble", "scripted", "it is down")]
        store.down = ""
        assert await bench.words(RIGHT) == ["authenticated"]
        assert bench.lines[1:] == [("auth-well", "scripted")]
        assert bench.slept == [1.0] * 10

    run(test)


def test_scram_is_paid_back_when_it_is_proved() -> None:
    async def test() -> None:
        bench = Bench([Scripted()])
        for _ in range(8):
            verdict = await bench.ask(ScramKeys("Ann@x.test"))
            assert verdict.keys is not None
            assert (verdict.reply, verdict.user) == (None, "")
            proved = await bench.ask(Proved("Ann@x.test", True, verdict.paid))
            assert (proved.reply, proved.user) == (None, "ann@x.test")
        assert bench.slept == []
        for _ in range(5):
            paid = (await bench.ask(ScramKeys("ann@x.test"))).paid
            assert await bench.words(Proved("ann@x.test", False, paid)) == ["bad-credentials"]
        assert await bench.words(ScramKeys("ann@x.test")) == ["too-many-failures"]
        assert bench.slept[5:] == [1.0]

    run(test)


def test_an_exchange_of_scram_that_is_given_up_is_a_failure() -> None:
    async def test() -> None:
        bench = Bench([Scripted()])
        assert await bench.words(*[ScramKeys("ann@x.test")] * 6) == ["authenticated"] * 5 + ["too-many-failures"]

    run(test)


def test_exchanges_of_scram_at_once_are_paid_for_each() -> None:
    """Who waited for another's keys would guess for nothing."""

    async def test() -> None:
        bench = Bench([store := Scripted()])
        store.gate = asyncio.Event()
        asked = [asyncio.ensure_future(bench.ask(ScramKeys("ann@x.test"))) for _ in range(20)]
        await asyncio.sleep(0)
        store.gate.set()
        words = [verdict.reason for verdict in await asyncio.gather(*asked)]
        assert sorted(words) == ["authenticated"] * 5 + ["too-many-failures"] * 15

    run(test)


def test_who_is_let_in_although_a_users_bucket_is_full_makes_no_room_in_it() -> None:
    async def test() -> None:
        bench = Bench([Scripted()], user=Rate(3, 3600.0), cache=0.0)
        assert await bench.words(RIGHT) == ["authenticated"]
        assert await bench.words(*[WRONG] * 4, ip="192.0.2.9") == ["bad-credentials"] * 3 + ["too-many-failures"]
        assert await bench.words(*[RIGHT] * 5) == ["authenticated"] * 5
        assert await bench.words(WRONG, ip="192.0.2.9") == ["too-many-failures"]

    run(test)


def test_a_token_is_remembered_no_longer_than_it_lives() -> None:
    async def test() -> None:
        bench = Bench([store := Scripted()])
        await bench.words(Token("right", ""), Token("right", ""))
        assert len(store.asked) == 1
        bench.now += 6.0
        await bench.ask(Token("right", ""))
        assert len(store.asked) == 2
        refused = await bench.ask(Token("wrong", ""))
        assert (refused.reason, refused.problem) == ("bad-credentials", "invalid_token")

    run(test)


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "later"])
def test_rights(waits: bool) -> None:
    async def test() -> None:
        bench = Bench([store := Scripted()])
        store.waits = waits
        rights = await settled(bench.authority.rights("ann@x.test"))
        assert rights is not None
        assert rights.addresses == {"sales@x.test"}
        store.found = None
        bench.now += 61.0
        gone = await settled(bench.authority.rights("ann@x.test"))
        assert gone is not None
        assert not gone.addresses
        store.down = "down"
        bench.now += 61.0
        assert await settled(bench.authority.rights("ann@x.test")) is None
        assert bench.lines == [("auth-trouble", "scripted", "down")]

    run(test)


def test_rights_of_who_is_in_no_directory() -> None:
    class Tokens(Scripted):
        questions: frozenset[type] = frozenset((Token,))

    async def test() -> None:
        tokens = Tokens()
        tokens.found = Account("eve@x.test", Rights(frozenset(("eve@x.test",))))
        users = Scripted()
        users.found = None
        for stores in ([tokens], [users, tokens]):
            rights = await settled(Bench(stores).authority.rights("eve@x.test"))
            assert rights is not None
            assert rights.addresses == {"eve@x.test"}

    run(test)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Ann@Example.ORG", "ann@example.org"),
        ("Ann", "ann"),
        ("ann@Bücher.example", "ann@xn--bcher-kva.example"),
        ("no address@@", "no address@@"),
        ("", ""),
    ],
)
def test_canonical(name: str, expected: str) -> None:
    assert canonical(name) == expected


def test_own_rights() -> None:
    assert own_rights("ann@x.test", "y.test").addresses == {"ann@x.test"}
    assert own_rights("ann", "y.test").addresses == {"ann@y.test"}
    # Who issues tokens may know both, and they are not the same.
    assert own_rights('"ann"', "y.test").addresses == {'"ann"@y.test'}
    assert not own_rights("ann", "").addresses
    assert not own_rights("postmaster", "").addresses
    assert own_rights("two words", "y.test").addresses == {"two words@y.test"}
    assert not own_rights("no address\n", "y.test").addresses


def test_memory_is_bounded_and_holds_no_secret() -> None:
    memory: Memory[str] = Memory(60.0, lambda: 0.0)
    marks = [memory.mark(str(n), "secret") for n in range(LIMIT + 10)]
    for mark in marks:
        memory.keep(mark, None, "yes", 1e9)
    assert memory.recall(marks[9], None) is None
    assert memory.recall(marks[10], None) == memory.recall(marks[-1], None) == "yes"
    assert len(memory._kept) == LIMIT
    assert memory.mark("ab", "c") != memory.mark("a", "bc")
    assert memory.mark("a", "b") != Memory(60.0, lambda: 0.0).mark("a", "b")
    assert "secret" not in repr(memory._kept)


def test_a_store_is_told_who_was_lately_let_in() -> None:
    """As this user, from this address."""
    store = Scripted()

    async def test() -> None:
        bench = Bench([store], cache=0.0)
        await bench.words(WRONG, RIGHT, RIGHT, WRONG)
        await bench.words(RIGHT, ip="192.0.2.2")
        await bench.words(Password("bob@x.test", "right"))
        bench.now += 86_401.0
        await bench.words(RIGHT)

    run(test)
    assert store.known == [False, False, True, True, False, False, False]


def test_who_may_guess_no_more_is_told_so_after_a_second() -> None:
    """Of each connection: else it would ask a thousand times in that time, with nothing at stake."""

    async def test() -> None:
        bench = Bench([store := Scripted()])
        await bench.words(*[Password("ann@x.test", f"wrong {n}") for n in range(5)])
        asked, slept = len(store.asked), len(bench.slept)
        assert await bench.words(WRONG, RIGHT, ScramKeys("bob@x.test")) == ["too-many-failures"] * 3
        assert (len(store.asked), bench.slept[slept:]) == (asked, [1.0] * 3)

    run(test)
