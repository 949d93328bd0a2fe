"""The measurement of TLS handshakes: small rounds against OpenSSL's s_server and a fastsmtp of two workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from needs import needs

from loadtest import LoadError, handshake
from loadtest.measurements import Bench
from loadtest.processes import fastsmtp, make_certificate


def test_a_round_gives_a_row(tmp_path: Path) -> None:
    needs("openssl")
    (row,) = handshake.full(Bench(tmp_path, 1, 20))
    assert row.name == "handshake"
    assert row.goal.required == 1.15
    assert 0 < row.values[0] < 20
    assert row.fastsmtp_us[0] > 0
    assert "s_server takes" in row.notes[0]


def test_sessions_resume_on_either_worker(tmp_path: Path) -> None:
    needs("openssl")
    with fastsmtp(tmp_path, "none", "discard", tls=True, workers=2) as server:
        handshake.shake_hands(server.port, 30, resume=True)


def test_a_session_that_is_not_resumed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("openssl")
    make_certificate(tmp_path)
    with handshake.s_server(tmp_path) as server:
        handshake.shake_hands(server.port, 3, resume=True)
        monkeypatch.setattr(handshake, "_take_what_comes", lambda _: None)  # nor any ticket
        with pytest.raises(LoadError, match="resumed nothing"):
            handshake.shake_hands(server.port, 3, resume=True)
