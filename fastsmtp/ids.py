"""The ids of messages: made at DATA, shown in Received, the order of the spool.

An id is 20 characters of 0-9a-v: 13 for a key of 63 bits, two for the worker, five that are random for each
start. Keys of one start are consecutive integers, so that a run of finished messages is deleted as one range.
They begin at the wall clock of the start (milliseconds << 22: no rate of messages overtakes the clock) or behind
the newest key of the spool, whichever is greater; the clock is not asked again, so no jump of it repeats a key.
Where it was set back before the start and the spool is empty, the random characters keep ids apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

_DIGITS = "0123456789abcdefghijklmnopqrstuv"
_PAIRS: Final = [a + b for a in _DIGITS for b in _DIGITS]
_EPOCH_MS = 1_577_836_800_000  # 2020-01-01: 41 bits of milliseconds last until 2089
_LATEST_MS = (1 << 41) - 1

LENGTH = 20


def key_of(message_id: str) -> int:
    """The key in an id."""
    return int(message_id[:13], 32)


def begin_of(key: int) -> str:
    """The characters with which the id begins that has this key: enough to find it in a log."""
    return "".join(_DIGITS[key >> shift & 31] for shift in range(60, -1, -5))


def is_id(text: str) -> bool:
    """Whether `text` looks like an id."""
    return len(text) == LENGTH and not text.strip(_DIGITS)


class Ids:
    """Gives out ids. `newest` is the greatest key in the spool, 0 when there is none."""

    __slots__ = ("_high", "_key", "_prefix", "_suffix")

    def __init__(self, worker: int, newest: int, wall: Callable[[], float]) -> None:
        milliseconds = min(max(int(wall() * 1000) - _EPOCH_MS, 0), _LATEST_MS)
        self._key = max(newest, milliseconds << 22)
        self._suffix = _PAIRS[worker % 1024] + "".join(_DIGITS[octet & 31] for octet in os.urandom(5))
        self._high = -1
        self._prefix = ""

    def next(self) -> str:
        """The next id."""
        self._key = key = self._key + 1
        if key >> 20 != self._high:  # the first nine characters change once in a million ids: 0.2 µs saved
            self._high = high = key >> 20
            self._prefix = "".join(_DIGITS[high >> shift & 31] for shift in range(40, -1, -5))
        return f"{self._prefix}{_PAIRS[key >> 10 & 1023]}{_PAIRS[key & 1023]}{self._suffix}"
