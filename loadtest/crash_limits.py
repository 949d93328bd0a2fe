"""`limits`: too few descriptors, too little memory, a clock that jumps.

In: prlimit(1), a control group of the kernel, libfaketime. Out: what holds when a machine gives less than is asked for:
sessions that are open go on, what was acknowledged is delivered, nothing is given up early because of a wall clock.
On failure: as any fault.
"""

from __future__ import annotations

import os
import random
import resource
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from errno import EBUSY
from inspect import getdoc
from pathlib import Path

from . import LoadError
from .crash_disk import Layout, check_root
from .crash_fault import Fault, play_run, under_load
from .crash_load import Connection, GoneError
from .crash_result import Finding
from .crash_server import CrashError, wait_until
from .crash_site import LOCAL, Bench, Site, opened

DESCRIPTORS = 64
CLIENTS = 120  # more than two workers can have
MEMORY = Path("/sys/fs/cgroup/memory")
LIMIT = "memory.limit_in_bytes"
SPARE = 2 << 20  # octets between what a server uses, the cache of files aside, and its limit
GREEDY = 60  # sessions
FAKETIME = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
)
GARBAGE_SESSIONS = 200
GARBAGE_MEMORY = 16 << 20
GARBAGE_ROUNDS = 4
WORDS = (
    b"EHLO x\r\n", b"HELO\r\n", b"MAIL FROM:<garbage@x.test>\r\n", b"RCPT TO:<garbage@here.test>\r\n", b"DATA\r\n",
    b"BDAT 99999\r\n", b"BDAT 3\r\n", b"BDAT x\r\n", b"RSET\r\n", b"NOOP " + b"x" * 3000 + b"\r\n", b"\r\n",
    b"\n.\n", b"\r.\r", b"..", b"x" * 70_000, b"STARTTLS\r\n", b"\x16\x03\x01\x02\x00", b"AUTH PLAIN =\r\n",
    b"\0" * 100, b"VRFY root\r\n", b"\xff\xfe" * 50, b"QUIT\r\n", b"GET / HTTP/1.1\r\n",
)  # fmt: skip
JUMPS = ("+1h", "-1h", "+3650d", "-3650d")
HELD_SECONDS = (0.3, 1.0)


def use_up_descriptors(site: Site) -> None:
    """More clients than its descriptors allow for. Who has a session goes on; the others wait in the kernel until there
    is room, and none is dropped unheard; bodies and mailboxes can still be written."""
    with ExitStack() as stack:
        session = stack.enter_context(Connection(site.server.port))
        session.hello()
        waiting = []
        for _ in range(CLIENTS):
            client = socket.create_connection(("127.0.0.1", site.server.port), 30)
            waiting.append(stack.enter_context(client))
        time.sleep(site.chance.uniform(*HELD_SECONDS))
        session.send(b"NOOP\r\n")
        if session.code() != 250:
            raise CrashError("a session does not go on when descriptors are short")
        while waiting:  # from the oldest on: each leaves room for another
            client = waiting.pop(0)
            if not client.recv(512).startswith((b"220", b"421")):
                raise CrashError("a client was dropped unheard")
            client.close()


def use_up_memory(site: Site) -> None:
    """The control group's memory is cut down to a little more than is in use, while large messages come. The kernel
    kills a worker, or only slows it down; nothing that was acknowledged is lost."""
    group = _group(site)
    site.note_fault()
    try:
        killed = _killed(group)
        wait_until(lambda: _limited(group), "the kernel cuts the memory down")
        # What is open is held in memory, too: sessions, each in the middle of a message.
        with ExitStack() as stack:
            try:
                for _ in range(GREEDY):
                    _begin_message(stack.enter_context(Connection(site.server.port, 5.0)))
            except GoneError:
                pass
            wait_until(lambda: _killed(group) > killed, "the kernel kills a process")
    except OSError as error:
        raise LoadError(f"{error.filename}: {error.strerror}") from None
    finally:
        (group / LIMIT).write_text("-1")
        site.note_fault()
    wait_until(
        lambda: len(site.server.workers()) == site.workers or site.server.process.poll() is not None, "all workers"
    )
    if site.server.process.poll() is not None:  # the kernel has chosen the supervisor
        site.server.kill()
    if not site.server.workers():
        site.restart()


def talk_garbage(site: Site) -> None:
    """Two hundred sessions of commands cut up, octets at random and messages without end, each ended where it stands.
    They leave no trace: no descriptor, no session, no file, no memory to speak of, no mail. The load beside them may
    take more memory than it ever had, but not each time."""
    _talk_garbage(site)  # what is taken once is taken now
    pids = site.server.workers()
    before = _descriptors(pids)
    grown = [0] * GARBAGE_ROUNDS
    for number in range(GARBAGE_ROUNDS):
        held = sum(map(_memory, pids))
        _talk_garbage(site)
        wait_until(lambda: _descriptors(pids) <= before, "the descriptors of garbage sessions are closed")
        grown[number] = sum(map(_memory, pids)) - held
        if grown[number] <= GARBAGE_MEMORY:
            break
    else:
        raise CrashError(f"{GARBAGE_SESSIONS} sessions of garbage leave {min(grown) >> 20} MB each time")
    if sorted(site.server.workers()) != sorted(pids):
        raise CrashError("garbage has ended a worker")


