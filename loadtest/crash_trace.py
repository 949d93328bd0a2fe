"""strace on a server that runs: which calls each thread makes, and the death of the process at one of them.

In: a thread, or a process with all that it has and makes. Out: a Tracer from which Calls are read, in their order; with
`kill_at` the process is killed when that thread begins such a call for the n-th time, before the call does anything.
strace counts for each thread by itself, so a case is (call, thread, n), of one thread that is attached to alone.
Always: it has attached when `attached` returns, and has let go when `detach` returns. Calls that a machine does not
know are left out. Not here: which calls matter to whom (crash_sweep). On failure: LoadError. strace(1), ptrace(2).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import LoadError
from .processes import find_program

# Whatever changes files or tells somebody that they were changed.
CALLS = (
    "openat", "mkdir", "mkdirat", "write", "writev", "pwrite64", "pwritev", "ftruncate", "fallocate", "fsync",
    "fdatasync", "syncfs", "sync_file_range", "rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat",
    "sendmsg", "sendto",
)  # fmt: skip
ATTACH_SECONDS = 10.0
DETACH_SECONDS = 5.0
_LINE = re.compile(r"^(?:(\d+) +)?(\w+)\(")
_KILLED = re.compile(r"^(?:(\d+) +)?\+\+\+ killed by SIGKILL", re.MULTILINE)


@dataclass(frozen=True)
class Call:
    """A call that was begun; `thread` 0 where only one was attached to."""

    thread: int
    name: str


class Tracer:
    """One strace. `following`: also the other threads and the children of what it is attached to."""

    def __init__(
        self, target: int, file: Path, *, following: bool, kill_at: tuple[str, int] | None = None, inject: str = ""
    ) -> None:
        file.unlink(missing_ok=True)
        self._file = file
        self._target = target
        self._following = following
        known = ",".join(f"?{name}" for name in CALLS)
        command = [find_program("strace", "strace"), "-q", "-e", f"trace={known}", "-s", "0"]
        command += ["-f"] if following else []
        if kill_at is not None:
            inject = f"{kill_at[0]}:signal=KILL:when={kill_at[1]}"
        command += ["-e", f"inject={inject}"] if inject else []
        self._process = subprocess.Popen(
            [*command, "-o", str(file), "-p", str(target)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def attached(self) -> None:
        """Waits until it is. Raises LoadError."""
        deadline = time.monotonic() + ATTACH_SECONDS
        while any(_tracer_of(thread) != self._process.pid for thread in self._threads()):
            if self._process.poll() is not None:
                _, said = self._process.communicate()
                raise LoadError(f"strace: {said.strip().splitlines()[-1:]}")
            if time.monotonic() > deadline:
                raise LoadError("strace does not attach")
            time.sleep(0.002)

    def _threads(self) -> list[int]:
        return threads_of(self._target) if self._following else [self._target]

    def detach(self) -> None:
        """What it was attached to goes on, if it lives."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.communicate(timeout=DETACH_SECONDS)
        except subprocess.TimeoutExpired:  # it waits for a thread that cannot be stopped now
            self._process.kill()
            self._process.communicate()

    def calls(self) -> list[Call]:
        lines = self._file.read_text(errors="replace").splitlines()
        return [Call(int(found[1] or 0), found[2]) for line in lines if (found := _LINE.match(line))]

    def injected(self) -> int:
        """How many calls were struck."""
        try:
            text = self._file.read_text(errors="replace")
        except FileNotFoundError:
            return 0
        return text.count("(INJECTED)") + text.count("(DELAYED)")

    def killed(self) -> set[int]:
        """The threads that have ended by SIGKILL; 0 is the one that it is attached to alone."""
        try:
            text = self._file.read_text(errors="replace")
        except FileNotFoundError:
            return set()
        return {int(found or 0) for found in _KILLED.findall(text)}


def _tracer_of(thread: int) -> int:
    """0: nobody, or it has ended."""
    try:
        text = Path(f"/proc/{thread}/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("TracerPid:"))


@contextmanager
def traced(
    target: int, file: Path, *, following: bool = False, kill_at: tuple[str, int] | None = None, inject: str = ""
) -> Iterator[Tracer]:
    """As long as the block runs. `inject` is what strace(1) calls so, such as "fsync:error=EIO:when=2". Raises
    LoadError."""
    tracer = Tracer(target, file, following=following, kill_at=kill_at, inject=inject)
    try:
        tracer.attached()
        yield tracer
    finally:
        tracer.detach()


def threads_of(process: int) -> list[int]:
    """In the order in which they were made."""
    return sorted(map(int, os.listdir(f"/proc/{process}/task")))
