"""A running server takes another configuration, or other certificates, while mail flows; and what it does not take.

Each test starts `fastsmtp serve` and looks at it from outside: by `fastsmtp reload`, signals, sockets, the log.
Not here: contexts (test_tls.py), how the workers are told (it shows).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from certs import Authority, Files
from needs import needs_root, public_folder
from peer import GoneError, Peer, stuff
from servers import ANY_DOMAIN, LISTENER, ROOT, Server, files, mailbox, running, toml

from fastsmtp.certificates import Watch
from fastsmtp.config import FIXED, parse
from fastsmtp.holdings import Holdings
from fastsmtp.log import open_log
from fastsmtp.reload import ADOPT, AT_TOP, FORGET, INSIDE, OF_LISTENERS, PACKET, PREPARE, RESULT
from fastsmtp.seat import Settings
from fastsmtp.server import identity
from loadtest.processes import free_port

ANYWHERE = "[[listener]]\naddress = '127.0.0.1:0'"
LETTER = b"Subject: x\r\n\r\nbody\r\n"
TLS = '[tls]\ncertificate = "mx.pem"\nkey = "mx.key"\n'


def run_reload(server: Server, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastsmtp", "reload", "--config", "fastsmtp.toml", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=server.folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def reload(server: Server, configuration: str) -> dict[str, Any]:
    """What the command says of a configuration that is taken."""
    (server.folder / "fastsmtp.toml").write_text(configuration)
    done = run_reload(server, "--json")
    assert done.returncode == 0, server.story(done.stdout + done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["ok"] is True
    return answer


def size_offered(address: str) -> str:
    with Peer(address) as peer:
        return next(line[4:] for line in peer.hello.splitlines() if "SIZE" in line)


# The configuration


def test_new_sessions_are_served_by_the_new_configuration_and_old_ones_by_theirs(tmp_path: Path) -> None:
    with running(tmp_path, toml(tmp_path, workers=2)) as server:
        with Peer(server.address) as idle, Peer(server.address) as busy:
            assert busy.envelope(["b@y.test"])[1].startswith("250 ")
            assert busy.ask("DATA").startswith("354 ")
            answer = reload(server, toml(tmp_path, workers=2, tables='[limits]\nmessage_size = "1MB"\n'))
            assert answer == {"ok": True, "file": "fastsmtp.toml", "errors": [], "changed": ["limits"], "restart": []}
            assert {size_offered(server.address) for _ in range(20)} == {"SIZE 1048576"}
            busy.send(stuff(b"Subject: long\r\n\r\n" + b"x" * 70 + b"\r\n" + (b"y" * 70 + b"\r\n") * 20_000))
            assert busy.reply().startswith("250 ")
            assert idle.data(["b@y.test"], LETTER).startswith("250 ")
            assert "SIZE 52428800" in idle.ask("EHLO again.test")
        server.wait_mail(2)
        (event,) = server.events("reloaded")
        assert (event["by"], event["changed"], event["restart"]) == (f"uid {os.getuid()}", ["limits"], [])
        assert server.stop() == 0


def test_a_signal_does_the_same(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        text = (tmp_path / "fastsmtp.toml").read_text()
        (tmp_path / "fastsmtp.toml").write_text(text + '[limits]\nmessage_size = "2MB"\n')
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("reloaded", by="SIGHUP")
        server.wait(lambda: size_offered(server.address) == "SIZE 2097152", "the new size")
        assert server.stop() == 0


def test_without_a_file_a_hang_up_ends_it_and_there_is_no_reload(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    default = '[[listener]]\naddress = "127.0.0.1:0"\n'
    with running(tmp_path) as server:
        # A file of the same data directory is not what the other server was started with.
        (tmp_path / "elsewhere" / "fastsmtp.toml").write_text(f'data_dir = "{tmp_path}/data"\n{default}')
        answer = run_reload(server, "--config", "elsewhere/fastsmtp.toml")
        assert answer.returncode == 0
        assert "note: that is the file which the server was started with, not elsewhere/fastsmtp.toml" in answer.stdout
        assert server.stop() == 0
    if socket.socket().connect_ex(("127.0.0.1", 2525)) == 0:
        pytest.skip("something listens on 127.0.0.1:2525")
    with running(tmp_path / "elsewhere", None) as server:
        (tmp_path / "elsewhere" / "fastsmtp.toml").write_text(default)
        refused = run_reload(server)
        assert refused.returncode == 1
        assert refused.stderr == "the server was started without a configuration file\nnothing was changed\n"
        assert server.stop(signal.SIGHUP) == 0


def test_a_wrong_configuration_changes_nothing_and_every_error_is_told(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        good = (tmp_path / "fastsmtp.toml").read_text()
        (tmp_path / "fastsmtp.toml").write_text(good + '[limits]\nmessage_size = "tiny"\nheader = 1\n')
        refused = run_reload(server)
        assert refused.returncode == 1
        assert refused.stdout == ""
        lines = refused.stderr.splitlines()
        assert ["limits.message_size" in lines[0], "limits.header" in lines[1]] == [True, True]
        assert lines[2:] == ["nothing was changed"]
        server.process.send_signal(signal.SIGHUP)
        (event,) = server.wait_for("reload-refused")
        assert [line.partition(": ")[2] for line in event["errors"]] == [line.partition(": ")[2] for line in lines[:2]]
        assert size_offered(server.address) == "SIZE 52428800"
        # What only the machine can say is asked too.
        (tmp_path / "fastsmtp.toml").write_text(good + '[tls]\ncertificate = "missing.pem"\n')
        refused = run_reload(server, "--json")
        assert refused.returncode == 1
        answer = json.loads(refused.stdout)
        assert (answer["ok"], len(answer["errors"])) == (False, 1)
        assert f"tls.certificate: {tmp_path}/missing.pem cannot be read: No such file" in answer["errors"][0]
        with Peer(server.address) as peer:
            assert peer.data(["b@y.test"], LETTER).startswith("250 ")


class Played:
    """Workers that are played here, of a supervisor that reads `texts`, one after the other."""

    def __init__(self, folder: Path, workers: int, *texts: str) -> None:
        left = iter(texts)
        settings = Settings(parse(f"hostname = 'a.test'\n{ANYWHERE}", folder, "file"))
        self._log = open_log("json", threaded=False)
        self.holdings = Holdings(
            settings, None, None, [], Watch(()), self._log, lambda: parse(next(left), folder, "file"), "file"
        )
        self.lines = [self.holdings.open_line(worker) for worker in range(workers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for line in self.lines:
            line.close()
        self.holdings.close()
        self._log.close()

    def heard(self, worker: int = 0) -> list[tuple[bytes, bytes]]:
        """What a worker is told when the supervisor has looked."""
        self.holdings.look_after(time.monotonic())
        found = []
        while True:
            try:
                octets, descriptors, _, _ = socket.recv_fds(self.lines[worker], PACKET, 10)
            except BlockingIOError:
                return found
            for descriptor in descriptors:
                os.close(descriptor)
            found.append((octets[:1], octets[1:].partition(b" ")[0]))


def test_who_asks_while_a_reload_is_under_way_hears_of_the_next(tmp_path: Path) -> None:
    """The one under way has read the file already, perhaps before it was changed."""
    with Played(tmp_path, 1, f"hostname = 'b.test'\n{ANYWHERE}", "hostname = 7") as played:
        (line,) = played.lines
        line.send(b"reload 1 0")
        assert played.heard() == [(PREPARE, b"")]
        line.send(b"reload 2 0")
        line.send(b"reload 3 0")
        assert played.heard() == []
        line.send(b"ok 1")
        assert played.heard() == [(ADOPT, b""), (RESULT, b"1")]
        assert played.heard() == [(RESULT, b"2,3")], "the second file is wrong, and both are told so"


def test_a_late_answer_to_a_reload_that_was_refused_is_none_to_the_next(tmp_path: Path) -> None:
    texts = [f"hostname = '{name}.test'\n{ANYWHERE}" for name in "bc"]
    with Played(tmp_path, 2, *texts) as played:
        quick, slow = played.lines
        played.holdings.begin("test")
        quick.send(b"no 1 it cannot")
        assert played.heard(0) == [(PREPARE, b""), (FORGET, b"")]
        played.holdings.begin("test")
        slow.send(b"ok 1")
        quick.send(b"ok 2")
        assert played.heard(0) == [(PREPARE, b"")]
        slow.send(b"no 2 it cannot")
        assert played.heard(1) == [(PREPARE, b""), (FORGET, b""), (PREPARE, b""), (FORGET, b"")]


def test_a_worker_that_cannot_changes_nothing_anywhere(tmp_path: Path) -> None:
    """The supervisor does not know whose folder for temporary files will be theirs."""
    needs_root()
    with public_folder("reload") as folder:
        closed = folder / "closed"
        for made in (closed, closed / "mail"):
            made.mkdir()
            made.chmod(0o777)
        (closed / "mail" / f".fastsmtp-{identity(folder / 'data')}").mkdir(0o700)
        configuration = toml(folder, workers=2, top='user = "nobody"')
        (folder / "mail").mkdir(0o777)
        (folder / "mail").chmod(0o777)
        with running(folder, configuration) as server:
            text = configuration.replace(f"{folder}/mail/", f"{closed}/mail/").replace(
                "[[domain]]", "[limits]\nreceived = 5\n[[domain]]"
            )
            (folder / "fastsmtp.toml").write_text(text)
            refused = run_reload(server)
            assert refused.returncode == 1
            assert refused.stderr.startswith("worker ")
            assert f"{closed}" in refused.stderr
            with Peer(server.address) as peer:
                assert peer.data(["b@y.test"], LETTER).startswith("250 ")
            server.wait_mail(1)
            assert reload(server, configuration.replace("[[domain]]", "[limits]\nreceived = 5\n[[domain]]"))


def test_what_was_begun_for_a_configuration_that_cannot_be_had_is_closed(tmp_path: Path) -> None:
    """What the users need is damaged; the ways out are made before."""

    def descriptors() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in server.workers()]

    configuration = toml(tmp_path, workers=2)
    with running(tmp_path, configuration) as server:
        text = configuration + (
            '[[customer]]\nnetworks = ["192.0.2.0/24"]\ndomains = ["f.test"]\n[transport.fetched]\ntype = "odmr"\n'
            '[[domain]]\nname = "f.test"\nrecipients = "any"\ntransport = "fetched"\n'
            '[[listener]]\naddress = "127.0.0.1:0"\nrole = "odmr"\n[auth]\nusers_file = "users"\n'
        )
        users = server.folder / "users"
        users.touch(0o600)
        users.write_text("# fastsmtp users 1\n")
        (server.folder / "data" / "auth-secret").write_bytes(b"short")
        (server.folder / "fastsmtp.toml").write_text(text)
        before = descriptors()
        for _ in range(4):
            refused = run_reload(server)
            assert (refused.returncode, refused.stderr[:7]) == (1, "worker "), refused.stderr
        server.wait(lambda: sum(descriptors()) < sum(before) + 4, "what was begun is closed")


def test_what_needs_a_restart_is_named_and_left(tmp_path: Path) -> None:
    with running(
        tmp_path, toml(tmp_path, listeners=f'{LISTENER}[[listener]]\naddress = "unix:{tmp_path}/s"\nmode = "0600"\n')
    ) as server:
        text = (tmp_path / "fastsmtp.toml").read_text().replace("workers = 1", "workers = 3").replace("0600", "0660")
        more = '[spool]\ninline = "1KB"\n[log]\nformat = "human"\n[limits]\nmemory = "64MB"\nerrors = 3\n'
        answer = reload(server, text + more)
        assert answer["restart"] == ["workers", "spool", "log", "limits.memory", "listener[1].mode"]
        assert answer["changed"] == ["limits"]
        assert len(server.workers()) == 1
        shown = run_reload(server)
        assert shown.stdout.splitlines() == [
            "fastsmtp.toml: nothing is different",
            "note: workers, spool, log, limits.memory, listener[1].mode: different too, but this needs a restart",
        ]


def test_all_that_is_said_to_need_a_restart_is_left() -> None:
    assert len(AT_TOP) + len(INSIDE) + len(OF_LISTENERS) == len(FIXED) == 7


def test_a_data_directory_without_a_server(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        text = (tmp_path / "fastsmtp.toml").read_text()
        (tmp_path / "fastsmtp.toml").write_text(text.replace("/data", "/other"))
        refused = run_reload(server)
        assert (refused.returncode, refused.stderr.splitlines()[0]) == (
            1,
            f"data_dir {tmp_path}/other: no server has run with it; a server keeps its data_dir until it is restarted",
        )
        (tmp_path / "fastsmtp.toml").write_text(text)
        assert server.stop() == 0
        assert f"data_dir {tmp_path}/data: no server runs with it" in run_reload(server).stderr


def test_a_killed_worker_starts_with_what_holds_now(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        reload(server, toml(tmp_path, tables='[limits]\nmessage_size = "3MB"\n'))
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        server.wait_for("worker-died")
        server.wait(lambda: len(server.workers()) == 1, "a worker")
        assert size_offered(server.address) == "SIZE 3145728"
        assert reload(server, toml(tmp_path))["changed"] == ["limits"]


def test_addresses_come_and_go(tmp_path: Path) -> None:
    stays, goes, comes = (f"127.0.0.1:{free_port()}" for _ in range(3))
    local = tmp_path / "s"

    def listeners(*addresses: str) -> str:
        return f'[[listener]]\naddress = ["{addresses[0]}"]\n[[listener]]\naddress = {json.dumps(addresses[1:])}\n'

    with running(tmp_path, toml(tmp_path, workers=2, listeners=listeners(stays, goes))) as server:
        with Peer(goes) as open_before, Peer(stays):
            answer = reload(server, toml(tmp_path, workers=2, listeners=listeners(comes, stays, f"unix:{local}")))
            assert answer["changed"] == ["listener"]
            assert open_before.data(["b@y.test"], LETTER).startswith("250 ")
        for address in (stays, comes, f"unix:{local}"):
            for _ in range(8):
                with Peer(address) as peer:
                    assert peer.data(["b@y.test"], LETTER).startswith("250 ")
        with pytest.raises(ConnectionRefusedError):
            Peer(goes)
        # A restarted worker has them all.
        os.kill(server.workers()[0], signal.SIGKILL)
        server.wait_for("worker-died")
        server.wait(lambda: len(server.workers()) == 2, "two workers")
        for _ in range(8):
            with Peer(comes) as peer:
                assert peer.data(["b@y.test"], LETTER).startswith("250 ")
        reload(server, toml(tmp_path, workers=2, listeners=listeners(comes, stays)))
        assert not local.exists()
        assert server.stop() == 0


def test_an_address_that_cannot_be_had_changes_nothing(tmp_path: Path) -> None:
    with running(tmp_path) as server, socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        more = f'{LISTENER}[[listener]]\naddress = ["{taken}", "127.0.0.1:0"]\n'
        (tmp_path / "fastsmtp.toml").write_text(toml(tmp_path, listeners=more))
        refused = run_reload(server)
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[0] == f"listener {taken}: the address is in use by another program"
        with Peer(server.address) as peer:
            assert peer.data(["b@y.test"], LETTER).startswith("250 ")


def test_no_session_is_dropped_while_mail_flows(tmp_path: Path) -> None:
    """Two configurations in turn, with other transports and limits, and what was acknowledged is delivered once."""

    def configuration(number: int) -> str:
        text = toml(tmp_path, workers=2, tables=f'[limits]\nmessage_size = "{number + 1}MB"\n')
        return text.replace("/mail/{domain}", "/odd/{domain}") if number % 2 else text

    with running(tmp_path, configuration(0)) as server:
        address = server.address
        accepted = [0, 0, 0]
        errors: list[str] = []
        done = threading.Event()

        def send(number: int) -> None:
            try:
                with Peer(address) as peer:
                    while not done.is_set():
                        if number == 2:  # a session for each message
                            with Peer(address) as other:
                                reply = other.data([f"b{number}@y.test"], LETTER)
                                assert other.ask("QUIT").startswith("221 ")
                        else:
                            reply = peer.data([f"b{number}@y.test"], LETTER)
                        assert reply.startswith("250 "), reply
                        accepted[number] += 1
                    assert peer.ask("QUIT").startswith("221 ")
            except (GoneError, OSError, AssertionError) as error:
                errors.append(f"{number}: {error!r}")

        threads = [threading.Thread(target=send, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for number in range(1, 5):
            (tmp_path / "fastsmtp.toml").write_text(configuration(number))
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("reloaded", number)
            before = list(accepted)
            server.wait(lambda before=before: all(map(int.__gt__, accepted, before)) or errors, "more mail")
        done.set()
        for thread in threads:
            thread.join()
        assert errors == []
        folders = (tmp_path / "mail", tmp_path / "odd")
        server.wait(lambda: sum(len(files(folder)) for folder in folders) >= sum(accepted), "all mail")
        assert sum(len(files(folder)) for folder in folders) == sum(accepted)
        assert all(map(files, folders))
        assert server.stop() == 0


def test_transports_that_stay_go_over_and_removed_ones_put_mail_off(tmp_path: Path) -> None:
    quick = '[queue]\nretry = "1s"\nretry_max = "1s"\n'
    other = '[transport.other]\ntype = "maildir"\npath = "other/{local}"\n'
    pair = '[[domain]]\nname = "a.test"\nrecipients = "any"\ntransport = "boxes"\n'
    pair += '[[domain]]\nname = "b.test"\nrecipients = "any"\ntransport = "other"\n'
    with running(tmp_path, toml(tmp_path, domains=pair, tables=quick + other)) as server:
        (tmp_path / "other" / "x").touch()  # so that its mail waits
        with Peer(server.address) as peer:
            assert peer.data(["x@b.test"], LETTER).startswith("250 ")
        server.wait_for("deferred", transport="other")
        only = pair.partition('[[domain]]\nname = "b')[0]
        reload(server, toml(tmp_path, domains=only, tables=quick))
        server.wait_for("deferred", transport="", status="4.3.5")
        with Peer(server.address) as peer:
            assert peer.data(["x@b.test"], LETTER).startswith("550 5.7.1")
            assert peer.ask("RSET").startswith("250 ")
            assert peer.data(["x@a.test"], LETTER).startswith("250 ")
        server.wait(lambda: mailbox(server.mail, "a.test", "x"), "mail")
        reload(server, toml(tmp_path, domains=only + ANY_DOMAIN, tables=quick))
        server.wait(lambda: mailbox(server.mail, "b.test", "x"), "what waited")
        assert server.stop() == 0


def test_commands_change_with_the_configuration(tmp_path: Path) -> None:
    with public_folder("reload") as folder:
        user = 'user = "nobody"\n' if os.geteuid() == 0 else ""
        (folder / "out").mkdir()
        (folder / "out").chmod(0o777)
        boxes = toml(folder).partition("[transport.boxes]")[0]

        def configuration(word: str) -> str:
            run = f'command = ["/bin/sh", "-c", "cat > {folder}/out/$0.{word}", "{{local}}"]\n'
            return f'{boxes}[transport.boxes]\ntype = "pipe"\n{run}{user}'

        with running(folder, configuration("old")) as server:
            for word, local in (("old", "a"), ("new", "b")):
                if word == "new":
                    assert reload(server, configuration("new"))["changed"] == ["transport"]
                with Peer(server.address) as peer:
                    assert peer.data([f"{local}@y.test"], LETTER).startswith("250 ")
                path = folder / "out" / f"{local}.{word}"
                server.wait(lambda path=path: path.exists() and path.read_bytes(), f"{path}")
            assert server.stop() == 0
            assert not server.events("runner-died")


def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        with running(tmp_path) as server:
            assert manager.recv(100) == b"READY=1"
            before = time.monotonic_ns() // 1000
            reload(server, toml(tmp_path))
            first, stamp = manager.recv(100).split(b"\n")
            assert first == b"RELOADING=1"
            assert before <= int(stamp.removeprefix(b"MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
            assert manager.recv(100) == b"READY=1"
            (tmp_path / "fastsmtp.toml").write_text("nonsense")
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("reload-refused")
            assert [manager.recv(100).split(b"\n")[0] for _ in range(2)] == [b"RELOADING=1", b"READY=1"]


# Certificates


@contextmanager
def with_certificates(folder: Path, *, user: str = "", workers: int = 2) -> Iterator[tuple[Server, Authority]]:
    """Two listeners with implicit TLS; the certificate is for mx.here.test."""
    authority = Authority(folder)
    authority.issue("mx", "mx.here.test")
    listeners = '[[listener]]\naddress = "127.0.0.1:0"\ntls = "implicit"\n' * 2
    top = f'user = "{user}"' if user else ""
    with running(folder, toml(folder, workers=workers, top=top, listeners=listeners, tables=TLS)) as server:
        yield server, authority
        assert server.stop() == 0


class Seen:
    """What a client sees of a handshake: the certificate's serial number and whether the session was resumed."""

    def __init__(
        self,
        address: str,
        context: ssl.SSLContext,
        name: str = "mx.here.test",
        session: ssl.SSLSession | None = None,
    ) -> None:
        host, _, port = address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), 20) as plain,
            context.wrap_socket(plain, server_hostname=name, session=session) as secured,
        ):
            assert secured.recv(4) == b"220 "  # tickets come before it
            shown = secured.getpeercert()
            self.serial = shown["serialNumber"] if shown else ""
            self.reused = bool(secured.session_reused)
            self.session = secured.session
            secured.sendall(b"QUIT\r\n")


