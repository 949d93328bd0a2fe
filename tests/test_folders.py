"""Whether the server's user may write where its mail is to go: asked as that user, by `check` and at the start."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from needs import needs_root, public_folder
from servers import ROOT

from fastsmtp.claim import StartError
from fastsmtp.config import parse
from fastsmtp.folders import MOST_MAILBOXES, ask_as, find_closed
from fastsmtp.supervisor import _check_folders
from fastsmtp.toml_lines import Place

NOBODY = pwd.getpwnam("nobody")
CONFIGURATION = """\
hostname = "mx.here.test"
user = "nobody"
data_dir = "data"
[[listener]]
address = "127.0.0.1:0"
[[domain]]
name = "here.test"
recipients = "any"
transport = "mailboxes"
[transport.mailboxes]
type = "maildir"
path = "mail/{domain}/{local}"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    needs_root()
    with public_folder("folders") as made:
        made.chmod(0o755)
        yield made


def make(folder: Path, name: str, mode: int) -> None:
    (folder / name).mkdir()
    (folder / name).chmod(mode)


def closed(folder: Path, text: str = CONFIGURATION) -> list[tuple[Place, str]]:
    return list(ask_as(NOBODY, partial(find_closed, parse(text, folder, "f"))))


LAYOUTS: dict[str, tuple[str, dict[str, int], str]] = {
    "all are made": ("mail/{domain}/{local}", {"mail": 0o777}, ""),
    "the root is closed": ("mail/{domain}/{local}", {"mail": 0o755}, "{}/mail is not writable"),
    "there is no root": ("mail/{domain}/{local}", {}, "{} is not writable, so {}/mail cannot be made"),
    "somewhere on the way": (
        "a/mail/{domain}/{local}",
        {"a": 0o700, "a/mail": 0o777},
        "{}/a is not writable, so {}/a/mail cannot be made",
    ),
    "the domain is closed": (
        "mail/{domain}/{local}",
        {"mail": 0o777, "mail/here.test": 0o755},
        "{}/mail/here.test is not writable",
    ),
    "but for a mailbox": (
        "mail/{domain}/{local}",
        {"mail": 0o777, "mail/here.test": 0o755, "mail/here.test/ann": 0o755, "mail/here.test/bob": 0o777},
        "",
    ),
    "what is in it cannot be seen": ("mail/{domain}/{local}", {"mail": 0o777, "mail/here.test": 0o711}, ""),
    "another domain is closed": ("mail/{domain}/{local}", {"mail": 0o777, "mail/other.test": 0o755}, ""),
    "homes, all closed": ("home/{local}/Maildir", {"home": 0o755, "home/ann": 0o755}, "{}/home is not writable"),
    "homes, one with an open mailbox": (
        "home/{local}/Maildir",
        {"home": 0o755, "home/.fastsmtp-1": 0o777, "home/ann": 0o755, "home/ann/Maildir": 0o777},
        "",
    ),
    "homes, all closed, beside a place for temporary files": (
        "home/{local}/Maildir",
        {"home": 0o755, "home/.fastsmtp-1": 0o777, "home/ann": 0o755, "home/ann/Maildir": 0o755},
        "{}/home is not writable",
    ),
    "homes, without a place for temporary files": (
        "home/{local}/Maildir",
        {"home": 0o755, "home/.fastsmtp-1": 0o755, "home/ann": 0o755, "home/ann/Maildir": 0o777},
        "{}/home is not writable",
    ),
}


@pytest.mark.parametrize(("path", "there", "wrong"), LAYOUTS.values(), ids=LAYOUTS)
def test_where_nothing_can_be_delivered(folder: Path, path: str, there: dict[str, int], wrong: str) -> None:
    for name in there:
        (folder / name).mkdir()
    for name, mode in there.items():
        (folder / name).chmod(mode)
    said = wrong.replace(" is not writable", " is not writable for the user nobody").replace("{}", str(folder))
    text = CONFIGURATION.replace("mail/{domain}/{local}", path)
    assert closed(folder, text) == ([(("transport", "mailboxes", "path"), said)] if wrong else [])
    assert os.geteuid() == 0
    assert ask_as(None, partial(list, find_closed(parse(text, folder, "f")))) == [], "root may write everywhere"


def test_of_many_mailboxes_it_is_believed_that_one_is_open(folder: Path) -> None:
    make(folder, "mail", 0o777)
    make(folder, "mail/here.test", 0o755)
    for number in range(MOST_MAILBOXES):
        assert closed(folder) if number in (0, 1, MOST_MAILBOXES - 1) else True
        make(folder, f"mail/here.test/u{number}", 0o755)
    assert closed(folder) == []


@pytest.mark.parametrize(
    ("trouble", "said"), [(OSError(1, "not allowed"), "not allowed"), (RuntimeError(), "it ended")]
)
def test_who_cannot_be_asked(trouble: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def drop_privileges(account: object) -> None:
        raise trouble

    monkeypatch.setattr("fastsmtp.folders.drop_privileges", drop_privileges)
    with pytest.raises(OSError, match="None") as error:
        ask_as(NOBODY, list)
    assert error.value.strerror == f"cannot become user nobody: {said}"
    with pytest.raises(StartError, match="cannot become user nobody"):
        _check_folders(parse(CONFIGURATION, Path("/"), "f"), NOBODY)
    _check_folders(parse(CONFIGURATION.replace('"maildir"\npath', '"discard"\n# path'), Path("/"), "f"), NOBODY)


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "fastsmtp", *arguments, "--config", str(folder / "f.toml")],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_it_is_said_by_check_and_at_the_start(folder: Path) -> None:
    """With key, path and user; a server that could deliver nothing does not start."""
    (folder / "f.toml").write_text(CONFIGURATION)
    make(folder, "mail", 0o755)
    wrong = f"transport.mailboxes.path: {folder}/mail is not writable for the user nobody\n"
    assert run(folder, "check") == (1, "", f"{folder}/f.toml:12: {wrong}")
    assert run(folder, "serve") == (1, "", f"fastsmtp: {wrong}")
    (folder / "mail").chmod(0o777)
    assert run(folder, "check")[0] == 0


def test_what_the_server_reads_is_looked_at_as_its_user(folder: Path) -> None:
    make(folder, "mail", 0o777)
    make(folder, "secret", 0o700)
    for name in ("users", "users.sqlite", "secret/password"):
        (folder / name).write_text("# fastsmtp users 1\n")
        (folder / name).chmod(0o600)
    text = (
        CONFIGURATION.replace('"data"', '"secret/data"')
        + '[auth]\nusers_file = "users"\n'
        + '[sql.users]\ndatabase = "users.sqlite"\n'
        + '[transport.out]\ntype = "smtp"\nsmarthost = "mx.test:587"\nuser = "x"\npassword_file = "secret/password"\n'
    )
    (folder / "f.toml").write_text(text)
    said = run(folder, "check")[2].replace(f"{folder}/", "")
    assert said.splitlines() == [
        "f.toml:3: data_dir: secret is closed to the user nobody",
        "f.toml:14: auth.users_file: users cannot be read: Permission denied",
        "f.toml:16: sql.users.database: users.sqlite cannot be read",
    ]
    (folder / "f.toml").write_text(text.replace('users_file = "users"', 'dovecot = { socket = "secret/auth" }'))
    said = run(folder, "check")[2].replace(f"{folder}/", "")
    assert "\nf.toml:14: auth.dovecot.socket: secret/auth cannot be reached: Permission denied\n" in said
