"""Passwords and their hashes: argon2id, in threads of its own, of which a worker has two.

In: a password as SASLprep leaves it, and what a store keeps of it: argon2 (with or without a scheme such as
`{ARGON2ID}` before it), or SCRAM keys. Out: whether they fit. A hash takes 19 MiB and some 17 ms of a processor without
the GIL; so no more than two are computed at once and no more than 64 wait. They are computed in time that nobody else
wants: who guesses keeps these threads busy, and no one else is to notice. One that has waited for such time for half a
second is computed as usual. More are `BusyError`; a machine that has no memory for one is `UnavailableError`.
ValueError: what the store keeps is neither. OWASP's parameters: m=19 MiB, t=2, p=1. RFC 9106.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError
from argon2.low_level import Type

from . import BusyError, UnavailableError
from .scram import fits, parse_keys

THREADS = 2
WAITING = 64
NICENESS = 10
HURRY = 0.5  # seconds after which a hash does not wait for idle time any longer
_USUAL = os.sched_param(0)  # the only one of policies without real time

_HASHER = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1, type=Type.ID)
_SCHEME = re.compile(r"\{ARGON2(I|ID|D)?\}")

# Of a random password that nobody has: what a user's password is compared with who does not exist.
NOBODYS = "$argon2id$v=19$m=19456,t=2,p=1$LFPZUxgJDJm4IvvZ7LYDsg$VtVQRp5Mv0AbSjvielQfW2zjE45vvhuPhTfzVgpROJA"


def hash_password(password: str) -> str:
    """What is kept of a password; takes some 20 ms."""
    return _HASHER.hash(password)


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


class Hashes:
    """The threads of one worker.

    A thread is idle (SCHED_IDLE) while it computes and at no other time: one that had the GIL and no processor would
    hold the loop up. Two processes with two such threads each, on two cores with other work: a loop that wakes each
    millisecond is late by 1.5 ms in one of ten times, by 8.1 where they are only nice, by 2.2 without any hash.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "passwords", _step_back)
        self._under_way = 0
        self._idles = _may_return()
        self._idle: dict[int, float] = {}  # since when a thread computes, by its number in the kernel
        self._looking = False

    async def verify(self, stored: str, password: str) -> bool:
        """Whether they fit. Raises UnavailableError, and ValueError."""
        bare = check_form(stored)
        if self._under_way >= THREADS + WAITING:
            raise BusyError("too many passwords are being checked")
        self._under_way += 1
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._verify if self._idles else verify, bare, password)
        work.add_done_callback(self._done)
        if self._idles and not self._looking:
            self._looking = True
            loop.call_later(HURRY / 2, self._look, loop)
        # Whoever waits may go away; what was begun ends, and counts until then.
        return await asyncio.shield(work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _verify(self, stored: str, password: str) -> bool:
        thread = threading.get_native_id()
        self._idle[thread] = time.monotonic()
        os.sched_setscheduler(0, os.SCHED_IDLE, _USUAL)
        try:
            return verify(stored, password)
        finally:
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
        self._looking = self._under_way > 0
        if self._looking:
            loop.call_later(HURRY / 2, self._look, loop)

    def _done(self, work: asyncio.Future[bool]) -> None:
        self._under_way -= 1
        if not work.cancelled():
            work.exception()
