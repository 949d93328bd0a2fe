"""Users of a real Dovecot; and of scripted ones, for what a real one seldom does."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from authority import Bench, client
from dovecot import Dovecot as RealDovecot
from dovecot import dovecot

from fastsmtp.credentials import Account, Denied, UnavailableError
from fastsmtp.credentials.dovecot import Dovecot, render_request
from fastsmtp.verdict import Client, Identity, Password

USERS = {"ann@x.test": "correct horse", "big": "x" * 100}


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60.0))


# The real one


@pytest.fixture(scope="module")
def server() -> Iterator[RealDovecot]:
    with dovecot({}, passwords=USERS) as running:
        yield running


def test_right_and_wrong_passwords(server: RealDovecot) -> None:
    async def test() -> None:
        store = Dovecot(server.auth, 20.0, "here.test")
        bench = Bench([store], cache=0)
        questions = [
            Password("ann@x.test", "correct horse"),
            Password("ANN@x.test", "correct horse"),
            Password("ann@x.test", "wrong"),
            Password("eve@x.test", "correct horse"),
            Password("big", "x" * 100),
            Password("ann@x.test", "correct horse\t"),
            Password("ann@x.test\tuser=big", "correct horse"),
        ]
        words = await bench.words(*questions)
        assert words == [
            *["authenticated"] * 2, *["bad-credentials"] * 2, "authenticated", *["bad-credentials"] * 2
        ]  # fmt: skip
        verdict = await bench.ask(Password("Big", "x" * 100))
        rights = bench.authority.rights("big")
        assert verdict.user == "big"
        assert getattr(rights, "addresses", None) == {"big@here.test"}
        assert bench.authority.mechanisms == {"PLAIN", "LOGIN"}
        assert bench.lines == []
        await bench.authority.close()

    run(test)


def test_many_at_once_over_one_connection(server: RealDovecot) -> None:
    async def test() -> None:
        store = Dovecot(server.auth, 20.0, "")
        asks = [
            store.check(Password("ann@x.test", "correct horse" if n % 2 else f"wrong{n}"), client()) for n in range(40)
        ]
        answers = await asyncio.gather(*asks)
        assert [isinstance(answer, Account) for answer in answers] == [bool(n % 2) for n in range(40)]
        # A password longer than its line would end the connection, and with it what others have asked.
        both = await asyncio.gather(
            store.check(Password("ann@x.test", "x" * 13_000), client()),
            store.check(Password("ann@x.test", "correct horse"), client(ip="", tls="")),
        )
        assert both[0] == Denied()
        assert isinstance(both[1], Account)
        await store.close()

    run(test)


def test_two_connections_of_one_process(server: RealDovecot) -> None:
    """As there are for a while after a reload."""

    async def test() -> None:
        one, other = Dovecot(server.auth, 20.0, ""), Dovecot(server.auth, 20.0, "")
        right = Password("ann@x.test", "correct horse")
        for store in (one, other):
            assert isinstance(await store.check(right, client()), Account)
        lines = one._line, other._line
        for store in (one, other):
            assert isinstance(await store.check(right, client()), Account)
        assert lines == (one._line, other._line)
        assert "BUG" not in server.log()
        await one.close()
        await other.close()

    run(test)


def test_dovecot_ends_and_comes_again(server: RealDovecot, tmp_path: Path) -> None:
    async def test() -> None:
        link = tmp_path / "auth"
        link.symlink_to(server.auth)
        right = Password("ann@x.test", "correct horse")
        bench = Bench([Dovecot(link, 20.0, "")], cache=0)
        assert await bench.words(right, right) == ["authenticated"] * 2
        link.unlink()
        for pid in _auth(server):
            os.kill(pid, signal.SIGKILL)
        assert await bench.words(right, right) == ["auth-unavailable"] * 2
        link.symlink_to(server.auth)
        assert await bench.words(right, right) == ["authenticated"] * 2
        assert [line[0] for line in bench.lines] == ["auth-trouble", "auth-well"]
        # And between two questions: nobody notices.
        for pid in _auth(server):
            os.kill(pid, signal.SIGKILL)
        assert await bench.words(right, right) == ["authenticated"] * 2
        await bench.authority.close()

    run(test)


def test_a_dovecot_that_stands_still(server: RealDovecot) -> None:
    async def test() -> None:
        store = Dovecot(server.auth, 0.5, "")
        right = Password("ann@x.test", "correct horse")
        assert isinstance(await store.check(right, client()), Account)
        auth = _auth(server)
        for pid in auth:
            os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(UnavailableError, match=r"no answer within 0\.5 s"):
                await store.check(right, client())
        finally:
            for pid in auth:
                os.kill(pid, signal.SIGCONT)
        store = Dovecot(server.auth, 20.0, "")
        assert isinstance(await store.check(right, client()), Account)
        await store.close()

    run(test)


def _auth(server: RealDovecot) -> list[int]:
    """The processes that answer."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    found = [int(pid) for pid in children if b"dovecot/auth" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert found
    return found


# Scripted ones

GREETING = b"VERSION\t1\t2\nMECH\tPLAIN\tplaintext\nSPID\t1\nCUID\t1\nCOOKIE\t0\nDONE\n"


