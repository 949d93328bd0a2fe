"""The parent of the workers: it forks them, restarts what dies, and ends them in order.

In: a `Config`. Out: an exit code, or StartError with one line for the operator. One thread, no loop, no
database; nothing is read from the network. What claim.py claimed is held, and exchanged, by holdings.py. A
worker's sockets stay open here while it is started again, so that its clients wait in the kernel; at the signal
to stop these copies are closed first, or clients would wait for nobody. The lock of the data directory is
inherited by every worker: while one of them lives no second server starts. A worker gets SIGTERM perhaps more
than once (from here, from a service manager that signals the whole group, from the kernel when this process dies)
and must take it as one; who asks twice here gets SIGKILL for it. What a worker does is not known here. prctl(2)
PR_SET_PDEATHSIG, sd_notify(3).
"""

from __future__ import annotations

import os
import pwd
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from . import log as events
from ._shared import Shared, die_with_parent
from .certificates import Watch, files_of
from .claim import (
    StartError,
    begin_lists,
    bind,
    compile_lists,
    drop_privileges,
    find_account,
    read_settings,
    take_data_dir,
)
from .config import Config, Maildir
from .folders import ask_as, find_closed
from .holdings import Holdings, Source, start_runner, tell_service_manager
from .log import Log, open_log
from .metrics import SIZE, Counter
from .seat import EXIT_CANNOT_START, Seat

Worker = Callable[[Config, Seat], int]

EXIT_BUG = 70  # EX_SOFTWARE: an exception came out of a worker
PF_EXITING = 4  # of /proc/PID/stat
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Patience:
    """How long the supervisor waits for a worker, in seconds."""

    heartbeat: float = 10.0  # for the next one
    first_heartbeat: float = 60.0
    early: float = 1.0  # a worker that lived no longer is started again after a wait that doubles
    restart: float = 0.1
    restart_max: float = 10.0
    shutdown: float = 5.0  # beyond timeouts.shutdown
    round: float = 1.0  # between two looks at the heartbeats
    starting_round: float = 0.02


PATIENCE = Patience()


def run(
    config: Config,
    announce: Callable[[list[str]], None],
    *,
    worker: Worker,
    patience: Patience = PATIENCE,
    source: Source | None = None,
    file: str = "",
) -> int:
    """Serves until a signal to stop; 0: every worker ended well, 1: one did not, or had to be killed. What killed a
    worker before it was asked to end is logged, and is no matter of the end: its mail is in its spool.

    `announce` is called once, with the addresses bound, when every worker accepts. `worker` is called in each
    child and returns its exit code. `source` reads the configuration of `file` anew, checked, for a reload; without
    it SIGHUP ends the server, as when its terminal goes away. Raises StartError.
    """
    with ExitStack() as stack:
        account = find_account(config.user)
        stack.callback(os.close, take_data_dir(config.data_dir, account))
        watch = Watch(path for files in files_of(config) for path in files)
        settings = read_settings(config)
        compile_lists(begin_lists(config, account), wait=True)
        _check_folders(config, account)
        # Before there are sockets and a log, so that it holds neither; it ends when the last worker has ended.
        runner = start_runner(config, account)
        if runner is not None:
            stack.callback(runner.close)
        listening = bind(config, account)
        for one in listening:
            stack.callback(one.close)
        mask = stack.enter_context(_blocked_signals())
        log = open_log(config.log.format, threaded=False)
        stack.callback(log.close)
        holdings = Holdings(settings, account, runner, listening, watch, log, source, file)
        stack.callback(holdings.close)
        supervisor = _Supervisor(worker, patience, holdings, config.worker_count, mask, log)
        stack.callback(supervisor.close)
        try:
            signum = supervisor.serve(announce)
        except StartError:
            supervisor.stop(0)
            raise
        return supervisor.stop(signum)


def _check_folders(config: Config, account: pwd.struct_passwd | None) -> None:
    """Nothing is taken that could be delivered nowhere."""
    if not any(isinstance(way, Maildir) for way in config.transport.values()):
        return
    try:
        for place, wrong in ask_as(account, partial(find_closed, config)):
            raise StartError(f"{'.'.join(map(str, place))}: {wrong}")
    except OSError as error:
        raise StartError(str(error.strerror)) from None


class _Place:
    """A worker as its parent sees it. `pid` 0: it is not running."""

    __slots__ = ("beat", "index", "pid", "ready", "ready_fd", "restart_at", "started", "still", "wait")

    def __init__(self, index: int) -> None:
        self.index = index
        self.pid = 0
        self.started = 0.0
        self.ready_fd = -1  # reading end of the pipe on which it says that it accepts
        self.ready = False
        self.beat = 0.0  # the last heartbeat seen
        self.still = 0.0  # seconds since it moved
        self.wait = 0.0  # before the last restart
        self.restart_at = 0.0


