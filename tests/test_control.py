"""The sockets of a running worker: where they stand, who may connect, what they say to nonsense."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from queueing import blocked, rows, send_deferred
from servers import running, toml

from fastsmtp import local_socket
from fastsmtp.control import REQUEST_LIMIT


def ask(data_dir: Path, *lines: bytes) -> list[dict[str, Any]]:
    """The answers of worker 0, each up to its last line."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(30)
        local_socket.connect(connection, data_dir, local_socket.CONTROL, 0)
        answers = []
        with connection.makefile("rb") as said:
            for line in lines:
                connection.sendall(line + b"\n")
                while True:
                    answer = said.readline()
                    if not answer:
                        return answers
                    answers.append(json.loads(answer))
                    if answers[-1].keys() & {"done", "error"}:
                        break
        return answers


def test_nonsense_is_answered_and_the_connection_goes_on(tmp_path: Path) -> None:
    with running(tmp_path, toml(tmp_path)):
        requests: dict[bytes, str] = {
            b"": "JSON object",
            b"hello": "JSON object",
            b"[1]": "JSON object",
            b"\xff": "JSON object",
            b"{}": "None",
            b'{"do": "explode"}': "explode",
            b'{"do": ["list"]}': "list",
            b'{"do": "list", "state": "lost"}': "state",
            b'{"do": "list", "limit": "all"}': "limit",
            b'{"do": "list", "domain": 5}': "domain",
            b'{"do": "delete"}': "exactly one",
            b'{"do": "delete", "ids": [5]}': "no message id",
            b'{"do": "delete", "ids": ["x"], "everything": true}': "no message id",
            b'{"do": "hold", "everything": 1}': "wrong type",
            b"[" * 100_000: "JSON object",
            b'{"do": "list", "domain": "\\ud800"}': "surrogates",
        }
        answers = ask(tmp_path / "data", *requests, b'{"do": "hello"}')
        for answer, words in zip(answers, requests.values(), strict=False):
            assert list(answer) == ["error"]
            assert words in answer["error"]
        assert answers[-1] == {"done": {"workers": 1}}


def test_a_request_without_an_end_ends_the_connection(tmp_path: Path) -> None:
    with running(tmp_path, toml(tmp_path)) as server:
        try:
            answers = ask(tmp_path / "data", b"x" * (REQUEST_LIMIT + 10))
        except (BrokenPipeError, ConnectionResetError):
            answers = []
        assert answers == []
        assert ask(tmp_path / "data", b'{"do": "hello"}')
        server.check_bugs()


def test_who_may_connect(tmp_path: Path) -> None:
    with running(tmp_path, toml(tmp_path, workers=2)) as server:
        data = tmp_path / "data"
        modes = {
            str(path.relative_to(data)): stat.S_IMODE(path.stat().st_mode)
            for kind in ("control", "submit")
            for path in (data / kind, *(data / kind).iterdir())
        }
        assert modes == {
            "control": 0o700, "control/0": 0o600, "control/1": 0o600,
            "submit": 0o755, "submit/0": 0o666, "submit/1": 0o666,
        }  # fmt: skip
        assert server.stop() == 0
        assert not list((data / "control").iterdir()) + list((data / "submit").iterdir())


def test_a_data_directory_may_lie_deep(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 40)
    folder.mkdir()
    with blocked(folder) as server:
        ids = send_deferred(server, 1)
        assert len(os.fsencode(folder / "data" / "control" / "0")) > 107
        assert [row["id"] for row in rows(folder)] == ids


def test_a_socket_that_cannot_be_made_keeps_the_server_from_starting(tmp_path: Path) -> None:
    """Rather than a server that nobody can ask."""
    (tmp_path / "data" / "control" / "0").mkdir(parents=True)
    with pytest.raises(AssertionError, match="cannot-start"), running(tmp_path, toml(tmp_path)):
        pass