class Scripted:
    """Answers a request, whose number is {}, with the next of `answers`; None: it ends the connection."""

    def __init__(self, answers: list[bytes | None], greeting: bytes) -> None:
        self.answers = answers
        self.greeting = greeting
        self.requests: list[list[str]] = []
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.write(self.greeting)
        with suppress(ConnectionError):
            while line := await reader.readline():
                words = line.decode().rstrip("\n").split("\t")
                self.requests.append(words)
                if words[0] == "AUTH":
                    answer = self.answers.pop(0)
                    if answer is None:
                        break
                    writer.write(answer.replace(b"{}", words[1].encode()))
        writer.close()


@asynccontextmanager
async def scripted(tmp_path: Path, *answers: bytes | None, greeting: bytes = GREETING):  # type: ignore[no-untyped-def]
    server = Scripted(list(answers), greeting)
    listening = await asyncio.start_unix_server(server.serve, tmp_path / "auth")
    store = Dovecot(tmp_path / "auth", 5.0, "here.test")
    try:
        yield server, store
    finally:
        await store.close()
        listening.close()


RIGHT = Password("Ann", "secret")


def test_what_is_said(tmp_path: Path) -> None:
    async def test() -> None:
        async with scripted(tmp_path, b"OK\t{}\tuser=ann@y.test\tx\n") as (server, store):
            answer = await store.check(RIGHT, client("2001:db8::1"))
            version, process, request = server.requests
            assert version == ["VERSION", "1", "2"]
            assert process[0] == "CPID"
            assert 0 < int(process[1]) < 2**31
            assert request[:-1] == [
                "AUTH", "1", "PLAIN", "service=smtp", "rip=2001:db8::1", "lip=127.0.0.1", "secured"
            ]  # fmt: skip
            assert b64decode(request[-1].removeprefix("resp=")) == b"\0Ann\0secret"
            assert isinstance(answer, Account)
            assert (answer.name, answer.rights.addresses) == ("ann@y.test", {"ann@y.test"})

    run(test)


def test_nothing_of_a_client_breaks_out_of_its_place() -> None:
    hostile = Client("::1%a\tnologin\n", 1, "[::]:587")
    assert render_request(RIGHT, hostile).split("\t")[:-1] == ["PLAIN", "service=smtp", "rip=::1%a\x01tnologin\x01n"]
    local = Client("", 0, "unix:/run/x")
    assert render_request(RIGHT, local).split("\t")[:-1] == ["PLAIN", "service=smtp"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"FAIL\t{}\tuser=ann\n", Denied()),
        (b"FAIL\t{}\tuser=ann\tcode=user_disabled\n", Denied()),
        (b"CONT\t{}\t\n", Denied()),
        (b"OK\t99\tuser=eve\nFAIL\t98\nrubbish\n\nFAIL\t{}\n", Denied()),
        (b"FAIL\t{}\ttemp\n", "a failure of its own"),
        (b"FAIL\t{}\tcode=temp_fail\treason=the\x01tdatabase\n", "the\tdatabase"),
    ],
)
def test_answers(tmp_path: Path, answer: bytes, expected: Denied | str) -> None:
    async def test() -> None:
        async with scripted(tmp_path, answer) as (_, store):
            if isinstance(expected, Denied):
                assert await store.check(RIGHT, client()) == expected
            else:
                with pytest.raises(UnavailableError, match=expected):
                    await store.check(RIGHT, client())

    run(test)


def test_a_broken_connection_is_made_anew_once(tmp_path: Path) -> None:
    async def test() -> None:
        ok = b"OK\t{}\tuser=ann\n"
        async with scripted(tmp_path, ok, None, ok, None, None, ok) as (server, store):
            assert isinstance(await store.check(RIGHT, client()), Account)
            first = store._line
            assert isinstance(await store.check(RIGHT, client()), Account)
            assert server.connections == 2
            assert first._writer.is_closing()
            with pytest.raises(UnavailableError, match="the connection ended without an answer"):
                await store.check(RIGHT, client())
            assert isinstance(await store.check(RIGHT, client()), Account)
            # Each says that it is another one, as the protocol wants it.
            names = {words[1] for words in server.requests if words[0] == "CPID"}
            assert len(names) == server.connections == 4

    run(test)


@pytest.mark.parametrize(
    ("greeting", "problem"),
    [
        (b"VERSION\t2\t0\nMECH\tPLAIN\nDONE\n", "it speaks version 2.0"),
        (b"VERSION\t1\t2\nMECH\tCRAM-MD5\nDONE\n", "it takes no PLAIN"),
        (b"x" * 40_000, r"chunk exceed|longer than|found"),
    ],
)
def test_greetings_that_are_none(tmp_path: Path, greeting: bytes, problem: str) -> None:
    async def test() -> None:
        async with scripted(tmp_path, greeting=greeting) as (_, store):
            with pytest.raises(UnavailableError, match=problem):
                await store.check(RIGHT, client())

    run(test)


def test_a_server_that_never_greets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsmtp.credentials.dovecot.CONNECT_SECONDS", 0.2)

    async def test() -> None:
        async with scripted(tmp_path, greeting=b"VERSION\t1\t2\n") as (_, store):
            begun = time.monotonic()
            with pytest.raises(UnavailableError, match="no greeting"):
                await store.check(RIGHT, client())
            assert time.monotonic() - begun < 4.0

    run(test)


def test_no_socket(tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(UnavailableError, match="No such file"):
            await Dovecot(tmp_path / "none", 5.0, "").check(RIGHT, client())
        assert await Dovecot(tmp_path / "none", 5.0, "").check(Identity("ann"), client()) == Denied()

    run(test)
