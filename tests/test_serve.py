"""The whole server as its users run it: real clients, real processes, real Maildirs, and what happens to it.

Each test starts `fastsmtp serve` (the plain ones share one) and looks at it from outside: sockets, signals, files,
the log. Not here: dialogs in detail (test_dialogs.py), kills at random (test_kill.py), real mail (test_corpus.py).
"""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from needs import SYSTEM_PATH, default_port, lacks, needs
from peer import GoneError, Peer
from servers import ROOT, Mail, Server, files, mailbox, running, toml

DOMAINS = """\
[[domain]]
name = "here.test"
recipients = ["ann", "bob"]
transport = "boxes"
[[domain]]
name = "any.test"
recipients = "any"
transport = "boxes"
"""
TLS = '[tls]\ncertificate = "cert.pem"\nkey = "key.pem"\n'
LETTER = b"Subject: x\r\n\r\nDear B,\r\n.\r\n..dots\r\nand \xe4\xff 8 bit\r\n"


def stored(octets: bytes) -> bytes:
    """A message whose lines end in CRLF, as a Maildir has it."""
    return octets.replace(b"\r\n", b"\n")


def one_mail(server: Server, domain: str, local: str) -> Mail:
    """The only message in a mailbox, once it is there."""
    server.wait(lambda: mailbox(server.mail, domain, local), f"the message of {local}@{domain}")
    (mail,) = mailbox(server.mail, domain, local)
    return mail


