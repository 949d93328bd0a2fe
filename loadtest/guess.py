"""Wrong passwords while users send: python -m loadtest.guess [--messages N] [--json FILE].

In: N wrong guesses (10,000) from 50 addresses of this machine, half of them for a user that there is; meanwhile users
log in at the same listener and send. Out: the users' p99 of a whole session while it is guessed, against that of a
quiet server, and how the guesses were answered. Guesses leave at a fixed rate, as long as the server takes them.
Always: each guess has had an answer, each session of a user has kept its message; else there are no figures. Who
guesses is a process of its own that takes what processor the others leave, so that users are not kept waiting by it but
by the server. The listener takes passwords in clear: what TLS costs is measured elsewhere.
On failure: one line, exit code 1.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import LoadError
from .measurements import Bench, Measurements, say
from .processes import Server, free_port
from .receive import main
from .report import Row

GUESSES = 10_000
ADDRESSES = 50
CONNECTIONS = 4  # of each address
RATE = 1000.0  # guesses in a second at most: a connection makes its next one when the last was answered
USERS = 10
USER_RATE = 20.0  # sessions of each in a second
QUIET_SECONDS = 10.0
SETTLED = 0.1  # of the sessions of a phase, which are not counted: caches fill
PATIENCE = 60.0
USER, PASSWORD = "ann@y.test", "correct horse battery"
MESSAGE = b"From: <ann@y.test>\r\nTo: <b@y.test>\r\nSubject: load\r\n\r\n" + b"x" * 70 + b"\r\n.\r\n"
COMMANDS = (b"MAIL FROM:<ann@y.test>\r\n", b"RCPT TO:<b@y.test>\r\n", b"DATA\r\n", MESSAGE, b"QUIT\r\n")


@contextmanager
def submission_server(folder: Path) -> Iterator[Server]:
    """A fastsmtp with one user, as long as the block runs."""
    port = free_port()
    file = folder / "fastsmtp.toml"
    file.write_text(f"""\
hostname = "mx.y.test"
data_dir = {json.dumps(f"{folder}/data")}
postmaster = "b@y.test"

[[listener]]
address = "127.0.0.1:{port}"
role = "submission"
auth_clear = true

[auth]
users_file = "users"

[[domain]]
name = "y.test"
recipients = "any"
transport = "nowhere"

[transport.nowhere]
type = "discard"
""")
    fastsmtp = [sys.executable, "-m", "fastsmtp"]
    added = subprocess.run(
        [*fastsmtp, "user", "add", USER, "--config", str(file)],
        input=f"{PASSWORD}\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    if added.returncode:
        raise LoadError(f"no user could be added: {added.stderr.strip()}")
    server = Server("fastsmtp", [*fastsmtp, "serve", "--config", str(file)], port, folder / "fastsmtp.log")
    with server.running():
        yield server


class Session:
    """One connection from an address of this machine. Raises LoadError when the server hangs up or is silent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int, source: str) -> Session:
        session = cls(*await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0)))
        for code in (await session.reply(), await session.say(b"EHLO client.test\r\n")):
            if code not in (220, 250):
                raise LoadError(f"a session begins with {code}")
        return session

    async def reply(self) -> int:
        async with asyncio.timeout(PATIENCE):
            while (line := await self._reader.readline())[3:4] == b"-":
                pass
        if not line:
            raise LoadError("the server hung up without an answer")
        return int(line[:3])

    async def say(self, octets: bytes) -> int:
        """The code of the reply."""
        self._writer.write(octets)
        return await self.reply()

    async def log_in(self, user: str, password: str) -> int:
        return await self.say(b"AUTH PLAIN %b\r\n" % b64encode(f"\0{user}\0{password}".encode()))

    def close(self) -> None:
        self._writer.close()


