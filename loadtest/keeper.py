"""Starts a server and answers for every process that comes of it: keeper.py GRACE PROCS COMMAND...

In: seconds that the server may take to end, the cgroup.procs file to join (empty: none), the server's command. Out: its
exit code. A server's daemons leave their parents, so this one is a subreaper: whatever loses its parent becomes its
child, is waited for, and its CPU time ends up in this process's account (cutime, cstime). Always: when standard input
closes or SIGTERM comes, the server is told to end, and after the grace nothing of it is left alive; standard input
closes also when whoever started this is killed. Nothing is imported from beside it, so that it starts at once.
On failure: exit code 127 and a line. prctl(2), PR_SET_CHILD_SUBREAPER; wait(2).
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.01


class Keeper:
    """The server's first process, and what descends from it."""

    def __init__(self, command: list[str]) -> None:
        quiet = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        self._first = os.posix_spawnp(
            command[0], command, os.environ, file_actions=quiet, setsigdef=[signal.SIGTERM, signal.SIGPIPE]
        )
        self.code = 0
        self.left = True

    def reap(self) -> None:
        """Waits for all that have ended. `left` becomes False when there was nothing to wait for."""
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._first:
                    self._first = 0
                    self.code = os.waitstatus_to_exitcode(ended[1])
        except ChildProcessError:
            self.left = False

    def end(self, grace: float) -> None:
        """First asks, then insists. Whoever loses its parent becomes a child of ours, so the last one is reached."""
        if self._first:
            os.kill(self._first, signal.SIGTERM)
        deadline = time.monotonic() + grace
        told = False
        self.reap()
        while self.left:
            if time.monotonic() > deadline:
                _signal_all(signal.SIGKILL)
            elif not self._first and not told:
                told = True
                _signal_all(signal.SIGTERM)  # to those that the first has left behind
            time.sleep(POLL_SECONDS)
            self.reap()


def _signal_all(signum: int) -> None:
    """To every child; none of their numbers can be another's, for only this process waits for them."""
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    os.kill(int(entry), signum)
        except OSError:
            pass  # ended meanwhile, and was no child


def main(grace: float, procs: str, command: list[str]) -> int:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        print(f"no subreaper: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return 127
    woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, _: asked.append(signum))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        if procs:
            with open(procs, "w", encoding="ascii") as file:
                file.write("0")
        keeper = Keeper(command)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return 127
    while not asked:
        readable, _, _ = select.select([0, woken], [], [])
        if 0 in readable and not os.read(0, 512):
            break
        if woken in readable:
            os.read(woken, 512)
        keeper.reap()
        if not keeper.left:
            break
    keeper.end(grace)
    return keeper.code if keeper.code >= 0 else 128 - keeper.code


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2], sys.argv[3:]))
