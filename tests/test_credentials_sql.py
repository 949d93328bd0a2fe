"""Users in a database: a real PostgreSQL, and SQLite files."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from authority import Bench, client, settled
from postgresql import Postgresql, postgresql

from fastsmtp.config_inbound import Sql
from fastsmtp.credentials import Account, Denied, UnavailableError
from fastsmtp.credentials.directory import Directory
from fastsmtp.credentials.hashes import Hashes, hash_password
from fastsmtp.credentials.scram import fits, make_keys, render_keys
from fastsmtp.credentials.sql import Query
from fastsmtp.sql import Database
from fastsmtp.verdict import Password, ScramKeys

QUERY = "SELECT password, scram, senders FROM users WHERE name = :name"
HASH = hash_password("correct horse")
KEYS = render_keys(make_keys("correct horse", 4096))


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60.0))


@asynccontextmanager
async def directory(
    place: str, query: str = QUERY, *, timeout: float = 10.0, iterations: int = 4096
) -> AsyncIterator[Directory]:
    database = Database(Sql.model_validate({"database": place, "timeout": timeout}))
    store = Directory(Query(database, query, iterations, "here.test"), Hashes(), b"s" * 32)
    try:
        yield store
    finally:
        await store.close()
        await database.close()


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "users.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE users (name TEXT, password TEXT, scram TEXT, senders TEXT)")
        connection.executemany(
            "INSERT INTO users VALUES (?, ?, ?, ?)",
            [
                ("ann@x.test", HASH, KEYS, "@x.test, Sales@Y.test"),
                ("bob", "{ARGON2ID}" + HASH, None, None),
                ("carl", None, KEYS, ""),
                ("many", HASH, None, "a@x.test"),
                ("many", HASH, None, "b@x.test"),
                ("torn", HASH, None, ""),
                ("torn", KEYS, None, ""),
                ("odd", "secret", None, ""),
                ("blob", b"x", None, ""),
                ("wrong-keys", HASH, "x", ""),
                ("wrong-sender", HASH, None, "nobody"),
            ],
        )
    return str(path)


def test_users_of_a_file(file: str) -> None:
    async def test() -> None:
        async with directory(file) as store:
            bench = Bench([store])
            names = ["Ann@X.test", "bob", "carl", "many", "eve", "x' OR '1'='1"]
            words = await bench.words(*[Password(name, "correct horse") for name in names])
            assert words == ["authenticated"] * 4 + ["bad-credentials"] * 2
            assert await bench.words(Password("ann@x.test", "wrong")) == ["bad-credentials"]
            ann = await settled(bench.authority.rights("ann@x.test"))
            many = await settled(bench.authority.rights("many"))
            assert ann is not None
            assert many is not None
            assert (ann.addresses, ann.domains) == ({"ann@x.test", "sales@y.test"}, {"x.test"})
            assert many.addresses == {"many@here.test", "a@x.test", "b@x.test"}
            assert "SCRAM-SHA-256" in store.mechanisms
            found = await store.check(ScramKeys("ann@x.test"), client())
            imagined = await store.check(ScramKeys("bob"), client())
            assert isinstance(found, Account)
            assert isinstance(imagined, Account)
            assert found.keys is not None
            assert imagined.keys is not None
            assert fits(found.keys, "correct horse")
            assert (imagined.name, imagined.keys.iterations) == ("", 4096)
        async with directory(file, iterations=0) as store:
            assert "SCRAM-SHA-256" not in store.mechanisms

    run(test)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("torn", "user torn: rows differ in column password"),
        ("odd", "user odd: no SCRAM keys"),
        ("blob", "user blob: column password holds bytes, not text"),
        ("wrong-keys", "user wrong-keys: no SCRAM keys"),
        ("wrong-sender", "user wrong-sender: 'nobody' is neither"),
    ],
)
def test_what_a_database_says_that_is_no_user(file: str, name: str, problem: str) -> None:
    async def test() -> None:
        async with directory(file) as store:
            with pytest.raises(UnavailableError, match=problem):
                await store.check(Password(name, "secret"), client())

    run(test)


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("SELECT pass FROM users WHERE name = :name", "no such column: pass"),
        ("SELECT senders FROM users WHERE name = :name", "neither a column password nor a column scram"),
        ("SELECT password FROM users WHERE name = :uid", "uid"),
    ],
)
def test_queries_that_are_wrong(file: str, query: str, problem: str) -> None:
    async def test() -> None:
        async with directory(file, query) as store:
            with pytest.raises(UnavailableError, match=problem):
                await store.check(Password("ann@x.test", "correct horse"), client())

    run(test)


def test_parts_of_a_name(file: str) -> None:
    async def test() -> None:
        query = "SELECT :local || ' ' || :domain || ' ' || :name AS senders, '' AS PASSWORD"
        async with directory(file, query) as store:
            for name, said in (("ann@x.test", r"'ann x\.test ann@x\.test'"), ("ann", "'ann  ann'")):
                with pytest.raises(UnavailableError, match=said):
                    await store.check(Password(name, "x"), client())

    run(test)


# PostgreSQL


@pytest.fixture(scope="module")
def server() -> Postgresql:
    running = postgresql()
    running.run(
        "CREATE SCHEMA login; CREATE TABLE login.users (name text PRIMARY KEY, password text, scram text);"
        "CREATE TABLE login.senders (name text, sender text);"
        f"INSERT INTO login.users VALUES ('ann@x.test', '{HASH}', '{KEYS}'), ('bob', '{HASH}', NULL);"
        "INSERT INTO login.senders VALUES ('ann@x.test', '@x.test'), ('ann@x.test', 'sales@y.test')"
    )
    return running


JOINED = (
    "SELECT u.password, u.scram, s.sender AS senders FROM login.users u"
    " LEFT JOIN login.senders s USING (name) WHERE u.name = :name"
)


def test_users_of_postgresql(server: Postgresql) -> None:
    async def test() -> None:
        async with directory(server.url, JOINED) as store:
            bench = Bench([store], cache=0)
            right = Password("ann@x.test", "correct horse")
            assert await bench.words(right, Password("bob", "correct horse")) == ["authenticated"] * 2
            assert await bench.words(Password("eve", "x"), Password("bob", "x")) == ["bad-credentials"] * 2
            rights = await settled(bench.authority.rights("ann@x.test"))
            assert rights is not None
            assert (rights.addresses, rights.domains) == ({"ann@x.test", "sales@y.test"}, {"x.test"})
            answers = await asyncio.gather(*[store.check(right, client()) for _ in range(20)])
            assert all(isinstance(answer, Account) for answer in answers)
            assert bench.lines == []

    run(test)


def test_postgresql_goes_away_stands_still_and_comes_back(server: Postgresql) -> None:
    async def test() -> None:
        async with directory(server.url, JOINED, timeout=2.0) as store:
            bench = Bench([store], cache=0)
            right = Password("ann@x.test", "correct horse")
            assert await bench.words(right) == ["authenticated"]
            with server.frozen():
                assert await bench.words(right) == ["auth-unavailable"]
            server.stop()
            try:
                assert await bench.words(right, right) == ["auth-unavailable"] * 2
                assert await settled(bench.authority.rights("ann@x.test")) is None
            finally:
                server.start()
            await asyncio.sleep(1.1)  # after a failure nobody tries for a second
            assert await bench.words(right, Password("ann@x.test", "wrong")) == ["authenticated", "bad-credentials"]
            assert [line[0] for line in bench.lines] == ["auth-trouble", "auth-well"]

    run(test)


def test_a_user_who_is_deleted_is_one_no_more(server: Postgresql) -> None:
    async def test() -> None:
        server.run(f"INSERT INTO login.users VALUES ('carl', '{HASH}', NULL)")
        async with directory(server.url, JOINED) as store:
            bench = Bench([store], cache=60.0)
            right = Password("carl", "correct horse")
            assert await bench.words(right) == ["authenticated"]
            server.run("DELETE FROM login.users WHERE name = 'carl'")
            assert await bench.words(right) == ["authenticated"]  # for a short time
            bench.now += 61.0
            assert await bench.words(right) == ["bad-credentials"]
            assert await store.check(right, client()) == Denied()

    run(test)
