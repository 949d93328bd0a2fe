"""`fastsmtp user`, as a program uses it, and as an operator does: in a process of its own, on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from fastsmtp.credentials import UnavailableError
from fastsmtp.credentials.file import HEADER, read_users
from fastsmtp.credentials.hashes import verify
from fastsmtp.credentials.scram import fits
from fastsmtp.user_command import user

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "fastsmtp.toml"
    path.write_text('[auth]\nusers_file = "users"\ndomain = "here.test"\n')
    return path


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(config: Path, *arguments: str, said: str | bytes = "") -> Done:
    done = CliRunner().invoke(user, [*arguments, "--config", str(config)], input=said, prog_name="fastsmtp user")
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return Done(done.exit_code, done.stdout, done.stderr)


def works(config: Path, *arguments: str, said: str | bytes = "") -> str:
    done = run(config, *arguments, said=said)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def fails(config: Path, *arguments: str, said: str | bytes = "", code: int = 1) -> str:
    done = run(config, *arguments, said=said)
    assert (done.returncode, done.stdout) == (code, "")
    return done.stderr


def test_a_user_from_beginning_to_end(config: Path) -> None:
    users = config.parent / "users"
    assert works(config, "add", "Ann@X.test", said="first\n") == ""
    assert users.stat().st_mode & 0o777 == 0o600
    assert users.read_text().startswith(HEADER + "\n")
    works(config, "add", "bob", "--sender", "@Bücher.example", "--sender", "Sales@X.test", said="second\r\nrest")
    assert works(config, "list").splitlines() == [
        "ann@x.test  scram  ann@x.test",
        "bob  scram  bob@here.test sales@x.test @xn--bcher-kva.example",
    ]
    assert [json.loads(line) for line in works(config, "list", "--json").splitlines()] == [
        {"name": "ann@x.test", "scram": True, "senders": ["ann@x.test"]},
        {"name": "bob", "scram": True, "senders": ["bob@here.test", "sales@x.test", "@xn--bcher-kva.example"]},
    ]
    assert works(config, "check", "bob", said="second") == "The password of bob is right.\n"
    assert json.loads(works(config, "check", "BOB", "--json", said="second\n")) == {"name": "bob", "ok": True}
    wrong = run(config, "check", "bob", "--json", said="wrong\n")
    assert (wrong.returncode, json.loads(wrong.stdout)) == (1, {"name": "bob", "ok": False})

    works(config, "passwd", "bob", said="third\n")
    assert run(config, "check", "bob", said="second\n").returncode == 1
    bob = read_users(users)["bob"]
    assert verify(bob.password, "third")
    assert bob.keys is not None
    assert fits(bob.keys, "third")
    assert bob.rights.domains == {"xn--bcher-kva.example"}
    works(config, "passwd", "bob", "--sender", "*", "--no-scram", said="third\n")
    assert works(config, "list").splitlines()[1] == "bob  no scram  bob@here.test *"
    works(config, "passwd", "bob", said="third\n")
    assert read_users(users)["bob"].keys is None

    scheme = users.read_text().replace("bob:$argon2id", "bob:{ARGON2ID}$argon2id")  # as Dovecot has it
    assert scheme != users.read_text()
    users.write_text(scheme)
    assert works(config, "check", "bob", said="third") == "The password of bob is right.\n"

    works(config, "delete", "bob")
    assert set(read_users(users)) == {"ann@x.test"}
    for command in ("delete", "passwd", "check"):
        assert fails(config, command, "bob", said="x\n") == "fastsmtp: there is no user bob\n"
    assert fails(config, "add", "ANN@x.test", said="x\n") == (
        "fastsmtp: user ann@x.test is there already; see `fastsmtp user passwd`\n"
    )


def test_what_a_user_may_send_as(config: Path) -> None:
    """Without a new password, and without a word about the others."""
    users = config.parent / "users"
    works(config, "add", "bob", "--sender", "office@x.test", said="first\n")
    works(config, "add", "ann@x.test", "--no-scram", said="second\n")
    before, inode = users.read_text(), users.stat().st_ino

    def senders(*options: str, name: str = "bob") -> list[str]:
        return works(config, "senders", name, *options).splitlines()

    assert senders() == ["bob@here.test", "office@x.test"]
    assert users.stat().st_ino == inode
    assert senders("--sender", "@Bücher.example", "--sender", "Sales@X.test") == [
        "bob@here.test", "sales@x.test", "@xn--bcher-kva.example",
    ]  # fmt: skip
    assert json.loads(works(config, "senders", "BOB", "--json")) == {
        "name": "bob",
        "senders": ["bob@here.test", "sales@x.test", "@xn--bcher-kva.example"],
    }
    assert senders("--add", "*", "--add", "sales@x.test", "--remove", "@bücher.example") == [
        "bob@here.test", "sales@x.test", "*",
    ]  # fmt: skip
    assert senders("--none") == ["bob@here.test"]
    assert senders("--none", name="ann@x.test") == ["ann@x.test"]
    assert senders("--add", "office@x.test") == ["bob@here.test", "office@x.test"]
    assert users.read_text() == before  # passwords, keys, the other user, the order

    for both in (["--none", "--add", "a@x.test"], ["--sender", "a@x.test", "--remove", "@b.test"]):
        assert "one of them at a time" in fails(config, "senders", "bob", *both, code=2)
    for option in ("--sender", "--add", "--remove"):
        assert f"{option}: 'x' is neither" in fails(config, "senders", "bob", option, "x", code=2)
    for word in ("bob@here.test", "@x.test"):
        said = fails(config, "senders", "bob", "--remove", "office@x.test", "--remove", word)
        assert said == f"fastsmtp: {word} is not among what user bob was given\n"
    for one in ([], ["--none"]):
        assert fails(config, "senders", "eve", *one) == "fastsmtp: there is no user eve\n"
    assert users.read_text() == before
    config.write_text('[auth]\nusers_file = "users"\n')
    assert senders("--none") == []  # a name that is no address, and no domain for it
    assert works(config, "senders", "bob") == ""


def test_a_line_that_somebody_broke_meanwhile(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users = config.parent / "users"
    works(config, "add", "bob", said="x\n")

    def prompt(twice: bool) -> str:
        users.write_text(HEADER + "\nbob:x\n")
        return "y"

    monkeypatch.setattr("fastsmtp.user_command._ask_password", prompt)
    broken = "fastsmtp: user bob: a line is name:password:scram:senders\n"
    assert fails(config, "passwd", "bob") == broken
    assert fails(config, "senders", "bob", "--none") == broken
    assert users.read_text() == HEADER + "\nbob:x\n"


def test_a_process_of_its_own(config: Path) -> None:
    def call(*arguments: str, said: bytes) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "fastsmtp", "user", *arguments]
        variables = {**os.environ, "FASTSMTP_CONFIG": str(config)}
        return subprocess.run(command, input=said, capture_output=True, cwd=ROOT, env=variables, check=False)

    added = call("add", "ann", said=b"pass word\n")
    assert (added.returncode, added.stdout, added.stderr) == (0, b"", b"")
    wrong = call("check", "ann", said=b"password\n")
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (1, b"The password of ann is wrong.\n", b"")


def test_another_command_was_quicker(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the password was asked for: the user was added, or deleted."""
    users = config.parent / "users"
    works(config, "add", "bob", said="x\n")
    before = users.read_text()

    def hash_password(password: str) -> str:
        users.write_text(before + "ann:::\n")
        return "$argon2id$"

    monkeypatch.setattr("fastsmtp.user_command.hash_password", hash_password)
    assert "user ann is there already" in fails(config, "add", "ann", said="y\n")
    assert users.read_text() == before + "ann:::\n"

    def prompt(twice: bool) -> str:
        users.write_text(HEADER + "\n")
        return "y"

    monkeypatch.setattr("fastsmtp.user_command._ask_password", prompt)
    assert fails(config, "passwd", "bob") == "fastsmtp: there is no user bob\n"
    assert users.read_text() == HEADER + "\n"


