"""Whether somebody else knows a mailbox: asked once for all who want to know, and remembered for a while.

In: an address. Out: KNOWN or UNKNOWN at once when it is remembered, else an awaitable; nobody else waits meanwhile.
Many sessions that ask for one address ask once. Refusals are remembered for less time than acceptances: a new mailbox
is found soon. What is remembered is bounded; what failed is not remembered. A question that fails, or takes too long,
is TEMPFAIL, or KNOWN where the operator wants mail accepted then; never UNKNOWN. The log says so, and why.
Not here: whom to ask, and how (lookups.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from .. import log as logs
from ..address import Address
from ..domains import Found

REMEMBERED = 100_000  # answers, of each source
UNDER_WAY = 1_000  # questions of each source, above which a new one fails at once
TELLING = 10.0  # seconds between two lines of the log on a source that fails

Question: TypeAlias = Callable[[Address], Awaitable[bool]]


class LookupFailedError(Exception):
    """There is no answer now; one line says why."""


class Asked:
    """`ask` raises LookupFailedError. Times are in seconds. `folds`: local-parts that differ in case only are one
    mailbox. `accepts`: what cannot be found out is taken. `count` is called for each failure."""

    def __init__(
        self,
        source: str,
        ask: Question,
        *,
        known_for: float,
        unknown_for: float,
        timeout: float,
        accepts: bool,
        folds: bool,
        log: logs.Log,
        now: Callable[[], float] = time.monotonic,
        count: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = source
        self._ask = ask
        self._lifetimes = {Found.KNOWN: known_for, Found.UNKNOWN: unknown_for}
        self._timeout = timeout
        self._accepts = accepts
        self._folds = folds
        self._log = log
        self._now = now
        self._count = count
        # The answers of now and of before, with the time until which they hold: older ones are thrown away together.
        self._young: dict[str, tuple[Found, float]] = {}
        self._old: dict[str, tuple[Found, float]] = {}
        self._under_way: dict[str, asyncio.Task[Found]] = {}
        self._failures = 0  # that the log has not told of
        self._told = float("-inf")

    def __call__(self, address: Address) -> Found | Awaitable[Found]:
        key = address.mailbox if self._folds else f"{address.local}@{address.domain}"
        entry = self._young.get(key) or self._old.get(key)
        if entry is not None and entry[1] > self._now():
            return entry[0]
        task = self._under_way.get(key)
        if task is None:
            if len(self._under_way) >= UNDER_WAY:
                return self._fail(address, f"{UNDER_WAY} questions are under way")
            task = self._under_way[key] = asyncio.get_running_loop().create_task(self._find_out(key, address))
        # Who gives up waiting does not end it for the others.
        return asyncio.shield(task)

    async def _find_out(self, key: str, address: Address) -> Found:
        try:
            async with asyncio.timeout(self._timeout):
                found = Found.KNOWN if await self._ask(address) else Found.UNKNOWN
        except TimeoutError:
            return self._fail(address, f"no answer within {self._timeout:g} s")
        except LookupFailedError as error:
            return self._fail(address, str(error))
        finally:
            del self._under_way[key]
        if len(self._young) >= REMEMBERED // 2:
            self._old, self._young = self._young, {}
        self._young[key] = (found, self._now() + self._lifetimes[found])
        return found

    def _fail(self, address: Address, why: str) -> Found:
        self._count()
        self._failures += 1
        now = self._now()
        if now - self._told >= TELLING:
            answer = "accepted" if self._accepts else "deferred"
            self._log.write(logs.LOOKUP_FAILED, self._source, address.wire, why, answer, self._failures)
            self._told = now
            self._failures = 0
        return Found.KNOWN if self._accepts else Found.TEMPFAIL