@dataclass
class Load:
    """What is under way: `codes` are the answers to guesses, `left` those that are still to be made."""

    port: int
    left: int
    codes: Counter[int] = field(default_factory=Counter)
    next_at: float = 0.0

    async def pace(self) -> bool:
        """Waits for the turn of the next guess; False when there is none."""
        if not self.left:
            return False
        self.left -= 1
        now = time.monotonic()
        self.next_at = max(self.next_at + 1 / RATE, now)
        await asyncio.sleep(self.next_at - now)
        return True

    async def guess(self, source: str, number: int) -> None:
        session: Session | None = None
        while await self.pace():
            if session is None:
                session = await Session.open(self.port, source)
            user = USER if self.left % 2 else f"user{self.left}@y.test"
            code = await session.log_in(user, f"guess {number} {self.left}")
            self.codes[code] += 1
            if code == 235:
                raise LoadError("a wrong password was taken")
            if code == 421:
                session.close()
                session = None
        if session is not None:
            session.close()

    async def send(self, number: int, until: asyncio.Event) -> list[float]:
        """A user's sessions, one after the other; the milliseconds of each."""
        found = []
        start = time.monotonic() + number / USERS / USER_RATE
        while not until.is_set():
            await asyncio.sleep(start - time.monotonic())
            begun = time.monotonic()
            session = await Session.open(self.port, f"127.0.2.{number + 1}")
            codes = [await session.log_in(USER, PASSWORD)]
            codes += [await session.say(command) for command in COMMANDS]
            session.close()
            if codes != [235, 250, 250, 354, 250, 221]:
                raise LoadError(f"a user's session was answered {codes}")
            found.append((time.monotonic() - begun) * 1000)
            start = max(start + 1 / USER_RATE, begun)
        return found


async def send_for(load: Load, seconds: float) -> list[float]:
    """Users alone for a while."""
    until = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, until.set)
    return await _together(load, until)


async def guess_all(load: Load, addresses: int) -> None:
    """From all addresses at once, until none is left."""
    async with asyncio.TaskGroup() as group:
        for number in range(addresses * CONNECTIONS):
            group.create_task(load.guess(f"127.0.1.{number % addresses + 1}", number))


async def send_beside(port: int, guesses: int) -> tuple[list[float], Counter[int]]:
    """Users, while a process of its own makes the guesses; what that was answered."""
    until = asyncio.Event()
    command = [sys.executable, "-m", "loadtest.guess", GUESS, str(port), str(guesses), str(ADDRESSES)]
    root = Path(__file__).parents[1]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root)

    async def wait() -> Counter[int]:
        try:
            said, wrong = await process.communicate()
        finally:
            until.set()
        if process.returncode:
            raise LoadError(f"who guesses has ended: {(wrong.decode().strip() or 'without a word').splitlines()[-1]}")
        return Counter({int(code): count for code, count in json.loads(said).items()})

    sent, codes = await asyncio.gather(_together(Load(port, 0), until), wait())
    return sent, codes


async def _together(load: Load, until: asyncio.Event) -> list[float]:
    found = await asyncio.gather(*(load.send(number, until) for number in range(USERS)))
    return [took for each in found for took in each[int(len(each) * SETTLED) :]]


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def guesses(bench: Bench) -> list[Row]:
    row = Row("guesses", [])
    for number in range(1, bench.rounds + 1):
        with bench.room() as folder, submission_server(folder) as server:
            asked = bench.count(GUESSES)
            try:
                quiet = asyncio.run(send_for(Load(server.port, 0), QUIET_SECONDS))
                started = time.monotonic()
                busy, codes = asyncio.run(send_beside(server.port, asked))
            except (OSError, TimeoutError) as error:
                raise LoadError(f"guesses: {error}") from None
            seconds = time.monotonic() - started
        if codes.total() != asked:
            raise LoadError(f"{asked} guesses were made, {codes.total()} answered")
        row.values.append(p99(busy) / p99(quiet))
        answers = ", ".join(f"{count:,} × {code}" for code, count in sorted(codes.items()))
        row.notes.append(
            f"round {number}: {p99(quiet):.1f} ms quiet ({len(quiet):,} sessions), {p99(busy):.1f} ms while guessed at "
            f"({len(busy):,}); {asked:,} guesses in {seconds:.1f} s: {answers}"
        )
        say(row.notes[-1])
    return [row]


MEASUREMENTS: Measurements = {"guesses": guesses}
GUESS = "--guess"


def _guess(port: str, count: str, addresses: str) -> int:
    """What the process that guesses does."""
    os.nice(19)
    load = Load(int(port), int(count))
    wrong: BaseException | None = None
    try:
        asyncio.run(guess_all(load, int(addresses)))
    except* (OSError, TimeoutError, LoadError) as errors:
        wrong = errors.exceptions[0]
    print(json.dumps(load.codes) if wrong is None else wrong, file=sys.stdout if wrong is None else sys.stderr)
    return int(wrong is not None)


if __name__ == "__main__":
    if sys.argv[1:2] == [GUESS]:
        sys.exit(_guess(*sys.argv[2:5]))
    sys.exit(main(sys.argv[1:], "loadtest.guess", "Guesses passwords while users send.", MEASUREMENTS))
