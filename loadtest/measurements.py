"""What is measured: each function takes a Bench and gives the rows of one measurement.

In: the fastsmtp of this Python, Postfix's smtp-source and smtp-sink. Out: rows of figures, one for each round. CPU per
message is that of all processes of a server, counted until it has nothing left to do; fastsmtp and smtp-sink take
turns, so that both see the same machine. A message counts when its 250 was read, and with a Maildir when its file
stands in new/. Every server has one worker and is stopped at the end.
Not here: the goals (report), what is sent (client), how CPU and memory are read (processes). On failure: LoadError.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeAlias

from . import LoadError, client
from .processes import (
    Growth,
    Server,
    fastsmtp,
    find_program,
    mail_in,
    proportional_memory,
    smtp_sink,
    unverified,
)
from .report import Row

LIMIT = 300.0  # seconds for one load, and for what it leaves behind
SESSIONS = 100
WARM_UP = 0.1  # of a round's messages, before the first round
IDLE = {"idle": 8000, "idle-tls": 2000}
IDLE_WARM_UP = 50
CROWD = 10_000
CROWD_SENDING = 500
LARGE_AT_ONCE = 10
LARGE_OCTETS = 20_000_000
LARGE_SECONDS = 10.0
LARGE_MOST = 400  # messages, whatever the time: what a disk must have room for
SMALL_RATE = 1000.0  # messages of 1 KB in a second


def say(text: str) -> None:
    """What goes on, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Bench:
    """What all measurements share."""

    folder: Path
    rounds: int
    messages: int | None  # None: each measurement's own number

    def count(self, default: int) -> int:
        return default if self.messages is None else self.messages

    @contextmanager
    def room(self) -> Iterator[Path]:
        """A new folder for one server; it is gone afterwards, also for the disk."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
            os.sync()


@dataclass(frozen=True)
class Sample:
    """One load on one server."""

    messages: int
    seconds: float
    cpu: float
    drained: float  # seconds after the load until nothing was left to do

    @property
    def us(self) -> float:
        return self.cpu / self.messages * 1e6

    @property
    def rate(self) -> float:
        return self.messages / self.seconds


# What sends: it takes a port, how many messages, and the number of the round, and returns the seconds of sending.
Load: TypeAlias = Callable[[int, int, int], float]


def measure(server: Server, load: Load, messages: int, number: int) -> Sample:
    """One round's load on one server that has nothing to do. Raises LoadError."""
    os.sync()  # what others have left to flush would be in this server's syncfs, and in its CPU
    before = server.cpu()
    seconds = load(server.port, messages, number)
    drained = server.settle(LIMIT)
    gc.collect()
    return Sample(messages, seconds, server.cpu() - before, drained)


def smtp_source(*options: str, recipient: str = "b@y.test") -> Load:
    """Postfix's client, over 100 sessions; `{}` in the recipient becomes the round's number."""

    def load(port: int, messages: int, number: int) -> float:
        command = [find_program("smtp-source", "postfix"), "-s", str(SESSIONS), *options, "-m", str(messages)]
        command += ["-f", "a@x.test", "-t", recipient.format(number), f"{client.HOST}:{port}"]
        started = time.perf_counter()
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        except subprocess.TimeoutExpired:
            raise LoadError(f"smtp-source did not finish within {LIMIT:.0f} s") from None
        seconds = time.perf_counter() - started
        if ended.returncode or ended.stderr.strip():
            said = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
            raise LoadError(f"smtp-source: {said[0]}")
        return seconds

    return load


def own_client(mailboxes: int) -> Load:
    """The same load to many mailboxes, which smtp-source cannot send."""

    def load(port: int, messages: int, number: int) -> float:
        return closed_loop(port, SESSIONS, messages, mailboxes)[0]

    return load


