"""Passwords and their hashes: argon2id, in threads of its own, of which a worker has two.

In: a password as SASLprep leaves it, and what a store keeps of it: argon2 (with or without a scheme such as
`{ARGON2ID}` before it), or SCRAM keys. Out: whether they fit. A hash takes 19 MiB and some 17 ms of a processor without
the GIL; so no more than two are computed at once and no more than 64 wait, behind what the loop does. More are
`BusyError`.
ValueError: what the store keeps is neither. OWASP's parameters: m=19 MiB, t=2, p=1. RFC 9106.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from argon2.low_level import Type

from . import BusyError
from .scram import fits, parse_keys

THREADS = 2
WAITING = 64
NICENESS = 10

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
    """Whether they fit; in a thread. Raises ValueError."""
    if not stored.startswith("$argon2"):
        return fits(parse_keys(stored), password)
    try:
        return _HASHER.verify(stored, password)
    except VerificationError:
        return False
    except InvalidHashError:
        raise ValueError("a password of argon2 that is damaged") from None


def _step_back() -> None:
    """Whoever guesses keeps these threads busy, and the loop goes first: the p99 of its delay, with two hashes running
    in each of two workers on two busy cores, is 18 ms instead of 48. On Linux a thread has a niceness of its own."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except OSError:
        pass  # not allowed here, or nice already


class Hashes:
    """The threads of one worker."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "passwords", _step_back)
        self._under_way = 0

    async def verify(self, stored: str, password: str) -> bool:
        """Whether they fit. Raises BusyError, and ValueError."""
        bare = check_form(stored)
        if self._under_way >= THREADS + WAITING:
            raise BusyError("too many passwords are being checked")
        self._under_way += 1
        work = asyncio.get_running_loop().run_in_executor(self._threads, verify, bare, password)
        work.add_done_callback(self._done)
        # Whoever waits may go away; what was begun ends, and counts until then.
        return await asyncio.shield(work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _done(self, work: asyncio.Future[bool]) -> None:
        self._under_way -= 1
        if not work.cancelled():
            work.exception()
