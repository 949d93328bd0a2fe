"""The parser: commands a second, and octets of messages a second.

The octets a read brings lie in the cache, as they do behind a socket: the same few reads are fed again and again.
Throughput is octets fed divided by the median time (`extra_info`, GB/s).
"""

from __future__ import annotations

from typing import Any

import pytest

from fastsmtp._parser import Parser

COMMANDS = b"MAIL FROM:<sender@example.org> SIZE=1000\r\n" + b"RCPT TO:<recipient@example.org>\r\n" * 9
LINE = b"x" * 70 + b"\r\n"
TEXTS = {
    "72-byte-lines": LINE * 910,
    "every-10th-line-dotted": (LINE * 9 + b"." + LINE) * 91,
    "every-line-dotted": (b"." + LINE) * 900,
    "10-KB-lines": (b"x" * 9998 + b"\r\n") * 6,
}


def bench_commands(benchmark: Any) -> None:
    parser = Parser(frozenset())

    def run() -> None:
        parser.feed(COMMANDS)
        while parser.next() is not None:
            pass

    benchmark(run)
    benchmark.extra_info["commands/s"] = round(10 / benchmark.stats.stats.median)


@pytest.mark.parametrize("read", [1460, 65536])
@pytest.mark.parametrize("text", TEXTS)
def bench_unstuff(benchmark: Any, text: str, read: int) -> None:
    octets = TEXTS[text]
    pieces = [octets[at : at + read] for at in range(0, len(octets), read)]
    parser = Parser(frozenset())
    parser.data(1 << 60)
    parser.feed(b"Subject: x\r\n\r\n")

    def run() -> None:
        for piece in pieces:
            parser.feed(piece)
            while parser.next() is not None:
                pass

    benchmark(run)
    benchmark.extra_info["GB/s"] = round(len(octets) / benchmark.stats.stats.median / 1e9, 2)
