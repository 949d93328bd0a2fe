"""What a reader must know before the figures of a run are believed.

In: a Result. Out: sentences, most important first; none when the generator was not in the way. A load generator that is
itself at its end measures itself: so its processes' share of a core and its lateness are judged here, and nowhere else.
"""

from __future__ import annotations

from .result import Result
from .show import count, number, plain

FULL = 0.85  # of a core, in each process: above it the generator may have been what was slow
LATE_MS = 5.0  # half of the timer's own coarseness on a busy machine would still be less
LATE_SHARE = 0.1  # of the latency that it is counted in


def caveats(result: Result) -> list[str]:
    found = []
    if result.interrupted:
        found.append(f"interrupted: the figures are those of the first {number(result.seconds)} s")
    share = generator_share(result)
    if share >= FULL:
        found.append(
            f"the generator was busy {100 * share:.0f} % of the time in each process: it may have been the bottleneck, "
            "give it more --processes or a machine of its own"
        )
    if result.lag_ms and result.lag_ms.p99 >= LATE_MS:
        counted_in = result.latency_ms.get("message") or result.latency_ms.get("end_of_data")
        if counted_in is None or result.lag_ms.p99 >= LATE_SHARE * counted_in.p99:
            found.append(
                f"the generator itself was late (p99 {number(result.lag_ms.p99)} ms, most "
                f"{number(result.lag_ms.max)} ms): that much of the latencies is not the server's"
            )
    if overrun := result.errors.get("overrun", 0):
        found.append(f"{count(overrun)} messages were due while no session was free: they were not sent")
    if result.messages_unknown:
        found.append(f"{count(result.messages_unknown)} messages were never answered: the server may have them or not")
    found += [f"limit hit: {plain(limit)}" for limit in result.limits]
    return found


def generator_share(result: Result) -> float:
    """Of a core, on average over its processes: 1.0 is all it can do."""
    if result.seconds <= 0 or result.processes <= 0:
        return 0.0
    cpu = result.client_cpu_us_per_message / 1e6 * result.messages_sent
    return cpu / result.seconds / result.processes