def renew(old: Files, new: Files) -> None:
    """As a renewal does it: one file, and a moment later the other."""
    os.replace(new.certificate, old.certificate)
    time.sleep(0.05)
    os.replace(new.key, old.key)


def test_a_renewed_certificate_is_used_and_tickets_stay_good(tmp_path: Path) -> None:
    with with_certificates(tmp_path) as (server, authority):
        context = authority.client()
        first = Seen(server.address, context)
        old = Files(tmp_path / "mx.pem", tmp_path / "mx.key")
        with Peer(server.address, implicit_tls=True) as peer:
            renew(old, authority.issue("new", "mx.here.test", kind="rsa"))
            (event,) = server.wait_for("certs-renewed")
            assert (event["files"], event["days"]) == ([str(old.certificate)], 90)
            second = Seen(server.address, authority.client())
            assert second.serial != first.serial
            assert {Seen(server.address, authority.client()).serial for _ in range(10)} == {second.serial}
            # On either worker, behind a reload too, and on this listener only.
            assert all(Seen(server.address, context, session=first.session).reused for _ in range(12))
            reload(server, (tmp_path / "fastsmtp.toml").read_text() + "[limits]\nerrors = 7\n")
            assert all(Seen(server.address, context, session=first.session).reused for _ in range(12))
            assert not Seen(server.addresses()[1], context, session=first.session).reused
            assert peer.data(["b@y.test"], LETTER).startswith("250 ")
        os.kill(server.workers()[0], signal.SIGKILL)
        server.wait_for("worker-died")
        server.wait(lambda: len(server.workers()) == 2, "two workers")
        assert {Seen(server.address, authority.client()).serial for _ in range(12)} == {second.serial}
        assert all(Seen(server.address, context, session=first.session).reused for _ in range(12))


