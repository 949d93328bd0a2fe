"""ETRN and ATRN with real server processes, several workers, and a server that comes for its mail.

`Home` is that server: it connects, says ATRN, and is the SMTP server of the same connection from then on. It answers as
a script says, keeps what it took, and may break off wherever a test wants.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from peer import GoneError, Peer
from queueing import queue, rows, send
from servers import LISTENER, Server, running, toml
from test_starttls import write_certificate

from fastsmtp import odmr as odmr_module
from fastsmtp.customers import narrow
from fastsmtp.log import Log
from fastsmtp.odmr import QUIT, Bringer, TakenError, Turn, claim_all

DOMAINS = """
[[domain]]
name = "home.test"
recipients = "any"
transport = "ondemand"
[[domain]]
name = "*.home.test"
recipients = "any"
transport = "ondemand"
[[domain]]
name = "far.test"
recipients = "any"
transport = "ondemand"
[[domain]]
name = "here.test"
recipients = "any"
transport = "boxes"
"""
TABLES = """
[transport.ondemand]
type = "odmr"
[[customer]]
networks = ["127.0.0.1"]
domains = ["home.test", "*.home.test", "here.test"]
queue = "home"
[[customer]]
networks = ["192.0.2.1"]
domains = ["far.test"]
"""
POSTMASTER = 'postmaster = "ann@here.test"'  # whose mail is not fetched
ODMR = '[[listener]]\naddress = "127.0.0.1:0"\nrole = "odmr"\n'
LISTENERS = LISTENER + ODMR


@contextmanager
def provider(
    folder: Path, workers: int = 1, *, top: str = POSTMASTER, tables: str = TABLES, listeners: str = LISTENERS
) -> Iterator[Server]:
    configuration = toml(folder, workers=workers, top=top, listeners=listeners, domains=DOMAINS, tables=tables)
    with running(folder, configuration) as server:
        yield server


def odmr(server: Server) -> str:
    return server.addresses()[1]


def send_waiting(server: Server, n: int, domain: str = "home.test") -> list[str]:
    """Mail that waits for its server; all of it was put off once."""
    ids = [send(server, [f"box@{domain}"], b"Subject: %d\r\n\r\nQUIT\r\n" % number) for number in range(n)]
    for message_id in ids:
        server.wait_for("deferred", id=message_id)
    return ids


class Taken(NamedTuple):
    recipients: list[str]
    octets: bytes


class Home:
    """A connection whose roles turn; `answers` replaces replies, by verb ("." for the end of data)."""

    def __init__(self, peer: Peer, answers: dict[str, Callable[[int], str]] | None = None) -> None:
        self.peer = peer
        self.taken: list[Taken] = []
        self.heard: list[str] = []
        self._answers = answers or {}
        self._counts: dict[str, int] = {}
        self._file = peer.socket.makefile("rb")

    def say(self, text: str) -> None:
        self.peer.send(text.encode() + b"\r\n")

    def serve(self, greeting: str = "220 home.test") -> str:
        """Until QUIT ("quit"), or the connection is gone ("gone")."""
        self.say(greeting)
        recipients: list[str] = []
        try:
            while line := self._file.readline():
                verb = line.split()[0].decode().upper()
                self.heard.append(line.decode().strip())
                if verb in ("EHLO", "MAIL"):
                    recipients = []
                usual = {"DATA": "354 go" if recipients else "554 for nobody", "QUIT": "221 bye"}.get(verb, "250 ok")
                said = self._answer(verb, usual)
                if said == "hang up":
                    return self._hang_up()
                if verb == "RCPT" and said.startswith("250"):
                    recipients.append(line.decode().split("<")[1].split(">")[0])
                self.say(said)
                if verb == "QUIT":
                    return "quit"
                if said.startswith("354"):
                    octets = b""
                    while (line := self._file.readline()) != b".\r\n":
                        assert line, "gone in the midst of a message"
                        octets += line.removeprefix(b".")
                    said = self._answer(".", "250 taken")
                    if said == "hang up":
                        return self._hang_up()
                    if said.startswith("250"):
                        self.taken.append(Taken(recipients, octets))
                    self.say(said)
                    recipients = []
        except (ConnectionResetError, GoneError):
            pass
        return "gone"

    def _hang_up(self) -> str:
        self.peer.socket.shutdown(socket.SHUT_RDWR)
        return "hung up"

    def _answer(self, verb: str, usual: str) -> str:
        count = self._counts[verb] = self._counts.get(verb, 0) + 1
        return self._answers[verb](count) if verb in self._answers else usual


EHLO = {"EHLO": lambda _: "250-home.test\r\n250-PIPELINING\r\n250-CHUNKING\r\n250-8BITMIME\r\n250 SIZE 1000000"}


def fetch(server: Server, command: str = "ATRN home.test", **answers: Callable[[int], str]) -> tuple[Home, str]:
    with Peer(odmr(server)) as peer:
        assert peer.ask(command).startswith("250 ")
        home = Home(peer, {**EHLO, **answers})
        return home, home.serve()


# ATRN


def test_a_server_comes_for_its_mail(tmp_path: Path) -> None:
    """Whichever worker has it; more than go over one session, to two domains."""
    with provider(tmp_path, 3) as server:
        send_waiting(server, 25)
        send_waiting(server, 5, "a.home.test")
        send_waiting(server, 1, "far.test")
        home, end = fetch(server, "ATRN home.test,A.home.test")
        assert end == "quit"
        assert sorted(each.recipients for each in home.taken) == [["box@a.home.test"]] * 5 + [["box@home.test"]] * 25
        numbers = [int(match[1]) for each in home.taken if (match := re.search(rb"Subject: (\d+)", each.octets))]
        assert sorted(numbers) == sorted([*range(25), *range(5)])
        assert all(each.octets.endswith(b"\r\n\r\nQUIT\r\n") for each in home.taken)
        assert [line for line in home.heard if line == "QUIT"] == ["QUIT"]
        assert not [line for line in home.heard if line.startswith("BDAT")]
        assert [row["recipients"][0]["domain"] for row in rows(tmp_path)] == ["far.test"]
        (turned,) = server.wait_for("turned")
        assert (turned["client"], turned["domains"], turned["end"]) == (
            "127.0.0.1", ["home.test", "a.home.test"], "done"
        )  # fmt: skip
        server.wait_for("session", end="turned")
        server.wait(lambda: len(server.events("relayed", host="home.test")) == 25, "the log of all workers")
        assert list((tmp_path / "data" / "turned").glob("*[!k]")) == []


def test_without_domains_all_that_are_its_own(tmp_path: Path) -> None:
    with provider(tmp_path, 2) as server:
        send_waiting(server, 1)
        send_waiting(server, 2, "b.home.test")
        send_waiting(server, 1, "far.test")
        home, end = fetch(server, "ATRN")
        assert (end, len(home.taken)) == ("quit", 3)
        with Peer(odmr(server)) as peer:
            assert peer.ask("ATRN").startswith("453 ")


def test_over_tls(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    octets = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key.pem").write_bytes(octets)
    write_certificate(tmp_path / "cert.pem", key, "mx.here.test")
    tls = '[tls]\ncertificate = "cert.pem"\nkey = "key.pem"\n'
    implicit = LISTENERS + '[[listener]]\naddress = "127.0.0.1:0"\nrole = "odmr"\ntls = "implicit"\n'
    with provider(tmp_path, tables=TABLES + tls, listeners=implicit) as server:
        for number in range(2):
            send_waiting(server, 2)
            address = server.addresses()[1 + number]
            with Peer(address, implicit_tls=bool(number)) as peer:
                if not number:
                    peer.start_tls()
                    assert "ATRN" in peer.ask("EHLO home.test")
                assert peer.ask("ATRN").startswith("250 ")
                home = Home(peer, EHLO)
                assert (home.serve(), len(home.taken)) == ("quit", 2)


def test_all_or_nothing(tmp_path: Path) -> None:
    with provider(tmp_path) as server:
        send_waiting(server, 1)
        with Peer(odmr(server)) as peer:
            assert peer.ask("ATRN home.test,far.test").startswith("450 ")
            assert peer.ask("ATRN else.test").startswith("450 ")
            assert peer.ask("ATRN here.test").startswith("450 "), "its mail is delivered, not fetched"
            assert peer.ask("ATRN c.home.test").startswith("453 ")
            assert peer.ask("ATRN -").startswith("501 ")
            assert peer.ask("ATRN home.test,").startswith("501 ")
            assert peer.ask("NOOP").startswith("250 ")
        with Peer(odmr(server)) as peer:
            peer.send(b"ATRN home.test\r\n220 home.test\r\n")
            assert peer.ended(), "it did not wait for its turn"
        with Peer(odmr(server)) as peer:
            assert peer.ask("ATRN home.test").startswith("250 "), "and nothing is left of it"


def test_one_connection_at_a_time(tmp_path: Path) -> None:
    with provider(tmp_path, 2) as server:
        send_waiting(server, 1)
        with Peer(odmr(server)) as first, Peer(odmr(server)) as second:
            assert first.ask("ATRN home.test").startswith("250 ")
            assert second.ask("ATRN home.test").startswith("450 ")
            home = Home(first, EHLO)
            assert home.serve() == "quit"
            server.wait_for("turned")
            assert second.ask("ATRN home.test").startswith("453 ")


def retry_at_once(server: Server) -> list[Taken]:
    """What a second ATRN fetches."""
    home, end = fetch(server)
    assert end == "quit"
    return home.taken


BREAKS: dict[str, dict[str, Callable[[int], str]]] = {
    "EHLO": {"EHLO": lambda _: "hang up"},
    "MAIL": {"MAIL": lambda n: "hang up" if n == 2 else "250 ok"},
    "the final dot": {".": lambda n: "hang up" if n == 2 else "250 ok"},
}


def test_a_connection_that_breaks_loses_nothing(tmp_path: Path) -> None:
    with provider(tmp_path, 2) as server:
        send_waiting(server, 6)
        taken = []
        for number, (where, answers) in enumerate(BREAKS.items(), 1):
            home, end = fetch(server, **answers)
            assert end == "hung up", where
            taken += home.taken
            server.wait_for("turned", number)
            server.wait(lambda: not [row for row in rows(tmp_path) if row["under_way"]], "all put off")
        assert len(taken) == 2
        assert len(taken) + len(retry_at_once(server)) == 6
        assert rows(tmp_path) == []


def test_killed_while_mail_is_fetched(tmp_path: Path) -> None:
    """What was under way may come twice; the lock and the socket of the dead are no hindrance."""
    with provider(tmp_path, 2) as server:
        ids = send_waiting(server, 4)
        workers = server.workers()

        def kill(number: int) -> str:
            if number == 2:
                for pid in workers:
                    os.kill(pid, signal.SIGKILL)
            return "250 taken"

        home, _ = fetch(server, **{".": kill})
        server.wait_for("worker-died", 2)
        again = retry_at_once(server)
        numbers = {each.octets for each in [*home.taken, *again]}
        assert len(numbers) == len(ids)
        assert rows(tmp_path) == []


def test_what_it_refuses_is_returned_and_put_off(tmp_path: Path) -> None:
    """As by any other host: the sender is told."""
    with provider(tmp_path) as server:
        ids = send_waiting(server, 3)
        home, end = fetch(
            server, RCPT=lambda n: {1: "550 5.1.1 nobody", 2: "450 4.2.1 later"}.get(n, "250 ok")
        )  # fmt: skip
        assert (end, len(home.taken)) == ("quit", 1)
        # The report to the sender fails too: no way leads there.
        (failed,) = [line for line in server.wait_for("failed") if line["id"] in ids]
        assert failed["status"] == "5.1.1"
        (left,) = [row for row in rows(tmp_path) if row["id"] in ids]
        assert left["recipients"][0]["reason"].startswith("4.2.1 ")


def test_a_server_that_does_not_greet(tmp_path: Path) -> None:
    with provider(tmp_path) as server:
        send_waiting(server, 1)
        greetings = {
            "554 go away": "refused",
            "EHLO home.test": "it says more than it was asked",
            "220 home.test\r\n220 again": "it says more than it was asked",
        }
        for number, (greeting, end) in enumerate(greetings.items(), 1):
            with Peer(odmr(server)) as peer:
                assert peer.ask("ATRN").startswith("250 ")
                home = Home(peer, EHLO)
                home.serve(greeting)
                assert home.taken == []
                assert server.wait_for("turned", number)[-1]["end"] == end
        assert len(retry_at_once(server)) == 1


def test_a_server_that_is_gone_at_once(tmp_path: Path) -> None:
    """Before, while and after the roles turn."""
    with provider(tmp_path) as server:
        send_waiting(server, 1)
        for number in range(8):
            with Peer(odmr(server)) as peer:
                peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                peer.send(b"ATRN home.test\r\n")
                if number % 2:
                    assert peer.reply()[:3] in ("250", "450")
        server.wait(lambda: sum(bool(event["end"]) for event in server.events("session")) >= 9, "sessions over")
        assert len(retry_at_once(server)) == 1


class Fake:
    """Colleagues who always have mail left, and never bring it."""

    async def retry(self, domains: list[str]) -> int:
        return 1

    async def count(self, domains: list[str], state: str) -> int:
        return 1


def test_mail_that_nobody_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """We take our leave; the domain can be fetched again."""
    monkeypatch.setattr(odmr_module, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(odmr_module, "POLL_SECONDS", 0.0)
    fake: Any = Fake()
    log_fd = os.memfd_create("log")
    log = Log(log_fd, human=False, clock=time.time, threaded=False)

    async def play() -> None:
        ours, theirs = socket.socketpair()
        turn = Turn(
            claim_all(tmp_path, ["a.test", "b.test"]), ["a.test", "b.test"], fake,
            client="192.0.2.1", hostname="mx.here.test", log=log, ending=lambda: False,
        )  # fmt: skip
        with pytest.raises(TakenError):
            claim_all(tmp_path, ["c.test", "b.test"])
        lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
        turn.begin(transport, lambda _: lost.set_result(None))
        reader, writer = await asyncio.open_connection(sock=theirs)
        writer.write(b"220 a.test\r\n")
        assert await reader.readline() == QUIT
        writer.write(b"221 bye\r\n")
        assert await reader.read() == b""
        writer.close()
        await lost
        for claim in claim_all(tmp_path, ["a.test", "b.test", "c.test"]):
            claim.close()

    asyncio.run(play())
    log.flush()
    assert '"end":"mail left"' in Path(f"/proc/self/fd/{log_fd}").read_text()
    os.close(log_fd)


def test_who_is_not_known_must_authenticate(tmp_path: Path) -> None:
    with provider(tmp_path, tables=TABLES.replace("127.0.0.1", "192.0.2.7")) as server, Peer(odmr(server)) as peer:
        assert "ATRN" in peer.hello
        assert "ETRN" not in peer.hello
        assert peer.ask("ATRN home.test").startswith("530 ")
        assert peer.ask("ETRN home.test").startswith("530 ")


def test_a_customer_who_logs_in(tmp_path: Path) -> None:
    tables = TABLES.replace('networks = ["127.0.0.1"]', 'users = ["Home"]') + '[auth]\nusers_file = "users"\n'
    listeners = LISTENER + ODMR + "auth = true\nauth_clear = true\n"
    (tmp_path / "users.toml").write_text(toml(tmp_path, listeners=listeners, domains=DOMAINS, tables=tables))
    for name in ("home", "ann"):
        add = [sys.executable, "-m", "fastsmtp", "user", "add", name, "--config", str(tmp_path / "users.toml")]
        subprocess.run(add, input=b"secret\n", check=True, timeout=60)
    with provider(tmp_path, tables=tables, listeners=listeners) as server:
        send_waiting(server, 2)
        with Peer(odmr(server)) as peer:
            assert peer.ask("ATRN home.test").startswith("530 ")
            assert peer.ask("AUTH PLAIN AGFubgBzZWNyZXQ=").startswith("235 ")
            assert peer.ask("ATRN home.test").startswith("450 "), "ann is nobody's customer"
        with Peer(odmr(server)) as peer:
            assert peer.ask("AUTH PLAIN AGhvbWUAc2VjcmV0").startswith("235 ")
            assert peer.ask("ETRN home.test").startswith("25")
            assert peer.ask("ATRN home.test").startswith("250 ")
            home = Home(peer, EHLO)
            assert (home.serve(), len(home.taken)) == ("quit", 2)


def test_the_end_of_the_server_while_mail_is_fetched(tmp_path: Path) -> None:
    """What is under way is finished; QUIT is said, and the rest waits."""
    with provider(tmp_path, 2) as server:
        send_waiting(server, 2)
        with Peer(odmr(server)) as peer:
            assert peer.ask("ATRN").startswith("250 ")
            stopped: list[int] = []
            stopping = threading.Thread(target=lambda: stopped.append(server.stop()))

            def stop(number: int) -> str:
                if number == 1:
                    stopping.start()
                    server.wait_for("stop")
                return "250 taken"

            home = Home(peer, {**EHLO, ".": stop})
            home.serve()
        stopping.join()
        assert stopped == [0]
        server.start()
        again = retry_at_once(server) if rows(tmp_path) else []
        assert len(home.taken) + len(again) == 2


# ETRN


def test_a_queue_run(tmp_path: Path) -> None:
    """Mail for here.test cannot be delivered; when it can, its server's ETRN has it tried at once."""
    with provider(tmp_path, 3) as server:
        blocked = tmp_path / "mail" / "here.test"
        blocked.parent.mkdir(exist_ok=True)
        blocked.touch()
        for _ in range(6):
            message_id = send(server, ["box@here.test"])
            server.wait_for("deferred", id=message_id)
        blocked.unlink()
        with Peer(server.address) as peer:
            assert "250-ETRN" in peer.hello
            assert peer.ask("ETRN here.test").startswith("253 2.0.0 6 pending")
            server.wait(lambda: not rows(tmp_path), "delivered")
            assert peer.ask("ETRN here.test").startswith("251 ")
        (event, _) = server.wait_for("queue-run", 2)
        assert (event["client"], event["node"], event["messages"]) == ("127.0.0.1", "here.test", 6)


