"""Databases that are asked: an SQLite file and a real PostgreSQL, well, slow, stopped, and asked wrong things."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
import uvloop
from postgresql import Postgresql, postgresql

from fastsmtp.check import check_machine
from fastsmtp.config import Sql, load
from fastsmtp.sql import Database, SqlError
from fastsmtp.sql_text import always_finds, names_in


def run(work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mail.db"
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE mailbox (local TEXT, domain TEXT, quota INTEGER)")
    connection.execute("INSERT INTO mailbox VALUES ('ann', 'x.test', 7), ('o''hara', 'x.test', NULL)")
    connection.close()
    return path


@pytest.fixture
def server() -> Iterator[Postgresql]:
    server = postgresql()
    server.run(
        "DROP SCHEMA IF EXISTS test_sql CASCADE; CREATE SCHEMA test_sql;"
        "CREATE TABLE test_sql.mailbox (local text, domain varchar(255), quota integer);"
        "INSERT INTO test_sql.mailbox VALUES ('ann', 'x.test', 7), ('o''hara', 'x.test', NULL)"
    )
    yield server
    server.run("DROP SCHEMA test_sql CASCADE")


def both(file: Path, server: Postgresql) -> list[tuple[Sql, str]]:
    return [(Sql(database=str(file)), "mailbox"), (Sql(database=server.url), "test_sql.mailbox")]


def test_the_values_of_a_query_are_its_names_behind_colons() -> None:
    query = """SELECT ':no', "a:no", x::text, $$ :no $$, $t$:no$t$ /* :no
        :no */ FROM t -- :no
        WHERE a = :local AND b=:domain_2 AND c LIKE '%:no''%:no' AND :local <> '' """
    assert names_in(query) == {"local", "domain_2"}


@pytest.mark.parametrize(
    ("query", "always"),
    [
        ("SELECT count(*) FROM box WHERE a = :address", True),
        ("\n select\n exists (SELECT 1 FROM box WHERE a = :address)", True),
        ("SELECT NOT EXISTS(SELECT 1 FROM box WHERE a = :address)", True),
        ("SELECT max(id) FROM box WHERE a = :address", True),
        ("SELECT 1 FROM box WHERE a = :address", False),
        ("SELECT count FROM box WHERE a = :address", False),
        ("SELECT 1 WHERE EXISTS (SELECT 1 FROM box WHERE a = :address)", False),
        ("SELECT count(*) FROM box WHERE a = :address HAVING count(*) > 0", False),
        ("SELECT count(*) FROM box WHERE a = :address GROUP BY a", False),
    ],
)
def test_a_query_that_has_a_row_for_everyone_knows_everyone(query: str, always: bool) -> None:
    assert always_finds(query) == always


def test_rows_are_dicts_and_values_are_bound(file: Path, server: Postgresql) -> None:
    async def ask(section: Sql, table: str) -> None:
        database = Database(section)
        query = f"SELECT local, quota FROM {table} WHERE local = :local AND domain = :domain"
        for local, rows in (
            ("ann", [{"local": "ann", "quota": 7}]),
            ("o'hara", [{"local": "o'hara", "quota": None}]),
            ("bob", []),
            ("' OR '1'='1", []),
            ("ann'; DROP TABLE mailbox; --", []),
        ):
            assert await database.rows(query, {"local": local, "domain": "x.test", "unused": "?"}) == rows
        like = f"SELECT local FROM {table} WHERE local LIKE '%nn' AND local <> ':local' AND local = :local"
        assert await database.rows(like, {"local": "ann"}) == [{"local": "ann"}]
        await database.close()

    for section, table in both(file, server):
        run(ask(section, table))


@pytest.mark.parametrize(
    "query", ["SELECT nothing FROM {}", "SELEC", "DELETE FROM {}", "SELECT :local; SELECT 2; x", "SELECT :other"]
)
def test_a_wrong_query_is_an_error_of_one_line_and_changes_nothing(file: Path, server: Postgresql, query: str) -> None:
    async def ask(section: Sql, table: str) -> None:
        database = Database(section)
        for _ in range(2):
            with pytest.raises(SqlError) as error:
                await database.rows(query.format(table), {"local": "ann"})
            assert str(error.value)
            assert "\n" not in str(error.value)
            assert await database.rows(f"SELECT quota FROM {table} WHERE local = 'ann'", {}) == [{"quota": 7}]
        await database.close()

    for section, table in both(file, server):
        run(ask(section, table))


def test_a_query_without_its_condition_does_not_fill_the_memory(file: Path, server: Postgresql) -> None:
    async def ask(section: Sql, table: str) -> None:
        database = Database(section)
        counted = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < {most}) SELECT x FROM c"
        assert len(await database.rows(counted.format(most=10_000), {})) == 10_000
        with pytest.raises(SqlError, match="more than 10000 rows"):
            await database.rows(counted.format(most=20_000), {})
        assert await database.rows(f"SELECT quota FROM {table} WHERE local = :local", {"local": "ann"}) == [
            {"quota": 7}
        ]
        await database.close()

    for section, table in both(file, server):
        run(ask(section, table))


def test_a_connection_that_was_lost_while_it_was_idle_is_made_anew(server: Postgresql) -> None:
    async def ask() -> None:
        database = Database(Sql(database=server.url))
        assert await database.rows("SELECT 1 AS a", {}) == [{"a": 1}]
        server.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                   "AND backend_type = 'client backend'")  # fmt: skip
        assert await database.rows("SELECT 1 AS a", {}) == [{"a": 1}]
        await database.close()

    run(ask())


def test_a_server_that_is_down_is_said_at_once_and_found_again() -> None:
    server = postgresql()

    async def ask() -> None:
        database = Database(Sql(database=server.url))
        assert await database.rows("SELECT 1 AS a", {}) == [{"a": 1}]
        server.stop()
        try:
            for _ in range(3):
                with pytest.raises(SqlError, match="connection"):
                    await database.rows("SELECT 1 AS a", {})
        finally:
            server.start()
        await asyncio.sleep(1.1)
        assert await database.rows("SELECT 1 AS a", {}) == [{"a": 1}]
        await database.close()

    run(ask())


def test_slow_answers_time_out_and_delay_nobody_else(file: Path, server: Postgresql) -> None:
    slow = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 2000000000) SELECT max(i) FROM n"

    async def ask(section: Sql, query: str) -> None:
        database = Database(section.model_copy(update={"timeout": 1.0, "connections": 2}))
        begun = time.monotonic()
        waiting = asyncio.create_task(database.rows(query, {}))
        await asyncio.sleep(0.1)
        for _ in range(5):
            assert await database.rows("SELECT 1 AS a", {}) == [{"a": 1}]
        assert not waiting.done()
        with pytest.raises(SqlError, match="no answer within 1 s"):
            await waiting
        assert time.monotonic() - begun < 3
        assert await database.rows("SELECT 1 AS a", {}) == [{"a": 1}]
        await database.close()

    run(ask(Sql(database=str(file)), slow))
    run(ask(Sql(database=server.url), "SELECT pg_sleep(60)"))


def test_of_more_questions_than_connections_the_rest_waits(server: Postgresql) -> None:
    async def ask() -> None:
        database = Database(Sql(database=server.url, connections=3))
        tasks = [database.rows("SELECT pg_backend_pid() AS pid, pg_sleep(0.05)::text", {}) for _ in range(12)]
        pids = {rows[0]["pid"] for rows in await asyncio.gather(*tasks)}
        assert len(pids) == 3
        await database.close()

    run(ask())


def test_a_server_that_hangs_delays_by_the_time_out_only(server: Postgresql) -> None:
    async def ask() -> None:
        database = Database(Sql(database=server.url, timeout="1s", connections=2))
        assert await database.rows("SELECT 1 AS a", {}) == [{"a": 1}]
        with server.frozen():
            for _ in range(2):  # on a connection that stands; then none is made
                begun = time.monotonic()
                with pytest.raises(SqlError, match="no answer within 1 s"):
                    await database.rows("SELECT 1 AS a", {})
                assert time.monotonic() - begun < 3
            with pytest.raises(SqlError, match="does not answer"):
                await database.rows("SELECT 1 AS a", {})
        await asyncio.sleep(1.1)
        assert await database.rows("SELECT 1 AS a", {}) == [{"a": 1}]
        await database.close()

    run(ask())


def test_a_wrong_password_and_a_missing_file_say_so(server: Postgresql, tmp_path: Path) -> None:
    async def ask(section: Sql, password: str) -> str:
        database = Database(section, password)
        with pytest.raises(SqlError) as error:
            await database.rows("SELECT 1", {})
        await database.close()
        return str(error.value)

    assert "password authentication failed" in run(ask(Sql(database=server.url.replace(":secret", "")), "wrong"))
    assert str(tmp_path / "no.db") in run(ask(Sql(database=str(tmp_path / "no.db")), ""))
    assert not (tmp_path / "no.db").exists()


def test_check_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fastsmtp.toml"
    file.write_text(
        '[sql.file]\ndatabase = "no.db"\n'
        '[sql.server]\ndatabase = "postgresql://mail@db/mail"\npassword_file = "no.pw"\n'
    )
    found = [place for place, _ in check_machine(load(file))]
    assert ("sql", "file", "database") in found
    assert ("sql", "server", "password_file") in found
    assert ("sql", "server", "database") not in found
    monkeypatch.setitem(sys.modules, "psycopg", None)
    said = dict(check_machine(load(file)))
    assert "pip install 'fastsmtp-mta[postgresql]'" in said["sql", "server", "database"]
    assert "\n" not in said["sql", "server", "database"]
