"""What waits in the queue, counted by destination domain, age and last reason.

In: rows of counts, from the slices of one spool, or of other censuses; they are only ever added up. Out: the same
rows, in which form a worker sends its census to the command line, which adds them up once more; and for each domain
its figures. However many domains and reasons there are, it stays small: what is one too many is counted under "other".
No I/O and no SQL here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

AGES = (300, 3_600, 14_400, 86_400)  # seconds; a recipient's age is how many of them it is over
DOMAINS = 10_000  # of more, those that are met last are counted together
REASONS = 30  # of one domain, likewise
OTHER = "other"  # no domain: it has no dot and is no literal


class Place:
    """The figures of one domain, in recipients. `ages` counts by AGES, then what is older; `reasons` by the last
    failure; `oldest` is an arrival, `due` the next attempt (None: none is planned), in epoch seconds."""

    __slots__ = ("ages", "due", "held", "new", "oldest", "reasons", "recipients")

    def __init__(self) -> None:
        self.recipients = 0
        self.held = 0
        self.new = 0
        self.ages = [0] * (len(AGES) + 1)
        self.reasons: dict[str, int] = {}
        self.oldest: float | None = None
        self.due: float | None = None

    def add_reason(self, reason: str, recipients: int) -> None:
        if reason not in self.reasons and len(self.reasons) >= REASONS:
            reason = OTHER
        self.reasons[reason] = self.reasons.get(reason, 0) + recipients

    @property
    def reason(self) -> str:
        """The most frequent one; empty where nothing was tried."""
        known = [(count, reason) for reason, count in self.reasons.items() if reason]
        return max(known)[1] if known else ""

    def render(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "recipients": self.recipients,
            "held": self.held,
            "new": self.new,
            "ages": self.ages,
            "oldest": self.oldest,
            "next": self.due,
            "reasons": dict(sorted(self.reasons.items(), key=lambda item: -item[1])),
        }


class Census:
    """`messages` and `set_aside` are whole messages."""

    __slots__ = ("messages", "places", "set_aside")

    def __init__(self, messages: int = 0, set_aside: int = 0) -> None:
        self.messages = messages
        self.set_aside = set_aside
        self.places: dict[str, Place] = {}

    def add(self, rows: Iterable[tuple[str, str, int, int, int, int, int, int | None]]) -> None:
        """Rows as of Reader.groups."""
        for domain, reason, age, recipients, held, new, oldest, due in rows:
            place = self._place(domain)
            place.recipients += recipients
            place.held += held
            place.new += new
            place.ages[age] += recipients
            place.add_reason(reason, recipients)
            place.oldest = _earlier(place.oldest, oldest)
            place.due = _earlier(place.due, None if due is None else due / 1000)

    def merge(self, rendered: dict[str, Any]) -> None:
        """Adds what another one rendered."""
        self.messages += rendered["messages"]
        self.set_aside += rendered["set_aside"]
        for domain, figures in rendered["domains"].items():
            place = self._place(domain)
            place.recipients += figures["recipients"]
            place.held += figures["held"]
            place.new += figures["new"]
            place.ages = [a + b for a, b in zip(place.ages, figures["ages"], strict=True)]
            place.oldest = _earlier(place.oldest, figures["oldest"])
            place.due = _earlier(place.due, figures["next"])
            for reason, count in figures["reasons"].items():
                place.add_reason(reason, count)

    def render(self) -> dict[str, Any]:
        """For JSON; the domain with the most recipients first."""
        places = sorted(self.places.items(), key=lambda item: (-item[1].recipients, item[0]))
        return {
            "messages": self.messages,
            "recipients": sum(place.recipients for place in self.places.values()),
            "set_aside": self.set_aside,
            "age_limits": list(AGES),
            "domains": {domain: place.render() for domain, place in places},
        }

    def _place(self, domain: str) -> Place:
        place = self.places.get(domain)
        if place is None:
            if len(self.places) >= DOMAINS:
                domain = OTHER
            place = self.places.setdefault(domain, Place())
        return place


def _earlier(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
