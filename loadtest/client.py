"""An SMTP client that costs little, for load: sessions that each play a script, one step after the other.

In: a port on 127.0.0.1 and scripts. Out: how long each message waited for its 250. A script is a generator of steps:
the octets to send and the code that must come back. One step is under way per session, as with smtp-source: nothing is
pipelined. Always: every reply is read to its end and its code compared, and what was not asked for is an error.
Not here: what is done with the figures. On failure: LoadError with the server's words. RFC 5321.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from itertools import cycle, islice
from time import perf_counter
from typing import Any, TypeAlias, TypeVar, cast

import uvloop

from . import LoadError

Step: TypeAlias = tuple[bytes, bytes]  # octets to send, the code to wait for; b"": none, go on when there is room
Script: TypeAlias = Generator[Step, None, None]
T = TypeVar("T")

HOST = "127.0.0.1"
SENDER = b"MAIL FROM:<a@x.test>\r\n"
OPENING_AT_ONCE = 100  # connections under way: far fewer than any listen queue holds
PIECE = 64 * 1024
LINE = b"x" * 70 + b"\r\n"


def make_message(payload: int) -> bytes:
    """A message of `payload` octets behind its header, in lines of 72, with the final dot."""
    header = b"From: <a@x.test>\r\nTo: <b@y.test>\r\nSubject: load\r\n\r\n"
    whole, rest = divmod(payload, len(LINE))
    short = b"x" * (rest - 2) + b"\r\n" if rest > 2 else b""
    return header + LINE * whole + short + b".\r\n"


def recipients(mailboxes: int, messages: int, domain: str = "y.test") -> Iterator[bytes]:
    """RCPT commands for so many messages, to b0, b1 ... of a domain in turn."""
    return islice(cycle([b"RCPT TO:<b%d@%s>\r\n" % (n, domain.encode()) for n in range(mailboxes)]), messages)


def greet() -> Script:
    yield b"", b"220"
    yield b"EHLO client.test\r\n", b"250"


def send(to: Iterable[bytes], message: bytes, latencies: list[float]) -> Script:
    """Messages one after the other; sessions that share the iterator `to` share its messages."""
    for recipient in to:
        yield SENDER, b"250"
        yield recipient, b"250"
        yield b"DATA\r\n", b"354"
        started = perf_counter()
        yield message, b"250"
        latencies.append(perf_counter() - started)


def send_pieces(recipient: bytes, payload: int) -> Script:
    """One large message, written 64 KB at a time, each when the one before has left."""
    yield SENDER, b"250"
    yield recipient, b"250"
    yield b"DATA\r\n", b"354"
    piece = LINE * (PIECE // len(LINE))
    yield b"Subject: large\r\n\r\n", b""
    for _ in range(payload // len(piece)):
        yield piece, b""
    yield LINE * (payload % len(piece) // len(LINE)) + b".\r\n", b"250"


class Session(asyncio.Protocol):
    """One connection, which greets by itself. `lost` says why it ended, and is empty while it lives."""

    __slots__ = ("_done", "_expected", "_partial", "_paused", "_scheduled", "_script", "_transport", "greeted", "lost")

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._script: Script | None = None
        self._done: asyncio.Future[None]
        self._expected = b""
        self._partial = b""
        self._paused = False
        self._scheduled = False
        self.greeted: asyncio.Future[None]
        self.lost = ""

    def run(self, script: Script) -> asyncio.Future[None]:
        """Plays a script to its end; the one before must have ended. The future may raise LoadError."""
        assert self._script is None
        self._script = script
        self._done = asyncio.get_running_loop().create_future()
        if self.lost:
            self._fail(self.lost)
        else:
            self._advance()
        return self._done

    def abort(self) -> None:
        """Closes without a word."""
        self._script = None
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but name: no isinstance here.
        self._transport = cast("asyncio.Transport", transport)
        self.greeted = self.run(greet())  # at once: the greeting may be here before anyone asks for it

    def data_received(self, data: bytes) -> None:
        if self._partial:
            data = self._partial + data
        last = data.rfind(b"\n", 0, -1) + 1
        if not data.endswith(b"\n") or data[last + 3 : last + 4] == b"-":
            self._partial = data
            return
        self._partial = b""
        if self._script is None or not self._expected or not data.startswith(self._expected, last):
            self._fail(f"the server said {_show(data[last:])} where {_show(self._expected) or 'nothing'} was expected")
        else:
            self._advance()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the server closed the connection{f' ({error})' if error else ''}")

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if not self._expected and not self._scheduled:
            self._advance()

    def _advance(self) -> None:
        if self._script is None:
            return
        for octets, expected in self._script:
            self._expected = expected
            if octets:
                self._transport.write(octets)
            if not expected and not self._paused:
                # Not at once: other sessions have their turn between two pieces.
                self._scheduled = True
                asyncio.get_running_loop().call_soon(self._go_on)
            return
        self._script = None
        self._expected = b""
        self._done.set_result(None)

    def _go_on(self) -> None:
        self._scheduled = False
        if not self._paused:
            self._advance()

    def _fail(self, why: str) -> None:
        self.lost = self.lost or why
        self._transport.abort()
        if self._script is not None:
            self._script = None
            if not self._done.done():
                self._done.set_exception(LoadError(self.lost))


def _show(octets: bytes) -> str:
    return octets.decode("ascii", "backslashreplace").strip()[:200]


async def open_session(port: int, tls: ssl.SSLContext | None = None) -> Session:
    """A session that has been greeted and has said EHLO. Raises LoadError."""
    try:
        _, session = await asyncio.get_running_loop().create_connection(Session, HOST, port, ssl=tls)
    except OSError as error:
        raise LoadError(f"cannot connect to port {port}: {error}") from None
    await session.greeted
    return session


async def open_sessions(port: int, count: int, tls: ssl.SSLContext | None = None) -> list[Session]:
    """So many of them, some at a time."""
    opened: list[Session] = []
    while len(opened) < count:
        some = min(OPENING_AT_ONCE, count - len(opened))
        opened += await asyncio.gather(*(open_session(port, tls) for _ in range(some)))
    return opened


async def send_closed_loop(sessions: Sequence[Session], to: Iterator[bytes], message: bytes) -> list[float]:
    """Each session sends as fast as it is answered; the seconds from end-of-data to 250, one for each message."""
    latencies: list[float] = []
    await asyncio.gather(*(session.run(send(to, message, latencies)) for session in sessions))
    return latencies


class Paced:
    """Messages at a steady rate, whether the server keeps up or not.

    Each goes through a session that is free, so one that waits holds up no other; `missed` counts those for which no
    session was free.
    """

    def __init__(self, free: list[Session], rate: float, recipient: bytes, message: bytes) -> None:
        self._free = free
        self._interval = 1 / rate
        self._recipient = recipient
        self._message = message
        self.latencies: list[float] = []
        self.missed = 0

    async def run(self, until: Callable[[], bool]) -> None:
        """Sends until told to stop, and waits for the last answer. Raises LoadError."""
        sent: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not until():
            while due <= loop.time():
                due += self._interval
                if self._free:
                    sent.append(loop.create_task(self._send(self._free.pop())))
                else:
                    self.missed += 1
            await asyncio.sleep(due - loop.time())
        await asyncio.gather(*sent)

    async def _send(self, session: Session) -> None:
        await session.run(send([self._recipient], self._message, self.latencies))
        self._free.append(session)


def run(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Runs it on uvloop for at most so long. Raises LoadError, also for what went wrong in a callback."""

    async def bounded() -> T:
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        wrong: list[str] = []

        def on_exception(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            wrong.append(f"{context.get('message')}: {context.get('exception')!r}")
            task.cancel()

        loop.set_exception_handler(on_exception)
        try:
            return await asyncio.wait_for(task, seconds)
        except TimeoutError:
            raise LoadError(f"not finished within {seconds:.0f} s") from None
        except asyncio.CancelledError:
            if wrong:
                raise LoadError(f"the client erred: {wrong[0]}") from None
            raise

    return uvloop.run(bounded())


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all (which are sorted) do not pass."""
    return values[math.ceil(share * len(values)) - 1]
