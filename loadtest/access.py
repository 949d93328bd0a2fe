"""What lists and limits cost: python -m loadtest.access [NAME ...] [--rounds N] [--messages N] [--json FILE].

In: how many lines the lists have (ACCESS_NETWORKS and ACCESS_MAILBOXES in the environment; 10^6 and 10^7). Out: for
`refused` the p99 of a good client's whole session while 10,000 connections a second from 50 addresses are turned away,
against that of a quiet server, the flood taking only what processor the others leave; for `access` the CPU of a message
with rules by a list of networks, a list of mailboxes and all limits, less that of the same server without them: many
mailboxes over sessions that stay open, and one with a connection for each message. Both are sent to in turns, in slices
of a round, now one first and now the other; a round's figure is the median of its slices' differences.
Always: every connection beyond the limit has heard 421, every message was kept; else there are no figures.
On failure: one line, exit code 1.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from . import LoadError
from .guess import SETTLED, Session, p99
from .measurements import WARM_UP, Bench, Load, Measurements, measure, own_client, say, smtp_source
from .processes import Server, free_port
from .receive import main
from .report import Row

ADDRESSES = 50
RATE = 10_000.0  # refused connections in a second
REFUSED = 100_000
OUTSTANDING = 64  # refused connections whose 421 is not read yet
CLIENTS = 10
CLIENT_RATE = 20.0  # sessions of each in a second
QUIET_SECONDS = 10.0
MESSAGES = 20_000  # of a round to each server
SLICES = 5
RECIPIENTS = 20_000  # mailboxes that are sent to, where sessions stay open
NO_PORT = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24)
MESSAGE = b"From: <a@x.test>\r\nTo: <b@y.test>\r\nSubject: load\r\n\r\n" + b"x" * 70 + b"\r\n.\r\n"
COMMANDS = (b"MAIL FROM:<a@x.test>\r\n", b"RCPT TO:<b@y.test>\r\n", b"DATA\r\n", MESSAGE, b"QUIT\r\n")

PLAIN = """\
[[domain]]
name = "y.test"
recipients = "any"
transport = "nowhere"
"""
LISTS = """\
[inbound]
sessions_per_address = 10000
sessions_per_network = 10000
new_sessions = "10000000/m"
messages = "10000000/m"
recipients = "10000000/m"
failures = "10000000/m"

[[rule]]
client = {file = "networks"}
action = "refuse"

[[domain]]
name = "y.test"
recipients = {file = "mailboxes"}
transport = "nowhere"
"""
ONE_EACH = "[inbound]\nsessions_per_address = 1\n" + PLAIN


@contextmanager
def serving(folder: Path, tables: str) -> Iterator[Server]:
    """A fastsmtp with one worker, as long as the block runs."""
    port = free_port()
    file = folder / "fastsmtp.toml"
    file.write_text(f"""\
hostname = "mx.y.test"
data_dir = {json.dumps(f"{folder}/data")}
workers = 1
postmaster = "b@y.test"

[[listener]]
address = "127.0.0.1:{port}"

[spool]
durability = "none"

[transport.nowhere]
type = "discard"

{tables}""")
    command = [sys.executable, "-m", "fastsmtp", "serve", "--config", str(file)]
    server = Server("fastsmtp", command, port, folder / "fastsmtp.log")
    with server.running():
        yield server


def write_lists(folder: Path) -> tuple[int, int]:
    """The texts; how many lines they have. Compiled before the server is ready."""
    networks, mailboxes = (int(os.environ.get(f"ACCESS_{name}", most)) for name, most in (
        ("NETWORKS", 1_000_000), ("MAILBOXES", 10_000_000),
    ))  # fmt: skip
    with (folder / "networks").open("w") as file:
        # Of 11.0.0.0/8 and on, every other /28: nothing can be merged, and no loopback address is among them.
        for number in range(networks):
            start = (11 << 24) + number * 32
            file.write(f"{start >> 24}.{start >> 16 & 255}.{start >> 8 & 255}.{start & 255}/28\n")
    with (folder / "mailboxes").open("w") as file:
        file.write("b@y.test\n")
        file.writelines(f"b{number}@y.test\n" for number in range(mailboxes - 1))
    return networks, mailboxes


def hold(port: int) -> list[socket.socket]:
    """The one session that each address may have. Raises LoadError."""
    held = []
    for number in range(ADDRESSES):
        connection = _connect(port, number)
        if not connection.recv(512).startswith(b"220"):
            raise LoadError("the first session of an address was refused")
        held.append(connection)
    return held


def flood(port: int, connections: int, rate: float) -> Counter[str]:
    """Connections that are turned away, at a rate; the codes that they hear."""
    heard: Counter[str] = Counter()
    waiting: deque[socket.socket] = deque()
    start = time.monotonic()
    for number in range(connections):
        ahead = start + number / rate - time.monotonic()
        if ahead > 0.001:
            time.sleep(ahead)
        waiting.append(_connect(port, number % ADDRESSES))
        if len(waiting) > OUTSTANDING:
            _hear(waiting.popleft(), heard)
    while waiting:
        _hear(waiting.popleft(), heard)
    return heard


def _connect(port: int, number: int) -> socket.socket:
    connection = socket.socket()
    connection.settimeout(60)
    connection.setsockopt(socket.IPPROTO_IP, NO_PORT, 1)
    connection.bind((f"127.0.1.{number + 1}", 0))
    connection.connect(("127.0.0.1", port))
    return connection


def _hear(connection: socket.socket, heard: Counter[str]) -> None:
    heard[connection.recv(512)[:3].decode("ascii", "replace")] += 1
    connection.close()


async def send(port: int, number: int, until: asyncio.Event) -> list[float]:
    """A good client's sessions, one after the other; the milliseconds of each."""
    found = []
    start = time.monotonic() + number / CLIENTS / CLIENT_RATE
    while not until.is_set():
        await asyncio.sleep(start - time.monotonic())
        begun = time.monotonic()
        session = await Session.open(port, f"127.0.2.{number + 1}")
        codes = [await session.say(command) for command in COMMANDS]
        session.close()
        if codes != [250, 250, 354, 250, 221]:
            raise LoadError(f"a good client was answered {codes}")
        found.append((time.monotonic() - begun) * 1000)
        start = max(start + 1 / CLIENT_RATE, begun)
    return found[int(len(found) * SETTLED) :]


