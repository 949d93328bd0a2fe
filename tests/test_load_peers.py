"""Peers: each is started as planned, takes mail to each of its ends, and leaves the machine as it was.

What is quick to get runs always; Exim, OpenSMTPD and Haraka, and packages fetched although the machine has them, only
with LOADTEST_ALL_PEERS=1 (root, network, two minutes).
"""

from __future__ import annotations

import os
import re
import smtplib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from needs import needs, needs_root

from loadtest import LoadError
from loadtest.install import Installed, Store
from loadtest.peers import MAILBOXES, PEERS, Job, Peer, Plan
from loadtest.private import USERS, private_command
from loadtest.start import HOST, mail_below, start
from loadtest.syncs import count_syncs, make_tracer

QUICK = {
    "fastsmtp": (),
    "fastsmtp-memory": (),
    "smtp-sink": ("smtp-sink",),
    "postfix": ("postfix", "smtp-sink"),
    "aiosmtpd": (),
}
ALL = bool(os.environ.get("LOADTEST_ALL_PEERS"))
PAIRS = [(name, end) for name, peer in PEERS.items() for end in peer.claims]
MESSAGES = 30


def store(folder: Path) -> Store:
    """With LOADTEST_ALL_PEERS as the name of a folder, what was fetched is used again."""
    kept = os.environ.get("LOADTEST_ALL_PEERS", "")
    return Store(Path(kept) if kept.startswith("/") else folder / "store")


