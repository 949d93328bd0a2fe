"""What the tests of the spool share: messages to keep, a spool with its log, and a SQLite that fails when told to."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import apsw
import uvloop

from fastsmtp.address import NULL, Address
from fastsmtp.job import Draft, Job, Keeper, Mark
from fastsmtp.log import Log
from fastsmtp.message import Content, Envelope, Message, Recipient
from fastsmtp.spool import Spool
from fastsmtp.verdict import Refused, Stored

PREFIX = b"Received: from a.test ([192.0.2.1]) by mx.test with ESMTP id x; Mon, 1 Jan 2024 00:00:00 +0000\r\n"
INLINE = 64 << 10


TESTS = Path(__file__).parent
CHILD_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS.parent)}


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return uvloop.run(main)


def octets(size: int, seed: int = 1) -> bytes:
    """Octets that differ from place to place."""
    line = b"%08d 0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\xe9\r\n"
    return b"".join(line % (seed * 1_000_003 + n) for n in range(size // 72 + 1))[:size]


def envelope_of(message_id: str, recipients: int = 1) -> Envelope:
    envelope = Envelope(Address("ann", "example.org"))
    envelope.id = message_id
    envelope.recipients = [Recipient(Address(f"bob{n}", "example.net")) for n in range(recipients)]
    return envelope


def letter(
    keeper: Keeper,
    body: bytes = b"Subject: x\r\n\r\nx\r\n",
    recipients: int = 1,
    drained: Callable[[], None] = lambda: None,
) -> tuple[Message, Draft]:
    """A message with its whole body in a draft."""
    message_id = keeper.next_id()
    draft = keeper.draft(message_id, drained)
    if body:
        draft.write(body)
    envelope = envelope_of(message_id, recipients)
    return Message(envelope, PREFIX, None, len(body), min(len(body), 14), Content.NONE, time.time()), draft


class Answers:
    """Takes the answers to `append` and waits for them."""

    def __init__(self) -> None:
        self.all: list[Stored | Refused] = []
        self._changed = asyncio.Event()

    def __call__(self, answer: Stored | Refused) -> None:
        self.all.append(answer)
        self._changed.set()

    async def wait(self, n: int) -> list[Stored | Refused]:
        async with asyncio.timeout(30):
            while len(self.all) < n:
                self._changed.clear()
                await self._changed.wait()
        return self.all


async def keep(keeper: Keeper, body: bytes = b"Subject: x\r\n\r\nx\r\n", recipients: int = 1) -> Message:
    """Keeps one message; fails unless it was stored."""
    answers = Answers()
    message, draft = letter(keeper, body, recipients)
    keeper.append(message, draft, answers)
    (answer,) = await answers.wait(1)
    assert isinstance(answer, Stored), answer.reason
    return message


async def settle(spool: Spool) -> None:
    """Waits until nothing is left to commit."""
    before = None
    while before != spool.commits or spool._commit._busy:
        before = spool.commits
        await asyncio.sleep(0.02)


def finished(job: Job) -> list[Mark]:
    return [Mark(job.key, number) for number in job.pending]


class Yard:
    """A place for a spool, with its log."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.directory = path / "spool"
        self.options = {"inline": INLINE, "min_free": 0, "memory": 64 << 20, **options}
        self._fd = os.open(path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.log = Log(self._fd, False, time.time, threaded=False)

    def spool(self, worker: int = 0, **options: Any) -> Spool:
        loop = asyncio.get_running_loop()
        return Spool(self.directory, worker, loop=loop, log=self.log, **{**self.options, **options})

    @asynccontextmanager
    async def opened(self, worker: int = 0, **options: Any) -> AsyncIterator[Spool]:
        spool = self.spool(worker, **options)
        spool.open()
        try:
            yield spool
        finally:
            await spool.close()

    def lines(self, event: str = "") -> list[dict[str, Any]]:
        """What was logged."""
        self.log.flush()
        found = [json.loads(line) for line in (self.path / "log").read_text().splitlines()]
        return [line for line in found if event in ("", line["event"])]

    @contextmanager
    def database(self) -> Iterator[apsw.Connection]:
        """The database of a closed spool."""
        db = apsw.Connection(str(self.directory / "spool.db"))
        try:
            yield db
        finally:
            db.close()


class _File(apsw.VFSFile):
    def __init__(self, faults: Faults, name: Any, flags: list[int]) -> None:
        self.faults = faults
        self.name = os.path.basename(name if isinstance(name, str) else name.filename()) if name else ""
        super().__init__("unix", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        self.faults.strike("write", self.name)
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        self.faults.strike("sync", self.name)
        super().xSync(flags)
        self.faults.calls.append(("synced", self.name))


class Faults(apsw.VFS):
    """SQLite's way to the files while `injected`: `rule` may raise for a call ("write" or "sync") on a file."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.rule: Callable[[str, str], None] = lambda call, name: None
        super().__init__("faults", "unix", makedefault=True)

    def xOpen(self, name: Any, flags: list[int]) -> _File:
        return _File(self, name, flags)

    def strike(self, call: str, name: str) -> None:
        self.calls.append((call, name))
        self.rule(call, name)

    def fail(self, error: type[Exception], call: str, name: str = "spool.db-wal", times: int = 1 << 30) -> None:
        """Lets the next `times` such calls fail."""
        left = times

        def rule(called: str, on: str) -> None:
            nonlocal left
            if (called, on) == (call, name) and left:
                left -= 1
                raise error("injected")

        self.rule = rule

    def heal(self) -> None:
        self.rule = lambda call, name: None


@contextmanager
def injected() -> Iterator[Faults]:
    faults = Faults()
    try:
        yield faults
    finally:
        faults.unregister()


def null_envelope(message_id: str) -> Envelope:
    envelope = Envelope(NULL)
    envelope.id = message_id
    envelope.recipients = [Recipient(Address("bob", "example.net"))]
    return envelope
