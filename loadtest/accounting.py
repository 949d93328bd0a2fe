"""What all processes of a server use, also those that fork and exit: CPU time, and memory at a moment.

In: a command. Out: a Supervised server with its CPU seconds so far. Where a cgroup can be made (version 2: cpu.stat;
version 1: cpuacct.usage) the kernel counts whatever is in it, to the nanosecond. Elsewhere it is by wait status: the
keeper inherits orphans and waits for them, so the CPU of whoever has ended is in some living ancestor's account. That
misses children of a process that ignores SIGCHLD, which nobody waits for; `how` says which of the two it is.
Always: the keeper's own time is taken off; what counts is the difference of two readings. What the kernel does in
threads of its own is nobody's.
Not here: what the server is (peers). On failure: LoadError. cgroups(7), proc(5), getrusage(2).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import LoadError
from .processes import POLL_SECONDS, QUIET_CPU, QUIET_SECONDS, cpu_seconds, family

KEEPER = Path(__file__).with_name("keeper.py")
GRACE_SECONDS = 15.0  # between SIGTERM and SIGKILL
REMOVE_SECONDS = 5.0  # until a cgroup without processes can be removed


class Cgroup:
    """A group that nobody else is in."""

    def __init__(self, folder: Path, file: str, read: Callable[[str], float], how: str) -> None:
        self._folder = folder
        self._file = folder / file
        self._read = read
        self.how = how
        self.procs = folder / "cgroup.procs"

    def cpu(self) -> float:
        """Seconds, user and system, of all that are or were in it."""
        return self._read(self._file.read_text())

    def remove(self) -> None:
        """Whoever is still in it is killed: nothing outlives its keeper but by a crash of that."""
        deadline = time.monotonic() + REMOVE_SECONDS
        while True:
            try:
                self._folder.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    return
            for pid in map(int, self.procs.read_text().split()):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(POLL_SECONDS)


def _read_v2(text: str) -> float:
    return int(dict(line.split() for line in text.splitlines())["usage_usec"]) / 1e6


def _read_v1(text: str) -> float:
    return int(text) / 1e9


# Kind of file system, what its options must name, file, how to read it, in words; the first that works is taken.
_HIERARCHIES = (
    ("cgroup2", "", "cpu.stat", _read_v2, "cgroup (version 2, cpu.stat)"),
    ("cgroup", "cpuacct", "cpuacct.usage", _read_v1, "cgroup (version 1, cpuacct.usage)"),
)
WAITED_FOR = "wait status (/proc/PID/stat cutime and cstime under a subreaper)"


def make_cgroup(name: str) -> Cgroup | None:
    """None: this machine or this user may make none."""
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        where, _, what = line.partition(" - ")
        mounts.append((Path(where.split()[4]), what.split()[0], what.split()[-1].split(",")))
    for kind, needed, file, read, how in _HIERARCHIES:
        for place, found, options in mounts:
            if found != kind or (needed and needed not in options):
                continue
            for parent in (place / _own_group(needed), place):
                folder = parent / f"loadtest-{os.getpid()}-{name}"
                try:
                    folder.mkdir()
                except OSError:
                    continue
                group = Cgroup(folder, file, read, how)
                try:
                    group.cpu()
                    if _may_join(group):
                        return group
                except (OSError, KeyError, ValueError):
                    pass
                group.remove()
    return None


def _own_group(controller: str) -> str:
    """Where this process is in a hierarchy, relative to its root."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") and ".." not in path:
            return path.lstrip("/")
    return ""


def _may_join(group: Cgroup) -> bool:
    command = ["/bin/sh", "-c", 'echo 0 >"$1"', "sh", str(group.procs)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Supervised:
    """A server under its keeper."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        grace: float = GRACE_SECONDS,
        cgroup: bool = True,
    ) -> None:
        self.name = name
        self._log = log
        self._grace = grace
        self._cgroup = make_cgroup(name) if cgroup else None
        self.how = self._cgroup.how if self._cgroup else WAITED_FOR
        procs = str(self._cgroup.procs) if self._cgroup else ""
        keeper = [sys.executable, "-IS", str(KEEPER), str(grace), procs, *command]
        with log.open("ab") as output:
            # A session of its own: Ctrl-C is for us, and we tell it to end.
            self._keeper = subprocess.Popen(
                keeper,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        self.pid = self._keeper.pid

    def alive(self) -> bool:
        return self._keeper.poll() is None

    def cpu(self) -> float:
        """Seconds that all its processes have used. Raises LoadError when none is left."""
        self.check_alive()
        own = time.clock_gettime((~self.pid << 3) | 2)  # the keeper's clock, see processes.cpu_seconds
        return (self._cgroup.cpu() if self._cgroup else cpu_seconds(self.pid)) - own

    def memory(self) -> int:
        """Octets of all its processes; a page that several share counts as a part for each."""
        total = 0
        for pid in family(self.pid)[1:]:
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue  # ended meanwhile
            total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        return total * 1024

    def settle(self, limit: float) -> bool:
        """Waits until it has nothing left to do; False when it still has after so many seconds."""
        started = quiet_since = time.monotonic()
        mark = self.cpu()
        while time.monotonic() - quiet_since < QUIET_SECONDS:
            if time.monotonic() - started > limit:
                return False
            time.sleep(POLL_SECONDS)
            used = self.cpu()
            if used - mark > QUIET_CPU:
                mark, quiet_since = used, time.monotonic()
        return True

    def check_alive(self) -> None:
        """Raises LoadError when all its processes have ended."""
        if not self.alive():
            raise LoadError(f"{self.name} has ended with exit code {self._keeper.returncode}: {self.last_words()}")

    def stop(self) -> int:
        """Ends all of it; the exit code of its first process. May be called again."""
        if self._keeper.stdin and not self._keeper.stdin.closed:
            self._keeper.stdin.close()
        try:
            code = self._keeper.wait(self._grace + REMOVE_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in reversed(family(self.pid)):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            code = self._keeper.wait()
        if self._cgroup:
            self._cgroup.remove()
            self._cgroup = None
        return code

    def last_words(self) -> str:
        """The last line that it said."""
        lines = self._log.read_text(errors="replace").splitlines()
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")