def run_program(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a program to its end."""
    environment = {**os.environ, "PATH": SYSTEM_PATH}
    return subprocess.run(
        command, env=environment, input=text, capture_output=True, text=True, timeout=120, check=False
    )


def make_certificate(folder: Path) -> None:
    """cert.pem and key.pem for mx.here.test."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mx.here.test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two workers, plain, TLS and LMTP, for tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("shared")
    make_certificate(folder)
    listeners = f"""\
[[listener]]
address = "127.0.0.1:0"
[[listener]]
address = "127.0.0.1:0"
tls = "implicit"
[[listener]]
address = "unix:{folder}/lmtp"
role = "lmtp"
"""
    with running(folder, toml(folder, workers=2, listeners=listeners, domains=DOMAINS, tables=TLS)) as server:
        yield server


# Real clients


def test_swaks(shared: Server, tmp_path: Path) -> None:
    needs("swaks")
    letter = tmp_path / "letter"
    letter.write_bytes(stored(LETTER))
    done = run_program(
        "swaks", "--server", shared.address, "--from", "s@client.test", "--to", "swaks@any.test,both@any.test",
        "--data", f"@{letter}", "--suppress-data",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for local in ("swaks", "both"):
        mail = one_mail(shared, "any.test", local)
        assert mail.body.rstrip(b"\n") == stored(LETTER).rstrip(b"\n")
        assert mail.sender == "s@client.test"
        assert mail.recipient == f"{local}@any.test"


def test_swaks_with_tls(shared: Server) -> None:
    needs("swaks")
    if "TLS" not in run_program("swaks", "--support").stdout.split("not supported")[0]:
        lacks("needs swaks with TLS: apt-get install libnet-ssleay-perl")
    for n, how in enumerate((["--tls"], ["--tls-on-connect"])):
        done = run_program(
            "swaks", "--server", shared.addresses()[n], *how, "--from", "s@client.test", "--to", f"tls{n}@any.test"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        mail = one_mail(shared, "any.test", f"tls{n}")
        assert mail.protocol == "ESMTPS"
        assert b"\n\t(TLSv1.3 " in mail.received


def test_smtp_source(tmp_path: Path) -> None:
    """Many sessions, several workers: every message is there once, and each worker had its share."""
    needs("smtp-source")
    with running(tmp_path, toml(tmp_path, workers=2)) as server:
        for more in ([], ["-d"]):  # a connection for each message, and persistent ones
            done = run_program(
                "smtp-source", *more, "-s", "20", "-m", "400", "-l", "3000", "-f", "s@client.test",
                "-t", "b@any.test", server.address,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        server.wait_for("delivered", 800)
        mails = mailbox(server.mail, "any.test", "b")
        assert len(mails) == 800
        assert len({mail.id for mail in mails}) == 800
        bodies = {re.sub(rb"(Date|Message-Id): [^\n]*\n", b"", mail.body) for mail in mails}
        assert len(bodies) == 1
        assert len(bodies.pop()) > 2000
        assert len(server.events("accepted")) == 800
        workers = Counter(mail.id[13:15] for mail in mails)
        assert len(workers) == 2, "one worker had them all"
        assert server.stop() == 0


# What is sent is found


def test_data_and_bdat_arrive_byte_for_byte(shared: Server) -> None:
    every_octet = bytes(range(256)).replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b"")
    letters = [LETTER, b"", b"\r\n", b".\r\n", b"Subject: x\r\n\r\n" + every_octet + b"\r\n" + b"x" * 200_000 + b"\r\n"]
    with Peer(shared.address) as peer:
        for n, letter in enumerate(letters):
            assert peer.data([f"data{n}@any.test"], letter).startswith("250 2.0.0 ")
            assert peer.bdat([f"bdat{n}@any.test"], letter).startswith("250 2.0.0 ")
            assert peer.bdat([f"cut{n}@any.test"], letter[:20], b"", letter[20:], b"").startswith("250 2.0.0 ")
        assert peer.bdat(["raw@any.test"], b"a\nb\rc\r\n\0d", parameters=" BODY=BINARYMIME").startswith("250 2.0.0 ")
        assert peer.ask("QUIT").startswith("221 ")
        assert peer.ended()
    boxes = [(kind, n) for kind in ("data", "bdat", "cut") for n in range(len(letters))]
    for kind, n in boxes:
        mail = one_mail(shared, "any.test", f"{kind}{n}")
        assert mail.body == stored(letters[n])
        assert mail.protocol == "ESMTP"
    assert one_mail(shared, "any.test", "raw").body == b"a\nb\rc\r\n\0d"


def test_starttls_and_implicit_tls(shared: Server) -> None:
    plain, implicit = shared.addresses()[:2]
    with Peer(plain) as peer:
        assert "250-STARTTLS" in peer.hello.split("\n")
        peer.start_tls()
        assert peer.ask("MAIL FROM:<s@client.test>").startswith("503 "), "EHLO is to be said again"
        assert "STARTTLS" not in peer.ask("EHLO client.test")
        assert peer.data(["secured@any.test"], LETTER).startswith("250 2.0.0 ")
    with Peer(implicit, implicit_tls=True) as peer:
        assert "STARTTLS" not in peer.hello
        assert peer.bdat(["secured@any.test"], LETTER).startswith("250 2.0.0 ")
    shared.wait(lambda: len(mailbox(shared.mail, "any.test", "secured")) == 2, "both messages")
    for mail in mailbox(shared.mail, "any.test", "secured"):
        assert mail.body == stored(LETTER)
        assert mail.protocol == "ESMTPS"
        assert b"\n\t(TLSv1.3 " in mail.received
    shared.wait_for("session", 2, tls="TLSv1.3 TLS_AES_256_GCM_SHA384")


def test_a_failed_handshake_ends_the_connection_only(shared: Server) -> None:
    with Peer(shared.address) as peer:
        assert peer.ask("STARTTLS").startswith("220 ")
        peer.send(b"this is no TLS, this is no TLS, this is no TLS\r\n")
        peer.socket.settimeout(60)
        while (octets := peer.socket.recv(1000)) not in (b"",):
            assert octets[:1] == b"\x15", "something else than an alert of TLS"
    shared.wait_for("tls-failed")
    with Peer(shared.address) as peer:
        assert peer.hello.startswith("250-")


def test_lmtp_over_a_unix_socket(shared: Server) -> None:
    address = shared.addresses()[2]
    assert address.startswith("unix:")
    with Peer(address, "LHLO client.test") as peer:
        replies = peer.envelope(["one@any.test", "nobody@here.test", "two@any.test"])
        assert [reply[:3] for reply in replies] == ["250", "250", "550", "250"]
        assert peer.ask("DATA").startswith("354 ")
        peer.send(b"Subject: x\r\n\r\nlmtp\r\n.\r\n")
        assert [reply[:10] for reply in peer.replies(2)] == ["250 2.0.0 ", "250 2.0.0 "]
        assert peer.ask("EHLO client.test").startswith("500 ")
    for local in ("one", "two"):
        mail = one_mail(shared, "any.test", local)
        assert mail.body == b"Subject: x\n\nlmtp\n"
        assert mail.protocol == "LMTP"
        assert b"(local, uid %d)" % os.getuid() in mail.received


# Who is a recipient


def test_unknown_mailboxes_foreign_domains_and_postmaster(shared: Server) -> None:
    with Peer(shared.address) as peer:
        assert peer.ask("MAIL FROM:<>").startswith("250 ")
        for recipient, reply in (
            ("ann@here.test", "250 2.1.5 "),
            ("ANN@Here.Test", "250 2.1.5 "),
            ("carl@here.test", "550 5.1.1 "),
            ("ann@foreign.test", "550 5.7.1 "),
            ("ann%foreign.test@here.test", "550 5.1.1 "),
            ("foreign.test!ann@here.test", "550 5.1.1 "),
            ("@here.test:ann@foreign.test", "550 5.7.1 "),
            ("Postmaster@here.test", "250 2.1.5 "),
            ("postmaster", "250 2.1.5 "),
            ("postmaster@foreign.test", "550 5.7.1 "),
        ):
            assert peer.ask(f"RCPT TO:<{recipient}>").startswith(reply), recipient
        assert peer.ask("DATA").startswith("354 ")
        peer.send(b"To: you\r\n\r\nx\r\n.\r\n")
        assert peer.reply().startswith("250 2.0.0 ")
    for local in ("ann", "postmaster"):  # a bare postmaster is the first domain's, and was named before
        mail = one_mail(shared, "here.test", local)
        assert mail.body == b"To: you\n\nx\n"
        assert mail.sender == ""


NAMES = [
    "../../../escape",
    "..",
    ".",
    ".hidden",
    "a/b",
    "/etc/passwd",
    "/",
    "a/../../b",
    "%2e%2e",
    "..%2f",
    "new",
    "tmp",
    "cur",
    " ",
    " a b ",
    "a\\b",
    'a"b',
    "x" * 64,
    "x" * 250,
    "x" * 249 + "y",
    "ü" * 125,
    "ü" * 124 + "é",
    "\N{GREEK CAPITAL LETTER OMEGA}" * 125,
    "\u202egnp.exe",
    "a:2,S",
    "a,S=1",
    "~root",
    "-rf",
    "*",
    "{domain}",
    "{local}",
]


def written(local: str) -> str:
    """A local-part as RFC 5321 4.1.2 has it: in quotes where they are needed."""
    if re.fullmatch(r"[\w~*{}-]+", local):
        return local
    escaped = local.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def test_no_local_part_leaves_the_folder_or_meets_another(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        with Peer(server.address) as peer:
            for n, name in enumerate(NAMES):
                body = f"Subject: {n}\r\n\r\n{n}\r\n".encode()
                reply = peer.data([f"{written(name)}@y.t"], body, parameters=" SMTPUTF8")
                assert reply.startswith("250 2.0.0 "), (name, reply)
            # the same mailboxes once more, unquoted and in other cases
            for name in ('"' + "X" * 64 + '"', "Ü" * 125):
                assert peer.data([f"{name}@Y.t"], b"again\r\n", parameters=" SMTPUTF8").startswith("250 2.0.0 ")
        server.wait_for("delivered", len(NAMES) + 2)
        everything = files(server.mail)
        assert len(everything) == len(NAMES) + 2
        boxes = [path.parent.parent for path in everything]
        assert len(set(boxes)) == len(NAMES)
        assert {box.parent for box in boxes} == {server.mail / "y.t"}
        assert sorted(Counter(boxes).values())[-3:] == [1, 2, 2]
        assert not any(box.name.startswith(".") for box in boxes)
        # nothing anywhere else
        assert {path.name for path in tmp_path.iterdir()} == {"data", "mail", "log", "errors", "fastsmtp.toml"}
        assert {path.name for path in server.mail.iterdir() if path.name[0] != "."} == {"y.t"}
        assert {path.name for box in boxes for path in box.iterdir()} == {"new", "tmp", "cur"}


def test_no_domain_leaves_the_folder(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        with Peer(server.address) as peer:
            assert peer.ask("MAIL FROM:<> SMTPUTF8").startswith("250 ")
            for domain in ("..", "../x", "a/b", "/", ".x", "a..b", "", "a b", "%2e%2e"):
                assert peer.ask(f"RCPT TO:<a@{domain}>").startswith("501 "), domain
            for domain in ("[192.0.2.1]", "[IPv6:2001:db8::1]", "bücher.test"):
                assert peer.ask(f"RCPT TO:<a@{domain}>").startswith("250 "), domain
            assert peer.ask("DATA").startswith("354 ")
            peer.send(b"x\r\n.\r\n")
            assert peer.reply().startswith("250 ")
        server.wait_for("delivered", 3)
        assert len(files(server.mail)) == 3
        assert "xn--bcher-kva.test" in {path.name for path in server.mail.iterdir()}


# The start


def test_the_embedded_default(tmp_path: Path) -> None:
    """As `make run` starts it."""
    with default_port():
        serve_by_default(tmp_path)


def serve_by_default(tmp_path: Path) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 2525)) == 0:
            lacks("needs port 2525, which another program has")
    with running(tmp_path, None) as server:
        assert server.address == "127.0.0.1:2525"
        server.wait(lambda: "Ctrl-C" in server.errors(), "the banner")
        with Peer(server.address) as peer:
            assert peer.data(["b@y.test"], LETTER).startswith("250 ")
        mail = tmp_path / "fastsmtp-data" / "mail"
        assert "fastsmtp-data/mail/<domain>/<local-part>/" in server.errors()
        server.wait(lambda: mailbox(mail, "y.test", "b"), "the message")
        assert mailbox(mail, "y.test", "b")[0].body == stored(LETTER)
        assert server.stop(signal.SIGINT) == 0


def test_a_second_server_on_the_same_data(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        done = subprocess.run(
            [sys.executable, "-m", "fastsmtp", "serve", "--config", "fastsmtp.toml"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert (
            done.stderr
            == f"fastsmtp: data_dir {tmp_path}/data is in use by process {server.pid}, or by workers it left\n"
        )
        assert done.stdout == ""
        with Peer(server.address) as peer:
            assert peer.data(["b@y.test"], LETTER).startswith("250 "), "the first goes on"


def test_nothing_kept(tmp_path: Path) -> None:
    with running(tmp_path, toml(tmp_path, tables='[spool]\ndurability = "none"\n')) as server:
        with Peer(server.address) as peer:
            assert peer.data(["b@y.test"], LETTER).startswith("250 ")
            assert peer.bdat(["b@y.test"], b"\r\n" + b"x" * 500_000 + b"\r\n").startswith("250 ")
        server.wait_mail(2)
        bodies = {mail.body for mail in mailbox(server.mail, "y.test", "b")}
        assert bodies == {stored(LETTER), b"\n" + b"x" * 500_000 + b"\n"}
        assert server.stop() == 0
        assert not (tmp_path / "data" / "spool").exists()


# The end


def test_sigterm_ends_idle_sessions_and_finishes_messages(tmp_path: Path) -> None:
    with running(tmp_path, toml(tmp_path, workers=2)) as server, ExitStack() as stack:
        idle = [stack.enter_context(Peer(server.address)) for _ in range(10)]
        silent = stack.enter_context(Peer(server.address, ""))
        assert silent.reply().startswith("220 ")
        data = stack.enter_context(Peer(server.address))
        data.envelope(["data@y.test"])
        assert data.ask("DATA").startswith("354 ")
        data.send(b"Subject: half\r\n")
        bdat = stack.enter_context(Peer(server.address))
        bdat.envelope(["bdat@y.test"])
        bdat.send(b"BDAT 3\r\nSub")
        assert bdat.reply().startswith("250 ")
        bdat.send(b"BDAT 97\r\nject: half\r\n")
        # Both are in the middle of their messages.
        server.process.terminate()
        for peer in [*idle, silent]:
            assert peer.reply().startswith("421 4.3.2 mx.here.test ")
            assert peer.ended()
        with pytest.raises(ConnectionRefusedError):
            Peer(server.address)
        data.send(b"\r\nthe rest\r\n.\r\n")
        bdat.send(b"x" * 85 + b"BDAT 4 LAST\r\nyz\r\n")
        assert data.reply().startswith("250 2.0.0 ")
        assert [reply[:4] for reply in bdat.replies(2)] == ["250 ", "250 "]
        for peer in (data, bdat):
            assert peer.reply().startswith("421 4.3.2 ")
            assert peer.ended()
        assert server.ended() == 0
        server.start()  # what was not delivered before the end is delivered now
        server.wait_mail(2)
        assert mailbox(server.mail, "y.test", "data")[0].body == b"Subject: half\n\nthe rest\n"
        assert mailbox(server.mail, "y.test", "bdat")[0].body == b"Subject: half\n" + b"x" * 85 + b"yz\n"
        assert server.stop() == 0
        assert len(files(server.mail)) == 2


def test_sigterm_does_not_wait_for_ever(tmp_path: Path) -> None:
    with running(tmp_path, toml(tmp_path, tables='[timeouts]\nshutdown = "1s"\n')) as server:
        with Peer(server.address) as peer, Peer(server.address) as other:
            assert other.data(["b@y.test"], LETTER).startswith("250 ")
            peer.envelope(["b@y.test"])
            assert peer.ask("DATA").startswith("354 ")
            peer.send(b"Subject: half\r\n")
            started = time.monotonic()
            assert server.stop() == 0
            assert 0.9 < time.monotonic() - started < 30
            with pytest.raises(GoneError):
                peer.reply()
        assert server.events("session", end="shutdown")
        server.start()
        server.wait_mail(1)
        assert server.stop() == 0
        assert len(files(server.mail)) == 1, "half a message was kept"


def test_idle_clients_that_stay_do_not_hold_up_the_end(tmp_path: Path) -> None:
    with (
        running(tmp_path, toml(tmp_path, tables='[timeouts]\nshutdown = "5m"\n')) as server,
        Peer(server.address) as peer,
        Peer(server.address, "") as silent,
    ):
        assert silent.reply().startswith("220 ")
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 50
        assert peer.reply().startswith("421 4.3.2 ")


def test_what_comes_late_in_the_shutdown_is_left_to_the_next_start(tmp_path: Path) -> None:
    """A transport that began with it would perhaps not be done at the end, and deliver it twice."""
    with running(tmp_path, toml(tmp_path, tables='[timeouts]\nshutdown = "6s"\n')) as server:
        with Peer(server.address) as late, Peer(server.address) as hanging:
            for peer in (late, hanging):
                peer.envelope(["b@y.test"])
                assert peer.ask("DATA").startswith("354 ")
            server.process.terminate()
            server.wait_for("stop")
            time.sleep(3.8)  # more than half of the time, and less than all of it
            late.send(b"Subject: late\r\n.\r\n")
            assert late.reply().startswith("250 ")
            assert server.ended() == 0
        assert files(server.mail) == []
        server.start()
        server.wait_mail(1)
        assert server.stop() == 0
        assert len(files(server.mail)) == 1


def test_a_second_sigterm_ends_it_at_once(tmp_path: Path) -> None:
    with running(tmp_path, toml(tmp_path, tables='[timeouts]\nshutdown = "5m"\n')) as server:
        with Peer(server.address) as peer:
            peer.envelope(["b@y.test"])
            assert peer.ask("DATA").startswith("354 ")
            server.process.terminate()
            server.wait_for("stop")
            time.sleep(0.2)
            assert server.process.poll() is None
            assert server.stop() == 1
            assert peer.ended()
        assert server.events("stopped")[-1]["killed"] == 1


# Processes


def test_a_killed_worker_is_started_again_and_others_go_on(tmp_path: Path) -> None:
    with running(tmp_path, toml(tmp_path, workers=2)) as server, ExitStack() as stack:
        peers = [stack.enter_context(Peer(server.address)) for _ in range(24)]
        before = server.workers()
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        died = server.wait_for("worker-died")[0]
        assert died["pid"] == before[0]
        assert died["why"] == "SIGKILL"
        gone = 0
        for peer in peers:
            try:
                assert peer.data(["b@y.test"], LETTER).startswith("250 ")
            except GoneError:
                gone += 1
        assert gone == died["sessions"]
        assert 0 < gone < 24
        server.wait(lambda: len(server.workers()) == 2, "the worker is back")
        assert before[1] in server.workers()
        server.wait_for("spool-opened", 3)
        with ExitStack() as later:
            for peer in [later.enter_context(Peer(server.address)) for _ in range(24)]:
                assert peer.data(["b@y.test"], LETTER).startswith("250 ")
        server.wait_mail(24 - gone + 24)
        assert server.stop() == 0
        assert len(files(server.mail)) == 24 - gone + 24


def test_deferred_mail_survives_a_restart(tmp_path: Path) -> None:
    """The mail root is a file: nothing can be delivered, everything is kept."""
    tables = '[queue]\nretry = "1s"\nretry_max = "1s"\n'
    big = b"Subject: big\r\n\r\n" + b"0123456789abcdef\r\n" * 20_000
    with running(tmp_path, toml(tmp_path, workers=2, tables=tables)) as server:
        mail = server.mail
        mail.rename(tmp_path / "away")
        mail.touch()
        with Peer(server.address) as peer:
            for n in range(20):
                assert peer.data([f"b{n}@y.test", f"c{n}@y.test"], LETTER).startswith("250 ")
            assert peer.bdat(["big@y.test"], big).startswith("250 ")
        deferred = server.wait_for("deferred", 60)
        assert deferred[0]["status"].startswith("4.")
        assert max(line["attempts"] for line in deferred) >= 2
        assert server.stop() == 0
        mail.unlink()
        (tmp_path / "away").rename(mail)
        server.start()
        server.wait_mail(41)
        assert sum(line["messages"] for line in server.wait_for("spool-opened", 4)[2:]) == 21
        for n in range(20):
            assert [found.body for found in mailbox(mail, "y.test", f"b{n}")] == [stored(LETTER)]
        assert mailbox(mail, "y.test", "big")[0].body == stored(big)
        assert server.stop() == 0
        assert len(files(mail)) == 41
        assert list(tmp_path.glob("data/spool/*/body/*")) == []


def test_deferred_mail_is_delivered_when_the_maildir_works_again(tmp_path: Path) -> None:
    tables = '[queue]\nretry = "1s"\nretry_max = "1s"\n'
    with running(tmp_path, toml(tmp_path, tables=tables)) as server:
        (server.mail / "y.test").mkdir()
        (server.mail / "y.test" / "b").touch()
        with Peer(server.address) as peer:
            assert peer.data(["b@y.test", "c@y.test"], LETTER).startswith("250 ")
        server.wait_for("deferred", 2, to="b@y.test")
        assert len(server.events("delivered", to="c@y.test")) == 1
        (server.mail / "y.test" / "b").unlink()
        server.wait_for("delivered", to="b@y.test")
        assert mailbox(server.mail, "y.test", "b")[0].body == stored(LETTER)
        assert len(mailbox(server.mail, "y.test", "c")) == 1


def test_a_start_without_the_mail_root_says_why(tmp_path: Path) -> None:
    (tmp_path / "mail").touch()
    server = Server(tmp_path, toml(tmp_path))
    try:
        server.launch()
        assert server.ended() == 1
        assert server.events() == []
        assert server.errors() == f"fastsmtp: transport.boxes.path: {tmp_path}/mail is no folder\n"
    finally:
        server.kill()


def test_fewer_workers_adopt_what_is_left(tmp_path: Path) -> None:
    def configuration(workers: int, delay_report: str = "0s") -> str:
        queue = f'[queue]\nretry = "1s"\nretry_max = "1s"\ndelay_report = "{delay_report}"\n'
        return toml(tmp_path, workers=workers, tables=queue)

    with running(tmp_path, configuration(4)) as server:
        (server.mail / "y.test").touch()
        used = 0
        while used < 4:  # the kernel chooses the worker
            with Peer(server.address) as peer:
                assert peer.data(["b@y.test"], LETTER).startswith("250 ")
            used = len({line["id"][13:15] for line in server.events("accepted")})
        server.wait(lambda: len({line["id"] for line in server.events("deferred")}) > 0, "a delivery that failed")
        assert server.stop() == 0
        accepted = len(server.events("accepted"))
        server.configuration = configuration(1, "1s")
        server.start()
        # What is told of mail stands in the spool of that mail, for they are kept in one commit.
        for told in server.wait_for("reported", accepted):
            assert told["report"][13:15] == told["id"][13:15]
        (server.mail / "y.test").unlink()
        server.wait_mail(2 * accepted)
        opened = server.wait_for("spool-opened", 8)[4:]
        assert {Path(line["spool"]).name for line in opened} == {"0", "1", "2", "3"}
        assert sum(line["messages"] for line in opened) == accepted
        assert server.stop() == 0
        assert len(files(server.mail)) == 2 * accepted
        server.start()
        assert {line["messages"] for line in server.wait_for("spool-opened", 12)[8:]} == {0}
        assert server.stop() == 0


# Limits


def test_descriptors_run_short(tmp_path: Path) -> None:
    """More clients than descriptors: none is dropped unheard, and they are served as others leave."""
    needs("prlimit")
    clients = 300
    with (
        running(tmp_path, toml(tmp_path, workers=1), ["prlimit", "--nofile=100:100"]) as server,
        ExitStack() as stack,
    ):
        peers = []
        for _ in range(clients):
            peer = Peer(server.address, "")
            stack.callback(peer.close)
            peers.append(peer)
        server.wait_for("accept-paused")
        for peer in peers:  # in the order of the accept queue: each leaves, and makes room for one that waits
            assert peer.reply().startswith("220 ")
            assert peer.ask("EHLO client.test").startswith("250-")
            assert peer.data(["b@y.test"], LETTER).startswith("250 ")
            peer.close()
        server.wait_for("accept-resumed")
        server.wait_mail(clients)
        assert server.stop() == 0
        assert len(files(server.mail)) == clients


def test_too_many_sessions(tmp_path: Path) -> None:
    with running(tmp_path, toml(tmp_path, workers=2, tables="[limits]\nsessions = 5\n")) as server:
        with ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(Peer(server.address))
            for _ in range(3):
                peer = stack.enter_context(Peer(server.address, ""))
                assert peer.reply().startswith("421 4.3.2 mx.here.test ")
                assert peer.ended()
        server.wait_for("session", 8)
        assert len(server.events("session", end="too many sessions")) == 3
        with Peer(server.address) as peer:
            assert peer.hello.startswith("250-")


# The log


def test_the_log_says_what_an_operator_needs_and_nothing_raw(tmp_path: Path) -> None:
    with running(tmp_path, toml(tmp_path, domains=DOMAINS)) as server:
        with Peer(server.address, "") as peer:
            peer.reply()
            peer.send(b"EHLO \x1b[31mred\x07\xff\xe2\x80\xaeevil\r\n")
            hello = peer.reply()
            peer.send(b"MAIL FROM:<s@client.test>\r\nRCPT TO:<nobody@here.test>\r\n")
            if hello.startswith("250"):
                assert [reply[:4] for reply in peer.replies(2)] == ["250 ", "550 "]
        with Peer(server.address, "HELO \t(forged); x\u2028y\u202e\u0085z") as peer:
            assert peer.data(["ann@here.test", "bob@here.test"], LETTER).startswith("250 ")
            assert peer.ask("RCPT TO:<x>\x1b]0;title\x07").startswith("5")
            assert peer.ask("QUIT").startswith("221 ")
        server.wait_for("session", 2)
        server.wait_for("delivered", 2)
        assert server.stop() == 0
        for line in server.lines():
            assert line.isascii()
            assert line.decode().isprintable()
            assert {"time", "level", "event"} < set(json.loads(line))
        kinds = Counter(line["event"] for line in server.events())
        assert kinds["start"] == kinds["stop"] == kinds["stopped"] == kinds["accepted"] == 1
        assert kinds["delivered"] == kinds["session"] == 2
        accepted = server.events("accepted")[0]
        assert accepted["from"] == "s@client.test"
        assert accepted["to"] == ["ann@here.test", "bob@here.test"]
        assert accepted["size"] == len(LETTER)
        assert {line["id"] for line in server.events("delivered")} == {accepted["id"]}
        assert server.events("session", end="quit")[0]["messages"] == 1
        if hello.startswith("250"):
            (refused,) = server.events("refused", reason="unknown-mailbox")
            assert refused["to"] == "nobody@here.test"
        received = mailbox(server.mail, "here.test", "ann")[0].received
        assert received.isascii()
        assert re.match(rb"Received: from [A-Za-z0-9.\-_:\[\]?]+ \(\[127\.0\.0\.1\]\)\n", received)