def test_an_unfinished_renewal_changes_nothing_and_is_told_once(tmp_path: Path) -> None:
    with with_certificates(tmp_path, workers=1) as (server, authority):
        first = Seen(server.address, authority.client())
        new = authority.issue("new", "mx.here.test")
        os.replace(new.certificate, tmp_path / "mx.pem")
        (event,) = server.wait_for("certs-kept")
        assert f"the key in {tmp_path}/mx.key does not belong to the certificate" in event["why"]
        time.sleep(2.5)
        assert len(server.events("certs-kept")) == 1
        assert Seen(server.address, authority.client()).serial == first.serial
        # A restarted worker has what the others have.
        os.kill(server.workers()[0], signal.SIGKILL)
        server.wait_for("worker-died")
        assert Seen(server.address, authority.client()).serial == first.serial
        assert run_reload(server).returncode == 1
        os.replace(new.key, tmp_path / "mx.key")
        server.wait_for("certs-renewed")
        assert Seen(server.address, authority.client()).serial != first.serial


def test_keys_that_only_root_can_read_reach_workers_that_are_nobody(tmp_path: Path) -> None:
    needs_root()
    with public_folder("reload") as folder:
        (folder / "mail").mkdir()
        (folder / "mail").chmod(0o777)
        with with_certificates(folder, user="nobody") as (server, authority):
            old = Files(folder / "mx.pem", folder / "mx.key")
            for path in old:
                path.chmod(0o600)
            first = Seen(server.address, authority.client())
            new = authority.issue("new", "mx.here.test")
            for path in new:
                path.chmod(0o600)
            renew(old, new)
            server.wait_for("certs-renewed")
            assert all(Seen(server.address, authority.client()).serial != first.serial for _ in range(10))


