"""Lists, rules and aliases on a real server: what is let in, whom it reaches, and files that change under way.

One server of two workers for what only looks; a server of its own for what changes files.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from peer import GoneError, Peer
from servers import ROOT, Server, mailbox, running, toml

from fastsmtp.lists import ListFile

LISTENERS = """\
[[listener]]
address = "127.0.0.1:0"
dsn = true
[[listener]]
address = "127.0.0.1:0"
vrfy = true
expn = true
[[listener]]
address = "127.0.0.1:0"
role = "lmtp"
"""
DOMAINS = """\
[[domain]]
name = "here.test"
recipients = {file = "mailboxes"}
detail = "+"
transport = "boxes"
[[domain]]
name = "own.test"
recipients = ["eve"]
aliases = "own"
catch_all = "bob@here.test"
transport = "boxes"
[[domain]]
name = "bad.test"
recipients = "any"
transport = "boxes"
"""
TABLES = """\
[alias]
file = "aliases"

[[rule]]
helo = ["*.dyn.test"]
action = "defer"

[[rule]]
name = "friends"
sender = ["friend@spam.test"]
action = "allow"

[[rule]]
name = "spammers"
sender = {file = "senders"}
action = "refuse"
text = "We know you"

[[rule]]
name = "blocked"
client = {file = "networks"}
action = "refuse"
"""
ALIASES = """\
sales@here.test: ann@here.test, bob@here.test
staff@here.test: ann@here.test, ghost@here.test, eve@own.test
owner-staff@here.test: boss@here.test
root: ann@here.test
"""
TEXT = b"Subject: x\r\n\r\nhello\r\n"


def configure(folder: Path, workers: int = 1) -> str:
    (folder / "mailboxes").write_text("# ours\nann\nbob@here.test\nboss\n")
    (folder / "aliases").write_text(ALIASES)
    (folder / "own").write_text("sales: eve\n")
    (folder / "senders").write_text("spam.test\n*.spam.test\n")
    (folder / "networks").write_text("127.0.66.0/24\n::1\n")
    return toml(folder, workers=workers, listeners=LISTENERS, domains=DOMAINS, tables=TABLES)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("lists")
    with running(folder, configure(folder, workers=2)) as one:
        yield one


def copies(server: Server, domain: str, local: str, word: bytes) -> list[bytes]:
    """What is in a mailbox and holds a word."""
    folder = server.mail / domain / local / "new"
    octets = [path.read_bytes() for path in folder.iterdir()] if folder.exists() else []
    return [each for each in octets if word in each]


def senders(server: Server, domain: str, local: str, word: bytes) -> list[str]:
    return [
        each.partition(b">")[0].removeprefix(b"Return-Path: <").decode() for each in copies(server, domain, local, word)
    ]


def test_who_is_let_in(server: Server) -> None:
    with Peer(server.address) as peer:
        assert peer.ask("MAIL FROM:<a@spam.test>") == "550 5.7.1 We know you (rule-spammers)"
        assert peer.ask("MAIL FROM:<a@b.SPAM.test>") == "550 5.7.1 We know you (rule-spammers)"
        assert peer.ask("MAIL FROM:<friend@spam.test>").startswith("250")
        assert peer.ask("RCPT TO:<ann@here.test>").startswith("250")
        assert peer.ask("RCPT TO:<ann@else.test>").startswith("550 5.7.1 Relaying denied")
        assert peer.ask("RCPT TO:<nobody@here.test>").startswith("550 5.1.1")
    with Peer(server.address) as peer:
        assert peer.ask("EHLO a.dyn.test") == "450 4.7.1 Not now, try again later (rule-1)"
    refused = server.wait_for("refused", 1, reason="rule-spammers")
    assert refused[0]["stage"] == "MAIL"


def test_a_blocked_network_waits_for_the_rules_before(server: Server) -> None:
    """The rule before it asks for the sender, so it is said at MAIL."""
    with Peer(server.address, source="127.0.66.6") as peer:
        assert peer.ask("MAIL FROM:<a@x.test>") == "550 5.7.1 Refused (rule-blocked)"
        assert peer.ask("MAIL FROM:<friend@spam.test>").startswith("250")


def test_aliases_reach_their_members(server: Server) -> None:
    with Peer(server.address) as peer:
        peer.data(
            ["sales@here.test", "ann+x@here.test", "sales@own.test", "root@own.test"], b"Subject: 1\r\n\r\n", "s@x.test"
        )
        peer.data(["nobody@own.test"], b"Subject: 2\r\n\r\n", "s@x.test")
    server.wait(lambda: senders(server, "here.test", "bob", b"Subject: 2"), "mail")
    server.wait(lambda: senders(server, "own.test", "eve", b"Subject: 1"), "mail")
    assert senders(server, "here.test", "ann", b"Subject: 1") == ["s@x.test"]  # once
    assert senders(server, "here.test", "bob", b"Subject: 1") == ["s@x.test"]
    assert senders(server, "here.test", "bob", b"Subject: 2") == ["s@x.test"]


def test_a_list_is_from_its_owner_who_hears_what_fails(server: Server) -> None:
    with Peer(server.address) as peer:
        recipients = ["staff@here.test", "bob@here.test"]
        peer.data(recipients, b"Subject: 3\r\n\r\n", "s@x.test")
        peer.data(["staff@here.test"], b"Subject: 4\r\n\r\n", "")
    server.wait(lambda: len(senders(server, "here.test", "boss", b"delivery-status")) == 1, "the report")
    server.wait(lambda: senders(server, "own.test", "eve", b"Subject: 4"), "mail")
    assert senders(server, "own.test", "eve", b"Subject: 3") == ["owner-staff@here.test"]
    assert senders(server, "here.test", "ann", b"Subject: 3") == ["owner-staff@here.test"]
    assert senders(server, "here.test", "bob", b"Subject: 3") == ["s@x.test"]
    # what has no sender gets none
    assert senders(server, "here.test", "ann", b"Subject: 4") == [""]
    (report,) = copies(server, "here.test", "boss", b"delivery-status")
    assert report.startswith(b"Return-Path: <>\nDelivered-To: boss@here.test\n")
    assert b"ghost@here.test" in report


def test_a_sender_who_asks_hears_that_the_list_has_it(server: Server) -> None:
    """And nothing of its members, whom only the owner knows (RFC 3461 5.2.7)."""
    with Peer(server.address) as peer:
        assert peer.ask("MAIL FROM:<bob@here.test> ENVID=e1").startswith("250 ")
        wishes = "NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;Staff@here.test"
        assert peer.ask(f"RCPT TO:<staff@here.test> {wishes}").startswith("250 ")
        assert peer.ask("DATA").startswith("354 ")
        peer.send(b"Subject: 5\r\n\r\n.\r\n")
        assert peer.reply().startswith("250 ")
    server.wait(lambda: copies(server, "here.test", "bob", b"Action: delivered"), "the report")
    (report,) = copies(server, "here.test", "bob", b"Action: delivered")
    assert b"Final-Recipient: rfc822; staff@here.test\n" in report
    assert b"Original-Recipient: rfc822; Staff@here.test\n" in report
    assert b"Original-Envelope-Id: e1\n" in report
    assert b"ghost" not in report
    server.wait(lambda: copies(server, "own.test", "eve", b"Subject: 5"), "mail")
    assert senders(server, "own.test", "eve", b"Subject: 5") == ["owner-staff@here.test"]
    reported = server.wait_for("reported", action="delivered")
    assert [(line["recipients"], line["to"]) for line in reported] == [(["staff@here.test"], "bob@here.test")]
    assert not copies(server, "here.test", "bob", b"ghost@here.test"), "the owner hears of who is unknown"


def test_what_is_told(server: Server) -> None:
    strangers, friends, _ = server.addresses()
    with Peer(strangers) as peer:
        assert peer.ask("VRFY ann@here.test").startswith("252")
        assert peer.ask("EXPN sales@here.test").startswith("252")
    with Peer(friends) as peer:
        assert peer.ask("VRFY ann@here.test") == "250 2.1.5 <ann@here.test>"
        assert peer.ask("VRFY <bob>") == "250 2.1.5 <bob@here.test>"
        assert peer.ask("VRFY nobody@here.test").startswith("550 5.1.1")
        assert peer.ask("VRFY nobody@bad.test").startswith("252")
        assert peer.ask("VRFY a b").startswith("501")
        assert peer.ask("EXPN sales") == "250-2.1.5 <ann@here.test>\n250 2.1.5 <bob@here.test>"
        assert peer.ask("EXPN ann").startswith("550 5.1.1")


def test_lmtp_has_one_answer_for_each_rcpt(server: Server) -> None:
    with Peer(server.addresses()[2], "LHLO x.test") as peer:
        peer.ask("MAIL FROM:<s@x.test>")
        for name in ("sales", "ann", "sales"):
            assert peer.ask(f"RCPT TO:<{name}@here.test>").startswith("250")
        assert peer.ask("DATA").startswith("354")
        peer.send(TEXT + b".\r\n")
        assert [reply[:3] for reply in peer.replies(3)] == ["250"] * 3
        assert peer.ask("NOOP").startswith("250")


# Files that change


def is_known(server: Server, local: str) -> bool:
    with Peer(server.address) as peer:
        peer.ask("MAIL FROM:<s@x.test>")
        return peer.ask(f"RCPT TO:<{local}@here.test>").startswith("250")


def everywhere(server: Server, local: str, known: bool) -> bool:
    return all(is_known(server, local) == known for _ in range(8))


def test_files_are_taken_anew_while_mail_flows(tmp_path: Path) -> None:
    with running(tmp_path, configure(tmp_path, workers=2)) as server:
        stop = threading.Event()
        sent: list[str] = []

        def flow() -> None:
            with Peer(server.address) as peer:
                while not stop.is_set():
                    sent.append(peer.data(["bob@here.test", "sales@here.test"], TEXT, "s@x.test"))

        mail = threading.Thread(target=flow)
        mail.start()
        try:
            path = tmp_path / "mailboxes"
            path.write_text("ann\nbob\nboss\nzoe\n")
            server.wait(lambda: everywhere(server, "zoe", True), "zoe")
            assert server.events("list-published", file=str(path))[0]["entries"] == 4

            path.write_text("ann\nbob\nboss\nold and wrong\nyan\n")
            (kept,) = server.wait_for("list-kept", 1)
            assert (kept["file"], kept["line"]) == (str(path), 4)
            assert everywhere(server, "zoe", True)
            assert everywhere(server, "yan", False)

            path.unlink()
            (*_, kept) = server.wait_for("list-kept", 2)
            assert kept["why"] == "cannot be read: No such file or directory"
            assert everywhere(server, "zoe", True)

            path.with_name("new").write_text("bob\nann\nyan\n")
            path.with_name("new").rename(path)
            server.wait(lambda: everywhere(server, "yan", True), "yan")
            assert everywhere(server, "zoe", False)
        finally:
            stop.set()
            mail.join()
        assert sent
        assert all(reply.startswith("250") for reply in sent)
        assert len(server.events("list-kept")) == 2
        # each message once to each of the two mailboxes
        server.wait(lambda: len(mailbox(server.mail, "here.test", "ann")) == len(sent), "all mail")
        server.wait(lambda: len(mailbox(server.mail, "here.test", "bob")) == len(sent), "all mail")
        # a worker that is started again takes what was published
        server.wait(lambda: len(server.workers()) == 2, "two workers")
        os.kill(server.workers()[0], 9)
        server.wait_for("worker-died")
        server.wait(lambda: len(server.workers()) == 2 and everywhere_or_gone(server), "yan again")


def everywhere_or_gone(server: Server, local: str = "yan") -> bool:
    try:
        return everywhere(server, local, True)
    except GoneError:
        return False


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("mailboxes", "ann\na b\n", "mailboxes:2: expected a local-part or an address"),
        ("mailboxes", None, "mailboxes: cannot be read: No such file"),
        ("aliases", "a: b\nb: a\n", "aliases:2: a loop: a -> b -> a"),
        ("networks", "127.0.66.1/24\n", "networks:1: expected an IP address or a network"),
    ],
)
def test_a_list_that_cannot_be_used_stops_the_start(tmp_path: Path, file: str, text: str | None, says: str) -> None:
    (tmp_path / "fastsmtp.toml").write_text(configure(tmp_path))
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text)
    for command, code in (("serve", 1), ("check", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "fastsmtp", command, "--config", "fastsmtp.toml"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert says in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_a_reload_takes_lists_that_are_new(tmp_path: Path) -> None:
    """All of them are compiled before it; with one that is wrong nothing changes."""
    before = configure(tmp_path, workers=2)
    after = before + '[[rule]]\nname = "more"\nsender = {file = "more"}\naction = "defer"\n'
    with running(tmp_path, before) as server:

        def said(domain: str = "more.test") -> set[str]:
            with Peer(server.address) as peer:
                return {peer.ask(f"MAIL FROM:<a@{domain}>")}

        def reload() -> None:
            (tmp_path / "fastsmtp.toml").write_text(after)
            os.kill(server.pid, signal.SIGHUP)

        with Peer(server.address) as old:
            (tmp_path / "more").write_text("more.test\n*.*\n")
            reload()
            (refused,) = server.wait_for("reload-refused")
            assert f"{tmp_path}/more:2: expected an address" in str(refused["errors"])
            assert said() == {"250 2.1.0 Sender OK"}

            (tmp_path / "more").write_text("more.test\n")
            reload()
            server.wait_for("reloaded")
            deferred = {"450 4.7.1 Not now, try again later (rule-more)"}
            server.wait(lambda: all(said() == deferred for _ in range(4)), "the rule")
            # a session that was there goes on as it began
            assert old.ask("MAIL FROM:<a@more.test>").startswith("250")

        (tmp_path / "more").write_text("other.test\n")
        server.wait(lambda: said() == {"250 2.1.0 Sender OK"}, "the list anew")
        # One that nobody names any more is removed; sessions that look into it go on, and nothing is said.
        compiled = ListFile("addresses", tmp_path / "more").compiled(tmp_path / "data" / "lists")
        others = {path for path in compiled.parent.iterdir() if path != compiled}
        (tmp_path / "fastsmtp.toml").write_text(before)
        with Peer(server.address) as old:
            os.kill(server.pid, signal.SIGHUP)
            server.wait_for("reloaded", 2)
            assert set(compiled.parent.iterdir()) == others
            server.wait(lambda: all(said("other.test") == {"250 2.1.0 Sender OK"} for _ in range(4)), "no rule")
            time.sleep(1.5)  # a tick
            assert {old.ask("MAIL FROM:<a@other.test>")} == deferred
        assert not server.events("list-kept")
        # and is there again when it is named again
        reload()
        server.wait_for("reloaded", 3)
        server.wait(lambda: all(said("other.test") == deferred for _ in range(4)), "the rule again")


def test_a_reload_that_compiles_a_long_list_holds_nothing_up(tmp_path: Path) -> None:
    """Here by a process that is stopped as soon as it is seen."""
    before = configure(tmp_path)
    (tmp_path / "slow").write_text("spam.test\n" * 300_000 + "*.*\n")
    after = before + '[[rule]]\nsender = {file = "slow"}\naction = "refuse"\n'
    with running(tmp_path, before) as server:
        (worker,) = server.workers()

        def begin() -> int:
            """The process that compiles."""
            there = server.workers()
            (tmp_path / "fastsmtp.toml").write_text(after)
            os.kill(server.pid, signal.SIGHUP)
            server.wait(lambda: len(server.workers()) == len(there) + 1, "a process that compiles")
            (compiles,) = set(server.workers()) - set(there)
            os.kill(compiles, signal.SIGSTOP)
            return compiles

        compiles = begin()
        os.kill(worker, signal.SIGKILL)
        server.wait_for("worker-died")
        server.wait(lambda: everywhere_or_gone(server, "ann"), "a worker that serves")
        assert not server.events("reload-refused")
        os.kill(compiles, signal.SIGCONT)
        (refused,) = server.wait_for("reload-refused")
        assert f"{tmp_path}/slow:300001: expected an address" in str(refused["errors"])
        # and who ends it does not wait for it either
        compiles = begin()
        assert server.stop() == 0
        assert not Path(f"/proc/{compiles}").exists()


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that everyone may look into; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_lists_are_read_as_the_user_who_serves(open_path: Path) -> None:
    tmp_path = open_path
    configuration = 'user = "nobody"\n' + configure(tmp_path)
    (tmp_path / "mail").mkdir()
    shutil.chown(tmp_path / "mail", "nobody")
    with running(tmp_path, configuration) as server:
        assert {path.owner() for path in (tmp_path / "data" / "lists").iterdir()} == {"nobody"}
        assert is_known(server, "ann")
        (tmp_path / "mailboxes").write_text("zoe\n")
        server.wait(lambda: is_known(server, "zoe"), "zoe")
    (tmp_path / "mailboxes").write_text("ann\n")
    (tmp_path / "mailboxes").chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-m", "fastsmtp", "serve", "--config", "fastsmtp.toml"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "mailboxes: cannot be read: Permission denied" in done.stderr


def test_a_list_is_compiled_once(tmp_path: Path) -> None:
    with running(tmp_path, configure(tmp_path)) as server:
        folder = tmp_path / "data" / "lists"
        before = {path.name: path.stat().st_ino for path in folder.iterdir()}
        assert len(before) == 5
        server.stop()
        (folder / "names-0123456789abcdef").write_text("of a configuration before")
        time.sleep(0.01)
        server.start()
        assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
