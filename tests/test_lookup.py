"""Mailboxes that somebody else knows: what is remembered, who waits for whom, and real databases and servers asked."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from dovecot import DOMAIN as DOVECOT
from dovecot import dovecot
from peer import Peer
from postfix import DOMAIN as POSTFIX
from postfix import postfix
from postgresql import postgresql
from scripted import Logged, logged
from sending import sending, terms
from servers import running, toml

from fastsmtp.address import parse_address
from fastsmtp.config import ConfigError, Sql, SqlLookup, load
from fastsmtp.delivery.ahead import KEPT, Ahead, AheadError
from fastsmtp.domains import Found
from fastsmtp.lookups import Lookups
from fastsmtp.metrics import Counter
from fastsmtp.policy import lookup
from fastsmtp.policy.lookup import Asked, LookupFailedError
from fastsmtp.sql import Database
from loadtest.sink_plan import parse_answer
from loadtest.sink_server import Settings, Sink

KNOWN, UNKNOWN, TEMPFAIL = Found.KNOWN, Found.UNKNOWN, Found.TEMPFAIL
ANN = parse_address("Ann@x.test")


@pytest.fixture
def log() -> Iterator[Logged]:
    with logged() as made:
        yield made


class Source:
    """Knows what it is told; an answer is an exception, or comes when the gate opens."""

    def __init__(self, **answers: bool | Exception) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.gate: asyncio.Event | None = None

    async def __call__(self, address: Any) -> bool:
        self.asked.append(address.local)
        if self.gate is not None:
            await self.gate.wait()
        answer = self.answers[address.local.lower()]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(source: Source, log: Logged, clock: Clock | None = None, **options: Any) -> Asked:
    given = {"known_for": 60.0, "unknown_for": 10.0, "timeout": 5.0, "accepts": False, "folds": True, **options}
    return Asked("sql.users", source, log=log[0], now=clock or Clock(), **given)


async def ask(asked: Asked, text: str) -> Found:
    found = asked(parse_address(text))
    return found if isinstance(found, Found) else await found


def play(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_answers_are_remembered_and_refusals_for_less_time(log: Logged) -> None:
    async def test() -> None:
        clock, source = Clock(), Source(ann=True, bob=False)
        asked = make(source, log, clock)
        for _ in range(3):
            assert await ask(asked, "ann@x.test") is KNOWN
            assert await ask(asked, "bob@x.test") is UNKNOWN
        assert source.asked == ["ann", "bob"]
        assert asked(ANN) is KNOWN, "without waiting"
        clock.now += 10.1
        assert await ask(asked, "ann@x.test") is KNOWN
        assert await ask(asked, "bob@x.test") is UNKNOWN
        assert source.asked == ["ann", "bob", "bob"]
        clock.now += 50
        assert await ask(asked, "ann@x.test") is KNOWN
        assert source.asked == ["ann", "bob", "bob", "ann"]

    play(test)


@pytest.mark.parametrize(("folds", "times"), [(True, 1), (False, 2)])
def test_case_matters_where_the_domain_says_so(log: Logged, folds: bool, times: int) -> None:
    async def test() -> None:
        source = Source(ann=True)
        asked = make(source, log, folds=folds)
        for text in ("ann@x.test", "Ann@x.test", "ann@X.TEST"):
            assert await ask(asked, text) is KNOWN
        assert len(source.asked) == times

    play(test)


def test_many_who_ask_for_one_address_ask_once_and_nobody_waits_for_another(log: Logged) -> None:
    async def test() -> None:
        source = Source(ann=True, bob=False)
        source.gate = asyncio.Event()
        asked = make(source, log)
        waiting = [asyncio.create_task(ask(asked, "ann@x.test")) for _ in range(50)]
        await asyncio.sleep(0.01)
        waiting[0].cancel()
        gate, source.gate = source.gate, None
        assert await ask(asked, "bob@x.test") is UNKNOWN
        assert not any(task.done() for task in waiting[1:])
        gate.set()
        assert await asyncio.gather(*waiting[1:]) == [KNOWN] * 49
        assert source.asked == ["ann", "bob"]

    play(test)


@pytest.mark.parametrize(("accepts", "found", "answer"), [(False, TEMPFAIL, "deferred"), (True, KNOWN, "accepted")])
def test_what_fails_is_never_unknown_and_asked_again(log: Logged, accepts: bool, found: Found, answer: str) -> None:
    async def test() -> None:
        clock, source = Clock(), Source(ann=LookupFailedError("the database is down"))
        counted: list[int] = []
        asked = make(source, log, clock, accepts=accepts, count=lambda: counted.append(1))
        for _ in range(3):
            assert await ask(asked, "ann@x.test") is found
        assert len(source.asked) == len(counted) == 3
        clock.now += 10
        assert await ask(asked, "ann@x.test") is found
        source.answers["ann"] = False
        assert await ask(asked, "ann@x.test") is UNKNOWN
        lines = [line for line in log[1]() if line["event"] == "lookup-failed"]
        assert [(line["source"], line["to"], line["why"], line["answer"], line["failures"]) for line in lines] == [
            ("sql.users", "ann@x.test", "the database is down", answer, 1),
            ("sql.users", "ann@x.test", "the database is down", answer, 3),
        ]

    play(test)


def test_a_question_that_takes_too_long_fails(log: Logged) -> None:
    async def test() -> None:
        source = Source(ann=True)
        source.gate = asyncio.Event()
        asked = make(source, log, timeout=0.05)
        assert await ask(asked, "ann@x.test") is TEMPFAIL
        assert log[1]()[0]["why"] == "no answer within 0.05 s"
        source.gate.set()
        assert await ask(asked, "ann@x.test") is KNOWN

    play(test)


def test_a_bug_in_the_question_is_everybodys_who_waits_and_not_remembered(log: Logged) -> None:
    async def test() -> None:
        source = Source(ann=KeyError("bug"))
        asked = make(source, log)
        with pytest.raises(KeyError):
            await ask(asked, "ann@x.test")
        source.answers["ann"] = True
        assert await ask(asked, "ann@x.test") is KNOWN

    play(test)


def test_what_is_remembered_and_what_is_under_way_is_bounded(log: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "REMEMBERED", 100)
    monkeypatch.setattr(lookup, "UNDER_WAY", 20)

    async def test() -> None:
        names = [f"u{number}" for number in range(1000)]
        source = Source(**dict.fromkeys(names, True))
        asked = make(source, log)
        for name in names:
            assert await ask(asked, f"{name}@x.test") is KNOWN
        assert len(asked._young) + len(asked._old) <= 100
        for name in names[-50:]:
            assert asked(parse_address(f"{name}@x.test")) is KNOWN
        source.gate = asyncio.Event()
        waiting = [asyncio.create_task(ask(asked, f"{name}@x.test")) for name in names[:30]]
        await asyncio.sleep(0.01)
        source.gate.set()
        assert sorted(found.value for found in await asyncio.gather(*waiting)) == ["known"] * 20 + ["tempfail"] * 10

    play(test)


# What a query's rows mean


MEANINGS = [
    # (what is asked, what it means); {} is a table of ann with the quota 7 and bob with none
    ("SELECT 1 FROM {} WHERE local = :local", KNOWN),
    ("SELECT local FROM {} WHERE local = :local", KNOWN),
    ("SELECT quota FROM {} WHERE local = :local", KNOWN),
    ("SELECT -0.5 FROM {} WHERE local = :local", KNOWN),
    ("SELECT '0' FROM {} WHERE local = :local", KNOWN),  # text is text
    ("SELECT local = 'ann' FROM {} WHERE local = :local", KNOWN),
    ("SELECT * FROM {} WHERE local = :local", KNOWN),
    ("SELECT local, NULL, 0 FROM {} WHERE local = :local", KNOWN),
    ("SELECT 1 FROM {}, (SELECT 1 UNION ALL SELECT 2) AS twice WHERE local = :local", KNOWN),
    ("SELECT count(*) FROM {} WHERE local = :local", KNOWN),
    ("SELECT 1 FROM {} WHERE local = :local; -- done", KNOWN),
    ("SELECT 1 FROM {} WHERE local = :local || 'x'", UNKNOWN),
    ("SELECT local, quota FROM {} WHERE local = :local || 'x'", UNKNOWN),
    ("SELECT quota FROM {} WHERE :local <> '' AND local = 'bob'", TEMPFAIL),
    ("SELECT quota FROM {} WHERE :local <> ''", TEMPFAIL),  # 7 and NULL
    ("SELECT (SELECT 1 FROM {} WHERE local = :local || 'x')", TEMPFAIL),
    ("SELECT max(quota), min(quota) FROM {} WHERE local = :local || 'x'", TEMPFAIL),
    ("SELECT count(*) FROM {} WHERE local = :local || 'x'", TEMPFAIL),
    ("SELECT 0.0 FROM {} WHERE local = :local", TEMPFAIL),
    ("SELECT local = 'bob' FROM {} WHERE local = :local", TEMPFAIL),
    ("SELECT '' FROM {} WHERE local = :local", TEMPFAIL),
    ("SELECT '  ', NULL FROM {} WHERE local = :local", TEMPFAIL),
    ("SELECT 1 FROM {} WHERE local = :local; SELECT 1", TEMPFAIL),
    ("-- nothing", TEMPFAIL),
    ("SELECT nothing FROM {} WHERE local = :local", TEMPFAIL),
    ("DELETE FROM {} WHERE local = :local", TEMPFAIL),
]
OF_SQLITE = [
    ("SELECT x'00' FROM {} WHERE local = :local", KNOWN),
    ("SELECT x'' FROM {} WHERE local = :local", TEMPFAIL),
    ("SELECT CAST(x'ff41' AS TEXT) FROM {} WHERE local = :local", TEMPFAIL),  # no UTF-8
    ("PRAGMA foreign_keys = on", TEMPFAIL),
]
OF_POSTGRESQL = [
    ("SELECT '\\x00'::bytea FROM {} WHERE local = :local", KNOWN),
    ("SELECT current_date FROM {} WHERE local = :local", KNOWN),
    ("SELECT ''::bytea FROM {} WHERE local = :local", TEMPFAIL),
    ("SELECT ''::char(5) FROM {} WHERE local = :local", TEMPFAIL),  # five blanks
    ("SELECT 'infinity'::date FROM {} WHERE local = :local", TEMPFAIL),  # no such day in Python
    ("SELECT FROM {} WHERE local = :local", TEMPFAIL),
    ("SELECT 1 FROM {} WHERE quota = :local", TEMPFAIL),  # "ann" is no number
    ("SET application_name = 'x'", TEMPFAIL),
]


@pytest.fixture
def sqlite(tmp_path: Path) -> Sql:
    database = apsw.Connection(str(tmp_path / "mail.db"))
    database.execute("CREATE TABLE box (local TEXT, quota INTEGER); INSERT INTO box VALUES ('ann', 7), ('bob', NULL)")
    database.close()
    return Sql(database=str(tmp_path / "mail.db"))


@pytest.fixture
def postgres() -> Sql:
    sql = postgresql()
    sql.run(
        "DROP SCHEMA IF EXISTS test_rows CASCADE; CREATE SCHEMA test_rows;"
        "CREATE TABLE test_rows.box (local text, quota integer);"
        "INSERT INTO test_rows.box VALUES ('ann', 7), ('bob', NULL)"
    )
    return Sql(database=sql.url)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_row_is_a_mailbox_none_is_none_and_what_says_neither_has_failed(
    kind: str, request: pytest.FixtureRequest, log: Logged
) -> None:
    section: Sql = request.getfixturevalue(kind)
    table, more = ("box", OF_SQLITE) if kind == "sqlite" else ("test_rows.box", OF_POSTGRESQL)
    counted: list[tuple[Counter, int]] = []

    async def test() -> None:
        database = Database(section)
        lookups = Lookups({"users": database}, lambda _: pytest.fail("none"), log[0], lambda *one: counted.append(one))
        found, failed = {}, 0
        for query, meaning in (*MEANINGS, *more):
            for _ in range(2):  # also over a connection that is there, and knows the query
                asked = lookups.make(SqlLookup(sql="users", query=query.format(table)), False)
                answer = asked(parse_address("ann@x.test"))
                found[query] = answer if isinstance(answer, Found) else await answer
                assert found[query] is meaning, query
                failed += meaning is TEMPFAIL
        assert counted == [(Counter.LOOKUP_FAILED, 1)] * failed
        await database.close()

    play(test)
    why = {line["why"] for line in log[1]() if line["event"] == "lookup-failed"}
    assert "the query finds a row of nothing but NULL, false, 0 or blanks: is it a mailbox?" in why
    assert not [line for line in log[1]() if line["event"] == "bug"]


# Call-ahead by the dialogue of deliveries


@pytest.mark.parametrize("without", [(), ("PIPELINING",)])
@pytest.mark.parametrize("lmtp", [True, False])
def test_a_server_is_asked_over_kept_connections_and_gets_no_message(
    tmp_path: Path, without: tuple[str, ...], lmtp: bool
) -> None:
    async def test() -> None:
        answers = {
            "gone": "550 5.1.1 nobody", "full": "552 5.2.2 full", "plain": "550 no", "later": "450 4.2.1 later",
            "policy": "550 5.7.1 you may not", "loop": "554 5.4.6 loop",
        }  # fmt: skip
        rules = tuple(parse_answer(f"rcpt {name}@* {text}") for name, text in answers.items())
        settings = Settings(f"unix:{tmp_path}/socket", lmtp=lmtp, rules=rules, without=frozenset(without))
        async with (
            Sink(settings) as sink,
            sending(tmp_path / "socket", terms(lmtp=lmtp), limits=KEPT) as transport,
        ):
            server = Ahead(transport)
            for name in ("ann", "bob", "carl"):
                assert await server.ask(parse_address(f"{name}@x.test"))
            assert sink.counts.connections == 1
            for name in ("gone", "full", "plain"):
                assert not await server.ask(parse_address(f"{name}@x.test"))
            for name in ("later", "policy", "loop"):
                with pytest.raises(AheadError, match=answers[name]):
                    await server.ask(parse_address(f"{name}@x.test"))
            assert sink.counts.connections == 2, "eight questions over each"
            assert await asyncio.gather(*[server.ask(parse_address(f"u{n}@x.test")) for n in range(40)]) == [True] * 40
            assert sink.counts.connections <= 2 + 10 + 40 // 8
        assert sink.counts.messages == 0

    play(test)


def test_a_refused_null_sender_or_a_missing_server_is_no_answer(tmp_path: Path) -> None:
    async def test() -> None:
        settings = Settings(f"unix:{tmp_path}/socket", rules=(parse_answer("mail * 550 5.7.1 no bounces"),))
        async with Sink(settings), sending(tmp_path / "socket", limits=KEPT) as transport:
            with pytest.raises(AheadError, match="no bounces"):
                await Ahead(transport).ask(ANN)
        async with sending(tmp_path / "nothing", limits=KEPT) as transport:
            with pytest.raises(AheadError, match="No such file"):
                await Ahead(transport).ask(ANN)

    play(test)


# A whole server


def domain(name: str, recipients: str, transport: str = "boxes", more: str = "") -> str:
    return f'[[domain]]\nname = "{name}"\nrecipients = {recipients}\ntransport = "{transport}"\n{more}\n'


def answers(peer: Peer, *recipients: str) -> list[str]:
    """The codes of RCPT, in a transaction of their own."""
    found = [reply[:9] for reply in peer.envelope(list(recipients))[1:]]
    peer.ask("RSET")
    return found


OK, UNKNOWN_USER, LATER = "250 2.1.5", "550 5.1.1", "451 4.3.0"
QUERY = '"SELECT 1 FROM {} WHERE local = :local AND domain = :domain"'


def test_recipients_of_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "users.db"
    database = apsw.Connection(str(path))
    database.execute("CREATE TABLE box (local TEXT, domain TEXT); INSERT INTO box VALUES ('ann', 'x.test')")
    source = f'{{sql = "users", query = {QUERY.format("box")}, unknown_for = "0s"}}'
    odd = '{sql = "users", query = "SELECT (SELECT 1 FROM box WHERE local || domain = :local || :domain)"}'
    domains = domain("x.test", source) + domain("odd.test", odd)
    tables = f'[sql.users]\ndatabase = "{path}"\n'
    with running(tmp_path, toml(tmp_path, domains=domains, tables=tables)) as server:
        with Peer(server.address) as peer:
            assert answers(peer, "ann@x.test", "ANN@x.test", "bob@x.test", "postmaster@x.test") == [
                OK, OK, UNKNOWN_USER, OK,
            ]  # fmt: skip
            assert answers(peer, "bob@odd.test") == [LATER], "a row for everyone"
            assert server.wait_for("lookup-failed", to="bob@odd.test")
            database.execute("INSERT INTO box VALUES ('bob', 'x.test')")
            assert answers(peer, "bob@x.test") == [OK]
            assert peer.data(["Bob@x.test"], b"Subject: x\r\n\r\nx\r\n").startswith("250 ")
        server.wait_mail(1)


def test_recipients_of_postgresql_that_goes_and_comes(tmp_path: Path) -> None:
    sql = postgresql()
    sql.run(
        "DROP SCHEMA IF EXISTS test_lookup CASCADE; CREATE SCHEMA test_lookup;"
        "CREATE TABLE test_lookup.box (local text, domain text); INSERT INTO test_lookup.box VALUES ('ann', 'x.test')"
    )
    source = f'sql = "users", query = {QUERY.format("test_lookup.box")}, known_for = "0s", unknown_for = "0s"'
    domains = (
        domain("x.test", f"{{{source}}}")
        + domain("kind.test", f'{{{source}, on_failure = "accept"}}')
        + domain("other.test", '"any"')
    )
    (tmp_path / "password").write_text("secret\n")
    url = sql.url.replace(":secret", "")
    tables = f'[sql.users]\ndatabase = "{url}"\npassword_file = "password"\ntimeout = "2s"\n'
    everybody = ("ann@x.test", "bob@x.test", "ann@kind.test", "ann@other.test")
    with running(tmp_path, toml(tmp_path, domains=domains, tables=tables)) as server, Peer(server.address) as peer:
        assert answers(peer, *everybody) == [OK, UNKNOWN_USER, UNKNOWN_USER, OK]
        sql.stop()
        try:
            assert answers(peer, *everybody) == [LATER, LATER, OK, OK]
        finally:
            sql.start()
        refused = server.wait_for("refused", reason="recipient-not-checked")
        assert {line["to"] for line in refused} == {"ann@x.test", "bob@x.test"}
        assert server.wait_for("lookup-failed", source="sql.users")
        time.sleep(1.1)
        assert answers(peer, *everybody) == [OK, UNKNOWN_USER, UNKNOWN_USER, OK]
        with sql.frozen(), Peer(server.address) as other:
            peer.ask("MAIL FROM:<>")
            peer.send(b"RCPT TO:<ann@x.test>\r\n")
            begun = time.monotonic()
            assert answers(other, "ann@other.test") == [OK], "a slow look-up delays nobody else"
            assert other.data(["ann@other.test"], b"Subject: x\r\n\r\nx\r\n").startswith("250 ")
            quick = time.monotonic() - begun
            assert peer.reply()[:9] == LATER
            assert time.monotonic() - begun > quick


def test_dovecot_is_asked_by_lmtp(tmp_path: Path) -> None:
    with dovecot({"ann": "", "full": "1"}) as boxes:
        tables = f'[transport.dovecot]\ntype = "lmtp"\naddress = "unix:{boxes.folder}/lmtp"\n'
        domains = domain(DOVECOT, '{ask = "dovecot", unknown_for = "0s"}', "dovecot")
        with running(tmp_path, toml(tmp_path, domains=domains, tables=tables)) as server:
            with Peer(server.address) as peer:
                asked = [f"{name}@{DOVECOT}" for name in ("ann", "bob", "ann", "carl")]
                assert answers(peer, *asked) == [OK, UNKNOWN_USER, OK, UNKNOWN_USER]
                assert peer.data([f"ann@{DOVECOT}"], b"Subject: x\r\n\r\nx\r\n").startswith("250 ")
            server.wait_for("relayed")


def test_postfix_is_asked_by_smtp(tmp_path: Path) -> None:
    refused = {f"u{number}": itertools.repeat("550 5.1.1 no such user") for number in range(30)}
    with postfix(answers={**refused, "late": ["450 4.2.0 later"]}) as boxes:
        tables = (
            f'[transport.postfix]\ntype = "smtp"\nsmarthost = "127.0.0.1:{boxes.port}"\ntls = "off"\n'
            "[dns]\nallow_loopback = true\n"
        )
        domains = domain(POSTFIX, '{ask = "postfix"}', "postfix")
        with (
            running(tmp_path, toml(tmp_path, domains=domains, tables=tables)) as server,
            Peer(server.address) as peer,
        ):
            found = answers(peer, *[f"u{number}@{POSTFIX}" for number in range(30)])
            assert set(found) == {UNKNOWN_USER}, "more than its smtpd_hard_error_limit"
            assert answers(peer, f"late@{POSTFIX}") == [LATER]
            assert answers(peer, f"late@{POSTFIX}", f"ann@{POSTFIX}") == [OK, OK]


@pytest.mark.parametrize(
    ("recipients", "said"),
    [
        ('{sql = "userz", query = "SELECT 1 FROM t WHERE a = :address"}', "there is no [sql.userz]; did you mean"),
        ('{sql = "users", query = "SELECT 1"}', "a query that asks for :local and :domain"),
        ('{ask = "dovekot"}', "there is no [transport.dovekot]"),
        ('{ask = "boxes"}', "[transport.boxes] is of type maildir"),
        ('{ask = "boxes", on_failure = "refuse"}', 'on_failure is "defer" or'),
        ('{ask = "boxes", known_for = "1m", unknown_for = "2m"}', "unknown_for is no longer than known_for"),
        ('{ask = "boxes", timeout = "1h"}', "timeout is less than 30s"),
        ('{ask = "boxes", cache = "1h"}', "cache is not known here"),
        ("{ask = 5}", "ask is text"),
    ],
)
def test_a_wrong_source_is_found_in_the_configuration(tmp_path: Path, recipients: str, said: str) -> None:
    tables = '[sql.users]\ndatabase = "users.db"\n'
    file = tmp_path / "fastsmtp.toml"
    file.write_text(toml(tmp_path, domains=domain("x.test", recipients), tables=tables))
    with pytest.raises(ConfigError) as error:
        load(file)
    assert said in str(error.value)
