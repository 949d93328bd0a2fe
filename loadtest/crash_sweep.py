"""`sweep`: the power is cut at every step, one after another, of taking, delivering, stopping and recovering.

In: a way that is gone once with all calls recorded. Out: a case for each (call, thread, n) of the record: the way is
gone again, the process is killed when that thread begins that call for the n-th time, at that moment the disks are cut,
and the server is started on what is left. A case counts only if the trace shows that it struck: threads take turns a
little differently each time. A run's number is that of its case.
The ways: `serve` takes small and large messages and delivers them to new mailboxes, to a next host and back as a
report; `stop` ends in order with mail in hand; `recover` starts after a kill with mail that waits, new and put off, in
database and files, and an orphaned body. Supervisors stand still meanwhile, where they would start the worker again.
In `recover` all that comes of the supervisor is watched, so n is of whichever thread gets there first.
On failure: as any fault.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path

from .crash_disk import Layout
from .crash_fault import Fault, lost_run
from .crash_load import Connection, GoneError, Letter, send_bdat, send_data
from .crash_power import fill_log
from .crash_result import Finding
from .crash_server import CrashError, wait_until
from .crash_site import LOCAL, NEXT, NOBODY, Bench, Site, opened
from .crash_trace import CALLS, Tracer, threads_of, traced
from .ledger import make_body, outcome_of

LARGE = 300_000  # octets of a body that has a file of its own
SEND_SECONDS = 2.0
WAY_SECONDS = 3.0  # in which a way comes to its end, if it was not struck
WAITING = ("a", "b")  # mailboxes whose mail waits
ORPHAN = 800_000  # octets of a body that never comes to its end
SETTLE_SECONDS = 0.15  # behind the last delivery: marks are committed, body files removed
RECORDS = 3  # runs that are recorded: a case that only some of them show is tried too


@dataclass(frozen=True)
class Case:
    """`thread` is its place among the threads of its process, in the order in which they were made; -1: any."""

    call: str
    thread: int
    n: int

    def __str__(self) -> str:
        where = "any thread" if self.thread < 0 else f"thread {self.thread}"
        return f"{self.call} {self.n} of {where}"


class Steps:
    """What is sent on a way: letters one after another, until the server is gone."""

    def __init__(self, site: Site, name: str) -> None:
        self._site = site
        self._name = f"r{site.run}{name}"
        self._chance = random.Random(1)  # the same octets in each case
        self._numbers = iter(range(1000))

    def letter(self, size: int, *recipients: str) -> Letter:
        name = f"{self._name}{next(self._numbers)}"
        return Letter(name, make_body(name, size, self._chance), recipients)

    def send(self, letters: list[Letter], *, bdat: bool = False) -> None:
        """In one group, on a connection of its own. Without an answer their fate is unknown."""
        try:
            # Where the worker is gone, the supervisor that stands still has its socket: connections wait for nobody.
            with Connection(self._site.server.port, SEND_SECONDS) as connection:
                if not self._site.server.workers():
                    raise GoneError("no worker")
                connection.hello()
                if bdat:
                    send_bdat(connection, letters, self._chance)
                else:
                    send_data(connection, letters)
        except GoneError:
            pass
        finally:
            for letter in letters:
                self._site.ledger.write(letter, outcome_of(letter.code), letter.code, letter.refused)


# --- the ways: each returns when it has come to its end, or was struck ---


def serve(site: Site, tracer: Tracer) -> None:
    """Power cut at each step of taking and delivering: small messages alone and in a group, to one and two mailboxes
    that are new; a large one; one to a next host; one that is refused there and comes back as a report."""
    steps = Steps(site, "s")
    steps.send([steps.letter(1000, _box(site, "a"), _box(site, "b"))])
    steps.send([steps.letter(LARGE, _box(site, "a"))], bdat=True)
    steps.send([steps.letter(2000, _box(site, "c")), steps.letter(0, _box(site, "a"))])
    steps.send([steps.letter(500, f"box@{NEXT}", NOBODY)])
    _await_end(site, tracer, files=5, records=2)


def stop(site: Site, tracer: Tracer) -> None:
    """Power cut at each step of an end in order, with messages that have just been acknowledged."""
    steps = Steps(site, "s")
    steps.send([steps.letter(1000, _box(site, "a"))])
    steps.send([steps.letter(500, _box(site, "b"), f"box@{NEXT}"), steps.letter(LARGE, _box(site, "b"))])
    for worker in site.server.workers():  # none where it was struck before
        os.kill(worker, signal.SIGTERM)
    wait_until(lambda: not site.server.workers(), "the end of a worker")


def recover(site: Site, tracer: Tracer) -> None:
    """Power cut at each step of a start behind a kill: the log is read, an orphaned body goes, mail that waited is
    delivered, from the database and from a file."""
    with Connection(site.server.port) as connection:
        connection.hello()
        envelope = f"MAIL FROM:<>\r\nRCPT TO:<{_box(site, 'a')}>\r\nBDAT {2 * ORPHAN}\r\n".encode()
        connection.send(envelope + (b"x" * 98 + b"\r\n") * (ORPHAN // 100))
        wait_until(lambda: len(list(site.ground.data.glob("spool/*/body/*"))) == 2, "a body that is begun")
        for name in WAITING:
            _place(site, name).unlink()
        _flush(site.ground.mail / LOCAL)  # else the cut brings them back
        site.note_fault()
        for worker in site.server.workers():
            os.kill(worker, signal.SIGKILL)
        _await_end(site, tracer, files=3, records=0)


def warm_up(site: Site) -> None:
    """Makes the threads that are made when they are needed first."""
    steps = Steps(site, "w")
    steps.send([steps.letter(100, f"warm-{site.run}@{LOCAL}", f"box@{NEXT}")])
    site.server.drain()


def warm_up_and_fill(site: Site) -> None:
    fill_log(site)
    warm_up(site)


def leave_mail(site: Site) -> None:
    """Mail that is put off, because plain files stand where its mailboxes would be."""
    (site.ground.mail / LOCAL).mkdir(parents=True, exist_ok=True)
    for name in WAITING:
        _place(site, name).touch()
    steps = Steps(site, "l")
    steps.send([steps.letter(1000, _box(site, "a")), steps.letter(LARGE, _box(site, "b"), _box(site, "a"))])
    wait_until(lambda: len(site.server.events("deferred")) >= 3, "mail that waits")


def _box(site: Site, name: str) -> str:
    return f"{name}-{site.run}@{LOCAL}"


def _place(site: Site, name: str) -> Path:
    return site.ground.mail / LOCAL / f"{name}-{site.run}"


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _await_end(site: Site, tracer: Tracer, files: int, records: int) -> None:
    """Until so much has arrived and what follows from it is done, or it was struck."""
    deadline = time.monotonic() + WAY_SECONDS
    settled = 0.0
    while not tracer.killed() and time.monotonic() < deadline:
        found = sum(len(list(_place(site, name).glob("new/*"))) for name in "abc")
        if found >= files and site.records() >= records:
            settled = settled or time.monotonic() + SETTLE_SECONDS
            if time.monotonic() > settled:
                return
        time.sleep(0.002)


# --- the cases ---


@dataclass(frozen=True)
class Way:
    """`by_thread`: a thread of the worker is attached to, while its supervisor stands still."""

    go: Callable[[Site, Tracer], None]
    prepare: Callable[[Site], None]
    by_thread: bool = True


def play_case(site: Site, way: Way, case: Case | None) -> tuple[Tracer, bool]:
    """Goes the way; None: it is recorded. Whether the case struck. In the end the server runs."""
    way.prepare(site)
    supervisor, (worker,) = site.server.supervisor, site.server.workers()
    target = (worker if case is None else threads_of(worker)[case.thread]) if way.by_thread else supervisor
    if way.by_thread:
        os.kill(supervisor, signal.SIGSTOP)
    kill_at = None if case is None else (case.call, case.n)
    following = case is None or not way.by_thread
    with traced(target, site.folder / "trace", following=following, kill_at=kill_at) as tracer:
        way.go(site, tracer)
        struck = case is not None and bool(tracer.killed())
        if struck:
            site.kill()
    if struck:
        site.ground.cut()
        site.ground.recover()
        site.restart()
    elif not site.server.workers():
        site.server.kill()
        site.restart()
    elif way.by_thread:
        os.kill(supervisor, signal.SIGCONT)
    return tracer, struck


def record_cases(site: Site, way: Way) -> list[Case]:
    """The cases that a way has. Raises CrashError."""
    most: Counter[tuple[str, int]] = Counter()
    for number in range(RECORDS):
        site.begin(10_000_000 + number, random.Random(0))
        try:
            threads = threads_of(site.server.workers()[0])
            tracer, _ = play_case(site, way, None)
            threads = threads if way.by_thread else []
            counted: Counter[tuple[int, str]] = Counter((call.thread, call.name) for call in tracer.calls())
            for (thread, name), count in counted.items():
                place = threads.index(thread) if thread in threads else -1
                if place >= 0 or not way.by_thread:
                    most[name, place] = max(most[name, place], count)
            if problems := site.finish().violations:
                raise CrashError(problems[0])
        finally:
            site.close()
    order = {name: place for place, name in enumerate(CALLS)}
    ways = sorted(most.items(), key=lambda item: (item[0][1], order[item[0][0]]))
    return [Case(name, thread, n) for (name, thread), count in ways for n in range(1, count + 1)]


def sweep(name: str, way: Way, layout: Layout) -> Fault:
    """All cases of a way on one layout; with fewer runs, as many of them at equal distances."""

    def play(bench: Bench) -> Iterator[Finding]:
        with ExitStack() as stack:
            site = stack.enter_context(opened(bench, layout, workers=1))
            site.server.start()
            cases = record_cases(site, way)
            numbers = bench.numbers
            chosen = range(len(cases))[
                numbers[0] if numbers else 0 :: max(1, len(cases) // len(numbers)) if numbers else 1
            ]
            for run in chosen[: len(numbers) or None]:
                found = _one(site, run, way, cases[run])
                yield found
                if found.violations:
                    stack.close()
                    site = stack.enter_context(opened(bench, layout, workers=1))
                    site.server.start()

    return Fault(name, play, getdoc(way.go) or "", every=True)


def _one(site: Site, run: int, way: Way, case: Case) -> Finding:
    site.begin(run, random.Random(0))
    try:
        _, struck = play_case(site, way, case)
        found = site.finish(struck)
    except CrashError as error:
        found = lost_run(site, run, str(error))
    finally:
        site.close()
    found.violations = [f"{case}: {violation}" for violation in found.violations]
    return found


def _faults(kind: str) -> Iterator[Fault]:
    two = Layout(kind)
    yield sweep(f"sweep.{kind}-serve", Way(serve, warm_up), two)
    yield sweep(f"sweep.{kind}-one-serve", Way(serve, warm_up_and_fill), Layout(kind, one=True))
    yield sweep(f"sweep.{kind}-stop", Way(stop, warm_up), two)
    yield sweep(f"sweep.{kind}-recover", Way(recover, leave_mail, by_thread=False), two)


FAULTS: tuple[Fault, ...] = (*_faults("ext4"), *_faults("xfs"))
