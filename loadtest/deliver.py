"""Speed and memory of delivering: python -m loadtest.deliver [NAME ...] [--rounds N] [--messages N] [--json FILE].

In: names of measurements. Out: a table as `loadtest.receive` makes it. `lmtp` relays to the sink over LMTP and over
SMTP in turns; `million` fills the queue with mail for a host that does not answer, and looks what that costs. Relaying
against other servers is the race's (`python -m loadtest compare --ends relay`). On failure: one line, exit code 1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from . import LoadError, client
from .measurements import LIMIT, SESSIONS, Bench, Measurements, Sample, closed_loop, measure, say, smtp_source
from .processes import Server, fastsmtp, free_port, proportional_memory
from .receive import main
from .report import Row
from .sink_server import SinkProcess

FILLING = 3600.0  # seconds, at most
NEW = 20_000  # messages sent beside the queue


@contextmanager
def relaying(bench: Bench, lmtp: bool) -> Iterator[tuple[Server, SinkProcess]]:
    """A fastsmtp that passes all on to a sink."""
    with bench.room() as folder, ExitStack() as stack:
        if lmtp:
            address = f"unix:{folder}/sink"
            sink = stack.enter_context(SinkProcess("--lmtp", address=address))
            yield stack.enter_context(fastsmtp(folder, "fsync", "lmtp", sink=address)), sink
        else:
            sink = stack.enter_context(SinkProcess())
            yield stack.enter_context(fastsmtp(folder, "fsync", "relay", sink=sink.port)), sink


def lmtp(bench: Bench) -> list[Row]:
    messages = bench.count(10_000)
    load = smtp_source("-d", "-l", "1000")
    row = Row("lmtp", [])
    total = warm_up = min(messages, 1000)
    theirs: list[float] = []
    with relaying(bench, lmtp=True) as (ours, ours_sink), relaying(bench, lmtp=False) as (other, other_sink):
        for server in (ours, other):
            measure(server, load, warm_up, 0)
        for number in range(1, bench.rounds + 1):
            by_lmtp, by_smtp = (measure(server, load, messages, number) for server in (ours, other))
            total += messages
            row.fastsmtp_us.append(by_lmtp.us)
            theirs.append(by_smtp.us)
            row.values.append(by_lmtp.us / by_smtp.us)
            row.rates.append(by_lmtp.rate)
            say(f"lmtp: round {number} of {bench.rounds}: LMTP {_show(by_lmtp)}; SMTP {_show(by_smtp)}")
    for sink in (ours_sink, other_sink):
        if sink.counts["messages"] != total:
            raise LoadError(f"{total} messages were acknowledged, {sink.counts['accepted']} came to the sink")
    row.notes.append(f"SMTP relay: {', '.join(f'{us:.0f}' for us in theirs)} µs")
    return [row]


def _show(sample: Sample) -> str:
    return f"{sample.us:.1f} µs, {sample.rate:,.0f}/s"


def million(bench: Bench) -> list[Row]:
    count = bench.count(1_000_000)
    memory, rate, start = Row("million-memory", []), Row("million-rate", []), Row("million-start", [])
    with bench.room() as folder:
        dead = free_port()
        with fastsmtp(folder, "fsync", "relay", sink=dead) as server:
            accept(server, min(NEW, count))  # what a busy server holds is no part of the queue
            server.settle(LIMIT)
            idle = proportional_memory(server.pid)
            few = [accept(server, min(NEW, count)) for _ in range(bench.rounds)]
            fill(server, count)
            server.settle(LIMIT)
            memory.values.append((proportional_memory(server.pid) - idle) / 1e6)
            many = [accept(server, min(NEW, count)) for _ in range(bench.rounds)]
            rate.values = [100 * (1 - new / old) for old, new in zip(few, many, strict=True)]
            rate.rates = many
            rate.notes.append(f"with an empty queue {', '.join(f'{each:,.0f}' for each in few)}/s")
        for _ in range(bench.rounds):
            began = time.monotonic()
            with fastsmtp(folder, "fsync", "relay", sink=dead) as server:
                accept(server, 1)
                start.values.append(time.monotonic() - began)
                server.settle(LIMIT)
    memory.notes.append(f"{count:,} messages of 1 KB for a host that does not answer")
    return [memory, rate, start]


def accept(server: Server, messages: int) -> float:
    """New mail that is thrown away once it is kept; messages in a second."""
    seconds, _ = closed_loop(server.port, min(SESSIONS, messages), messages, 1, "discard.test")
    return messages / seconds


def fill(server: Server, messages: int) -> None:
    """Sends what nobody will take."""

    async def work() -> None:
        sessions = await client.open_sessions(server.port, SESSIONS)
        done = 0
        while done < messages:
            some = min(messages - done, max(messages // 10, 1))
            await client.send_closed_loop(sessions, client.recipients(1000, some), client.make_message(1000))
            done += some
            say(f"million: {done:,} of {messages:,} messages in the queue")

    client.run(work(), FILLING)


MEASUREMENTS: Measurements = {"lmtp": lmtp, "million": million}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "loadtest.deliver", "Measures delivering.", MEASUREMENTS))
