"""What the sessions of a sink's process share: what is offered, the plan, the recorder, the counts.

In: the settings of a sink. Out: rendered greetings, the parameters that may be used, and counts that processes add up.
Not here: a session (sink_protocol), how it is started (sink). RFC 5321 4.1.1.1.
"""

from __future__ import annotations

import ssl
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from .sink_plan import StagePlan
from .sink_record import Recorder

if TYPE_CHECKING:
    from .sink_protocol import Session

# What can be offered at EHLO, with the parameters of MAIL and RCPT that each allows.
EXTENSIONS: Mapping[str, tuple[str, ...]] = {
    "PIPELINING": (),
    "SIZE": ("SIZE",),
    "8BITMIME": ("BODY=7BIT", "BODY=8BITMIME"),
    "CHUNKING": (),
    "SMTPUTF8": ("SMTPUTF8",),
    "DSN": ("RET", "ENVID", "NOTIFY", "ORCPT"),
    "ENHANCEDSTATUSCODES": (),
    "STARTTLS": (),
    "AUTH": ("AUTH",),
}


@dataclass
class Counts:
    """What happened. `seconds` is from the first message to the last."""

    connections: int = 0
    sessions_peak: int = 0
    tls: int = 0
    tls_failed: int = 0
    messages: int = 0  # answered 2xx, for one recipient at least
    recipients: int = 0  # of those messages, answered 2xx
    octets: int = 0
    seconds: float = 0.0
    refusals: Counter[str] = field(default_factory=Counter)  # replies, by code
    faults: Counter[str] = field(default_factory=Counter)  # NAME@STAGE
    unrecorded: int = 0  # messages refused because they could not be recorded

    def add(self, other: Mapping[str, Any]) -> Self:
        """Those of another process, as `as_json` gives them."""
        for name, value in other.items():
            if isinstance(value, dict):
                getattr(self, name).update(value)
            elif name == "seconds":
                self.seconds = max(self.seconds, value)
            elif name != "rate":
                setattr(self, name, getattr(self, name) + value)
        return self

    def as_json(self) -> dict[str, Any]:
        """The fields, and `rate`, in messages a second."""
        values = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}
        return values | {"rate": round(self.messages / self.seconds, 1) if self.seconds else 0.0}


@dataclass(frozen=True)
class Account:
    """Who may authenticate; an empty name: nobody has to."""

    user: bytes = b""
    password: bytes = b""


class Service:
    """One for each process."""

    def __init__(
        self,
        *,
        hostname: str,
        lmtp: bool,
        without: frozenset[str],
        size: int,
        plan: Mapping[str, StagePlan],
        recorder: Recorder | None,
        tls: ssl.SSLContext | None,
        implicit_tls: bool,
        account: Account,
        drip: float,
    ) -> None:
        self.lmtp = lmtp
        self.size = size
        self.plan = plan
        self.recorder = recorder
        self.tls = tls
        self.account = account
        self.drip = drip  # seconds between two octets
        self.sessions: set[Session] = set()
        self.counts = Counts()
        self._first = 0.0
        unable = {"STARTTLS"} if tls is None or implicit_tls else set()
        unable |= set() if account.user else {"AUTH"}
        self.offered = frozenset(EXTENSIONS) - without - unable
        self.parameters = frozenset(parameter for name in self.offered for parameter in EXTENSIONS[name])
        name = hostname.encode()
        self.greeting = b"220 %s %s\r\n" % (name, b"LMTP" if lmtp else b"ESMTP")
        self.helo = b"250 %s\r\n" % name
        self.ehlo = {secured: self._render_ehlo(name, secured) for secured in (False, True)}

    def _render_ehlo(self, name: bytes, secured: bool) -> bytes:
        values = {"SIZE": f" {self.size}", "AUTH": " PLAIN LOGIN"}
        offered = [each for each in EXTENSIONS if each in self.offered and not (secured and each == "STARTTLS")]
        lines = [name, *(f"{each}{values.get(each, '')}".encode() for each in offered)]
        return b"".join(b"250-%s\r\n" % line for line in lines[:-1]) + b"250 %s\r\n" % lines[-1]

    def opened(self, session: Session) -> None:
        self.sessions.add(session)
        self.counts.connections += 1
        self.counts.sessions_peak = max(self.counts.sessions_peak, len(self.sessions))

    def kept(self, recipients: int, octets: int, now: float) -> None:
        """A message was answered 2xx for so many."""
        counts = self.counts
        counts.messages += 1
        counts.recipients += recipients
        counts.octets += octets
        self._first = self._first or now
        counts.seconds = now - self._first