class _Supervisor:
    def __init__(
        self,
        worker: Worker,
        patience: Patience,
        holdings: Holdings,
        workers: int,
        mask: set[int],
        log: Log,
    ) -> None:
        self._worker = worker
        self._patience = patience
        self._holdings = holdings
        self._mask = mask
        self._log = log
        self._shared = Shared(workers, SIZE)
        holdings.lists.on_kept = lambda: self._shared.add(0, Counter.LIST_KEPT, 1)
        self._places = [_Place(index) for index in range(workers)]
        self._alive, self._alive_end = os.pipe()
        self._serving = False
        self._last_round = time.monotonic()

    def close(self) -> None:
        """Leaves no worker behind, whatever happened."""
        self._kill()
        for place in self._places:
            if place.pid:
                os.waitpid(place.pid, 0)
                self._bury(place)
        os.close(self._alive)
        os.close(self._alive_end)

    def serve(self, announce: Callable[[list[str]], None]) -> int:
        """Keeps a worker in every place; the signal that ends it."""
        self._last_round = time.monotonic()
        while True:
            now = time.monotonic()
            # Time that this process did not see either (it was stopped, the machine slept) counts for nobody.
            passed = min(now - self._last_round, 2 * self._patience.round)
            self._last_round = now
            for place in self._places:
                self._look_after(place, now, passed)
            self._look_after_runner()
            self._holdings.look_after(now)
            if not self._serving and all(place.ready for place in self._places):
                self._serving = True
                self._tell_ready(announce)
            self._log.flush()
            signum = _wait_signal(self._next_round(now))
            if signum == signal.SIGHUP and self._holdings.source is not None:
                self._holdings.begin("SIGHUP")
            elif signum in STOP_SIGNALS:
                return signum

    def stop(self, signum: int) -> int:
        """Ends all workers in order; the exit code. `signum` 0: nobody asked, the start failed."""
        started = time.monotonic()
        # First of all: what arrives from now on goes to workers that accept, or to the next server.
        self._holdings.stop_listening()
        tell_service_manager("STOPPING=1")
        if signum:
            self._log.write(events.STOP, signal.Signals(signum).name)
        killed_before = [place for place in self._places if place.pid and _is_ending(place.pid)]
        for place in self._places:
            if place.pid:
                os.kill(place.pid, signal.SIGTERM)
        deadline = started + self._holdings.settings.config.timeouts.shutdown + self._patience.shutdown
        code = 0
        killed = 0
        while any(place.pid for place in self._places):
            left = deadline - time.monotonic()
            again = _wait_signal(min(left, self._patience.round)) if left > 0 else 0
            if left <= 0 or (again in STOP_SIGNALS and not (again == signal.SIGHUP and self._holdings.source)):
                killed += self._kill()
                deadline = time.monotonic() + self._patience.round
            for place in self._places:
                status = _take_status(place.pid)
                if status is None:
                    continue
                # Without a handler yet, it had promised nothing yet.
                if status != 0 and not (status == -signal.SIGTERM and not place.ready):
                    code = code if place in killed_before else 1
                    self._log.write(
                        events.WORKER_DIED, place.index, place.pid, _explain(status), self._bury(place), None
                    )
                else:
                    self._bury(place)
            self._log.flush()
        self._log.write(events.STOPPED, time.monotonic() - started, killed)
        return code

    def _tell_ready(self, announce: Callable[[list[str]], None]) -> None:
        config = self._holdings.settings.config
        addresses = [one.address for one in self._holdings.listening]
        self._log.write(events.START, config.hostname, len(self._places), str(config.data_dir), tuple(addresses))
        announce(addresses)
        tell_service_manager("READY=1")

    def _next_round(self, now: float) -> float:
        """Seconds until something is due that no signal tells."""
        if self._holdings.is_busy or not all(place.ready for place in self._places if place.pid):
            return self._patience.starting_round
        restarts = [place.restart_at - now for place in self._places if not place.pid]
        return max(0.0, min([self._patience.round, *restarts]))

    def _look_after(self, place: _Place, now: float, passed: float) -> None:
        if not place.pid:
            if now >= place.restart_at:
                self._start(place, now)
            return
        status = _take_status(place.pid)
        if status is not None:
            self._replace(place, status, now)
            return
        if not place.ready:
            place.ready = _take_byte(place.ready_fd)
        beat = self._shared.heartbeat(place.index)
        if beat != place.beat:
            place.beat = beat
            place.still = 0.0
            return
        place.still += passed
        if place.still > (self._patience.heartbeat if beat else self._patience.first_heartbeat):
            self._log.write(events.WORKER_STUCK, place.index, place.pid, place.still)
            place.still = 0.0
            os.kill(place.pid, signal.SIGKILL)

    def _look_after_runner(self) -> None:
        runner = self._holdings.runner
        try:
            status = runner.look_after() if runner is not None else None
        except OSError as error:
            self._log.write(events.RUNNER_DIED, f"cannot be started: {error.strerror}")
            return
        if status is not None:
            self._log.write(events.RUNNER_DIED, _explain(status))

    def _replace(self, place: _Place, status: int, now: float) -> None:
        if status == EXIT_CANNOT_START and not self._serving:
            self._bury(place)
            raise StartError(f"worker {place.index} cannot start; the log says why")
        self._delay(place, now, early=now - place.started < self._patience.early)
        self._log.write(events.WORKER_DIED, place.index, place.pid, _explain(status), self._bury(place), place.wait)

    def _delay(self, place: _Place, now: float, early: bool) -> None:
        longer = min(max(2 * place.wait, self._patience.restart), self._patience.restart_max)
        place.wait = longer if early else 0.0
        place.restart_at = now + place.wait

    def _bury(self, place: _Place) -> int:
        """Forgets a worker that has been waited for; how many sessions it had open."""
        os.close(place.ready_fd)
        self._holdings.close_line(place.index)
        place.pid = 0
        place.ready = False
        place.beat = place.still = 0.0
        return self._shared.clear(place.index)

    def _kill(self) -> int:
        """Kills what is left; how many that were."""
        left = [place.pid for place in self._places if place.pid]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return len(left)

    def _start(self, place: _Place, now: float) -> None:
        place.ready_fd, ready_end = os.pipe()
        parent = os.getpid()
        orders = self._holdings.open_line(place.index)
        try:
            pid = os.fork()
        except OSError as error:
            os.close(place.ready_fd)
            os.close(ready_end)
            orders.close()
            self._holdings.close_line(place.index)
            if not self._serving:
                raise StartError(f"cannot fork: {error.strerror}") from None
            self._delay(place, now, early=True)
            self._log.write(events.WORKER_DIED, place.index, 0, f"cannot fork: {error.strerror}", 0, place.wait)
            return
        if not pid:
            self._be_worker(place, parent, ready_end, orders)
        orders.close()
        os.set_blocking(place.ready_fd, False)
        os.close(ready_end)
        place.pid = pid
        place.started = now

    def _be_worker(self, place: _Place, parent: int, ready_end: int, orders: socket.socket) -> NoReturn:
        """The child. Whatever happens, nothing of the parent's code runs in it."""
        code = EXIT_BUG
        try:
            code = self._work(place, parent, ready_end, orders)
        except BaseException as error:
            self._say(events.BUG, f"worker {place.index}", repr(error), events.trace(error))
        finally:
            os._exit(code)

    def _work(self, place: _Place, parent: int, ready_end: int, orders: socket.socket) -> int:
        self._forget_others(place)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Ctrl-C reaches the whole group, a hang-up too: the supervisor decides what they mean.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        try:
            if self._holdings.account:
                drop_privileges(self._holdings.account)
        except OSError as error:
            user = self._holdings.settings.config.user
            self._say(events.CANNOT_START, f"cannot become user {user}: {error.strerror}")
            return EXIT_CANNOT_START
        die_with_parent(signal.SIGTERM)
        if os.getppid() != parent:
            return 0
        holdings = self._holdings
        seat = Seat(
            place.index,
            len(self._places),
            holdings.sockets_of(place.index),
            holdings.contexts,
            self._shared,
            self._alive,
            ready_end,
            holdings.settings,
            orders,
            holdings.runner.asks if holdings.runner is not None else None,
        )
        return self._worker(holdings.settings.config, seat)

    def _say(self, event: events.Event, *values: object) -> None:
        """In the child, whose copy of the parent's log is not its own."""
        log = open_log(self._holdings.settings.config.log.format, threaded=False)
        log.write(event, *values)
        log.close()

    def _forget_others(self, place: _Place) -> None:
        """Closes the child's copies of what is not its own: held here, the pipe would never say that the supervisor is
        gone."""
        os.close(self._alive_end)
        self._holdings.forget(place.index)
        for other in self._places:
            if other.pid or other is place:
                os.close(other.ready_fd)


