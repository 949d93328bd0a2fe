"""Passwords and their hashes: argon2id, in threads of its own, of which a worker has two.

In: a password as SASLprep leaves it, what a store keeps of it: argon2 (with or without a scheme such as `{ARGON2ID}`
before it), or SCRAM keys; and from whom it is. Out: whether they fit. A hash takes 19 MiB and some 20 ms of a processor
without the GIL; so no more than two are computed at once and no more than 64 wait (turns.py). Who guesses keeps these
threads busy, and no one else is to notice: of strangers one is computed at a time, after a wrong one there is a rest,
and all in time that nobody else wants; for half a second, then as usual. More are `BusyError`; a machine that has no
memory for one is `UnavailableError`. ValueError: what the store keeps is neither. OWASP's parameters: m=19 MiB, t=2,
p=1. RFC 9106.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from argon2 import PasswordHasher
from argon2.exceptions import HashingError, InvalidHashError, VerificationError, VerifyMismatchError
from argon2.low_level import Type

from . import BusyError, UnavailableError
from .scram import fits, parse_keys
from .turns import Turns

THREADS = 2
WAITING = 64
NICENESS = 10
HURRY = 0.5  # seconds after which a hash does not wait for idle time any longer
# After a stranger's wrong password strangers are not served for so many times as long as it took: whatever is guessed,
# it is a third of a processor for each worker. Right ones follow each other at once, as after a restart.
REST = 2.0
REST_MOST = 0.1  # seconds
PATIENCE = 10.0  # seconds in the line: a client that waits for longer is better told to come again
_USUAL = os.sched_param(0)  # the only one of policies without real time

_HASHER = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1, type=Type.ID)
_SCHEME = re.compile(r"\{ARGON2(I|ID|D)?\}")

# Of a random password that nobody has: what a user's password is compared with who does not exist.
NOBODYS = "$argon2id$v=19$m=19456,t=2,p=1$LFPZUxgJDJm4IvvZ7LYDsg$VtVQRp5Mv0AbSjvielQfW2zjE45vvhuPhTfzVgpROJA"


def hash_password(password: str) -> str:
    """What is kept of a password; takes some 20 ms. Raises UnavailableError."""
    try:
        return _HASHER.hash(password)
    except HashingError as error:
        raise UnavailableError(f"argon2: {error}") from None


def check_form(stored: str) -> str:
    """A store's text, without its scheme. ValueError: nothing can be compared with it."""
    bare = _SCHEME.sub("", stored, count=1)
    if bare.startswith("$argon2"):
        try:
            _HASHER.check_needs_rehash(bare)
        except InvalidHashError:
            raise ValueError("a password of argon2 that is damaged") from None
        return bare
    parse_keys(stored)
    return stored


def verify(stored: str, password: str) -> bool:
    """Whether they fit; in a thread. Raises ValueError, UnavailableError."""
    if not stored.startswith("$argon2"):
        return fits(parse_keys(stored), password)
    try:
        return _HASHER.verify(stored, password)
    except VerifyMismatchError:
        return False
    except VerificationError as error:
        raise UnavailableError(f"argon2: {error}") from None
    except InvalidHashError:
        raise ValueError("a password of argon2 that is damaged") from None


