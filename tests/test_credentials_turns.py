"""Whose password is hashed next: those who are known, then strangers by turns, of whom one is computed at a time."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from authority import client

from fastsmtp.credentials import BusyError
from fastsmtp.credentials import hashes as hashes_module
from fastsmtp.credentials.directory import Directory
from fastsmtp.credentials.file import HEADER, Users
from fastsmtp.credentials.hashes import NOBODYS, THREADS, WAITING, Hashes
from fastsmtp.credentials.turns import Turns
from fastsmtp.verdict import Password

A, B, C = b"192.0.2.1", b"192.0.2.2", b"192.0.2.3"


def fill(places: int, *rows: tuple[str, bytes | None]) -> Turns[str]:
    turns: Turns[str] = Turns(places)
    for item, stranger in rows:
        assert turns.add(item, stranger) is None
    return turns


def drain(turns: Turns[str]) -> list[str]:
    found = []
    while taken := turns.take(strangers=True):
        found.append(taken[0])
    return found


def test_the_known_first_then_an_address_at_a_time() -> None:
    turns = fill(9, ("a1", A), ("a2", A), ("a3", A), ("b1", B), ("k1", None), ("c1", C), ("k2", None))
    assert turns.take(strangers=True) == ("k1", False)
    assert drain(turns) == ["k2", "a1", "b1", "c1", "a2", "a3"]
    assert turns.take(strangers=True) is None


def test_who_was_served_goes_behind_the_others() -> None:
    turns = fill(9, ("a1", A), ("a2", A), ("b1", B))
    assert turns.take(strangers=True) == ("a1", True)
    turns.add("c1", C)
    assert drain(turns) == ["b1", "a2", "c1"]


def test_strangers_are_left_where_they_are() -> None:
    turns = fill(9, ("a1", A), ("k1", None))
    assert turns.take(strangers=False) == ("k1", False)
    assert turns.take(strangers=False) is None
    assert len(turns) == 1


def test_who_loses_his_place() -> None:
    """Who has the most, his last; but for none who has as many."""
    turns = fill(4, ("a1", A), ("a2", A), ("a3", A), ("b1", B))
    assert turns.add("b2", B) == "a3"
    assert turns.add("b3", B) == "b3"
    assert turns.add("a4", A) == "a4"
    assert turns.add("c1", C) == "a2"
    assert len(turns) == 4
    assert turns.add("c2", C) == "c2"
    lost = [turns.add(f"k{n}", None) for n in range(6)]
    assert lost[0] == "b2"
    assert set(lost[1:4]) == {"a1", "b1", "c1"}
    assert lost[4:] == ["k4", "k5"]  # nobody is left who is not known
    assert turns.add("a9", A) == "a9"
    assert drain(turns) == ["k0", "k1", "k2", "k3"]


def test_everybody_is_served_or_told() -> None:
    dice = random.Random(7)
    turns: Turns[int] = Turns(10)
    ended: list[int] = []
    for number in range(5000):
        loser = turns.add(number, dice.choice((None, A, A, A, B, C)))
        ended += [] if loser is None else [loser]
        assert len(turns) <= 10
        if dice.random() < 0.6 and (taken := turns.take(dice.random() < 0.7)):
            ended.append(taken[0])
    while taken := turns.take(strangers=True):
        ended.append(taken[0])
    assert sorted(ended) == list(range(5000))


# The threads


class Computing:
    """In the place of argon2: `begun` are the passwords in the order in which they were computed. What begins with
    "held" waits for `let_go`; what ends with "right" fits."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.let_go = threading.Event()

    def verify(self, stored: str, password: str) -> bool:
        self.begun.append(password)
        if password.startswith("held"):
            assert self.let_go.wait(20.0)
        return password.endswith("right")


@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Computing]:
    made = Computing()
    monkeypatch.setattr(hashes_module, "verify", made.verify)
    monkeypatch.setattr(hashes_module, "REST", 0.0)
    yield made
    made.let_go.set()


def run(test: Callable[[Hashes], Awaitable[None]]) -> None:
    async def limited() -> None:
        hashes = Hashes()
        try:
            await asyncio.wait_for(test(hashes), 20.0)
        finally:
            hashes.close()

    asyncio.run(limited())


def ask(hashes: Hashes, password: str, stranger: bytes | None) -> asyncio.Task[bool]:
    return asyncio.create_task(hashes.verify(NOBODYS, password, stranger))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_of_strangers_one_is_computed_at_a_time(computing: Computing) -> None:
    async def test(hashes: Hashes) -> None:
        tasks = [ask(hashes, "held", A), ask(hashes, "b right", B), ask(hashes, "c right", C)]
        await until(lambda: computing.begun == ["held"])
        # The other thread is theirs who are known.
        assert await ask(hashes, "known right", None)
        assert computing.begun == ["held", "known right"]
        computing.let_go.set()
        assert await asyncio.gather(*tasks) == [False, True, True]

    run(test)


