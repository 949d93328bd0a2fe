"""What a race found: for each server, end and scenario a Line with its rounds, and what all of them have in common.

In: rounds, as they were measured. Out: values that the Markdown table, the JSON file, the charts and the page show
alike; field names are the keys of the JSON file and its documentation. A Spread is the median of rounds with the
smallest and the largest beside it. Always: a round that counts for nothing (a server lost mail, did not answer) stands
in `problems` and in no Spread; a figure that nobody measured is None. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from .result import Latency

# What a server may do with a message that it has accepted.
ENDS = {
    "discard": "accepted and thrown away",
    "maildir": "delivered to Maildirs, counted there",
    "relay": "relayed to a sink, counted there",
}
# What a server claims to have done when it says 250.
CLAIMS = {
    "fsync": "the message is on stable storage before its 250",
    "nothing": "nothing is kept before the 250",
}


@dataclass(frozen=True)
class Spread:
    """Rounds of one figure."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None: no round has the figure."""
        rounds = tuple(values)
        return cls(median(rounds), min(rounds), max(rounds), rounds) if rounds else None


@dataclass(frozen=True)
class Syncs:
    """Calls that wait for the disk, counted with strace while one session sends one message after the other.

    Nobody shares a commit then, so a server that keeps its promise makes at least one call for each message.
    """

    messages: int
    calls: dict[str, int]  # by name: fsync, fdatasync, syncfs, sync_file_range, O_DSYNC (a write to a file opened so)
    before_250: float  # for each message, between its end-of-data and its reply
    in_all: float  # for each message, with what delivery and clearing up took


@dataclass(frozen=True)
class Round:
    """One load on one server."""

    number: int  # from 1
    seconds: float  # of load
    accepted: int
    refused: int
    unknown: int  # no answer was read after end-of-data: may be delivered or not
    errors: int
    delivered: int | None  # in mailboxes or at the sink; None: nothing is counted at this end
    drained_seconds: float | None  # from the load's start until the last was delivered
    accepted_rate: float
    drained_rate: float | None
    cpu_us: float  # of all the server's processes, for each message accepted, until nothing was left to do
    client_cpu_us: float  # the generator's, for each message accepted
    memory: int | None  # octets, proportional set size of all the server's processes late in the load
    latency_ms: dict[str, Latency]  # by phase, as in Result
    problems: tuple[str, ...] = ()  # not empty: the round counts for nothing, and why


@dataclass(frozen=True)
class Line:
    """One server with one end under one scenario: a line of the table."""

    server: str
    version: str
    end: str
    scenario: str
    claim: str  # a key of CLAIMS
    syncs: Syncs | None  # None: not counted
    claim_holds: bool | None  # None: not counted
    accepted: Spread | None  # messages a second; None: no round counts
    drained: Spread | None  # messages a second, in the mailbox or at the sink
    cpu_us: Spread | None  # for each message
    client_cpu_us: Spread | None
    memory: Spread | None  # octets
    # phase -> percentile ("p50", "p90", "p99", "p999", "max") -> rounds, in ms
    latency_ms: dict[str, dict[str, Spread]]
    rounds: tuple[Round, ...]
    problems: tuple[str, ...]  # of all rounds, and why there are none

    @property
    def end_of_data_ms(self) -> dict[str, Spread]:
        """Latency from end-of-data to its reply, by percentile; empty when no round counts."""
        return self.latency_ms.get("end_of_data", {})


@dataclass(frozen=True)
class Comparison:
    """A whole race."""

    started: str  # ISO 8601, UTC
    command: str  # as one would type it
    machine: dict[str, Any]  # processor, cores, memory, kernel, file_system, python, ...
    versions: dict[str, str]  # by server
    rounds: int
    seconds: float  # of load in each round
    scenarios: dict[str, str]  # name: its sentence
    ends: tuple[str, ...]
    accounting: str  # how CPU was counted, in words
    lines: tuple[Line, ...]  # by scenario, end; those that sync first, the faster first
    missing: dict[str, str] = field(default_factory=dict)  # server: why it could not take part
    interrupted: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(
    server: str,
    version: str,
    end: str,
    scenario: str,
    claim: str,
    syncs: Syncs | None,
    rounds: Iterable[Round],
    problems: Iterable[str] = (),
) -> Line:
    """The line of these rounds; those with problems are shown and count for nothing."""
    all_rounds = tuple(rounds)
    good = [one for one in all_rounds if not one.problems]
    latency: dict[str, dict[str, Spread]] = {}
    for phase in dict.fromkeys(phase for one in good for phase in one.latency_ms):
        found = [one.latency_ms[phase] for one in good if phase in one.latency_ms]
        latency[phase] = {
            name: spread
            for name in ("p50", "p90", "p99", "p999", "max")
            if (spread := Spread.of(getattr(value, name) for value in found))
        }
    return Line(
        server=server,
        version=version,
        end=end,
        scenario=scenario,
        claim=claim,
        syncs=syncs,
        claim_holds=None if syncs is None else holds(claim, syncs),
        accepted=Spread.of(one.accepted_rate for one in good),
        drained=Spread.of(one.drained_rate for one in good if one.drained_rate is not None),
        cpu_us=Spread.of(one.cpu_us for one in good),
        client_cpu_us=Spread.of(one.client_cpu_us for one in good),
        memory=Spread.of(one.memory for one in good if one.memory is not None),
        latency_ms=latency,
        rounds=all_rounds,
        problems=(*problems, *(f"round {one.number}: {text}" for one in all_rounds for text in one.problems)),
    )


def holds(claim: str, syncs: Syncs) -> bool:
    """Whether the calls counted are what the claim says; one that keeps more than it claims is no liar."""
    return claim != "fsync" or syncs.before_250 >= 1