def closed_loop(
    port: int, sessions: int, messages: int, mailboxes: int, domain: str = "y.test"
) -> tuple[float, list[float]]:
    """Seconds of sending, and the sorted latencies."""

    async def work() -> tuple[float, list[float]]:
        opened = await client.open_sessions(port, sessions)
        started = time.perf_counter()
        to = client.recipients(mailboxes, messages, domain)
        latencies = await client.send_closed_loop(opened, to, client.make_message(1000))
        return time.perf_counter() - started, sorted(latencies)

    return client.run(work(), LIMIT)


def compare(bench: Bench, name: str, durability: str, transport: str, load: Load, messages: int) -> Row:
    """fastsmtp and smtp-sink in turns."""
    row = Row(name, [])
    drained: list[float] = []
    with bench.room() as folder, fastsmtp(folder, durability, transport) as ours, smtp_sink() as sink:
        total = warm_up = max(int(messages * WARM_UP), min(messages, 1000))
        for server in (ours, sink):
            measure(server, load, warm_up, 0)
        for number in range(1, bench.rounds + 1):
            mine, theirs = (measure(server, load, messages, number) for server in (ours, sink))
            total += messages
            check_mail(folder, transport, total)
            row.fastsmtp_us.append(mine.us)
            row.smtp_sink_us.append(theirs.us)
            row.values.append(mine.us / theirs.us)
            row.rates.append(mine.rate)
            drained.append(mine.drained)
            say(
                f"{name}: round {number} of {bench.rounds}: fastsmtp {mine.us:.1f} µs, {mine.rate:,.0f}/s; "
                f"smtp-sink {theirs.us:.1f} µs, {theirs.rate:,.0f}/s"
            )
    if durability == "fsync":
        row.notes.append(f"queue empty {median(drained):.1f} s after the load")
    return row


def check_mail(folder: Path, transport: str, expected: int) -> None:
    """All that was acknowledged is in a mailbox. Raises LoadError."""
    if transport == "maildir" and (found := mail_in(folder)) != expected:
        raise LoadError(f"{expected} messages were acknowledged, {found} are in a mailbox")


def persistent(bench: Bench) -> list[Row]:
    return [compare(bench, "persistent", "none", "discard", smtp_source("-d", "-l", "1000"), bench.count(20_000))]


def churn(bench: Bench) -> list[Row]:
    return [compare(bench, "churn", "none", "discard", smtp_source("-l", "1000"), bench.count(10_000))]


def big(bench: Bench) -> list[Row]:
    return [compare(bench, "big", "none", "discard", smtp_source("-d", "-l", "50000"), bench.count(5_000))]


def fsync(bench: Bench) -> list[Row]:
    return [compare(bench, "fsync", "fsync", "discard", smtp_source("-d", "-l", "1000"), bench.count(20_000))]


def maildir(bench: Bench) -> list[Row]:
    # A mailbox that no round has filled before: rounds stay comparable.
    load = smtp_source("-d", "-l", "1000", recipient="b{}@y.test")
    return [compare(bench, "maildir", "fsync", "maildir", load, bench.count(10_000))]


def maildir_1000(bench: Bench) -> list[Row]:
    return [compare(bench, "maildir-1000", "fsync", "maildir", own_client(1000), bench.count(10_000))]


def latency(bench: Bench) -> list[Row]:
    messages = bench.count(20_000)
    rows = []
    for name, transport in (("latency", "discard"), ("latency-maildir", "maildir")):
        row = Row(name, [])
        pooled: list[float] = []
        with bench.room() as folder, fastsmtp(folder, "fsync", transport) as server:
            closed_loop(server.port, SESSIONS, total := min(messages, 1000), 1)
            server.settle(LIMIT)
            for number in range(1, bench.rounds + 1):
                before = server.cpu()
                seconds, latencies = closed_loop(server.port, SESSIONS, messages, 1)
                server.settle(LIMIT)
                row.fastsmtp_us.append((server.cpu() - before) / messages * 1e6)
                total += messages
                check_mail(folder, transport, total)
                pooled += latencies
                row.values.append(client.percentile(latencies, 0.99) * 1e3)
                row.rates.append(messages / seconds)
                say(f"{name}: round {number} of {bench.rounds}: {show_latencies(latencies)}")
        row.notes.append(f"all rounds: {show_latencies(sorted(pooled))}")
        rows.append(row)
    return rows


