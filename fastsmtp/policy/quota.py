"""How much each user may send: messages and recipients, over all workers of the machine.

In: a user's MAIL or RCPT. Out: 450 4.7.1 at MAIL or 452 4.7.1 at RCPT, with a text that says when again; for who is no
user, nothing. Each rate is a bucket (GCRA): all of it may be sent at once, then it fills evenly over its period. What
was asked for counts, whether or not a message came of it: a program that tries addresses uses up its quota too.
Several rates hold together, and of a refused request none is spent unless two workers ask at the same instant.
Not here: limits of clients that are no users (policy/limits.py). RFC 6409 3.3 (450 and 452 of a policy: RFC 5321 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

from .._shared import Shared
from ..config_values import Rate
from ..reply import Reply
from ..shared_keys import KeyKind
from ..verdict import Ask, Stage, Verdict

REMEMBERED = 10_000  # users whose keys are kept: making one takes 0.7 µs
CODES = {Stage.MAIL: 450, Stage.RCPT: 452}
COUNTED = {Stage.MAIL: "messages", Stage.RCPT: "recipients"}
REASONS = {Stage.MAIL: "quota-messages", Stage.RCPT: "quota-recipients"}


class Quota:
    """The check at MAIL, for messages, or at RCPT, for recipients. `now` is monotonic."""

    def __init__(self, stage: Stage, rates: Sequence[Rate], shared: Shared, now: Callable[[], float]) -> None:
        self.stage = stage
        self._rates = rates
        self._shared = shared
        self._now = now
        # A rate that is alone need not be asked before it is spent.
        self._takes = (shared.owes, shared.spend) if len(rates) > 1 else (shared.spend,)
        self._known: dict[str, list[int]] = {}

    def __call__(self, ask: Ask) -> Verdict | None:
        user = ask.client.user
        if not user:
            return None
        keys, now = self._keys_of(user), self._now()
        for take in self._takes:
            waits = [take(key, rate.interval, rate.count, now) for key, rate in zip(keys, self._rates, strict=True)]
            if any(waits):
                return self._refuse(waits)
        return None

    def _keys_of(self, user: str) -> list[int]:
        """One for each rate."""
        keys = self._known.get(user)
        if keys is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            keys = self._known[user] = [
                self._shared.key(KeyKind.QUOTA, f"{self.stage}:{rate}:{user}".encode()) for rate in self._rates
            ]
        return keys

    def _refuse(self, waits: Sequence[float]) -> Verdict:
        wait = max(waits)
        rate = self._rates[waits.index(wait)]
        what, reason = COUNTED[self.stage], REASONS[self.stage]
        text = f"Your quota of {what} ({rate}) is used up, try again in {_show(wait)}"
        return Verdict(reason, Reply(CODES[self.stage], "4.7.1", text, reason=reason))


def _show(seconds: float) -> str:
    """Rounded up, so that who waits so long need not wait again."""
    if seconds <= 100:
        return f"{ceil(seconds)} s"
    return f"{ceil(seconds / 60)} min" if seconds <= 5940 else f"{ceil(seconds / 3600)} h"