def installed(name: str, folder: Path) -> Installed:
    """Without the network, unless all peers are asked for."""
    if PEERS[name].private:
        needs_root()
    if not ALL:
        if name not in QUICK:
            pytest.skip("LOADTEST_ALL_PEERS is not set")
        needs(*QUICK[name])
        if name == "aiosmtpd":
            pytest.importorskip("aiosmtpd")
    return PEERS[name].install(store(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One that any user may pass, as a race's own is."""
    for part in (tmp_path, *tmp_path.parents[:2]):
        part.chmod(0o755)
    return tmp_path


def etc() -> dict[str, int]:
    """What stands in /etc, with the time of its last change."""
    found = {}
    for where, _, names in os.walk("/etc"):
        for name in names:
            path = f"{where}/{name}"
            found[path] = os.lstat(path).st_mtime_ns
    return found


def processes_with(text: str) -> list[str]:
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{entry}/cmdline").read_text(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if text in words and int(entry) != os.getpid():
            found.append(words)
    return found


def send(port: int, messages: int) -> None:
    with smtplib.SMTP(HOST, port, timeout=30) as session:
        for number in range(messages):
            session.sendmail("a@x.test", ["b@y.test"], f"Subject: {number}\r\n\r\n.\r\nhello\r\n")


@pytest.mark.parametrize(("name", "end"), PAIRS)
def test_a_plan_stays_on_loopback_and_in_its_folder(name: str, end: str, tmp_path: Path) -> None:
    needs(*(("smtp-sink",) if name == "smtp-sink" else ()))
    plan = PEERS[name].plan(Job(tmp_path, end, 52525, 52526, Installed("1", program=tmp_path / "packages")))
    said = "\n".join([*plan.command, *plan.files.values(), *plan.etc.values()])
    assert re.search(r"127\.0\.0\.1", said)
    assert "52525" in said
    assert ("52526" in said) == (end == "relay")
    assert not re.search(r"\b0\.0\.0\.0\b|\[::\]", said)
    assert all(not os.path.isabs(path) and ".." not in path for path in (*plan.files, *plan.folders, *plan.etc))
    assert {user for user in plan.folders.values() if user} <= USERS.keys()
    if "mailboxes" in plan.files:
        assert len(plan.files["mailboxes"].splitlines()) == len(MAILBOXES) == 1001


@pytest.mark.parametrize(("name", "end"), PAIRS)
def test_mail_is_delivered_and_the_machine_left_alone(name: str, end: str, folder: Path) -> None:
    package = installed(name, folder)
    before = etc()
    running = start(PEERS[name], package, store(folder), folder / "it", end)
    try:
        used = running.server.cpu()
        send(running.port, MESSAGES)
        deadline = time.monotonic() + 30
        while running.delivered() not in (None, MESSAGES) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert running.delivered() == (None if end == "discard" else MESSAGES)
        assert running.server.settle(30)
        assert running.delivered() in (None, MESSAGES)  # and not one more
        assert running.server.cpu() > used
        assert running.server.memory() > 500_000
        if end == "maildir":
            running.clear()
            assert running.delivered() == 0
    finally:
        running.stop()
    assert not (folder / "it").exists()
    assert not processes_with(str(folder / "it"))
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    assert etc() == before


CLAIMS = [
    pair for pair in PAIRS if ALL or (pair[0] in QUICK and pair not in {("postfix", "discard"), ("postfix", "relay")})
]


@pytest.mark.parametrize(("name", "end"), CLAIMS)
def test_a_claim_is_what_strace_counts(name: str, end: str, folder: Path) -> None:
    needs("strace")
    package = installed(name, folder)
    tracer = make_tracer(store(folder))
    running = start(PEERS[name], package, store(folder), folder / "it", end, tracer)
    try:
        syncs = count_syncs(HOST, running.port, running.trace(), messages=3)
    finally:
        running.stop()
    # Debian's OpenSMTPD promises what it does not do; nobody else may.
    assert (syncs.before_250 >= 1) == (PEERS[name].claims[end] == "fsync" and name != "opensmtpd"), syncs


@pytest.mark.skipif(not ALL, reason="LOADTEST_ALL_PEERS is not set")
def test_a_package_that_the_machine_has_not_is_unpacked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_root()
    real = subprocess.run

    def run(command: list[str], **options: object) -> object:
        if command[0] == "dpkg-query":
            command = ["false"]
        elif command[0].endswith("apt-get") and "install" in command:
            command = [*command, "--reinstall"]  # else it would not download what is there
        return real(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr("loadtest.install.subprocess.run", run)
    bare = Store(folder / "bare")
    package = PEERS["postfix"].install(bare)
    assert package.tree is not None
    assert (package.tree / "usr/sbin/postfix").exists()
    running = start(PEERS["postfix"], package, bare, folder / "it", "relay", make_tracer(bare))
    try:
        assert count_syncs(HOST, running.port, running.trace(), messages=3).before_250 >= 1
        assert running.delivered() == 3
    finally:
        running.stop()


def test_a_server_that_does_not_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    peer = Peer(
        "broken",
        {"discard": "nothing"},
        lambda _: Installed("1"),
        lambda _: Plan([sys.executable, "-c", "import sys; sys.exit('no such port')"]),
    )
    with pytest.raises(LoadError, match="broken has ended with exit code 1: no such port"):
        start(peer, Installed("1"), Store(tmp_path), tmp_path / "it", "discard")
    assert not (tmp_path / "it").exists()


def test_a_program_that_is_missing_is_an_error(tmp_path: Path) -> None:
    peer = Peer("gone", {"discard": "nothing"}, lambda _: Installed("1"), lambda _: Plan(["/no/such/program"]))
    with pytest.raises(LoadError, match="/no/such/program cannot be started: No such file"):
        start(peer, Installed("1"), Store(tmp_path), tmp_path / "it", "discard")


def test_an_end_that_a_server_has_not_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="smtp-sink cannot maildir"):
        start(PEERS["smtp-sink"], Installed("1"), Store(tmp_path), tmp_path / "it", "maildir")


def test_mail_is_counted_in_new_only(tmp_path: Path) -> None:
    for name in ("y.test/b/new/1", "y.test/b/new/2", "y.test/b/tmp/3", "y.test/b/cur/4", "c/new/5", "c/index"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert mail_below(tmp_path) == 3
    assert mail_below(tmp_path, remove=True) == 3
    assert mail_below(tmp_path) == 0
    assert (tmp_path / "y.test/b/tmp/3").exists()
    assert mail_below(tmp_path / "none") == 0


def test_a_private_view_shows_our_files_and_hides_nothing_else(tmp_path: Path) -> None:
    needs_root()
    tree, folder = tmp_path / "tree", tmp_path / "it"
    (tree / "usr/share/race").mkdir(parents=True)
    (tree / "usr/share/race/file").write_text("from the package")
    (folder / "queue").mkdir(parents=True)
    shown = "cat /usr/share/race/file /etc/race.conf; ls /etc/hostname; id -u postfix; touch /var/spool/it/written; pwd"
    binds = {"queue": "/var/spool/it"}
    command = private_command(folder, [tree], {"race.conf": "ours\n"}, binds, ["sh", "-c", shown])
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    said = ended.stdout.splitlines()
    assert said == ["from the packageours", "/etc/hostname", str(USERS["postfix"]), "/mnt"], ended.stderr
    assert (folder / "queue/written").exists()
    assert not Path("/etc/race.conf").exists()
    assert not Path("/var/spool/it").exists()


def test_a_path_that_overlays_cannot_take_is_refused(tmp_path: Path) -> None:
    needs_root()
    with pytest.raises(LoadError, match="no path with a colon"):
        private_command(tmp_path / "a:b", [], {}, {}, ["true"])


def test_a_package_that_does_not_exist_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(LoadError) as error:
        Store(tmp_path / "store")._run(["sh", "-c", "echo first; echo E: no such package >&2; exit 3"])
    assert str(error.value) == "sh failed: E: no such package"
