"""The words between connection, spool and queue.

A connection writes a body into a `Draft` and gives it to its `Keeper`; once kept, the message is a `Job` of the
queue's `Backlog`, and for each recipient the queue hands back a `Mark`: finished, or later. Both faces belong to
one object, a Spool or a MemorySpool. Only values and interfaces here; nothing decides, waits or does I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from .message import Message
from .verdict import Refused, Stored

if TYPE_CHECKING:
    import asyncio

# What a job takes in memory beside its body: message, envelope, one recipient (measured 1.8 KB).
JOB_OCTETS: Final = 2048
HELD = float("inf")  # due time of a recipient that is on hold: not before an operator releases it


class Draft(Protocol):
    """A body that is being received."""

    id: str
    size: int

    @property
    def head(self) -> bytes | bytearray:
        """The body's first octets: at least up to `header_done`, or 256 KB of them."""
        ...

    def write(self, chunk: bytes) -> bool:
        """Takes octets. False: read no more until `drained` was called."""
        ...

    def header_done(self) -> None:
        """The header has been written as a whole: what follows need not be in `head`."""
        ...

    def abandon(self) -> None:
        """The message will not come. Nothing happens when it was appended."""
        ...


class Job:
    """A kept message that is not finished.

    `pending` are the numbers of the unfinished recipients (their places in the envelope); the keeper takes them
    out as `finish` is told. `tried` has the mark of the last attempt, for recipients that have had one.
    `deliveries` are under way or wait for their transport; the queue counts them. `held` is what the keeper has
    counted for it, in octets.
    """

    __slots__ = ("checked", "deliveries", "held", "key", "message", "pending", "tried")

    def __init__(self, key: int, message: Message, pending: list[int], checked: bool) -> None:
        self.key = key
        self.message = message
        self.pending = pending
        self.checked = checked  # the body's file is known to be whole
        self.tried: dict[int, Mark] = {}
        self.deliveries = 0
        self.held = 0


class Mark:
    """What became of one recipient of a job: `due` None is finished, else when to try again (epoch seconds).

    `reported`: its sender was told of the delay.
    """

    __slots__ = ("attempts", "due", "key", "number", "reason", "reported")

    def __init__(
        self,
        key: int,
        number: int,
        due: float | None = None,
        attempts: int = 0,
        reason: str = "",
        reported: bool = False,
    ) -> None:
        self.key = key
        self.number = number
        self.due = due
        self.attempts = attempts
        self.reason = reason
        self.reported = reported


class Keeper(Protocol):
    """What a connection needs."""

    def next_id(self) -> str: ...
    def room(self, size: int = 0) -> bool: ...
    def draft(self, message_id: str, drained: Callable[[], None]) -> Draft: ...
    def append(self, message: Message, draft: Draft, answer: Callable[[Stored | Refused], None]) -> None: ...


class ReportKeeper(Protocol):
    """What reports need. `marks` of held jobs are made with the message that tells of them, or not at all."""

    def next_id(self) -> str: ...
    def draft(self, message_id: str, drained: Callable[[], None]) -> Draft: ...
    def append(
        self, message: Message, draft: Draft, answer: Callable[[Stored | Refused], None], marks: Sequence[Mark]
    ) -> None: ...


class Turned(Protocol):
    """What a connection becomes when the roles turn (RFC 2645): the client is the server then. One of the two methods
    is called, once."""

    def begin(self, transport: asyncio.Transport, lost: Callable[[Exception | None], None]) -> None:
        """Takes the connection, as its protocol; `lost` is called when it is no more."""
        ...

    def abandon(self) -> None:
        """There is no connection any more."""
        ...


class Backlog(Protocol):
    """What the queue needs."""

    on_stored: Callable[[list[Job]], None]

    @property
    def backlog(self) -> int: ...
    @property
    def healthy(self) -> bool: ...
    @property
    def over_budget(self) -> bool: ...
    def finish(self, marks: Sequence[Mark]) -> None: ...
    async def claim(self, now: float, n: int) -> list[Job]: ...
    def next_due(self) -> float | None: ...
    async def read(self, job: Job) -> bool: ...
    def drop(self, job: Job) -> None: ...
    def release(self, job: Job) -> None: ...