def show_latencies(latencies: list[float]) -> str:
    """Of sorted seconds, in ms."""
    shown = [f"p{100 * share:g} {client.percentile(latencies, share) * 1e3:.1f}" for share in (0.5, 0.9, 0.99, 0.999)]
    return f"{', '.join(shown)}, max {latencies[-1] * 1e3:.1f} ms"


def idle(bench: Bench) -> list[Row]:
    rows = []
    for name, count in IDLE.items():
        row = Row(name, [])
        tls = name == "idle-tls"
        for number in range(1, bench.rounds + 1):
            with bench.room() as folder, fastsmtp(folder, "none", "discard", tls) as server:
                row.values.append(memory_per_session(server, count, tls) / 1024)
            say(f"{name}: round {number} of {bench.rounds}: {row.values[-1]:.2f} KB, {count} sessions")
        row.notes.append(f"proportional set size of all processes, {count} sessions")
        rows.append(row)
    return rows


def memory_per_session(server: Server, count: int, tls: bool) -> float:
    """Octets that a session adds to the server's processes. Raises LoadError."""

    async def work() -> float:
        context = unverified() if tls else None
        # The first sessions bring code and tables into memory that later ones share.
        for session in await client.open_sessions(server.port, IDLE_WARM_UP, context):
            session.abort()
        await asyncio.to_thread(server.settle, LIMIT)
        before = proportional_memory(server.pid)
        sessions = await client.open_sessions(server.port, count, context)
        await asyncio.to_thread(server.settle, LIMIT)
        after = proportional_memory(server.pid)
        check_alive(sessions)
        return (after - before) / count

    return client.run(work(), LIMIT)


def check_alive(sessions: list[client.Session]) -> None:
    """No session has been closed. Raises LoadError."""
    lost = [session.lost for session in sessions if session.lost]
    if lost:
        raise LoadError(f"{len(lost)} of {len(sessions)} sessions ended: {lost[0]}")


def large(bench: Bench) -> list[Row]:
    needed = 2 * LARGE_MOST * LARGE_OCTETS
    free = shutil.disk_usage(bench.folder).free
    if free < needed:
        raise LoadError(f"{bench.folder} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed")
    speed, memory = Row("large", []), Row("large-memory", [])
    for number in range(1, bench.rounds + 1):
        with bench.room() as folder, fastsmtp(folder, "fsync", "maildir") as server:
            found = large_beside_small(server, min(bench.count(LARGE_MOST), LARGE_MOST))
            server.settle(LIMIT)
            check_mail(folder, "maildir", found.large + len(found.latencies) + len(found.alone))
        if found.missed:
            speed.notes.append(f"round {number}: {found.missed} small messages found no free session")
        speed.values.append(client.percentile(found.latencies, 0.99) * 1e3)
        speed.rates.append(len(found.latencies) / found.seconds)
        memory.values.append(found.growth / 1e6)
        say(
            f"large: round {number} of {bench.rounds}: {found.large} large messages in {found.seconds:.1f} s; small: "
            f"{show_latencies(found.latencies)}; alone: {show_latencies(found.alone)}; {found.growth / 1e6:+.0f} MB"
        )
        megabytes = found.large * LARGE_OCTETS / 1e6
        speed.notes.append(
            f"round {number}: {found.large} large messages, {megabytes / found.seconds:.0f} MB/s, "
            f"small {show_latencies(found.latencies)}; before them {show_latencies(found.alone)}"
        )
    return [speed, memory]


