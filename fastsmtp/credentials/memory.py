"""What a store has answered, kept for a short time: by a keyed hash of the question, so that no password is kept.

In: a question's words and the answer. Out: the answer, as long as it is young and the store's stamp of that user is
still the same. The key is random and this process's own; what a core dump holds of a password is the hash under it.
Both answers are kept: a telephone that goes on with an old password is no guesser, and costs no argon2.
Bounded: what was kept first goes first. Nothing here asks a store.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from typing import Generic, TypeVar

LIMIT = 10_000  # answers

T = TypeVar("T")


class Memory(Generic[T]):
    """`seconds` 0: nothing is kept. `now` is monotonic."""

    def __init__(self, seconds: float, now: Callable[[], float]) -> None:
        self._seconds = seconds
        self._now = now
        self._key = secrets.token_bytes(32)
        self._kept: dict[bytes, tuple[float, object, T]] = {}

    def mark(self, *words: str) -> bytes:
        """What stands for a question."""
        hashed = hashlib.blake2b(key=self._key, digest_size=20)
        for word in words:
            octets = word.encode()
            hashed.update(b"%d:%b" % (len(octets), octets))
        return hashed.digest()

    def recall(self, mark: bytes, stamp: object) -> T | None:
        kept = self._kept.get(mark)
        if kept is None:
            return None
        until, then, answer = kept
        if then == stamp and self._now() < until:
            return answer
        del self._kept[mark]
        return None

    def keep(self, mark: bytes, stamp: object, answer: T, most: float) -> None:
        """For `most` seconds at most."""
        seconds = min(self._seconds, most)
        if seconds <= 0:
            return
        self._kept.pop(mark, None)
        while len(self._kept) >= LIMIT:
            del self._kept[next(iter(self._kept))]
        self._kept[mark] = (self._now() + seconds, stamp, answer)
