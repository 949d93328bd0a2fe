"""`kill`: processes that die or stand still at any moment.

A killed process loses nothing that it has written, so these show what is lost in memory, and what recovery makes of
every state of the files. What a power cut takes besides, crash_power shows.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack

from .crash_fault import Fault, under_load
from .crash_load import Connection, GoneError
from .crash_server import CrashError, wait_until
from .crash_site import Site

SESSIONS = 40
STUCK_SECONDS = 40.0  # until a worker that stands still was killed by its supervisor


def _signal(pid: int, signum: int) -> bool:
    """False: it has ended meanwhile."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return False
    return True


def _await_workers(site: Site, opened: int) -> None:
    """Until as many spools as there are workers have been opened since there were `opened` such lines."""
    begun = time.monotonic()
    site.note_fault()
    wait_until(lambda: len(site.server.events("spool-opened")) >= opened + 1, "a new worker")
    wait_until(lambda: len(site.server.workers()) == site.workers, "all workers")
    site.note_recovery(time.monotonic() - begun)


def kill_worker(site: Site) -> None:
    """kill -9 of a worker. The supervisor starts it again, its spool is recovered, its clients' connections end; those
    of the other worker do not notice. Nothing that was acknowledged is lost or altered; a second copy only of what was
    under way."""
    opened = len(site.server.events("spool-opened"))
    site.note_fault()
    if not _signal(site.chance.choice(site.server.workers()), signal.SIGKILL):
        raise CrashError("a worker has ended by itself")
    _await_workers(site, opened)


def crash_worker(site: Site) -> None:
    """SIGSEGV of a worker, as after a crash in C. It costs the sessions that it had open, and nothing else: those of
    the other worker go on."""
    opened = len(site.server.events("spool-opened"))
    workers = site.server.workers()
    with ExitStack() as stack:
        sessions = [stack.enter_context(Connection(site.server.port)) for _ in range(SESSIONS)]
        for session in sessions:
            session.hello()
        site.note_fault()
        if not _signal(site.chance.choice(workers), signal.SIGSEGV):
            raise CrashError("a worker has ended by itself")
        _await_workers(site, opened)
        # The kernel gives each worker about half of them.
        lost = sum(not _goes_on(session) for session in sessions)
        if not 0 < lost < SESSIONS:
            raise CrashError(f"{lost} of {SESSIONS} sessions were lost by the crash of one worker of {len(workers)}")


def _goes_on(session: Connection) -> bool:
    try:
        session.send(b"NOOP\r\n")
        return session.code() == 250
    except GoneError:
        return False


def kill_supervisor(site: Site) -> None:
    """kill -9 of the supervisor. Its workers end in order, and the lock of the data directory is free only then: a new
    server starts at once or says that it cannot yet. Nothing is lost, altered, or delivered twice but what was under
    way."""
    site.note_fault()
    site.server.process.kill()
    site.server.process.wait()
    site.note_fault()
    site.note_recovery(site.server.start())


def kill_group(site: Site) -> None:
    """kill -9 of all its processes at once, then a new start, as after a crash of the machine without its loss of
    memory. What a reader finds in new/ meanwhile is whole; the new server accepts and delivers everything that the old
    one has acknowledged."""
    site.kill()
    site.restart()


def kill_recovery(site: Site) -> None:
    """kill -9 of the group, then again, once or more, while it starts and recovers. Recovery that was cut off is done
    again, with the same result."""
    site.kill()
    for _ in range(site.chance.choice((1, 1, 2))):
        site.check_whole()
        site.server.launch()
        time.sleep(site.chance.uniform(0, 0.8))
        site.kill()
    site.restart()


def kill_reload(site: Site) -> None:
    """kill -9 of the group while it exchanges its configuration (SIGHUP), with mail in its queue. It starts with the
    new one."""
    before, after = 'retry_max = "2s"', 'retry_max = "3s"'
    configuration = site.server.configuration
    site.server.configuration = (
        configuration.replace(before, after) if before in configuration else configuration.replace(after, before)
    )
    site.server.write_configuration()
    _signal(site.server.supervisor, signal.SIGHUP)
    time.sleep(site.chance.uniform(0, 0.4))
    site.kill()
    site.restart()


def kill_workers(site: Site) -> None:
    """kill -9 of the group, then a start with another number of workers. Spools of workers that are no more are
    adopted, each by one worker; everything in them is delivered."""
    site.kill()
    site.configure(workers=site.chance.choice([number for number in (1, 2, 3, 4) if number != site.workers]))
    site.restart()


def stop_in_order(site: Site) -> None:
    """SIGTERM. What was acknowledged is kept, the exit code is 0, and nothing is delivered twice: an end in order is no
    excuse."""
    code = site.server.stop()
    if code:
        raise CrashError(f"exit code {code} after SIGTERM: {site.server.last_words()}")
    site.restart()


def stand_still(site: Site) -> None:
    """SIGSTOP of a worker or of all processes for up to two seconds, then SIGCONT. Nothing is lost and nothing comes
    twice; sessions wait."""
    chance = site.chance
    stopped = [site.server.supervisor, *site.server.workers()]
    if chance.random() < 0.6:
        stopped = [chance.choice(stopped[1:])]
    for pid in stopped:
        _signal(pid, signal.SIGSTOP)
    time.sleep(chance.uniform(0.1, 2))
    for pid in stopped:
        _signal(pid, signal.SIGCONT)


def stand_still_for_good(site: Site) -> None:
    """SIGSTOP of a worker, for good. The supervisor sees that its heart stands still, kills it and starts another."""
    opened = len(site.server.events("spool-opened"))
    worker = site.chance.choice(site.server.workers())
    begun = time.monotonic()
    if not _signal(worker, signal.SIGSTOP):
        raise CrashError("a worker has ended by itself")
    wait_until(lambda: worker not in site.server.workers(), "a worker that stands still is killed", STUCK_SECONDS)
    site.note_fault()
    _await_workers(site, opened)
    site.note_recovery(time.monotonic() - begun)


FAULTS: tuple[Fault, ...] = (
    under_load("kill.worker", kill_worker, share=5),
    under_load("kill.segv", crash_worker),
    under_load("kill.supervisor", kill_supervisor, share=3),
    under_load("kill.group", kill_group, share=5),
    under_load("kill.recovery", kill_recovery, share=3),
    under_load("kill.workers", kill_workers, share=3),
    under_load("kill.reload", kill_reload),
    under_load("kill.term", stop_in_order, share=2),
    under_load("kill.stop", stand_still, share=2),
    under_load("kill.stuck", stand_still_for_good, share=0.1),
)
