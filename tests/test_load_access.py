"""Refused connections beside good clients, and what lists cost, small: counts are asserted, figures are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from needs import needs

from loadtest import LoadError, access
from loadtest.measurements import Bench


def test_refused_connections_beside_good_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "QUIET_SECONDS", 0.5)
    (row,) = access.refused(Bench(tmp_path, rounds=1, messages=1000))
    assert row.values[0] > 0
    assert row.rates[0] > 0
    assert "refused connections a second" in row.notes[0]


def test_a_connection_that_is_let_in_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(access, "ONE_EACH", access.PLAIN)
    with pytest.raises(LoadError, match=r"200 connections were to be refused, they heard \{'220': 200\}"):
        access.refused(Bench(tmp_path, rounds=1, messages=200))


def test_the_cost_of_lists_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("smtp-source")
    monkeypatch.setenv("ACCESS_NETWORKS", "1000")
    monkeypatch.setenv("ACCESS_MAILBOXES", "1000")
    rows = access.access(Bench(tmp_path, rounds=1, messages=500))
    assert [row.name for row in rows] == ["access", "access-connection"]
    for row in rows:
        assert len(row.values) == 1
        assert row.fastsmtp_us[0] > 0
        assert row.goal.required == 5
        assert "1,000 networks, 1,000 mailboxes" in row.notes[0]
