"""What all connections of one listener share: its terms, its time limits, and the rounds in which they are looked at.

In: the objects that server.py wires. Out: `Service`, which every `Connection` of a listener holds. `tick` is called
once a second and checks the connections whose turn it is; `post` and `send` put the replies of a round of the loop onto
the wire together; `drain` ends sessions as soon as no message is under way. What a client says is not looked at here.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Literal

from . import log as logs
from ._files import send_last
from ._parser import Parser
from ._shared import Shared
from .commands import BARRIERS
from .job import Keeper
from .metrics import Counter
from .policy import Policy
from .terms import Terms

if TYPE_CHECKING:
    from .connection import Connection
    from .policy.limits import Limits


class Times:
    """Time limits, in seconds; `data_rate` in octets per second, 0 for none."""

    __slots__ = ("command", "data", "data_rate", "greet_delay", "oversize", "session", "tls", "write")

    def __init__(
        self,
        command: float = 300.0,
        data: float = 300.0,
        data_rate: float = 100.0,
        tls: float = 30.0,
        session: float = 3600.0,
        oversize: float = 600.0,
        write: float = 300.0,
        greet_delay: float = 0.0,
    ) -> None:
        self.command = command
        self.data = data
        self.data_rate = data_rate
        self.tls = tls
        self.session = session
        self.oversize = oversize
        self.write = write
        self.greet_delay = greet_delay

    @property
    def period(self) -> int:
        """How often, in whole seconds, connections are checked so that no limit is passed by much."""
        return int(max(1, min(30, min(self.command, self.data, self.session, self.write) / 4)))


class Service:
    """What all connections of one listener share.

    `rounds` are the sets that are checked in turn, one each second: a connection stays in one until it only has to
    take our last words, then it stands in `leaving`, which is checked each second.
    """

    __slots__ = (
        "context", "draining", "early_refused", "fetches", "handshakes", "keeper", "last_words", "leaving", "limits",
        "log", "loop", "make_parser", "name", "outbox", "policy", "rounds", "session_limit", "shared", "tasks", "terms",
        "times", "trusts", "turn", "turned_away", "withheld", "worker",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        terms: Terms,
        *,
        loop: asyncio.AbstractEventLoop,
        keeper: Keeper,
        policy: Policy,
        log: logs.Log,
        shared: Shared,
        worker: int = 0,
        times: Times | None = None,
        context: ssl.SSLContext | None = None,
        early_refused: bool = True,
        session_limit: int = 10_000,
        withheld: Callable[[str], frozenset[str]] | None = None,
        trusts: Callable[[str], bool] | None = None,
        fetches: Callable[[str], bool] | None = None,
        limits: Limits | None = None,
        command_line: int = 2048,
        auth_line: int = 12288,
        text_line: int = 1 << 20,
        header: int = 256 << 10,
        bare: Literal["reject", "normalize", "keep"] = "reject",
    ) -> None:
        self.name = name
        self.terms = terms
        self.loop = loop
        self.keeper = keeper
        self.policy = policy
        self.log = log
        self.shared = shared
        self.worker = worker
        self.times = times or Times()
        self.context = context
        self.early_refused = early_refused
        self.session_limit = session_limit
        self.withheld = withheld
        self.trusts = trusts
        self.fetches = fetches
        self.limits = limits
        parser = Parser(
            BARRIERS, command_line=command_line, auth_line=auth_line, text_line=text_line, header=header, bare=bare
        )
        self.make_parser: Callable[[], Parser] = parser.another
        self.draining = False
        self.outbox: list[tuple[asyncio.Transport, bytes]] = []
        self.last_words: list[tuple[asyncio.Transport, bytes, bool]] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.rounds: list[set[Connection]] = [set() for _ in range(self.times.period)]
        self.leaving: set[Connection] = set()
        self.turn = 0
        self.turned_away = 0  # clients over their limits, since the start
        self.handshakes = 0  # of clients that are no sessions yet (gate.py)

    def connections(self) -> list[Connection]:
        return [connection for each in (*self.rounds, self.leaving) for connection in each]

    def tick(self) -> None:
        """Called once a second: checks the connections whose turn it is; all of them when the end is waited for."""
        self.turn = (self.turn + 1) % len(self.rounds)
        now = time.monotonic()
        for connection in self.connections() if self.draining else (*self.rounds[self.turn], *self.leaving):
            connection.check(now)
        if self.limits is not None:
            self.limits.tick()

    def drain(self) -> None:
        """Ends every session as soon as no message is under way in it."""
        self.draining = True
        for connection in self.connections():
            connection.drain()

    def count(self, counter: Counter, n: int = 1) -> None:
        self.shared.add(self.worker, counter, n)

    def turn_away(self) -> None:
        """Counts a client that its limits did not let in."""
        self.turned_away += 1
        self.shared.add(self.worker, Counter.SESSIONS_REFUSED, 1)

    def post(self, transport: asyncio.Transport, octets: bytes) -> None:
        """Has octets sent when every session that can go on has gone on. A write runs the kernel's whole network
        stack and wakes the client: sessions after sessions, then writes after writes, take 10 % less CPU."""
        if not self.outbox and not self.last_words:
            self.loop.call_soon(self.send)
        self.outbox.append((transport, octets))

    def post_last(self, transport: asyncio.Transport, octets: bytes, plain: bool) -> None:
        """Has the last octets of a session sent, behind what was posted before, and the connection closed. `plain`:
        the socket takes them as they are."""
        if not self.outbox and not self.last_words:
            self.loop.call_soon(self.send)
        self.last_words.append((transport, octets, plain))

    def send(self) -> None:
        """Sends what was posted."""
        outbox = self.outbox
        if outbox:
            self.outbox = []
            for transport, octets in outbox:
                if not transport.is_closing():
                    transport.write(octets)
        last_words = self.last_words
        if last_words:
            self.last_words = []
            for transport, octets, plain in last_words:
                if not transport.is_closing():
                    _end(transport, octets, plain)

    def run(self, work: Coroutine[None, None, None]) -> None:
        """Runs a coroutine that nobody waits for."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def _end(transport: asyncio.Transport, octets: bytes, plain: bool) -> None:
    """Octets and the end leave in one packet, unless others wait to be sent before them."""
    socket = transport.get_extra_info("socket") if plain else None
    if socket is not None and not transport.get_write_buffer_size():
        octets = octets[send_last(socket.fileno(), octets) :]
    if octets:
        transport.write(octets)
    transport.close()
