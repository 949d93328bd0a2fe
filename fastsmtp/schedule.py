"""When things happen to a message that waits: the next try, the report of its delay, its end.

In: how often a recipient was tried, how old the message is, chance. Out: seconds, or yes and no. Pure values, one
object for the whole queue. The same back-off serves a recipient and a destination that does not answer. Mail without
a sender (reports) has a lifetime of its own: nobody waits for it, and nobody can be told. Whether a try has been made
before a message is given up, and what telling means, is decided elsewhere. RFC 5321 4.5.4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .message import Message

HOUR = 3600.0
DAY = 24 * HOUR


class Schedule(NamedTuple):
    """Times in seconds. `retry` is the first wait, doubling up to `retry_max`. `delay_report`: the age at which a
    sender is told that the message still waits; 0: never. `soft_bounce`: nothing is given up."""

    retry: float = 300.0
    retry_max: float = 4 * HOUR
    lifetime: float = 5 * DAY
    report_lifetime: float = DAY
    delay_report: float = 4 * HOUR
    soft_bounce: bool = False

    def wait(self, attempts: int, chance: Callable[[], float]) -> float:
        """Before the next attempt, after `attempts` of them: within a tenth of the plain figure, so that what failed
        together does not come back together. `chance` is uniform in [0, 1)."""
        plain = min(self.retry * 2.0 ** min(attempts - 1, 60), self.retry_max)
        return plain * (0.9 + 0.2 * chance())

    def end(self, message: Message) -> float:
        """When a message is given up, in seconds since the epoch."""
        return message.arrived + (self.lifetime if message.envelope.reverse_path else self.report_lifetime)

    def is_delayed(self, message: Message, now: float) -> bool:
        """Whether its sender may be told that it waits."""
        return 0 < self.delay_report <= now - message.arrived
