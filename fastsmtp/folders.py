"""Whether the user that serves can put mail where it is to go: asked before there is a server that takes any.

In: a configuration; who the server will be, where that is not who asks. Out: the key of each transport whose mailboxes
none can be written to, and why. It is asked in a forked process that has become that user, as only the kernel knows
all that it heeds: groups, ACLs, file systems that are read-only. Nothing is made and nothing written.
A single mailbox that is closed is no error: its mail waits, and the log names it. A folder that is closed is none where
mailboxes are in it that are open. OSError: there is no such process, or it cannot become the user. access(2), fork(2).
"""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Callable, Iterable, Iterator
from glob import escape, glob
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from .claim import drop_privileges
from .config import Config, Maildir
from .delivery.maildir import folder_name
from .toml_lines import Place

MOST_MAILBOXES = 1000  # that are looked at for one that is open; of more it is believed

Findings: TypeAlias = Iterable[tuple[Place, str]]


def ask_as(account: pwd.struct_passwd | None, question: Callable[[], Findings]) -> Findings:
    """What `question` finds as another user; None: as this one. The caller has one thread. Raises OSError."""
    if account is None:
        return question()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            with open(writer, "w", encoding="utf-8", errors="surrogateescape") as file:
                try:
                    drop_privileges(account)
                    said: object = list(question())
                except OSError as error:
                    said = error.strerror
                json.dump(said, file)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="surrogateescape") as file:
        answer = json.loads(file.read() or '"it ended"')
    os.waitpid(pid, 0)
    if not isinstance(answer, list):
        raise OSError(None, f"cannot become user {account.pw_name}: {answer}")
    return [(tuple(place), wrong) for place, wrong in answer]


def find_closed(config: Config) -> Iterator[tuple[Place, str]]:
    """The transports to Maildirs that could deliver nothing, as far as this user can tell."""
    for name, way in config.transport.items():
        if isinstance(way, Maildir):
            domains = [domain.name for domain in config.domain if domain.transport == name]
            if wrong := _explain_maildir(way, domains):
                yield ("transport", name, "path"), wrong


def explain_folder(folder: Path) -> str:
    """Why nothing can be put there; empty when it can, or when the folder can be made."""
    there = nearest(folder)
    if not os.path.isdir(there):  # Path.is_dir fails where it may not look
        return f"{there} is no folder"
    if not _is_open(there):
        return f"{there} is not writable for {_me()}" + ("" if there == folder else f", so {folder} cannot be made")
    return ""


def nearest(folder: Path) -> Path:
    """The folder, or the first above it that there is."""
    return next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))


def _me() -> str:
    try:
        return f"the user {pwd.getpwuid(os.geteuid()).pw_name}"
    except KeyError:
        return f"uid {os.geteuid()}"


def _is_open(folder: str | Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=True)


def _explain_maildir(way: Maildir, domains: Iterable[str]) -> str:
    # Temporary files stand in a folder of their own there, which somebody may have made already.
    if (wrong := explain_folder(way.root)) and not any(map(_is_open, glob(f"{escape(str(way.root))}/.fastsmtp-*"))):
        return wrong
    for name in domains:
        above, _, below = way.path.replace("{domain}", folder_name(name)).partition("{local}")
        if name != "*" and (wrong := explain_folder(Path(above))) and not _has_open_mailbox(Path(above), below):
            return wrong
    return ""


def _has_open_mailbox(folder: Path, below: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            mailboxes = (entry.path for entry in entries if entry.name[0] != ".")
            paths = list(islice(mailboxes, MOST_MAILBOXES))
    except OSError:
        return os.access(folder, os.X_OK, effective_ids=True)  # what is in it cannot be seen from here
    return len(paths) == MOST_MAILBOXES or any(_is_open(nearest(Path(path + below))) for path in paths)