def test_passwords_are_compared_as_they_are_meant(config: Path) -> None:
    """RFC 4013: a no-break space is a space, a ligature its letters."""
    works(config, "add", "ann", said="ﬁsh\u00a0cake\n")
    assert run(config, "check", "ann", said="fish cake\n").returncode == 0


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("", "fastsmtp: the password is empty\n"),
        ("\n", "fastsmtp: the password is empty\n"),
        (b"\xff\n", "fastsmtp: the password is not UTF-8\n"),
        ("x" * 1025 + "\n", "fastsmtp: a password has at most 1024 octets\n"),
        ("a\x07b\n", "fastsmtp: the password holds a character that is not allowed\n"),
    ],
)
def test_what_is_no_password(config: Path, said: str | bytes, problem: str) -> None:
    assert fails(config, "add", "ann", said=said) == problem
    assert not (config.parent / "users").exists()


@pytest.mark.parametrize("name", ["a:b", "a b", "", "#ann", "a,b", "a\x07", "a\nb"])
def test_what_is_no_name(config: Path, name: str) -> None:
    assert "is no user name" in fails(config, "add", name, said="x\n", code=2)


def test_a_hash_that_cannot_be_computed(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works(config, "add", "ann", said="x\n")

    def verify(stored: str, password: str) -> bool:
        raise UnavailableError("argon2: Memory allocation error")

    monkeypatch.setattr("fastsmtp.user_command.verify", verify)
    assert fails(config, "check", "ann", said="x\n") == "fastsmtp: argon2: Memory allocation error\n"


def test_a_machine_without_memory_for_a_new_password(config: Path) -> None:
    """As it is: an address space that has no room for 19 MiB more."""
    script = """\
import mmap, resource, sys
from fastsmtp.user_command import user
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
kept = []
try:
    while True:
        kept.append(mmap.mmap(-1, 1 << 24))
except OSError:
    user(["add", "ann", "--config", sys.argv[1]])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(config)], input="secret\n", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "fastsmtp: argon2: Memory allocation error\n"
    assert not (config.parent / "users").exists()


def test_what_is_no_sender(config: Path) -> None:
    assert "--sender: 'nobody' is neither" in fails(config, "add", "ann", "--sender", "nobody", said="x\n", code=2)


def test_a_password_is_no_argument(config: Path) -> None:
    assert "unexpected extra argument" in fails(config, "add", "ann", "secret", code=2)


def test_what_cannot_be_done(config: Path) -> None:
    assert "users; `fastsmtp user add` makes it" in fails(config, "list")
    users = config.parent / "users"
    users.write_text(HEADER + "\n")
    users.chmod(0o644)
    for command in (["list"], ["add", "ann"], ["delete", "ann"]):
        assert fails(config, *command, said="x\n") == f"fastsmtp: {users} can be read by others: chmod 600 {users}\n"
    config.write_text("")
    assert fails(config, "list") == "fastsmtp: auth.users_file is not set in the configuration\n"
    config.write_text("[auth]\nusers = 1\n")
    assert ":2: auth.users: unknown key" in fails(config, "list")
    assert "cannot be read" in fails(config.parent / "none", "list")
    config.write_text('user = "no-such-user"\n[auth]\nusers_file = "new"\n')
    assert "there is no user 'no-such-user'" in fails(config, "add", "ann", said="x\n")


def converse(config: Path, *arguments: str, answers: list[str]) -> tuple[int, str]:
    """On a terminal: each answer is given when something is asked."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "fastsmtp", "user", *arguments, "--config", str(config)])
    shown, asked, deadline = "", 0, time.monotonic() + 30.0
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            piece = os.read(terminal, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece.decode()
        while answers and len(re.findall("(?:Password|confirmation): ", shown)) > asked:
            asked += 1
            os.write(terminal, f"{answers.pop(0)}\n".encode())
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown


def test_on_a_terminal_it_asks_twice_and_shows_nothing(config: Path) -> None:
    code, shown = converse(config, "add", "ann", answers=["hidden1", "hidden1"])
    assert code == 0, shown
    assert shown.split("\r\n") == ["Password: ", "Repeat for confirmation: ", ""]
    assert run(config, "check", "ann", said="hidden1\n").returncode == 0
    code, shown = converse(config, "check", "ann", answers=["hidden2"])
    assert code == 1
    assert shown.split("\r\n") == ["Password: ", "The password of ann is wrong.", ""]
    code, shown = converse(config, "passwd", "ann", answers=["one", "two", "three", "three"])
    assert code == 0
    assert "do not match" in shown
    assert run(config, "check", "ann", said="three\n").returncode == 0