def _talk_garbage(site: Site) -> None:
    for _ in range(GARBAGE_SESSIONS):
        try:
            with socket.create_connection(("127.0.0.1", site.server.port), 30) as client:
                for _ in range(site.chance.randrange(30)):
                    client.sendall(_garbage(site.chance))
        except OSError:
            pass  # it has had enough of us


def _garbage(chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return chance.randbytes(chance.randrange(2000))
    word = chance.choice(WORDS)
    return word[: chance.randrange(len(word) + 1)] if chance.random() < 0.2 else word


def _descriptors(pids: Sequence[int]) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def _memory(pid: int) -> int:
    """Octets that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def _removed(group: Path) -> bool:
    """Not before the kernel has forgotten the last process in it."""
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def _limited(group: Path) -> bool:
    """The kernel refuses while it cannot free what is above the limit."""
    used = next(int(line.split()[1]) for line in (group / "memory.stat").open() if line.startswith("rss "))
    try:
        (group / LIMIT).write_text(str(used + SPARE))
    except OSError as error:
        if error.errno != EBUSY:
            raise
        return False
    return True


def _killed(group: Path) -> int:
    return int((group / "memory.oom_control").read_text().split()[-1])


def _begin_message(client: Connection) -> None:
    client.hello()
    client.send(f"MAIL FROM:<>\r\nRCPT TO:<greedy@{LOCAL}>\r\nDATA\r\n".encode())
    client.codes(3)
    client.send((b"x" * 998 + b"\r\n") * 120)  # is kept in memory


def jump(site: Site) -> None:
    """The wall clock jumps by an hour or ten years, forward or back. Nothing expires early, no name comes twice."""
    _clock(site).write_text(site.chance.choice(JUMPS))
    time.sleep(site.chance.uniform(*HELD_SECONDS))


def jump_and_start(site: Site) -> None:
    """The wall clock jumps by an hour or ten years, and then all processes are killed and started anew: what waits is
    neither given up nor left until that time comes."""
    _clock(site).write_text(site.chance.choice(JUMPS))
    site.kill()
    site.restart()


def _group(site: Site) -> Path:
    return MEMORY / f"crash-{os.getpid()}"


def _clock(site: Site) -> Path:
    return site.folder / "clock"


# What each limit is set by: a command before the server's own.


@contextmanager
def few_descriptors(site: Site) -> Iterator[tuple[str, ...]]:
    yield ("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}")


@contextmanager
def in_group(site: Site) -> Iterator[tuple[str, ...]]:
    check_root()
    group = _group(site)
    try:
        group.mkdir()
    except OSError as error:
        raise LoadError(f"control groups for memory (version 1) are needed: {error}") from None
    try:
        yield ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
    finally:
        site.server.kill()
        wait_until(lambda: _removed(group), "the end of a control group")


@contextmanager
def other_clock(site: Site) -> Iterator[tuple[str, ...]]:
    library = next((path for path in FAKETIME if Path(path).exists()), None)
    if library is None:
        raise LoadError("libfaketime is needed: apt-get install faketime")
    _clock(site).write_text("+0")
    yield (
        "env", f"LD_PRELOAD={library}", f"FAKETIME_TIMESTAMP_FILE={_clock(site)}", "FAKETIME_NO_CACHE=1",
        "FAKETIME_DONT_FAKE_MONOTONIC=1", "FAKETIME_DONT_RESET=1",
    )  # fmt: skip


def limited(
    name: str, strike: Callable[[Site], None], setting: Callable[[Site], AbstractContextManager[tuple[str, ...]]]
) -> Fault:
    def play(bench: Bench) -> Iterator[Finding]:
        with ExitStack() as stack:
            site = stack.enter_context(opened(bench, Layout()))
            site.server.prefix = stack.enter_context(setting(site))
            site.server.start()
            for number in bench.numbers:
                found = play_run(site, number, bench.chance(name, number), strike)
                yield found
                if found.violations:
                    return

    return Fault(name, play, getdoc(strike) or "")


FAULTS: tuple[Fault, ...] = (
    limited("limits.descriptors", use_up_descriptors, few_descriptors),
    limited("limits.memory", use_up_memory, in_group),
    under_load("limits.garbage", talk_garbage),
    limited("limits.clock", jump, other_clock),
    limited("limits.clock-start", jump_and_start, other_clock),
)
