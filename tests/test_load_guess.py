"""Guesses while users send, small: counts are asserted, figures are not."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest import LoadError, guess
from loadtest.measurements import Bench
from loadtest.processes import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with guess.submission_server(tmp_path) as server:
        yield server


def test_guesses_are_answered_and_users_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guess, "QUIET_SECONDS", 0.5)
    monkeypatch.setattr(guess, "ADDRESSES", 3)
    (row,) = guess.guesses(Bench(tmp_path, rounds=1, messages=66))
    assert row.values[0] > 0
    (note,) = row.notes
    assert "66 guesses in" in note
    assert "× 235" not in note
    # Of each address ten are looked at, in sessions of three; then nothing is, until there is room again.
    answers = {code: int(count) for count, code in re.findall(r"(\d+) × (\d{3})", note)}
    assert sum(answers.values()) == 66
    assert 10 <= answers["535"] <= 30
    assert answers["454"] > 20


def test_a_guess_that_is_right_is_an_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def log_in(session: guess.Session, user: str, password: str) -> int:
        return 235

    monkeypatch.setattr(guess.Session, "log_in", log_in)
    load = guess.Load(server.port, 1)
    with pytest.raises(LoadError, match="a wrong password was taken"):
        asyncio.run(load.guess("127.0.1.1", 0))


def test_a_user_who_is_refused_is_an_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guess, "PASSWORD", "another")
    with pytest.raises(LoadError, match=r"answered \[535, 530"):
        asyncio.run(guess.send_for(guess.Load(server.port, 0), 0.1))
