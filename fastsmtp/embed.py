"""The public API: an SMTP server in your own asyncio program, with a Python function as its destination.

In: a function, and where to listen. Out: a `Server` that runs until it is stopped. The function gets a `Mail` for each
message; when it returns, the client hears 250, so the message must be safe by then; when it raises `RefuseError`,
the client hears that; any other exception is logged and answered 451. A function that is a coroutine function delays
only the session whose message it has. Nothing is written to disk here. Runs on uvloop and on asyncio's own loop.
Not here: spool, Maildirs and processes (`fastsmtp serve` has those).
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from inspect import isawaitable
from types import TracebackType
from typing import Literal, TypeAlias

from . import log as logs
from ._shared import Shared
from .connection import Connection
from .domains import Domain, Domains
from .job import Draft
from .memory_spool import MemoryDraft, MemorySpool
from .message import Message, shows_tls
from .metrics import Counter
from .policy import Policy
from .policy.recipients import KNOWN_MAILBOX, UNKNOWN_MAILBOX, Recipients
from .reply import R451_LOCAL_ERROR, R452_NO_ROOM, Reply
from .seat import BACKLOG
from .service import Service
from .terms import Terms
from .verdict import STORED, Ask, Refused, Stage, Stored, Verdict


@dataclass(frozen=True, slots=True)
class Mail:
    """A message and its envelope. `sender` is empty for the null reverse-path; `data` begins with our Received field,
    then come the sender's octets, with CRLF line ends. `client` is an IP address, "" for a unix socket; `tls` says
    whether it came over TLS."""

    id: str
    sender: str
    recipients: tuple[str, ...]
    data: bytes
    client: str
    helo: str
    tls: bool


class RefuseError(Exception):
    """Raised by a destination: the client hears `code` (400 to 599), `enhanced` (RFC 3463) and `text` (ASCII)."""

    def __init__(self, code: int, enhanced: str, text: str) -> None:
        super().__init__(text)
        if not 400 <= code <= 599:
            raise ValueError("a refusal has a code from 400 to 599")
        self.reply = Reply(code, enhanced, text)


Destination: TypeAlias = Callable[[Mail], Awaitable[None] | None]


class Server:
    """A running server. `addresses` are those bound, as `host:port` or `unix:/path`; also an async context manager."""

    def __init__(self, service: Service, listening: asyncio.Server, log: logs.Log) -> None:
        self._service = service
        self._listening = listening
        self._log = log
        self.addresses = [_show(one.getsockname()) for one in listening.sockets]
        self._timer = service.loop.call_later(1.0, self._tick)

    def _tick(self) -> None:
        self._timer = self._service.loop.call_later(1.0, self._tick)
        self._service.tick()
        self._log.flush()

    async def stop(self, patience: float = 30.0) -> None:
        """Accepts nothing more, tells idle sessions 421, waits up to `patience` seconds for messages under way."""
        self._listening.close()
        self._service.drain()
        deadline = time.monotonic() + patience
        while self._service.connections() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for connection in self._service.connections():
            connection.abort("shutdown")
        self._timer.cancel()
        self._log.close()

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


async def start(
    destination: Destination,
    address: str = "127.0.0.1:2525",
    *,
    hostname: str = "",
    recipients: Callable[[str], bool] | None = None,
    role: Literal["mx", "lmtp"] = "mx",
    tls: ssl.SSLContext | None = None,
    message_size: int = 50 << 20,
    memory: int = 256 << 20,
    bare: Literal["reject", "normalize", "keep"] = "reject",
) -> Server:
    """Starts a server on `address` (`host:port`, `[IPv6]:port` or `unix:/path`; port 0 is any free one).

    `hostname` is our name in greeting and Received; by default the machine's. `recipients` says, for an address,
    whether it is taken; by default all are. `tls` is offered as STARTTLS. `message_size` and `memory` are in octets:
    the largest message, and all that are held at once. `bare`: what is done about a CR or LF that is no part of CRLF.
    Raises OSError when the address cannot be bound, ValueError when it is none.
    """
    loop = asyncio.get_running_loop()
    log = logs.Log(sys.stderr.fileno(), os.isatty(sys.stderr.fileno()), time.time)
    name = hostname or socket.getfqdn()
    keeper = _Caller(destination, loop, log, memory)
    check = Recipients(Domains([Domain("*", "")], name)) if recipients is None else _Chosen(recipients)
    policy = Policy([check], log)
    terms = Terms(
        name,
        role,
        next_id=keeper.next_id,
        room=lambda size: None if keeper.room(size) else R452_NO_ROOM,
        now=time.time,
        asks=policy.stages,
        any_octets=True,
        tls=tls is not None,
        bare_data=bare != "reject",
        message_size=message_size,
    )
    service = Service(
        address,
        terms,
        loop=loop,
        keeper=keeper,
        policy=policy,
        log=log,
        shared=Shared(1, len(Counter)),
        context=tls,
        early_refused=role == "mx",
        bare=bare,
    )
    keeper.service = service

    def accept() -> Connection:
        return Connection(service)

    if address.startswith("unix:"):
        listening = await loop.create_unix_server(accept, address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"{address!r} is no address: host:port, [IPv6]:port or unix:/path")
        listening = await loop.create_server(accept, host.strip("[]"), int(port), backlog=BACKLOG)
    return Server(service, listening, log)


class _Chosen:
    """The check at RCPT: the embedder's word on who is a recipient."""

    stage = Stage.RCPT

    def __init__(self, known: Callable[[str], bool]) -> None:
        self._known = known

    def __call__(self, ask: Ask) -> Verdict:
        return KNOWN_MAILBOX if self._known(str(ask.recipient)) else UNKNOWN_MAILBOX


class _Caller:
    """A Keeper for which a message is kept when the destination has returned."""

    service: Service

    def __init__(self, destination: Destination, loop: asyncio.AbstractEventLoop, log: logs.Log, memory: int) -> None:
        self._memory = MemorySpool(0, loop=loop, memory=memory)
        self.next_id = self._memory.next_id
        self.room = self._memory.room
        self.draft = self._memory.draft
        self._destination = destination
        self._log = log

    def append(self, message: Message, draft: Draft, answer: Callable[[Stored | Refused], None]) -> None:
        assert isinstance(draft, MemoryDraft)
        parts = draft.take()
        if parts is None:
            answer(Refused("memory-full", R452_NO_ROOM))
            return
        self.service.run(self._call(message, parts, draft.size, answer))

    async def _call(
        self, message: Message, parts: list[bytes], size: int, answer: Callable[[Stored | Refused], None]
    ) -> None:
        envelope = message.envelope
        mail = Mail(
            message.id,
            str(envelope.reverse_path),
            tuple([str(recipient.address) for recipient in envelope.recipients]),
            b"".join([message.prefix, *parts]),
            envelope.client,
            envelope.helo,
            shows_tls(message.prefix),
        )
        outcome: Stored | Refused = STORED
        try:
            pending = self._destination(mail)
            if isawaitable(pending):
                await pending
        except RefuseError as refusal:
            outcome = Refused("destination", refusal.reply)
        except Exception as error:
            self._log.write(logs.BUG, "destination", repr(error), logs.trace(error))
            outcome = Refused("destination-failed", R451_LOCAL_ERROR)
        finally:
            self._memory.used -= size
        answer(outcome)


def _show(name: object) -> str:
    """A bound address as it is written in `start`."""
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    return f"unix:{name}"
