"""What a server holds after a million messages: python -m loadtest.endure [--messages N] [--json FILE].

In: a fastsmtp that says 250 after the fsync and discards. Out: by how much its memory grows with each message, as the
slope of a line through many looks at it, and how many descriptors more it has open than at first. Every tenth of the
messages comes over a connection of its own. The first fifth is for caches to fill and is left out.
On failure: one line, exit code 1.
"""

from __future__ import annotations

import os
import sys
from statistics import linear_regression

from .measurements import LIMIT, Bench, Measurements, say, smtp_source
from .processes import family, fastsmtp, proportional_memory
from .receive import main
from .report import Row

LOOKS = 100  # at most
FILLING = 0.2  # of the looks
CHURN = 10


def flat(bench: Bench) -> list[Row]:
    messages = bench.count(1_000_000)
    looks = max(5, min(LOOKS, messages // 1000))
    slice_of = max(CHURN, messages // looks)
    memory, descriptors = Row("flat-memory", []), Row("flat-descriptors", [])
    for number in range(1, bench.rounds + 1):
        with bench.room() as folder, fastsmtp(folder, "fsync", "discard") as server:
            sent, held, opened = [], [], []
            for look in range(1, looks + 1):
                smtp_source("-d", "-l", "1000")(server.port, slice_of - slice_of // CHURN, look)
                smtp_source("-l", "1000")(server.port, slice_of // CHURN, look)
                server.settle(LIMIT)
                sent.append(look * slice_of)
                held.append(proportional_memory(server.pid))
                opened.append(sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family(server.pid)))
                if look % 10 == 0:
                    say(f"flat: {sent[-1]:,} messages, {held[-1] / 1e6:.1f} MB, {opened[-1]} descriptors")
        first = int(looks * FILLING)
        memory.values.append(linear_regression(sent[first:], held[first:]).slope)
        descriptors.values.append(opened[-1] - opened[first])
        memory.notes.append(f"round {number}: {held[0] / 1e6:.1f}, {held[first] / 1e6:.1f}, {held[-1] / 1e6:.1f} MB "
                            f"after {sent[0]:,}, {sent[first]:,} and {sent[-1]:,} messages")  # fmt: skip
    return [memory, descriptors]


MEASUREMENTS: Measurements = {"flat": flat}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "loadtest.endure", "Looks at what a server holds.", MEASUREMENTS))
