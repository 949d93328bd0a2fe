"""Latencies counted in log-linear buckets, as HdrHistogram does it, for a twentieth of what its Python takes.

In: seconds, many at a time. Out: counts by bucket, which can be sent to another process and merged, and percentiles.
A bucket is the upper half of a value as a 32-bit float: eight bits of exponent, seven of mantissa. So its width is
1/128 of its power of two, which are HdrHistogram's two significant digits, and the standard library makes it in C.
Always: a percentile is off by 0.4 % at most, count and maximum by nothing.
Not here: which phase was timed (result). Nothing fails.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections import Counter
from collections.abc import Sequence

from .result import Latency

_UPPER = 1 if sys.byteorder == "little" else 0  # which 16 bits of a float are the upper half


def _middle(bucket: int) -> float:
    """The value in the middle of a bucket."""
    (value,) = struct.unpack(">f", struct.pack(">HH", bucket, 0x8000))
    return float(value)


class Histogram:
    """Seconds, none of them negative."""

    __slots__ = ("counts", "most")

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.most = 0.0

    def add(self, values: Sequence[float]) -> None:
        if values:
            self.counts.update(memoryview(array("f", values)).cast("B").cast("H")[_UPPER::2].tolist())
            self.most = max(self.most, max(values))

    def merge(self, other: Histogram) -> None:
        self.counts.update(other.counts)
        self.most = max(self.most, other.most)

    def latency(self) -> Latency | None:
        """In milliseconds; None when there is no value."""
        count = self.counts.total()
        if not count:
            return None
        ordered = sorted(self.counts)
        found: list[float] = []
        seen = place = 0
        for share in (0.5, 0.9, 0.99, 0.999):
            while seen < math.ceil(share * count):
                seen += self.counts[ordered[place]]
                place += 1
            found.append(1000 * min(_middle(ordered[place - 1]), self.most))
        p50, p90, p99, p999 = found
        return Latency(count, p50, p90, p99, p999, 1000 * self.most)
