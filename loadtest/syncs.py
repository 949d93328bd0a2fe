"""How often a server waits for the disk: strace over all its processes while one session sends message after message.

In: a server started under a Tracer. Out: Syncs, calls for each message, and those of them between the end of a message
and its reply. One message is under way at a time, so no two can share a commit: a server that promises stable
storage makes at least one such call before each 250, and one that makes none keeps nothing.
Always: what fails is not counted; a write counts when its file was opened with O_SYNC or O_DSYNC, so do pwritev2 with
RWF_SYNC or RWF_DSYNC and msync with MS_SYNC. Not seen: what goes through io_uring (`io_uring_setup` is counted, to
tell). strace slows a server down: nothing here is a speed. On failure: LoadError. strace(1).
"""

from __future__ import annotations

import re
import smtplib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import LoadError
from .comparison import Syncs
from .install import Store
from .processes import find_program

TRACE = "trace"  # the file's name in the server's folder
MESSAGES = 10
PAUSE_SECONDS = 0.1  # after each message, in which what follows a 250 is done
ANSWER_SECONDS = 30.0
CALLS = ("fsync", "fdatasync", "syncfs", "sync", "sync_file_range", "msync", "io_uring_setup")
SENDS = ("sendto", "sendmsg", "sendmmsg")
WRITES = ("write", "writev", "pwrite64", "pwritev", "pwritev2")
OPENS = ("open", "openat", "creat")
DSYNC = "O_DSYNC"
REPLY = "250"  # of a Call: the server answers; its own clock, for it may go on before the client wakes
_TRACED = ",".join((*CALLS, *OPENS, *SENDS, *WRITES, "close"))
# PID TIME name(arguments) = result, or its two halves when another process came between them
_LINE = re.compile(r"(\d+) +(\d+\.\d+) (?:<\.\.\. )?(\w+)(?:\(| resumed>)(.*)")
_RESULT = re.compile(r"\) += (-?\d+)")
_OPENED_SYNC = re.compile(r"\bO_D?SYNC\b")
_REPLY = re.compile(r'"250[ -]')
_SYNC_FLAG = re.compile(r"\bRWF_D?SYNC\b|\bMS_SYNC\b")


@dataclass(frozen=True)
class Tracer:
    """strace, the machine's or one unpacked in a tree."""

    program: str
    tree: Path | None

    def command(self, file: Path, command: list[str]) -> list[str]:
        """`command` under strace. No --seccomp-bpf: it would keep programs from changing their user."""
        return [self.program, "-f", "-ttt", "-s", "4", "-e", f"trace={_TRACED}", "-e", "signal=none",
                "-o", str(file), "--", *command]  # fmt: skip


def make_tracer(store: Store) -> Tracer:
    """Raises LoadError where strace neither is nor can be fetched."""
    tree = store.debian("strace").tree
    return Tracer("/usr/bin/strace" if tree else find_program("strace", "strace"), tree)


@dataclass(frozen=True)
class Call:
    at: float  # when it began, seconds since 1970
    name: str


def read_calls(lines: Iterator[str] | list[str]) -> Iterator[Call]:
    """The calls that waited for the disk, and those that sent a 250, from strace's lines."""
    begun: dict[tuple[str, str], tuple[float, str]] = {}
    synced: set[tuple[str, str]] = set()  # (process, descriptor): opened so
    for line in lines:
        found = _LINE.match(line)
        if not found:
            continue
        pid, at, name, rest = found[1], float(found[2]), found[3], found[4]
        if rest.endswith("<unfinished ...>"):
            begun[pid, name] = at, rest
            continue
        if " resumed>" in line:
            at, before = begun.pop((pid, name), (at, ""))
            rest = before.removesuffix("<unfinished ...>") + rest
        result = _RESULT.search(rest)
        if not result or int(result[1]) < 0:
            continue
        descriptor = re.match(r"\d*", rest)
        assert descriptor is not None
        if name in OPENS:
            if _OPENED_SYNC.search(rest):
                synced.add((pid, result[1]))
        elif name == "close":
            synced.discard((pid, descriptor[0]))
        elif name in SENDS or (name in WRITES and _REPLY.search(rest)):
            if _REPLY.search(rest):
                yield Call(at, REPLY)
        elif name in WRITES:
            if (pid, descriptor[0]) in synced or _SYNC_FLAG.search(rest):
                yield Call(at, DSYNC)
        elif name != "msync" or _SYNC_FLAG.search(rest):
            yield Call(at, name)


def send_traced(host: str, port: int, messages: int) -> list[tuple[float, float]]:
    """One session; when each message's end was sent and when its 250 came. Raises LoadError."""
    windows = []
    session = smtplib.SMTP(local_hostname="client.test", timeout=ANSWER_SECONDS)
    try:
        session.connect(host, port)
        session.ehlo()
        for number in range(messages):
            for command in ("MAIL FROM:<a@x.test>", "RCPT TO:<b@y.test>", "DATA"):
                _check(command, session.docmd(command))
            sent = time.time()
            session.send(f"Subject: {number}\r\n\r\n{'x' * 70}\r\n.\r\n")
            reply = session.getreply()
            windows.append((sent, time.time()))
            _check("a message", reply)
            time.sleep(PAUSE_SECONDS)
        session.quit()
    except (OSError, smtplib.SMTPException) as error:
        raise LoadError(f"the traced session failed: {error}") from None
    finally:
        # Not `with`: that says QUIT also when a signal ends the race, and its error would take the signal's place.
        session.close()
    return windows


def _check(what: str, reply: tuple[int, bytes]) -> None:
    code, text = reply
    if code not in (250, 354):
        raise LoadError(f"{what} was answered {code} {text.decode(errors='replace')[:200]}")


def count_syncs(host: str, port: int, trace: Path, messages: int = MESSAGES) -> Syncs:
    """Of a server that greets and is traced into that file. Raises LoadError."""
    started = time.time()
    windows = send_traced(host, port, messages)
    time.sleep(PAUSE_SECONDS * 5)  # for what follows the last
    with trace.open(errors="replace") as lines:
        calls = [call for call in read_calls(lines) if call.at >= started]
    return attribute(calls, windows)


def attribute(calls: list[Call], windows: list[tuple[float, float]]) -> Syncs:
    """Calls for each message, and those that fell between its end and its reply."""
    replies = [call.at for call in calls if call.name == REPLY]
    exact = [(sent, max((at for at in replies if sent <= at <= replied), default=replied)) for sent, replied in windows]
    counted = [call for call in calls if call.name not in ("io_uring_setup", REPLY)]
    before = sum(1 for call in counted if any(sent <= call.at <= replied for sent, replied in exact))
    names = Counter(call.name for call in calls if call.name != REPLY)
    return Syncs(len(windows), dict(sorted(names.items())), before / len(windows), len(counted) / len(windows))