@dataclass(frozen=True)
class Beside:
    """Small mail with large mail beside it."""

    large: int
    seconds: float
    latencies: list[float]
    alone: list[float]
    missed: int
    growth: int


def large_beside_small(server: Server, most: int) -> Beside:
    """Small mail at a steady rate: first alone, then while ten sessions send large messages."""

    async def work() -> Beside:
        small = await client.open_sessions(server.port, SESSIONS)
        senders = await client.open_sessions(server.port, LARGE_AT_ONCE)
        recipient, message = b"RCPT TO:<b@y.test>\r\n", client.make_message(1000)
        loop = asyncio.get_running_loop()

        alone = client.Paced(small, SMALL_RATE, recipient, message)
        until = loop.time() + LARGE_SECONDS / 5
        await alone.run(lambda: loop.time() > until)

        growth = Growth(server.pid)
        beside = client.Paced(small, SMALL_RATE, recipient, message)
        started = loop.time()
        sent = 0

        async def send_large(session: client.Session) -> None:
            nonlocal sent
            while loop.time() - started < LARGE_SECONDS and sent < most:
                sent += 1
                await session.run(client.send_pieces(b"RCPT TO:<big@y.test>\r\n", LARGE_OCTETS))

        sending = asyncio.gather(*map(send_large, senders))
        await asyncio.gather(sending, beside.run(sending.done))
        seconds = loop.time() - started
        return Beside(sent, seconds, sorted(beside.latencies), sorted(alone.latencies), beside.missed, growth.peak())

    return client.run(work(), LIMIT)


def crowd(bench: Bench) -> list[Row]:
    messages = bench.count(20_000)
    rows = []
    for name, durability in (("crowd", "none"), ("crowd-fsync", "fsync")):
        row = Row(name, [])
        cpu: dict[int, list[float]] = {CROWD_SENDING: [], CROWD: []}
        with bench.room() as folder, fastsmtp(folder, durability, "discard") as server:
            crowded(server, CROWD_SENDING, min(messages, 1000))
            for number in range(1, bench.rounds + 1):
                few, many = (crowded(server, count, messages) for count in (CROWD_SENDING, CROWD))
                row.values.append(100 * (1 - many.rate / few.rate))
                row.fastsmtp_us.append(many.us)
                row.rates.append(many.rate)
                cpu[CROWD_SENDING].append(few.us)
                say(
                    f"{name}: round {number} of {bench.rounds}: "
                    f"{CROWD_SENDING} open {few.rate:,.0f}/s, {few.us:.1f} µs; "
                    f"{CROWD} open {many.rate:,.0f}/s, {many.us:.1f} µs"
                )
        row.notes.append(f"{median(cpu[CROWD_SENDING]):.1f} µs with {CROWD_SENDING} open")
        rows.append(row)
    return rows


def crowded(server: Server, count: int, messages: int) -> Sample:
    """500 of `count` open sessions send. Raises LoadError."""

    async def work() -> Sample:
        sessions = await client.open_sessions(server.port, count)
        await asyncio.to_thread(server.settle, LIMIT)
        before = server.cpu()
        started = time.perf_counter()
        to = client.recipients(1, messages)
        await client.send_closed_loop(sessions[:CROWD_SENDING], to, client.make_message(1000))
        seconds = time.perf_counter() - started
        drained = await asyncio.to_thread(server.settle, LIMIT)
        used = server.cpu() - before
        check_alive(sessions)
        return Sample(messages, seconds, used, drained)

    sample = client.run(work(), LIMIT)
    server.settle(LIMIT)
    gc.collect()
    return sample


Measurements: TypeAlias = Mapping[str, Callable[[Bench], list[Row]]]

MEASUREMENTS: Measurements = {
    "persistent": persistent,
    "churn": churn,
    "big": big,
    "fsync": fsync,
    "maildir": maildir,
    "maildir-1000": maildir_1000,
    "latency": latency,
    "idle": idle,
    "large": large,
    "crowd": crowd,
}