def test_names_are_added_by_a_reload(tmp_path: Path) -> None:
    with with_certificates(tmp_path, workers=1) as (server, authority):
        authority.issue("other", "mx.other.test")
        before = Seen(server.address, authority.client())
        with pytest.raises(ssl.SSLCertVerificationError):
            Seen(server.address, authority.client(), "mx.other.test")
        text = (tmp_path / "fastsmtp.toml").read_text()
        also = '[[tls.also]]\ncertificate = "other.pem"\nkey = "other.key"\n'
        assert reload(server, text + also)["changed"] == ["tls"]
        other = Seen(server.address, authority.client(), "mx.other.test")
        assert other.serial != before.serial == Seen(server.address, authority.client()).serial


def test_tickets_of_clients_that_are_no_longer_believed_are_worth_nothing(tmp_path: Path) -> None:
    """A ticket carries that the certificate was good: with other authorities the keys of tickets must be others too."""
    authority, others = Authority(tmp_path), Authority(tmp_path, "Other CA")
    authority.issue("mx", "mx.here.test")

    def configuration(ca: Path) -> str:
        asked = f'client_ca = "{ca}"\nclient_certificate = "required"\n'
        listener = f'[[listener]]\naddress = "127.0.0.1:0"\ntls = "implicit"\n{asked}'
        return toml(tmp_path, listeners=listener, tables=TLS)

    with running(tmp_path, configuration(authority.ca)) as server:
        context = authority.client(own=authority.issue("ann", mail="ann@here.test"))
        first = Seen(server.address, context)
        assert Seen(server.address, context, session=first.session).reused
        reload(server, configuration(others.ca))
        with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
            Seen(server.address, context, session=first.session)
        believed = authority.client(own=others.issue("bob", mail="bob@here.test"))
        assert Seen(server.address, believed).serial == first.serial
        assert server.stop() == 0


def test_an_address_turns_to_tls_and_back(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.issue("mx", "mx.here.test")

    def configuration(tls: str) -> str:
        listener = f'[[listener]]\naddress = "127.0.0.1:0"\ntls = "{tls}"\n'
        return toml(tmp_path, workers=2, listeners=listener, tables=TLS)

    with running(tmp_path, configuration("starttls")) as server:
        with Peer(server.address) as before:
            reload(server, configuration("implicit"))
            for _ in range(8):
                assert Seen(server.address, authority.client()).serial
            before.start_tls()  # offered when it came
            assert before.ask("EHLO again.test").startswith("250-")
        reload(server, configuration("off"))
        for _ in range(8):
            with Peer(server.address) as peer:
                assert "STARTTLS" not in peer.hello
                assert peer.data(["b@y.test"], LETTER).startswith("250 ")
        assert server.stop() == 0