def test_what_etrn_is_for(tmp_path: Path) -> None:
    with provider(tmp_path) as server:
        send_waiting(server, 1)
        send_waiting(server, 2, "a.home.test")
        send_waiting(server, 1, "far.test")
        asked = {
            "ETRN home.test": "253 2.0.0 1 ",
            "ETRN @home.test": "253 2.0.0 3 ",
            "ETRN @a.home.test": "253 2.0.0 2 ",
            "ETRN #home": "253 2.0.0 3 ",
            "ETRN b.home.test": "251 ",
            "ETRN far.test": "459 ",
            "ETRN @far.test": "459 ",
            "ETRN #else": "459 ",
            "ETRN": "501 ",
            "ETRN #": "501 ",
            "ETRN @": "501 ",
            "ETRN a..b": "501 ",
        }
        with Peer(server.address) as peer:
            for command, expected in asked.items():
                said = peer.ask(command)
                assert said.startswith(expected), (command, said)
                server.wait(lambda: all(row["recipients"][0]["next"] for row in rows(tmp_path)), "put off")
                if expected.startswith("253"):
                    done = json.loads(queue(tmp_path, "list", "--json", "--state", "deferred").stdout.splitlines()[0])
                    assert done["recipients"][0]["attempts"]
            peer.envelope(["box@here.test"])
            assert peer.ask("ETRN home.test").startswith("503 ")