def test_a_guesser_with_many_connections_has_one_turn_in_two(computing: Computing) -> None:
    async def test(hashes: Hashes) -> None:
        tasks = [ask(hashes, "held", A), *[ask(hashes, f"a{n} right", A) for n in range(9)]]
        await until(lambda: computing.begun == ["held"])
        tasks.append(ask(hashes, "b right", B))
        await asyncio.sleep(0)
        computing.let_go.set()
        await asyncio.gather(*tasks)
        assert computing.begun.index("b right") == 2

    run(test)


def test_after_a_wrong_password_strangers_rest(computing: Computing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes_module, "REST", 1e9)
    monkeypatch.setattr(hashes_module, "REST_MOST", 1e9)

    async def test(hashes: Hashes) -> None:
        assert await asyncio.gather(*[ask(hashes, f"{n} right", A) for n in range(3)]) == [True] * 3
        assert not await ask(hashes, "wrong", A)
        waiting = ask(hashes, "b right", B)
        assert await asyncio.gather(*[ask(hashes, "known right", None) for _ in range(3)]) == [True] * 3
        assert "b right" not in computing.begun
        hashes._welcome()
        assert await waiting

    run(test)


def test_a_rest_ends(computing: Computing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes_module, "REST", 1e9)
    monkeypatch.setattr(hashes_module, "REST_MOST", 0.01)

    async def test(hashes: Hashes) -> None:
        assert await asyncio.gather(*[ask(hashes, f"{n} wrong", A) for n in range(5)]) == [False] * 5

    run(test)


def test_what_cannot_be_computed_is_no_wrong_password(computing: Computing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes_module, "REST", 1e9)
    monkeypatch.setattr(hashes_module, "REST_MOST", 1e9)

    def fail(stored: str, password: str) -> bool:
        raise ValueError("damaged")

    monkeypatch.setattr(hashes_module, "verify", fail)

    async def test(hashes: Hashes) -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match="damaged"):
                await hashes.verify(NOBODYS, "x", A)

    run(test)


def test_who_is_known_gets_the_place_of_a_stranger(computing: Computing) -> None:
    async def test(hashes: Hashes) -> None:
        held = [ask(hashes, "held right", None) for _ in range(THREADS)]
        strangers = [ask(hashes, f"{n} right", A if n else B) for n in range(WAITING)]
        await until(lambda: len(computing.begun) == THREADS)
        with pytest.raises(BusyError):
            await hashes.verify(NOBODYS, "one more", A)
        known = ask(hashes, "known right", None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [task.done() for task in strangers] == [False] * (WAITING - 1) + [True]
        assert isinstance(strangers.pop().exception(), BusyError)
        computing.let_go.set()
        assert await asyncio.gather(*held, known, *strangers) == [True] * (THREADS + WAITING)

    run(test)


def test_nobody_waits_for_ever(computing: Computing, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(hashes: Hashes) -> None:
        held = ask(hashes, "held right", A)
        monkeypatch.setattr(hashes_module, "PATIENCE", 0.01)
        late = [ask(hashes, "late", A), ask(hashes, "late", B)]
        await asyncio.sleep(0.05)
        monkeypatch.setattr(hashes_module, "PATIENCE", 10.0)
        after = ask(hashes, "right", C)
        await asyncio.sleep(0)
        computing.let_go.set()
        assert await held
        assert await after
        for task in late:
            with pytest.raises(BusyError):
                await task
        assert "late" not in computing.begun

    run(test)


def test_who_went_away_costs_nothing(computing: Computing) -> None:
    async def test(hashes: Hashes) -> None:
        held, gone = ask(hashes, "held right", A), ask(hashes, "gone", A)
        await until(lambda: computing.begun == ["held right"])
        gone.cancel()
        after = ask(hashes, "right", A)
        await asyncio.sleep(0)
        computing.let_go.set()
        assert await asyncio.gather(held, after) == [True, True]
        assert computing.begun == ["held right", "right"]

    run(test)


def test_a_store_says_who_is_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes | None] = []

    async def look(self: Hashes, stored: str, password: str, stranger: bytes | None = None) -> bool:
        seen.append(stranger)
        return False

    monkeypatch.setattr(Hashes, "verify", look)
    path = tmp_path / "users"
    path.write_text(HEADER + "\n")
    path.chmod(0o600)
    users = Users(path, "")
    users.load()

    async def test() -> None:
        store = Directory(users, Hashes(), b"s" * 32)
        for ip, known in (("192.0.2.1", False), ("2001:db8::1", False), ("192.0.2.1", True), ("", False)):
            await store.check(Password("ann", "x"), client(ip), known)
        await store.close()

    asyncio.run(test())
    assert seen == [b"192.0.2.1", bytes.fromhex("20010db800000000"), None, b""]
