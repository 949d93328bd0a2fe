"""What the spool says of its troubles: one line per interval and place, however often something fails.

A line about the end of a trouble is written only when there was one about its beginning. Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Callable

from .log import SPOOL_TROUBLE, SPOOL_WARNING, SPOOL_WELL, Event, Log

INTERVAL_SECONDS = 10.0


class Trouble:
    """The voice of the spool `name`."""

    __slots__ = ("_began", "_log", "_monotonic", "_name", "_quiet_until")

    def __init__(self, log: Log, name: str, monotonic: Callable[[], float]) -> None:
        self._log = log
        self._name = name
        self._monotonic = monotonic
        self._quiet_until: dict[str, float] = {}
        self._began: float | None = None

    def begins(self, where: str, why: str) -> None:
        """Mail cannot be kept."""
        if self._say(SPOOL_TROUBLE, where, why) and self._began is None:
            self._began = self._monotonic()

    def ends(self) -> None:
        """Mail can be kept again."""
        if self._began is not None:
            self._log.write(SPOOL_WELL, self._name, self._monotonic() - self._began)
            self._began = None

    def warn(self, where: str, why: str) -> None:
        """Mail is kept, but somebody should look."""
        self._say(SPOOL_WARNING, where, why)

    def _say(self, event: Event, where: str, why: str) -> bool:
        now = self._monotonic()
        if now < self._quiet_until.get(where, now):
            return False
        self._quiet_until[where] = now + INTERVAL_SECONDS
        self._log.write(event, self._name, where, why)
        return True