def test_who_may_not(tmp_path: Path) -> None:
    with provider(tmp_path, tables=TABLES.replace("127.0.0.1", "192.0.2.7")) as server, Peer(server.address) as peer:
        assert "ETRN" not in peer.hello
        assert peer.ask("ETRN home.test").startswith("502 ")
        assert peer.ask("ATRN home.test").startswith("502 ")


def test_a_worker_that_cannot_be_asked(tmp_path: Path) -> None:
    with provider(tmp_path) as server:
        send_waiting(server, 1)
        (tmp_path / "data" / "control" / "0").unlink()
        with Peer(server.address) as peer, Peer(odmr(server)) as other:
            assert peer.ask("ETRN home.test").startswith("458 ")
            assert other.ask("ATRN home.test").startswith("451 ")
            assert other.ask("NOOP").startswith("250 ")


@pytest.mark.parametrize(
    ("names", "node", "found"),
    [
        (["a.test"], "a.test", ["a.test"]),
        (["a.test"], "b.a.test", []),
        (["*.a.test"], "a.test", []),
        (["*.a.test"], "b.a.test", ["b.a.test"]),
        (["*"], "a.test", ["a.test"]),
        (["a.test"], "@a.test", ["a.test"]),
        (["a.test", "b.a.test", "*.c.a.test", "ba.test"], "@a.test", ["a.test", "b.a.test", "*.c.a.test"]),
        (["*.a.test"], "@a.test", ["*.a.test"]),
        (["*.a.test"], "@b.a.test", ["b.a.test", "*.b.a.test"]),
        (["*"], "@a.test", ["a.test", "*.a.test"]),
        (["a.test"], "@b.a.test", []),
    ],
)
def test_what_a_node_means(names: list[str], node: str, found: list[str]) -> None:
    assert narrow(names, node) == found


# The QUIT of whoever brings mail


class RecordingTurn:
    def __init__(self) -> None:
        self.octets = b""
        self.politely: bool | None = None

    def arrived(self, bringer: Bringer) -> None: ...

    def brought(self, octets: bytes) -> None:
        self.octets += octets

    def gone(self, bringer: Bringer, politely: bool) -> None:
        self.politely = politely


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("octets", "politely"),
    [
        (b"EHLO QUIT\r\nQUIT\r\n", True),
        (b"QUIT\r\n", True),
        (b"MAIL FROM:<a@b> ENVID=QUIT\r\n", False),
        (b"x\r\nQUIT\r\n.\r\n", False),
        (b"x\r\nQUIT\r\n.\r\nQUIT\r\n", True),
        (b"QU", False),
    ],
)
def test_quit_is_kept_back(octets: bytes, politely: bool, size: int) -> None:
    turn: Any = RecordingTurn()
    bringer = Bringer(turn)
    for at in range(0, len(octets), size):
        bringer.data_received(octets[at : at + size])
    if not politely and not octets.endswith(b"QU"):
        assert turn.octets == octets
    bringer.connection_lost(None)
    assert turn.politely == politely
    if politely:
        assert turn.octets == octets.removesuffix(QUIT)
