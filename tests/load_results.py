"""Results of load tests as they might be, and as nobody would like them: with text that a hostile server has chosen."""

from __future__ import annotations

from typing import Any

from loadtest.comparison import Comparison, Line, Round, Syncs, summarise
from loadtest.result import Latency, Result, Snapshot

# Ends a tag, begins a script, clears a screen, sets a window's title, writes from right to left, ends a line.
HOSTILE = "\"'><script>alert(1)</script><img src=x:y>&amp;[bold]\x1b[2J\x1b]0;title\x07\u202e\x9b1m\r\n[/nope]$x_1$"
# What must not arrive anywhere.
RAW = ("\x1b", "\x07", "\u202e", "\x9b", "\r")


def latency(p50: float, count: int = 100_000) -> Latency:
    return Latency(count, p50, p50 * 2, p50 * 4, p50 * 8, p50 * 16)


def snapshot(second: int, **changes: Any) -> Snapshot:
    values: dict[str, Any] = {
        "second": second,
        "seconds": float(second),
        "sessions": 10 * second,
        "accepted": 1000 + 100 * second,
        "refused": 0,
        "octets": 1_000_000,
        "errors": {},
        "replies": {"250": 4000, "354": 1000},
        "latency_ms": {"end_of_data": latency(4.0 + second)},
        "lag_ms": 0.25,
    }
    return Snapshot(**(values | changes))


def result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "scenario": "mx-small",
        "target": "127.0.0.1:2525",
        "started": "2026-11-22T10:00:00Z",
        "options": {"sessions": 100, "rate": 0.0},
        "processes": 2,
        "seconds": 10.0,
        "interrupted": False,
        "sessions_opened": 400,
        "sessions_peak": 100,
        "messages_sent": 15_530,
        "messages_accepted": 15_500,
        "messages_refused": 30,
        "messages_unknown": 0,
        "recipients_refused": 0,
        "octets_sent": 15_530_000,
        "rate": 1550.0,
        "client_cpu_us_per_message": 20.5,
        "errors": {"reset": 0, "timeout": 0},
        "replies": {"250": 46_500, "354": 15_500, "451": 30},
        "misbehaviour": {},
        "latency_ms": {"session": latency(900.0, 400), "connect": latency(0.125, 400), "end_of_data": latency(4.5)},
        "lag_ms": None,
        "limits": [],
        "machine": {"cores": 2},
        "timeline": [snapshot(second) for second in range(1, 11)],
    }
    return Result(**(values | changes))


def hostile_result() -> Result:
    """HOSTILE wherever text can come from outside."""
    return result(
        scenario=HOSTILE,
        target=HOSTILE,
        started=HOSTILE,
        options={HOSTILE: HOSTILE},
        errors={HOSTILE: 3},
        replies={HOSTILE: 5, f"5{HOSTILE}": 1},
        misbehaviour={HOSTILE: {"sessions": 1, HOSTILE: 1}},
        latency_ms={HOSTILE: latency(1.0), "end_of_data": latency(2.0)},
        limits=[HOSTILE],
        machine={HOSTILE: HOSTILE},
        timeline=[snapshot(n, errors={HOSTILE: n}, replies={f"5{HOSTILE}": n}) for n in range(1, 4)],
    )


def race_round(number: int, rate: float, cpu: float, p50: float, delivered: bool) -> Round:
    return Round(
        number=number,
        seconds=10.0,
        accepted=int(rate * 10),
        refused=0,
        unknown=0,
        errors=0,
        delivered=int(rate * 10) if delivered else None,
        drained_seconds=12.5 if delivered else None,
        accepted_rate=rate,
        drained_rate=rate * 0.8 if delivered else None,
        cpu_us=cpu,
        client_cpu_us=21.0,
        memory=40_000_000,
        latency_ms={"end_of_data": latency(p50)},
    )


def line(
    server: str,
    claim: str,
    rate: float,
    cpu: float = 200.0,
    p50: float = 4.0,
    before: float = 1.0,
    end: str = "discard",
) -> Line:
    """Three rounds: 0.9, 1 and 1.1 of these figures."""
    rounds = [
        race_round(number, rate * by, cpu * by, p50 * by, end != "discard")
        for number, by in enumerate((0.9, 1.0, 1.1), 1)
    ]
    return summarise(server, "1.0", end, "mx-small", claim, Syncs(20, {"fsync": 20}, before, before + 1), rounds)


def comparison(*lines: Line, **changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "started": "2026-11-22T10:00:00Z",
        "command": "python -m loadtest compare",
        "machine": {"cores": 2},
        "versions": {"one": "1.0"},
        "rounds": 3,
        "seconds": 10.0,
        "scenarios": {"mx-small": "Small mail."},
        "ends": ("discard",),
        "accounting": "cgroup v2",
        "lines": lines,
    }
    return Comparison(**(values | changes))
