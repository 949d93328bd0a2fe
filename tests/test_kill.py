"""kill -9 at random moments under load: nothing that was acknowledged is lost, altered or given to another.

Clients send messages of the ledger and note what they are answered; a reader looks at every file in new/ as soon as
it is there and moves half of them to cur/, as readers do. Meanwhile a worker, the supervisor or the whole group is
killed, also while it starts and recovers; now and then the server is stopped in order. In the end everything is
delivered, and the ledger is verified.
`--kills N` is the long form: n faults without a loss bound the loss at 3/n per fault (95 %). A killed process loses
nothing that it has written: what a power cut does is not shown here. KILL_SEED repeats the choices of a run, though
not its moments.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from peer import GoneError, Peer, stuff
from servers import PATIENCE, ROOT, Server, files, read_mail, sockets, toml

from loadtest.ledger import DOMAIN, Ledger, Outcome, any_size, digest, find_fault, make_body, outcome_of, read_ledger
from loadtest.processes import free_port
from loadtest.rules import Circumstances, verify

CLIENTS = 6
PAUSE = 0.06  # seconds between two groups of a client, on average: the disk is not what is tested
SHORT_KILLS = 8
SHORT_SECONDS = 20.0
ROUND = 25  # kills between two looks at the ledger
_NUMBERS = itertools.count(1)  # of messages
MAILBOXES = [f"box{n}@here.test" for n in range(8)]


class Sent:
    """A message on its way. `code` is that of the reply to it, 0 for none."""

    def __init__(self, message_id: str, body: bytes, recipients: list[str]) -> None:
        self.id = message_id
        self.sender = f"{message_id}@{DOMAIN}"
        self.recipients = tuple(recipients)
        self.sha256 = digest(body)
        self.body = body
        self.code = 0
        lines = [f"MAIL FROM:<{self.sender}>", *(f"RCPT TO:<{recipient}>" for recipient in recipients)]
        self.envelope = "".join(f"{line}\r\n" for line in lines).encode()
        self.answers = len(lines)


class Client(threading.Thread):
    """Sends messages in pipelined groups, over one connection until it breaks, then over the next."""

    def __init__(
        self, address: str, ledger: Ledger, seed: int, done: threading.Event, look: Callable[[str], str]
    ) -> None:
        """`look` tells what the server is at, for a client that waits in vain."""
        super().__init__()
        self._address = address
        self._ledger = ledger
        self._chance = random.Random(seed)
        self._done = done
        self._look = look
        self.failure = ""

    def run(self) -> None:
        try:
            while not self._done.is_set():
                self._session()
        except Exception as error:
            self.failure = self._look(f"{type(error).__name__}: {error}")

    def _session(self) -> None:
        try:
            peer = Peer(self._address)
        except (ConnectionError, GoneError):
            self._done.wait(0.02)
            return
        with peer:
            try:
                while not self._done.is_set() and self._chance.random() < 0.95:
                    self._send_group(peer)
                    self._done.wait(self._chance.uniform(0, 2 * PAUSE))
            except GoneError:
                pass

    def _send_group(self, peer: Peer) -> None:
        chance = self._chance
        group = []
        for _ in range(chance.choice((1, 1, 2, 5))):
            message_id = f"m{next(_NUMBERS):06d}"
            body = make_body(message_id, any_size(chance), chance)
            group.append(Sent(message_id, body, chance.sample(MAILBOXES, chance.choice((1, 1, 1, 2, 4)))))
        try:
            if chance.random() < 0.5:
                self._send_data(peer, group)
            else:
                self._send_bdat(peer, group)
        finally:
            for sent in group:
                self._ledger.write(sent, outcome_of(sent.code), sent.code)

    def _send_data(self, peer: Peer, group: list[Sent]) -> None:
        """Each end-of-data with the next envelope behind it."""
        peer.send(group[0].envelope + b"DATA\r\n")
        for sent, following in zip(group, [*group[1:], None], strict=True):
            replies = peer.replies(sent.answers + 1)
            if replies[-1][:1] != "3":
                sent.code = int(replies[-1][:3])
                return
            peer.send(stuff(sent.body) + (following.envelope + b"DATA\r\n" if following else b""))
            sent.code = int(peer.reply()[:3])

    def _send_bdat(self, peer: Peer, group: list[Sent]) -> None:
        """All in one write, every message in two chunks."""
        out = b""
        for sent in group:
            half = self._chance.randrange(len(sent.body) + 1)
            first, last = sent.body[:half], sent.body[half:]
            out += b"%sBDAT %d\r\n%sBDAT %d LAST\r\n%s" % (sent.envelope, len(first), first, len(last), last)
        peer.send(out)
        for sent in group:
            sent.code = int(peer.replies(sent.answers + 2)[-1][:3])


class Reader(threading.Thread):
    """Reads what comes into new/; half of it moves on to cur/."""

    def __init__(self, mail: Path, done: threading.Event) -> None:
        super().__init__()
        self._mail = mail
        self._done = done
        self._seen: set[Path] = set()
        self.faults: list[str] = []

    def run(self) -> None:
        while not self._done.is_set():
            self._look()
            self._done.wait(0.02)

    def _look(self) -> None:
        for path in self._mail.glob("*/*/new/*"):
            if path in self._seen:
                continue
            self._seen.add(path)
            try:
                mail = read_mail(path)
                fault = find_fault(mail.sender.removesuffix(f"@{DOMAIN}"), mail.body.replace(b"\n", b"\r\n"))
            except ValueError as error:
                fault = str(error)
            if fault:
                self.faults.append(f"{path}: {fault}")
            if len(self._seen) % 2:
                path.rename(path.parent.parent / "cur" / f"{path.name}:2,S{len(self._seen)}")
                self._seen.discard(path)  # what comes again under this name is looked at again


class Run:
    """One round of kills over one folder."""

    def __init__(self, folder: Path, chance: random.Random, tables: str = "") -> None:
        self.chance = chance
        self.port = free_port()
        listener = f'[[listener]]\naddress = "127.0.0.1:{self.port}"\n'
        tables = tables or '[timeouts]\nshutdown = "5s"\n'
        self.server = Server(folder, toml(folder, workers=2, listeners=listener, tables=tables))
        self.ledger = Ledger(folder / "ledger")
        self.faults: list[float] = []
        self.restarts: list[float] = []  # seconds
        self.struck: Counter[str] = Counter()

    def kill(self, kills: int, until: float) -> None:
        """Serves clients, and kills so often or so long."""
        self.server.start()
        done = threading.Event()
        address = f"127.0.0.1:{self.port}"
        clients = [Client(address, self.ledger, self.chance.getrandbits(32), done, self.look) for _ in range(CLIENTS)]
        reader = Reader(self.server.mail, done)
        threads = [*clients, reader]
        for thread in threads:
            thread.start()
        try:
            while sum(self.struck.values()) < kills and time.monotonic() < until:
                time.sleep(self.chance.uniform(0, 2.5) if self.chance.random() < 0.7 else self.chance.uniform(0, 0.1))
                self.strike()
            time.sleep(0.5)
        finally:
            done.set()
            for thread in threads:
                thread.join(2 * PATIENCE)
        assert not any(thread.is_alive() for thread in threads), self.look("a client hangs")
        failures = [client.failure for client in clients if client.failure]
        assert not failures, "\n\n".join(failures)
        assert reader.faults == []

    def look(self, what: str) -> str:
        return f"{self.server.story(what)}\n{self.server.whereabouts(self.port)}\nstruck so far: {dict(self.struck)}"

    def strike(self) -> None:
        kind = self.chance.choices(("worker", "supervisor", "group", "start", "stop"), (5, 2, 2, 1, 1))[0]
        if kind == "worker":
            workers = self.server.workers()
            if not workers:  # killed just now, not yet started again
                return
            self.faults.append(time.time())
            os.kill(self.chance.choice(workers), signal.SIGKILL)
        else:
            if kind == "stop":  # in order, which is no excuse for a duplicate
                assert self.server.stop() == 0, self.server.story("an orderly end")
            else:
                self.faults.append(time.time())
                if kind == "supervisor":
                    self.server.process.kill()
                    self.server.process.wait()
                else:
                    self.server.kill()
                self.faults.append(time.time())  # what is killed on a busy machine may deliver until here
            if kind == "start":
                self.server.launch()
                time.sleep(self.chance.uniform(0, 1))
                self.faults.append(time.time())
                self.server.kill()
            started = time.monotonic()
            self.server.start_again()
            self.restarts.append(time.monotonic() - started)
        self.struck[kind] += 1

    def drain(self) -> None:
        """Waits until every acknowledged message is in its mailboxes; whether they are the right ones says verify."""
        entries = read_ledger(self.ledger.path)
        acked = sum(len(entry.recipients) for entry in entries if entry.outcome is Outcome.ACKED)
        deadline = time.monotonic() + PATIENCE
        count, since = 0, time.monotonic()
        while (count < acked or time.monotonic() - since < 1.5) and time.monotonic() < deadline:
            found = len(files(self.server.mail))
            if found != count:
                count, since = found, time.monotonic()
            time.sleep(0.1)

    def check_rest(self) -> None:
        """Nothing is left over: no message in a spool, no body, no temporary file."""
        before = len(self.server.events("spool-opened"))
        assert self.server.stop() == 0, self.server.story("the end")
        self.server.start()
        opened = self.server.wait_for("spool-opened", before + 2)[before:]
        assert [line["messages"] for line in opened] == [0, 0]
        assert self.server.stop() == 0, self.server.story("the end")
        assert list(self.server.folder.glob("data/spool/*/body/*")) == []
        assert list(self.server.mail.glob(".*/*")) == []
        assert list(self.server.mail.glob("*/*/tmp/*")) == []
        assert self.server.events("set-aside") == []
        self.server.check_bugs()


@pytest.mark.timeout(0)
def test_kill(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    kills = pytestconfig.getoption("--kills")
    seed = int(os.environ.get("KILL_SEED") or random.randrange(1 << 32))
    chance = random.Random(seed)
    until = time.monotonic() + (float("inf") if kills else SHORT_SECONDS)
    left = kills or SHORT_KILLS
    number = 0
    while left > 0 and time.monotonic() < until:
        folder = tmp_path / str(number)
        folder.mkdir()
        run = Run(folder, chance)
        try:
            run.kill(min(left, ROUND), until)
            run.drain()
            run.check_rest()
        finally:
            run.server.kill()
            run.ledger.close()
        outcomes = Counter(str(entry.outcome) for entry in read_ledger(run.ledger.path))
        print(
            f"KILL_SEED={seed}, round {number}: {dict(run.struck)}, {dict(outcomes)},"
            f" {len(files(run.server.mail))} files, accepted again within {max(run.restarts, default=0):.1f} s"
        )
        report = verify(run.ledger.path, [run.server.mail], given=Circumstances(tuple((at, at) for at in run.faults)))
        assert report.violations == []
        assert outcomes["acked"] > 3 * sum(run.struck.values()), "there was hardly any load"
        assert outcomes["5xx"] == 0
        assert max(run.restarts, default=0) < PATIENCE / 2
        left -= sum(run.struck.values())
        number += 1
        for path in [*files(run.server.mail), *folder.glob("log")]:
            path.unlink()


def test_a_server_that_keeps_nothing_is_found_out(tmp_path: Path) -> None:
    """The loop is no good if it finds no loss where there is one: nothing can be delivered, all is in memory."""
    tables = '[spool]\ndurability = "none"\n'
    run = Run(tmp_path, random.Random(1), tables)
    try:
        run.server.start()
        (run.server.mail / "here.test").touch()
        with Peer(run.server.address) as peer:
            for _ in range(5):
                message_id = f"m{next(_NUMBERS):06d}"
                sent = Sent(message_id, make_body(message_id, 1000, run.chance), MAILBOXES[:1])
                reply = peer.bdat(MAILBOXES[:1], sent.body, sender=sent.sender)
                run.ledger.write(sent, outcome_of(int(reply[:3])), int(reply[:3]))
        run.server.kill()
        (run.server.mail / "here.test").unlink()
        run.server.start_again()
        assert run.server.stop() == 0
        assert [each.rule for each in verify(run.ledger.path, [run.server.mail]).violations] == ["A"] * 5
    finally:
        run.server.kill()
        run.ledger.close()


@pytest.mark.parametrize("struck", ["workers", "supervisor", "group", "stop"])
def test_nobody_is_forgotten_who_waits_to_be_accepted(tmp_path: Path, struck: str) -> None:
    """Clients that the kernel has taken and no worker has accepted: the next worker greets them, or they are told."""
    server = Server(tmp_path, toml(tmp_path, workers=2))
    try:
        server.start()
        workers = server.workers()
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        waiting = [Peer(server.address, hello="") for _ in range(20)]
        if struck == "workers":
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
        elif struck == "supervisor":
            server.process.kill()
        elif struck == "group":
            server.kill()
        else:
            server.process.terminate()
        if struck in ("supervisor", "stop"):
            for worker in workers:
                os.kill(worker, signal.SIGCONT)
        heard = [hear(peer, 1 if struck == "workers" else 3) for peer in waiting]
        if struck == "workers":
            assert heard == [["220"]] * len(waiting)
        else:  # whoever was greeted in the last moment is sent away
            assert all(replies in ([], ["220"], ["220", "421"], ["421"]) for replies in heard), heard
        if struck == "stop":
            assert server.ended() == 0
    finally:
        server.kill()


def hear(peer: Peer, most: int) -> list[str]:
    """The codes that come, until the end or so many."""
    codes: list[str] = []
    with peer, suppress(GoneError):
        while len(codes) < most:
            codes.append(peer.reply()[:3])
    return codes


def test_a_client_that_waits_in_vain_is_told_of() -> None:
    """What a failure of the loop shows: who waited for what, and where the kernel has its connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with Peer(f"127.0.0.1:{port}", hello="", timeout=0.05) as peer:
            with pytest.raises(TimeoutError, match=r"said last b'', unread b'', the greeting is missing"):
                peer.reply()
            own = peer.socket.getsockname()[1]
            mine = f"of {os.getpid()}"
            assert f"socket {port} to 0: listens, tx 0, rx 1, {mine}" in sockets(port)
            assert f"socket {port} to {own}: open, tx 0, rx 0, of nobody" in sockets(port)
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"220 here\r\n250 o")
                assert peer.reply() == "220 here"
                with pytest.raises(TimeoutError, match=r"b'EHLO x\\r\\n', unread b'250 o', reply 2 is missing"):
                    peer.ask("EHLO x")
                assert f"socket {port} to {own}: open, tx 0, rx 8, {mine}" in sockets(port)


