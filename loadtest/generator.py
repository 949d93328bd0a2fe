"""The generator: as many processes as a run needs, told what to do, and what they counted put together.

In: Options. Out: a Snapshot each second while it goes on, a Result at the end. Always: the processes begin to send at
the same moment, when all of them have opened their sessions; none outlives this one, which waits for none that is late
by more than its limits allow. Ctrl-C ends the run with what was counted so far; a second one ends it at once.
Not here: what a process does (worker), how results look (table, page, live). On failure: LoadError, also when the
server cannot be reached at all.
"""

from __future__ import annotations

import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from math import ceil, inf
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import perf_counter

from . import LoadError
from .connecting import loopback_sources, ports_of_an_address
from .ledger import Ledger
from .machine import describe_machine
from .misbehaving import check_kinds
from .options import Options
from .result import ERRORS, Latency, Result, Snapshot
from .tally import Part
from .worker import INTERRUPTED_GRACE, QUIT_SECONDS, STALLED, Closing, Opening, Order, Ready, Word

RESERVE = 100  # descriptors of a process that are no sessions
HEAD_START = 0.05  # seconds for all processes to hear that they begin
PATIENCE = 20.0  # seconds beyond all limits that a process is given to end by itself

OnSnapshot = Callable[[Snapshot], None]


def run(options: Options, on_snapshot: OnSnapshot) -> Result:
    """Sends what the options say. Raises LoadError; KeyboardInterrupt at the second Ctrl-C."""
    check_kinds(options)
    if options.ledger:
        Ledger(options.ledger).close()  # an unwritable one is better found here
    options = replace(options, seed=options.seed or secrets.randbelow(2**31) + 1)
    limits: list[str] = []
    orders = make_orders(options, find_address(options.address), limits)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    processes = [Process(order) for order in orders]
    try:
        run_ = Run(processes, options, on_snapshot)
        run_.wait()
    finally:
        for process in processes:
            process.end()
    return run_.result(orders[0].options, started, limits)


def find_address(target: tuple[str, int]) -> tuple[str, int]:
    """Numeric. Raises LoadError."""
    host, port = target
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LoadError(f"{host} cannot be found: {error.strerror}") from None
    address = found[0][4]
    return str(address[0]), int(address[1])