def _step_back() -> None:
    """For what a thread does under the GIL. On Linux each has a niceness of its own."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except OSError:
        pass  # not allowed here, or nice already


def _may_return() -> bool:
    """Whether a thread of this process gets out of SCHED_IDLE again: as root, or where RLIMIT_NICE allows it."""
    found = []

    def try_it() -> None:
        _step_back()
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, _USUAL)
            os.sched_setscheduler(0, os.SCHED_OTHER, _USUAL)
            found.append(True)
        except OSError:
            pass

    trial = threading.Thread(target=try_it)
    trial.start()
    trial.join()
    return bool(found)


@dataclass(slots=True, eq=False)
class _Work:
    """`late` ends the wait in the line."""

    stored: str = field(repr=False)
    password: str = field(repr=False)
    fits: asyncio.Future[bool] = field(repr=False)
    late: asyncio.TimerHandle | None = None


class Hashes:
    """The threads of one worker, and the line before them.

    A thread is idle (SCHED_IDLE) while it computes and at no other time: one that had the GIL and no processor would
    hold the loop up. Two processes with two such threads each, on two cores with other work: a loop that wakes each
    millisecond is late by 1.5 ms in one of ten times, by 8.1 where they are only nice, by 2.2 without any hash. But
    that is among the threads of one group: where the kernel shares processors out among groups first (autogroup,
    cgroups), a thread of another group, such as one that writes to the disk, waits for an idle one as for any other. So
    there are few of them as well.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "passwords", _step_back)
        self._turns: Turns[_Work] = Turns(WAITING)
        self._computing = 0
        self._strangers = True  # whether one of theirs may be computed now
        self._idles = _may_return()
        self._idle: dict[int, float] = {}  # since when a thread computes, by its number in the kernel
        self._looking = False
        self._closed = False

    async def verify(self, stored: str, password: str, stranger: bytes | None = None) -> bool:
        """Whether they fit. `stranger`: the address of a client that has not lately been let in as this user; None:
        it has. Raises UnavailableError, and ValueError."""
        if self._closed:
            raise UnavailableError("argon2: closed")
        loop = asyncio.get_running_loop()
        work = _Work(check_form(stored), password, loop.create_future())
        work.late = loop.call_later(PATIENCE, _refuse, work)
        loser = self._turns.add(work, stranger)
        if loser is not None:
            _refuse(loser)
        self._go_on()
        # Whoever waits may go away; his place is free when his turn has come, and what was begun ends.
        return await work.fits

    def close(self) -> None:
        self._closed = True
        while (taken := self._turns.take(strangers=True)) is not None:
            _refuse(taken[0])
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _go_on(self) -> None:
        """Has computed what can be now."""
        while self._computing < THREADS and not self._closed:
            taken = self._turns.take(self._strangers)
            if taken is None:
                return
            work, stranger = taken
            if not work.fits.done():
                self._compute(work, stranger)

    def _compute(self, work: _Work, stranger: bool) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()

        def done(computed: asyncio.Future[bool | Exception]) -> None:
            self._computing -= 1
            if computed.cancelled():  # closed meanwhile
                _refuse(work)
                return
            answer = computed.exception() or computed.result()
            if stranger and answer is False:
                loop.call_later(min(REST_MOST, REST * (loop.time() - begun)), self._welcome)
            elif stranger:
                self._strangers = True
            if work.fits.done():
                pass  # nobody waits any more
            elif isinstance(answer, BaseException):
                work.fits.set_exception(answer)
            else:
                work.fits.set_result(answer)
            self._go_on()

        if work.late is not None:
            work.late.cancel()
        try:
            computing = loop.run_in_executor(self._threads, self._verify, work.stored, work.password)
        except RuntimeError as error:  # no thread can be begun
            work.fits.set_exception(UnavailableError(f"argon2: {error}"))
            return
        self._computing += 1
        self._strangers = self._strangers and not stranger
        computing.add_done_callback(done)
        if self._idles and not self._looking:
            self._looking = True
            loop.call_later(HURRY / 2, self._look, loop)

    def _welcome(self) -> None:
        """Strangers again."""
        self._strangers = True
        self._go_on()

    def _verify(self, stored: str, password: str) -> bool | Exception:
        thread = threading.get_native_id()
        try:
            if self._idles:
                self._idle[thread] = time.monotonic()
                os.sched_setscheduler(0, os.SCHED_IDLE, _USUAL)
            return verify(stored, password)
        except Exception as error:
            return error
        finally:
            if self._idles:
                os.sched_setscheduler(0, os.SCHED_OTHER, _USUAL)
                self._idle.pop(thread, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = time.monotonic()
        for thread, since in list(self._idle.items()):
            if now - since > HURRY:
                try:
                    os.sched_setscheduler(thread, os.SCHED_OTHER, _USUAL)
                except OSError:
                    pass  # it has ended
        self._looking = self._computing > 0
        if self._looking:
            loop.call_later(HURRY / 2, self._look, loop)


def _refuse(work: _Work) -> None:
    if work.late is not None:
        work.late.cancel()
    if not work.fits.done():
        work.fits.set_exception(BusyError("too many passwords are being checked"))