def test_a_log_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    """Its standard output is a pipe that is full: mail goes on, a dead worker is replaced, and it ends in order."""
    port = free_port()
    (tmp_path / "fastsmtp.toml").write_text(
        toml(tmp_path, workers=2, listeners=f'[[listener]]\naddress = "127.0.0.1:{port}"\n')
    )
    unread, written = os.pipe()
    command = [sys.executable, "-m", "fastsmtp", "serve", "--config", str(tmp_path / "fastsmtp.toml")]
    with subprocess.Popen(command, cwd=ROOT, stdout=written, stderr=written) as server:
        try:
            children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
            send_when_it_accepts(port)
            os.set_blocking(written, False)
            with suppress(BlockingIOError):
                while True:
                    os.write(written, b"x")
            os.set_blocking(written, True)
            with Peer(f"127.0.0.1:{port}") as peer:
                for _ in range(800):  # more lines than the log holds in memory
                    assert peer.bdat(MAILBOXES[:1], b"x\r\n")[:3] == "250"
            before = children.read_text().split()
            os.kill(int(before[0]), signal.SIGKILL)
            deadline = time.monotonic() + PATIENCE
            while len(children.read_text().split()) < 2 or before[0] in children.read_text().split():
                assert time.monotonic() < deadline, "a worker that died is not replaced"
                time.sleep(0.02)
            send_when_it_accepts(port)
            server.terminate()
            assert server.wait(PATIENCE) == 0
        finally:
            server.kill()
            os.close(unread)
            os.close(written)


def send_when_it_accepts(port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with Peer(f"127.0.0.1:{port}") as peer:
                assert peer.bdat(MAILBOXES[:1], b"x\r\n")[:3] == "250"
                return
        except (OSError, GoneError):
            assert time.monotonic() < deadline
            time.sleep(0.05)