@contextmanager
def _blocked_signals() -> Iterator[set[int]]:
    """Signals wait until they are asked for; gives the mask that was. Ignored ones (nohup) stay ignored."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, children would vanish without a status
    asked = {number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*asked, signal.SIGCHLD})
    try:
        yield {int(number) for number in mask}
    finally:
        while _wait_signal(0):
            pass  # one that came too late must not kill the process now
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _wait_signal(seconds: float) -> int:
    """The signal that came, or 0."""
    found = signal.sigtimedwait((*STOP_SIGNALS, signal.SIGCHLD), max(0.0, seconds))
    return found.si_signo if found else 0


def _take_status(pid: int) -> int | None:
    """A child's exit code, negative for a signal; None while it runs, or if there is none."""
    found, status = os.waitpid(pid, os.WNOHANG) if pid else (0, 0)
    return os.waitstatus_to_exitcode(status) if found else None


def _is_ending(pid: int) -> bool:
    """Whether a child has ended, or was killed and is about to: its memory is given back before it can be waited for.
    proc(5): state, flags and pending signals of its first thread."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            facts = file.read().rpartition(")")[2].split()
    except OSError:
        return False
    state, flags, pending = facts[0], int(facts[6]), int(facts[28])
    return state in "ZX" or bool(flags & PF_EXITING or pending & 1 << signal.SIGKILL - 1)


def _take_byte(fd: int) -> bool:
    try:
        return bool(os.read(fd, 1))
    except BlockingIOError:
        return False


def _explain(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit code {status}"
