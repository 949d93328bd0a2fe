"""What a run found: one Snapshot for each second while it goes on, one Result at its end.

In: counts and latencies, merged over all processes of the generator. Out: values that the live view, the table, the
JSON file and the report show alike; the names of the fields are the keys of the JSON file and its documentation.
Latencies are in milliseconds; a phase that never happened is missing. Nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# The parts of a session that are timed, in their order.
PHASES = {
    "connect": "TCP connection",
    "banner": "connection to greeting",
    "tls": "TLS handshake",
    "ehlo": "EHLO",
    "auth": "AUTH",
    "mail": "MAIL",
    "rcpt": "RCPT",
    "data": "DATA to 354",
    "end_of_data": "end of data to its reply",
    "message": "from when it was due to its reply",
    "large": "end of data of a large message to its reply",
    "session": "whole session",
}
# Errors by kind; what the server said, and how often, stands in `replies`.
ERRORS = {
    "connect": "no connection: refused, unreachable, timed out",
    "tls": "TLS handshake failed",
    "refused": "a command was refused by a reply 4xx or 5xx",
    "reset": "the connection was lost in the middle of a session",
    "timeout": "the server did not answer in time",
    "protocol": "the server's answer is no SMTP reply, or not one to what was sent",
    "overrun": "a message was due and no session came free for it",
}


@dataclass(frozen=True)
class Latency:
    """Percentiles of one phase, in milliseconds."""

    count: int
    p50: float
    p90: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True)
class Snapshot:
    """One second of a run. Counts are of that second, `sessions` is at its end."""

    second: int
    seconds: float  # since the start
    sessions: int
    accepted: int
    refused: int
    octets: int
    errors: dict[str, int]
    replies: dict[str, int]  # "250", "451", ...
    latency_ms: dict[str, Latency]
    lag_ms: float  # by which the generator itself was late at most


@dataclass(frozen=True)
class Result:
    """A whole run."""

    scenario: str
    target: str
    started: str  # ISO 8601, UTC
    options: dict[str, Any]
    processes: int
    seconds: float
    interrupted: bool
    sessions_opened: int
    sessions_peak: int
    messages_sent: int
    messages_accepted: int
    messages_refused: int
    messages_unknown: int  # no answer was read after end-of-data
    recipients_refused: int
    octets_sent: int
    rate: float  # messages accepted in a second
    client_cpu_us_per_message: float
    errors: dict[str, int]
    replies: dict[str, int]
    misbehaviour: dict[str, dict[str, int]]  # kind: {"sessions": n, and outcomes of misbehave.OUTCOMES: n}
    latency_ms: dict[str, Latency]
    lag_ms: Latency | None  # open loop: how late the generator sent
    limits: list[str]  # limits of the machine that were hit, in words
    machine: dict[str, Any]
    timeline: list[Snapshot] = field(default_factory=list)
    tls_resumed: int = 0  # handshakes that resumed a session

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
