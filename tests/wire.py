"""A connection to play on: a service with everything real around it, and a transport and a keeper that record.

In: what the listener is like. Out: a `Bench`, whose service makes connections on a FakeTransport (no socket, no
waiting: what was answered can be read when `send` returns) or on a real loop. The keeper keeps messages in a list and
answers at once, later or with a refusal, as it is told. Log, shared counters, policy, recipients and domains are the
real ones; `check_bugs` fails when the log has a "bug" line or a session was not counted out.
Not here: what anything must say.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from users import MECHANISMS, Users

from fastsmtp._shared import Shared
from fastsmtp.address import parse_address
from fastsmtp.connection import Connection
from fastsmtp.domains import Domain, Domains
from fastsmtp.ids import Ids
from fastsmtp.job import Keeper
from fastsmtp.log import Log
from fastsmtp.message import Message
from fastsmtp.metrics import Counter
from fastsmtp.policy import Check, Policy
from fastsmtp.policy.recipients import Recipients
from fastsmtp.policy.relay import Relay
from fastsmtp.reply import R421_NOT_TAKING_MAIL, R452_NO_ROOM, Reply
from fastsmtp.service import Service, Times
from fastsmtp.terms import Terms
from fastsmtp.verdict import STORED, NextHop, Refused, Stored

HOSTNAME = "mx.here.test"
HIGH_WATER = 65536  # asyncio's own
ARRIVED = 1_700_000_000.0
R554 = Reply(554, "5.7.1", "No SMTP service for you here")
DOMAINS = (
    Domain("here.test", "boxes", ["ann", "bob", "carl"]),
    Domain("any.test", "boxes"),
    Domain("case.test", "boxes", ["Ann"], case_sensitive=True),
    Domain("*.sub.test", "boxes"),
    Domain("xn--bcher-kva.test", "boxes", ["ann", "jürgen"]),
)


class FakeTransport(asyncio.Transport):
    """Records what is written, write by write. As in a real one, `connection_lost` comes later: with `settle`."""

    def __init__(self, peer: object = ("192.0.2.7", 25252)) -> None:
        super().__init__()
        self.peer = peer
        self.protocol: Connection | None = None
        self.writes: list[bytes] = []
        self.reading = True
        self.closed = False
        self.aborted = False
        self.eof = False
        self.lost = False
        self.stuck = False  # the client takes nothing
        self.waiting = 0  # octets that it has not taken
        self.socket: Any = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": self.peer, "socket": self.socket}.get(name, default)

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.eof, "written after write_eof"
        if not self.closed:
            self.writes.append(bytes(data))
        if self.stuck:
            before, self.waiting = self.waiting, self.waiting + len(data)
            if before <= HIGH_WATER < self.waiting and self.protocol is not None:
                self.protocol.pause_writing()

    def pause_reading(self) -> None:
        assert not self.closed
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.closed
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        assert not self.closed
        self.eof = True

    @property
    def ended(self) -> bool:
        """Whether the client sees the end of our side."""
        return self.closed or self.eof

    def settle(self) -> None:
        """What the loop does after close or abort."""
        if self.closed and not self.lost and self.protocol is not None:
            self.lost = True
            self.protocol.connection_lost(ConnectionResetError() if self.aborted else None)


class RecordingDraft:
    """A body in memory. `full` makes `write` ask for a pause."""

    def __init__(self, keeper: RecordingKeeper, message_id: str, drained: Callable[[], None]) -> None:
        self.keeper = keeper
        self.id = message_id
        self.size = 0
        self.octets = bytearray()
        self.drained = drained
        self.whole_header_at = -1
        self.appended = False
        self.abandoned = False

    @property
    def head(self) -> bytes:
        end = self.whole_header_at if self.whole_header_at >= 0 else 256 << 10
        return bytes(self.octets[:end])

    def write(self, chunk: bytes) -> bool:
        assert not self.appended
        assert not self.abandoned
        if self.keeper.broken:
            raise RuntimeError("a bug in the keeper")
        self.octets += chunk
        self.size += len(chunk)
        return not self.keeper.full

    def header_done(self) -> None:
        assert self.whole_header_at < 0
        self.whole_header_at = len(self.octets)

    def abandon(self) -> None:
        if not self.appended:
            self.abandoned = True


class Kept:
    """A message that was handed over, with its octets."""

    def __init__(self, message: Message, body: bytes) -> None:
        self.message = message
        self.body = body

    @property
    def reverse_path(self) -> str:
        return f"<{self.message.envelope.reverse_path}>"

    @property
    def recipients(self) -> list[str]:
        return [f"<{recipient.address}>" for recipient in self.message.envelope.recipients]


class RecordingKeeper:
    """Keeps messages in a list. `result` is what it answers, `later` whether it waits for `release`."""

    def __init__(self) -> None:
        self.kept: list[Kept] = []
        self.drafts: list[RecordingDraft] = []
        self.result: Stored | Refused = STORED
        self.later = False
        self.full = False
        self.broken = False
        self.free = 1 << 40
        self.healthy = True
        self.waiting: list[tuple[Callable[[Stored | Refused], None], Stored | Refused]] = []
        self.defer: Callable[[Callable[[], None]], object] | None = None
        self._ids = Ids(0, 0, lambda: ARRIVED)

    def next_id(self) -> str:
        return self._ids.next()

    def room(self, size: int = 0) -> bool:
        return self.healthy and size <= self.free

    def draft(self, message_id: str, drained: Callable[[], None]) -> RecordingDraft:
        draft = RecordingDraft(self, message_id, drained)
        self.drafts.append(draft)
        return draft

    def append(self, message: Message, draft: Any, answer: Callable[[Stored | Refused], None]) -> None:
        assert isinstance(draft, RecordingDraft)
        assert not draft.abandoned
        assert not draft.appended
        assert message.id == draft.id
        assert message.size == draft.size
        draft.appended = True
        result = self.result
        if result is STORED:
            self.kept.append(Kept(message, bytes(draft.octets)))
        if self.later:
            self.waiting.append((answer, result))
        elif self.defer is not None:
            self.defer(lambda: answer(result))
        else:
            answer(result)

    def release(self) -> None:
        """Gives the answers that wait."""
        waiting, self.waiting = self.waiting, []
        for answer, result in waiting:
            answer(result)

    @property
    def leaked(self) -> list[RecordingDraft]:
        """Drafts that were neither handed over nor abandoned."""
        return [draft for draft in self.drafts if not draft.appended and not draft.abandoned]


class Bench:
    """A service and what is around it."""

    def __init__(self, service: Service, keeper: RecordingKeeper, log_fd: int) -> None:
        self.service = service
        self.keeper = keeper
        self._log_fd = log_fd

    @property
    def log(self) -> list[dict[str, Any]]:
        """The log so far."""
        self.service.log.flush()
        size = os.fstat(self._log_fd).st_size
        return [json.loads(line) for line in os.pread(self._log_fd, size, 0).decode().splitlines()]

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line["event"] == event]

    def counted(self, counter: Counter) -> int:
        return self.service.shared.total(counter)

    def check_bugs(self, number: int) -> None:
        assert len(bugs := self.logged("bug")) == number, bugs
        assert self.service.shared.open_sessions() == len(self.service.connections())

    def close(self) -> None:
        self.service.log.close()
        os.close(self._log_fd)

    def connect(self, peer: object = ("192.0.2.7", 25252)) -> Player:
        return Player(self, peer)

    def run(self, seconds: float = 0.0) -> None:
        """Lets tasks of the loop go on."""
        self.service.loop.run_until_complete(asyncio.sleep(seconds))


class Player:
    """A client on a FakeTransport."""

    def __init__(self, bench: Bench, peer: object) -> None:
        self.bench = bench
        self.transport = FakeTransport(peer)
        self.connection = Connection(bench.service)
        self.transport.protocol = self.connection
        self._taken = 0
        self.connection.connection_made(self.transport)
        self._go_round()

    def _go_round(self) -> None:
        """What the loop does at the end of a round."""
        self.bench.service.send()
        self.transport.settle()

    def send(self, octets: bytes) -> None:
        """Octets that arrive as one read; ignored once the server has closed, as by a kernel."""
        if octets and not self.transport.closed:
            self.connection.data_received(octets)
            self._go_round()

    def take_writes(self) -> list[bytes]:
        """The writes since the last call."""
        self._go_round()
        writes = self.transport.writes[self._taken :]
        self._taken = len(self.transport.writes)
        return writes

    def take(self) -> bytes:
        return b"".join(self.take_writes())

    def say(self, *lines: str) -> list[str]:
        """Sends lines as one read; the reply lines."""
        self.send("".join(f"{line}\r\n" for line in lines).encode())
        return self.take().decode().splitlines()

    def end(self) -> None:
        """The client sends its end."""
        if not self.transport.closed and not self.connection.eof_received():
            self.transport.close()
        self._go_round()

    def vanish(self) -> None:
        """The connection is lost."""
        if not self.transport.lost:
            self.transport.closed = self.transport.lost = True
            self.connection.connection_lost(ConnectionResetError())


def make_service(
    loop: asyncio.AbstractEventLoop,
    role: str = "mx",
    *,
    checks: Sequence[Check] = (),
    patience: float = 30.0,
    times: Times | None = None,
    context: ssl.SSLContext | None = None,
    postmaster: str = "",
    early_refused: bool = True,
    session_limit: int = 10_000,
    withheld: frozenset[str] = frozenset(),
    command_line: int = 2048,
    text_line: int = 1 << 20,
    header: int = 256 << 10,
    bare: Any = "reject",
    any_octets: bool = True,
    keeper: RecordingKeeper | None = None,
    trusts: Callable[[str], bool] | None = None,
    fetches: Callable[[str], bool] | None = None,
    next_hop: NextHop | None = None,
    users: Users | None = None,
    **terms: Any,
) -> Bench:
    """`terms` are further arguments of Terms; `checks` come before the one of recipients. `next_hop`: what the host
    behind hop.test takes. `trusts`: who may relay, `fetches`: for whom mail waits, by address. `users`: who can
    authenticate, by any mechanism."""
    log_fd = os.memfd_create("log")
    log = Log(log_fd, human=False, clock=time.time, threaded=False)
    keeper = keeper or RecordingKeeper()
    kept: Keeper = keeper
    rows = [*DOMAINS, Domain("hop.test", "boxes", hop=lambda: next_hop)]
    domains = Domains(rows, HOSTNAME, parse_address(postmaster) if postmaster else None)
    relays = trusts is not None or users is not None
    relay = [Relay(domains, lambda address: ("net", address))] if relays else []
    known = [users] if users is not None else []
    policy = Policy([*checks, *known, *relay, Recipients(domains)], log, patience)

    def room(size: int) -> Reply | None:
        if keeper.room(size):
            return None
        return R452_NO_ROOM if keeper.healthy else R421_NOT_TAKING_MAIL

    service = Service(
        "[192.0.2.1]:25",
        Terms(
            HOSTNAME,
            role,
            next_id=keeper.next_id,
            room=room,
            now=lambda: ARRIVED,
            asks=policy.stages,
            any_octets=any_octets,
            tls=terms.pop("tls", context is not None),
            mechanisms=terms.pop("mechanisms", MECHANISMS if users is not None else frozenset()),
            bare_data=bare != "reject",
            **terms,
        ),
        loop=loop,
        keeper=kept,
        policy=policy,
        log=log,
        shared=Shared(1, len(Counter)),
        times=times,
        context=context,
        early_refused=early_refused,
        session_limit=session_limit,
        withheld=(lambda _: withheld) if withheld else None,
        trusts=trusts,
        fetches=fetches,
        command_line=command_line,
        text_line=text_line,
        header=header,
        bare=bare,
    )
    return Bench(service, keeper, log_fd)


@contextmanager
def bench(role: str = "mx", bugs: int = 0, **options: Any) -> Iterator[Bench]:
    """A service on a loop of its own; at the end nothing else may have gone wrong in it."""
    loop = asyncio.new_event_loop()
    made = make_service(loop, role, **options)
    try:
        yield made
        made.check_bugs(bugs)
    finally:
        loop.close()
        made.close()
