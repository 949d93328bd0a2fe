"""What operators and the servers behind them do wrong: the answer to a client is the right one or 451, never another.

Servers that are asked for mailboxes and speak anything but SMTP; configurations and lists that are wrong, gone or
exchanged, with a reload in the midst of sessions, twice; queries that find what their author did not expect.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import apsw
import pytest
from peer import GoneError, Peer
from servers import Server, running, toml

NOT_CHECKED = "451 4.3.0 "


# Servers that are asked


def speaks_http(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def floods(client: socket.socket) -> None:
    client.sendall(b"220 hi\r\n")
    while True:
        client.sendall(b"250-" + b"x" * 500 + b"\r\n")


def has_no_lines(client: socket.socket) -> None:
    client.sendall(b"220 hi\r\n")
    while True:
        client.sendall(b"x" * 60_000)


def answers_before_it_is_asked(client: socket.socket) -> None:
    client.sendall(b"220 hi\r\n" + b"250 ok\r\n" * 9)
    client.recv(1000)


def echoes(client: socket.socket) -> None:
    client.sendall(b"220 hi\r\n")
    while octets := client.recv(1000):
        client.sendall(octets)


def is_busy(client: socket.socket) -> None:
    client.sendall(b"421 busy\r\n")


def wants_nobody(client: socket.socket) -> None:
    client.sendall(b"554 5.1.1 not you\r\n")
    client.recv(1000)


def answering(**answers: str) -> Callable[[socket.socket], None]:
    """Speaks LMTP but for some verbs; an empty answer is the end."""

    def serve(client: socket.socket) -> None:
        client.sendall(b"220 hi\r\n")
        for line in client.makefile("rb"):
            answer = answers.get(line[:4].decode().upper(), "250 ok")
            if not answer:
                return
            client.sendall(answer.encode() + b"\r\n")

    return serve


WRONG: dict[str, Callable[[socket.socket], None]] = {
    "http": speaks_http,
    "flood": floods,
    "line": has_no_lines,
    "early": answers_before_it_is_asked,
    "echo": echoes,
    "busy": is_busy,
    "nobody": wants_nobody,
    "greeting": answering(LHLO="550 5.1.1 no"),
    "sender": answering(MAIL="550 5.1.1 no such sender"),
    "end": answering(RCPT=""),
    "later": answering(RCPT="450 5.1.1 no"),
    "policy": answering(RCPT="550 5.7.1 no"),
    "two": answering(RCPT="250-5.1.1 one\r\n550 5.1.1 two"),
    "data": answering(RCPT="354 go ahead"),
    "letters": answering(RCPT="abc no"),
}


@contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port on which each client is served so."""

    def run(client: socket.socket) -> None:
        with client, suppress(OSError):
            client.settimeout(20)
            serve(client)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=run, args=(listening.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield int(listening.getsockname()[1])
        listening.shutdown(socket.SHUT_RDWR)


def test_what_is_no_answer_of_a_delivery_server_is_none(tmp_path: Path) -> None:
    domains, transports = "", ""
    with ExitStack() as stack:
        kinds = {**WRONG, "right": answering(RCPT="550 5.1.1 no"), "yes": answering()}
        for name, serve in kinds.items():
            port = stack.enter_context(serving(serve))
            recipients = f'{{ask = "{name}", timeout = "3s"}}'
            domains += f'[[domain]]\nname = "{name}.test"\nrecipients = {recipients}\ntransport = "{name}"\n'
            domains += 'catch_all = "ann@yes.test"\n' if name in WRONG else ""
            transports += f'[transport.{name}]\ntype = "lmtp"\naddress = "127.0.0.1:{port}"\n'
        server = stack.enter_context(running(tmp_path, toml(tmp_path, domains=domains, tables=transports)))
        with Peer(server.address) as peer:
            found = {}
            for name in kinds:
                found[name] = peer.envelope([f"ann@{name}.test"])[-1]
                peer.ask("RSET")
        assert found.pop("right").startswith("550 5.1.1 ")
        assert found.pop("yes").startswith("250 ")
        assert {name: answer[:10] for name, answer in found.items()} == dict.fromkeys(WRONG, NOT_CHECKED)
        assert len(server.wait_for("lookup-failed", len(WRONG))) == len(WRONG)


# Queries


@pytest.mark.parametrize(
    ("query", "known", "unknown"),
    [
        ("SELECT * FROM box WHERE local = :local", "250 2.1.5 ", "550 5.1.1 "),
        ("SELECT empty FROM box WHERE local = :local", NOT_CHECKED, "550 5.1.1 "),
        ("SELECT nothing FROM box WHERE local = :local", NOT_CHECKED, NOT_CHECKED),
        ("SELECT 1 WHERE :local = :local; DROP TABLE box", NOT_CHECKED, NOT_CHECKED),
        ("INSERT INTO box VALUES (:local, 1) RETURNING 1", NOT_CHECKED, NOT_CHECKED),
        (
            "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c WHERE :local = :local",
            NOT_CHECKED, NOT_CHECKED,
        ),
    ],
)  # fmt: skip
def test_queries_that_find_what_nobody_expected(tmp_path: Path, query: str, known: str, unknown: str) -> None:
    database = apsw.Connection(str(tmp_path / "users.db"))
    database.execute("CREATE TABLE box (local, empty); INSERT INTO box VALUES ('ann', NULL), ('ann', x'00ff')")
    database.close()
    domains = f'[[domain]]\nname = "a.test"\nrecipients = {{sql = "users", query = "{query}"}}\ntransport = "boxes"\n'
    domains += 'catch_all = "zoe@z.test"\n[[domain]]\nname = "z.test"\nrecipients = ["zoe"]\ntransport = "boxes"\n'
    if unknown != NOT_CHECKED:
        domains = domains.replace('catch_all = "zoe@z.test"\n', "")
    with (
        running(tmp_path, toml(tmp_path, domains=domains, tables='[sql.users]\ndatabase = "users.db"\n')) as server,
        Peer(server.address) as peer,
    ):
        answers = peer.envelope(["ann@a.test", "no@a.test", "'/**/OR/**/'1'='1@a.test"])[1:]
    assert [answer[:10] for answer in answers] == [known, unknown, unknown]


# Reloads


WANTED = {
    "ann@f.test": "250",
    "ann@s.test": "250",
    "no@f.test": "550",
    "no@s.test": "550",
    "team@f.test": "250",
    "x@else.test": "550",
}
BOXES = "ann\n" + "".join(f"u{n}\n" for n in range(200))
LISTS = """\
[sql.users]
database = "users.db"
[alias]
file = "aliases"
[inbound]
sessions_per_address = 100
exceptions = {file = "free"}
"""


def configured(folder: Path, more: str = "") -> str:
    domains = '[[domain]]\nname = "f.test"\nrecipients = {file = "boxes"}\ntransport = "boxes"\n'
    query = 'query = "SELECT 1 FROM box WHERE local = :local", known_for = "1s", unknown_for = "1s"'
    domains += f'[[domain]]\nname = "s.test"\nrecipients = {{sql = "users", {query}}}\ntransport = "boxes"\n'
    return toml(folder, workers=2, domains=domains, tables=LISTS + more)


def disturb(folder: Path, step: int) -> None:
    """What an operator may do next."""
    file, boxes, free = folder / "fastsmtp.toml", folder / "boxes", folder / "free"
    match step % 8:
        case 0:
            file.write_text(configured(folder, f'[[rule]]\nname = "r{step}"\nhelo = ["bad.test"]\naction = "refuse"\n'))
        case 1:
            file.write_text("nonsense = [")
        case 2:
            file.write_text(configured(folder, '[[rule]]\nclient = {file = "gone"}\naction = "refuse"\n'))
        case 3:
            boxes.write_text(f"{BOXES}a b\n")
        case 4:
            boxes.unlink()
        case 5:
            (folder / "new").write_text(f"{BOXES}v{step}\n")
            (folder / "new").rename(boxes)
            file.write_text(configured(folder))
        case 6:
            free.unlink()
            os.mkfifo(free)
        case 7:
            free.unlink()
            free.write_text("127.9.0.0/16\n")


def ask_on(address: str, number: int, is_over: threading.Event, heard: Tally[tuple[str, str]]) -> None:
    chance = random.Random(number)
    while not is_over.is_set():
        with suppress(GoneError), Peer(address, source=f"127.{chance.choice([1, 9])}.0.{number + 1}") as peer:
            for _ in range(5):
                recipient = chance.choice(list(WANTED))
                heard[recipient, peer.envelope([recipient])[-1][:3]] += 1
                peer.ask("RSET")


def test_reloads_and_lists_that_are_wrong_change_no_answer(tmp_path: Path) -> None:
    database = apsw.Connection(str(tmp_path / "users.db"))
    database.execute("CREATE TABLE box (local); INSERT INTO box VALUES ('ann')")
    database.close()
    (tmp_path / "boxes").write_text(BOXES)
    (tmp_path / "aliases").write_text("team: ann@f.test, ann@s.test\nowner-team: ann@f.test\n")
    (tmp_path / "free").write_text("127.9.0.0/16\n")
    heard = Tally[tuple[str, str]]()
    is_over = threading.Event()
    with running(tmp_path, configured(tmp_path)) as server:
        threads = [threading.Thread(target=ask_on, args=(server.address, n, is_over, heard)) for n in range(4)]
        for thread in threads:
            thread.start()
        try:
            play_operator(server, tmp_path)
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
        assert set(heard) == set(WANTED.items())
        assert server.events("worker-died") == []


def play_operator(server: Server, folder: Path) -> None:
    chance = random.Random(1)
    for step in range(1, 25):
        disturb(folder, step)
        for _ in range(chance.choice([1, 1, 2])):
            os.kill(server.pid, signal.SIGHUP)
        time.sleep(chance.random() * 0.3)
    disturb(folder, 5)
    before = len(server.events("reloaded"))
    os.kill(server.pid, signal.SIGHUP)
    server.wait_for("reloaded", before + 1)
    assert server.events("reload-refused")