async def send_for(port: int, seconds: float) -> list[float]:
    until = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, until.set)
    return await _together(port, until)


async def send_beside(port: int, connections: int) -> tuple[list[float], Counter[str], float]:
    """Good clients while a process of its own floods; what that heard, and how long it took."""
    until = asyncio.Event()
    command = [sys.executable, "-m", "loadtest.access", "--flood", str(port), str(connections)]
    root = Path(__file__).parents[1]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=root)

    async def wait() -> tuple[Counter[str], float]:
        try:
            said, _ = await process.communicate()
        finally:
            until.set()
        if process.returncode:
            raise LoadError(f"the flood has ended with {process.returncode}")
        answer = json.loads(said)
        return Counter(answer["heard"]), answer["seconds"]

    sent, (heard, seconds) = await asyncio.gather(_together(port, until), wait())
    return sent, heard, seconds


async def _together(port: int, until: asyncio.Event) -> list[float]:
    found = await asyncio.gather(*(send(port, number, until) for number in range(CLIENTS)))
    return [took for each in found for took in each]


def refused(bench: Bench) -> list[Row]:
    row = Row("refused", [])
    for number in range(1, bench.rounds + 1):
        with bench.room() as folder, serving(folder, ONE_EACH) as server:
            connections = bench.count(REFUSED)
            try:
                quiet = asyncio.run(send_for(server.port, QUIET_SECONDS))
                held = hold(server.port)
                before = server.cpu()
                busy, heard, seconds = asyncio.run(send_beside(server.port, connections))
                used = server.cpu() - before
                for connection in held:
                    connection.close()
            except (OSError, TimeoutError) as error:
                raise LoadError(f"refused: {error}") from None
        if heard != {"421": connections}:
            raise LoadError(f"{connections} connections were to be refused, they heard {dict(heard)}")
        row.values.append(p99(busy) / p99(quiet))
        row.rates.append(connections / seconds)
        row.notes.append(
            f"round {number}: {p99(quiet):.1f} ms quiet ({len(quiet):,} sessions), {p99(busy):.1f} ms beside "
            f"{connections / seconds:,.0f} refused connections a second ({len(busy):,}); the server used "
            f"{used / seconds:.0%} of a core"
        )
        say(row.notes[-1])
    return [row]


def in_turns(without: Server, with_lists: Server, load: Load, messages: int, number: int) -> list[tuple[float, float]]:
    """CPU of a message on both servers, in each slice of a round."""
    each = max(1, messages // SLICES)
    pairs = []
    for part in range(SLICES):
        order = (without, with_lists) if part % 2 else (with_lists, without)
        used = {server.port: measure(server, load, each, number).us for server in order}
        pairs.append((used[without.port], used[with_lists.port]))
    return pairs


def access(bench: Bench) -> list[Row]:
    messages = bench.count(MESSAGES)
    rows = []
    with bench.room() as plain, bench.room() as listed:
        lines = write_lists(listed)
        loads = {
            "access": own_client(min(RECIPIENTS, lines[1] - 1)),
            "access-connection": smtp_source("-l", "1024"),
        }
        with serving(plain, PLAIN) as without, serving(listed, LISTS) as with_lists:
            for name, load in loads.items():
                row = Row(name, [])
                rows.append(row)
                for server in (without, with_lists):
                    measure(server, load, max(1, int(messages * WARM_UP)), 0)
                for number in range(1, bench.rounds + 1):
                    pairs = in_turns(without, with_lists, load, messages, number)
                    found = [more - base for base, more in pairs]
                    row.values.append(median(found))
                    row.fastsmtp_us.append(median(more for _, more in pairs))
                    row.notes.append(
                        f"{name}: round {number}: {median(base for base, _ in pairs):.1f} µs without, "
                        f"{row.fastsmtp_us[-1]:.1f} µs with {lines[0]:,} networks, {lines[1]:,} mailboxes and all "
                        f"limits; slices differ by {min(found):.1f} to {max(found):.1f} µs"
                    )
                    say(row.notes[-1])
    return rows


MEASUREMENTS: Measurements = {"refused": refused, "access": access}


def _flood(port: str, connections: str) -> int:
    os.nice(19)  # attacks come from elsewhere; here this one takes what the others leave
    begun = time.monotonic()
    heard = flood(int(port), int(connections), RATE)
    print(json.dumps({"heard": heard, "seconds": time.monotonic() - begun}))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--flood"]:
        sys.exit(_flood(*sys.argv[2:]))
    sys.exit(main(sys.argv[1:], "loadtest.access", "Lists and limits: what they cost.", MEASUREMENTS))
