"""What the Authority costs: questions in, verdicts out, a users file of 10,000 lines; no sockets, no TLS.

A password that is remembered and one that is not (which is argon2's time, in a thread), the keys of SCRAM with their
proof, and what a change of the file costs at the next login. Refusals are not here: they wait a second on purpose.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from inspect import isawaitable
from pathlib import Path
from typing import Any

import pytest

from fastsmtp._shared import Shared
from fastsmtp.config_values import Rate
from fastsmtp.credentials import Authority
from fastsmtp.credentials.directory import Directory
from fastsmtp.credentials.file import HEADER, Users
from fastsmtp.credentials.guessing import Guessing
from fastsmtp.credentials.hashes import Hashes, hash_password
from fastsmtp.credentials.scram import make_keys, render_keys
from fastsmtp.log import Log
from fastsmtp.metrics import Counter
from fastsmtp.verdict import Ask, Client, Password, Proved, Question, ScramKeys, Stage, Verdict

USERS = 10_000
Ready = Callable[[float], Authority]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("auth") / "users"
    kept = f"{hash_password('secret')}:{render_keys(make_keys('secret'))}:@x.test"
    path.write_text("\n".join([HEADER, *(f"user{n}@x.test:{kept}" for n in range(USERS))]) + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def authority(file: Path) -> Iterator[Ready]:
    """Made for so many seconds of memory."""
    sink = os.open(os.devnull, os.O_WRONLY)
    log = Log(sink, False, time.time, threaded=False)
    hashes = Hashes()

    def make(cache: float) -> Authority:
        users = Users(file, "")
        users.load()
        shared = Shared(1, len(Counter))
        guessing = Guessing(shared, Rate(10, 600.0), Rate(20, 3600.0), lambda _: False, time.monotonic)
        return Authority([Directory(users, hashes, b"s" * 32)], guessing, cache=cache, log=log)

    yield make
    hashes.close()
    log.close()
    os.close(sink)


def ask(question: Question) -> Ask:
    return Ask(Stage.AUTH, Client("192.0.2.1", 1, "127.0.0.1:587"), question=question)


RIGHT = ask(Password("user77@x.test", "secret"))


async def answer(authority: Authority, question: Ask) -> Verdict:
    """Of a question that cannot be answered at once."""
    verdict = authority(question)
    assert isawaitable(verdict), verdict
    return await verdict


def bench_password_remembered(benchmark: Any, authority: Ready) -> None:
    one = authority(60.0)

    asyncio.run(answer(one, RIGHT))
    benchmark(one, RIGHT)


def bench_password(benchmark: Any, authority: Ready) -> None:
    one = authority(0)

    with asyncio.Runner() as runner:
        benchmark.pedantic(lambda: runner.run(answer(one, RIGHT)), rounds=50, warmup_rounds=2)


def bench_scram(benchmark: Any, authority: Ready) -> None:
    """On a loop that runs: 100 in a round, of which the time of one is shown."""
    one = authority(0)
    keys = ask(ScramKeys("user77@x.test"))

    async def login() -> None:
        for _ in range(100):
            given = await answer(one, keys)
            one(ask(Proved("user77@x.test", True, given.paid)))

    with asyncio.Runner() as runner:
        benchmark.pedantic(lambda: runner.run(login()), rounds=30, warmup_rounds=2)
    benchmark.extra_info["µs each"] = round(benchmark.stats.stats.median * 1e4, 1)


def bench_file_that_changed(benchmark: Any, file: Path) -> None:
    users = Users(file, "")
    benchmark(users.load)
