"""Whose turn it is: a line in which those who are known go first, and strangers by turns, an address at a time.

In: items, with the address of a stranger; when one can be served. Out: the next one. Of an address that has many in the
line each waits behind one of every other address, so that a guesser with fifty connections is served as often as
somebody who comes once. There are so many places and no more. Where all are taken, one who is known gets the place of a
stranger, and a stranger that of the address which has the most; who lost his is given back, to be told.
Not here: who is known, and how fast strangers are served.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    def __init__(self, places: int) -> None:
        self._places = places
        self._known: deque[T] = deque()
        self._strangers: dict[bytes, deque[T]] = {}  # the address whose turn it is stands first

    def __len__(self) -> int:
        return len(self._known) + sum(map(len, self._strangers.values()))

    def add(self, item: T, stranger: bytes | None) -> T | None:
        """Puts it into the line. Whoever has no place now, which may be itself; None: there was one left."""
        loser: T | None = None
        if len(self) >= self._places:
            most = max(self._strangers, key=lambda address: len(self._strangers[address]), default=None)
            if most is None or (stranger is not None and len(self._strangers[most]) <= self._waiting(stranger) + 1):
                return item
            loser = self._strangers[most].pop()
            if not self._strangers[most]:
                del self._strangers[most]
        (self._known if stranger is None else self._strangers.setdefault(stranger, deque())).append(item)
        return loser

    def take(self, strangers: bool) -> tuple[T, bool] | None:
        """The next one, and whether it is a stranger's; `strangers`: whether theirs may be served now."""
        if self._known:
            return self._known.popleft(), False
        if not (strangers and self._strangers):
            return None
        address, row = next(iter(self._strangers.items()))
        item = row.popleft()
        del self._strangers[address]
        if row:
            self._strangers[address] = row
        return item, True

    def _waiting(self, address: bytes) -> int:
        return len(self._strangers.get(address, ()))