def descriptors() -> int:
    """How many one process may have; raised as far as it goes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 20 if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def make_orders(options: Options, address: tuple[str, int], limits: list[str]) -> list[Order]:
    """One for each process; what limit asked for how many is added to `limits`. Raises LoadError."""
    roles = make_roles(options)
    room = max(descriptors() - RESERVE, 1)
    wanted = max(options.max_sessions, len(roles))
    count = max(options.processes, ceil(wanted / room))
    if count > max(options.processes, 1):
        limits.append(f"{room + RESERVE:,} descriptors in a process: {count} processes")
    options = replace(options, processes=count)
    sources = options.source
    ports = ports_of_an_address()
    if not sources and wanted > ports and address[0].startswith("127."):
        sources = loopback_sources(ceil(wanted / ports))
        limits.append(f"{ports:,} ports of an address: connecting from {sources[0]} to {sources[-1]}")
    most = options.max_sessions or room * count
    return [
        Order(
            options=options,
            index=index,
            address=address,
            sources=sources[index % len(sources) :] + sources[: index % len(sources)] if sources else (),
            roles=roles[index::count],
            most=_share(most, count, index),
            budget=_share(options.messages, count, index) if options.messages else inf,
        )
        for index in range(count)
    ]


def _share(whole: int, count: int, index: int) -> int:
    """Of so many things, what the one of `count` gets that has this index."""
    return whole // count + (index < whole % count)


def make_roles(options: Options) -> tuple[str, ...]:
    """What each session does. Raises LoadError when none is left that sends mail."""
    roles = ["large"] * options.large
    for kind, share in options.misbehave.items():
        roles += [kind] * max(round(share * options.sessions), share > 0)
    left = options.sessions - len(roles)
    if left < 1:
        raise LoadError(f"of {options.sessions} sessions none is left that behaves: more --sessions, or smaller shares")
    return (*["mail"] * left, *roles)


class Process:
    """A worker, as its parent sees it."""

    def __init__(self, order: Order) -> None:
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        self.ready = False
        self.ticks = 0
        self.sessions = 0
        self.closing: Closing | None = None
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                process_group=0,  # Ctrl-C on the terminal is the parent's
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        self.say(order)

    def say(self, word: object) -> None:
        try:
            self.connection.send(word)
        except OSError:
            pass  # it has ended; whoever reads finds that out

    def end(self) -> None:
        self.connection.close()
        if self.closing is None:
            self._process.kill()
        self._process.wait()


@contextmanager
def on_interrupt(handler: Callable[..., None]) -> Iterator[None]:
    """SIGINT goes to the handler, where signals are ours: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Run:
    """What the processes say, second by second."""

    def __init__(self, processes: list[Process], options: Options, on_snapshot: OnSnapshot) -> None:
        self._processes = processes
        self._options = options
        self._on_snapshot = on_snapshot
        self._start = 0.0  # 0: not begun
        self._interrupted = False
        self._deadline = perf_counter() + STALLED + PATIENCE
        self._open: dict[int, Part] = {}  # seconds that not every process has told of
        self._total = Part()
        self._peak = 0
        self._timeline: list[Snapshot] = []

    def wait(self) -> None:
        """Until all have ended. Raises LoadError, KeyboardInterrupt."""
        with on_interrupt(self._interrupt):
            while waiting := [process for process in self._processes if process.closing is None]:
                for connection in wait([process.connection for process in waiting], 1.0):
                    self._hear(next(process for process in waiting if process.connection is connection))
                if perf_counter() > self._deadline:
                    raise LoadError("a process of the generator did not end in time")
        self._show_last()

    def _interrupt(self, *_: object) -> None:
        """A signal handler: an exception amid what a process says would leave the rest of it unread."""
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        self._deadline = min(self._deadline, perf_counter() + INTERRUPTED_GRACE + QUIT_SECONDS + PATIENCE)
        for process in self._processes:
            process.say((Word.STOP, 0.0))

    def _hear(self, process: Process) -> None:
        try:
            said = process.connection.recv()
        except (EOFError, OSError):
            raise LoadError("a process of the generator died") from None
        match said:
            case LoadError():
                raise said
            case Opening():
                process.sessions = said.sessions
                if not self._interrupted:
                    self._deadline = perf_counter() + STALLED + PATIENCE
                self._on_snapshot(self._snapshot(0, Part(sessions=sum(each.sessions for each in self._processes))))
            case Ready():
                process.ready = True
                self._total.merge(said.part)
                if all(each.ready for each in self._processes):
                    self._begin()
            case Part():
                self._add(process.ticks, said)
                process.ticks += 1
            case Closing():
                process.closing = said
                self._add(process.ticks, said.part)
        self._show()

    def _begin(self) -> None:
        self._start = perf_counter() + HEAD_START
        options = self._options
        self._deadline = self._start + options.duration + options.grace + QUIT_SECONDS + PATIENCE
        for process in self._processes:
            process.say((Word.GO, self._start))

    def _add(self, second: int, part: Part) -> None:
        whole = self._open.setdefault(second, Part())
        whole.merge(part)
        whole.seconds = max(whole.seconds, part.seconds)
        whole.sessions += part.sessions
        whole.peak += part.peak

    def _show(self) -> None:
        """The seconds that are complete."""
        told = min((each.ticks for each in self._processes if each.closing is None), default=0)
        for second in sorted(second for second in self._open if second < told):
            self._finish(second)

    def _show_last(self) -> None:
        for second in sorted(self._open):
            self._finish(second)

    def _finish(self, second: int) -> None:
        part = self._open.pop(second)
        self._total.merge(part)
        self._peak = max(self._peak, part.peak)
        snapshot = self._snapshot(second, part)
        self._timeline.append(snapshot)
        self._on_snapshot(snapshot)

    def _snapshot(self, second: int, part: Part) -> Snapshot:
        return Snapshot(
            second=second,
            seconds=part.seconds,
            sessions=part.sessions,
            accepted=part.accepted,
            refused=part.refused,
            octets=part.octets,
            errors=_positive(part.errors),
            replies=_codes(part),
            latency_ms=_latencies(part),
            lag_ms=1000 * part.lag.most,
        )

    def result(self, options: Options, started: str, limits: list[str]) -> Result:
        """When all have ended."""
        total = self._total
        ended = [process.closing for process in self._processes if process.closing]
        seconds = max(closing.seconds for closing in ended)
        for closing in ended:
            limits += [limit for limit in closing.limits if limit not in limits]
        answered = total.accepted + total.refused
        return Result(
            scenario=options.scenario,
            target=options.target,
            started=started,
            options=options.public(),
            processes=len(self._processes),
            seconds=seconds,
            interrupted=self._interrupted,
            sessions_opened=total.opened,
            sessions_peak=self._peak,
            messages_sent=answered + total.unknown + total.lost,
            messages_accepted=total.accepted,
            messages_refused=total.refused,
            messages_unknown=total.unknown,
            recipients_refused=total.recipients_refused,
            octets_sent=total.octets,
            rate=total.accepted / seconds if seconds > 0 else 0.0,
            client_cpu_us_per_message=1e6 * sum(closing.cpu for closing in ended) / answered if answered else 0.0,
            errors={kind: total.errors[kind] for kind in ERRORS},
            replies=_codes(total),
            misbehaviour=_misbehaviour(total),
            latency_ms=_latencies(total),
            lag_ms=total.lag.latency(),
            limits=limits,
            machine=describe_machine(Path.cwd()),
            timeline=self._timeline,
            tls_resumed=total.resumed,
        )


def _positive(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def _codes(part: Part) -> dict[str, int]:
    return {str(code): count for code, count in sorted(part.replies.items()) if count}


def _latencies(part: Part) -> dict[str, Latency]:
    found = {phase: histogram.latency() for phase, histogram in part.phases.items()}
    return {phase: latency for phase, latency in found.items() if latency}


def _misbehaviour(part: Part) -> dict[str, dict[str, int]]:
    return {
        kind: {"sessions": outcomes.total(), **dict(sorted(outcomes.items()))}
        for kind, outcomes in sorted(part.misbehaviour.items())
    }
