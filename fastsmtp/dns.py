"""What DNS says: our own values, kept as long as they hold, each question in flight once.

In: names in lower-case A-labels (any case and a last dot are taken too) and addresses. Out: an `Answer`: records, or
"no such name", or "no such records", or that nobody could say, with the reason. What is kept costs a look into a
dict: no Task, no Future. Who asks while a question is in flight waits for the same answer; who stops waiting does not
stop the question. Kept as long as the TTL says, within bounds; what is not there as its SOA says (RFC 2308 5);
failures some seconds (RFC 9520 3.2). The longest unused goes first when room runs out.
Not here: sockets and octets (nameservers.py), what a mail server makes of it (delivery/hosts.py, policy).
Failure: an Answer; nothing is raised for what name servers do.
RFC 1035, RFC 2308, RFC 3596, RFC 6761 6.3 (localhost), RFC 9520.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import Enum, IntEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

IPAddress: TypeAlias = IPv4Address | IPv6Address
T = TypeVar("T")


class Kind(IntEnum):
    """The types of records that are asked for, by number (RFC 1035 3.2.2, RFC 3596 2.1). As keys ints are hashed in C,
    members of Enum in Python."""

    A = 1
    PTR = 12
    MX = 15
    TXT = 16
    AAAA = 28


class Status(Enum):
    """What came of a question."""

    RECORDS = "records"
    NO_NAME = "no such name"
    NO_RECORDS = "no such records"
    FAILED = "no answer"


class MX(NamedTuple):
    """An MX record. `host` is lower-case without its last dot; the root is ""."""

    preference: int
    host: str


class Answer(Generic[T]):
    """Immutable by convention. `records` is empty unless the status is RECORDS; `reason` says on one line why not.
    `ttl` is in seconds, as it came; `octets` is how long the message was, 0 for none."""

    __slots__ = ("octets", "reason", "records", "status", "ttl")

    def __init__(
        self, status: Status, records: tuple[T, ...] = (), ttl: int = 0, reason: str = "", octets: int = 0
    ) -> None:
        self.status = status
        self.records = records
        self.ttl = ttl
        self.reason = reason
        self.octets = octets

    def __repr__(self) -> str:
        return f"Answer({self.status.name}, {self.records!r}, ttl={self.ttl}, reason={self.reason!r})"


Ask: TypeAlias = Callable[[Kind, str], Awaitable[Answer[Any]]]

# How long an answer is kept at least and at most, in seconds. RFC 2308 5 finds one to three hours right for what is
# not there; a new MX record should not wait that long.
LIFETIMES: Mapping[Status, tuple[float, float]] = {
    Status.RECORDS: (5.0, 86_400.0),
    Status.NO_NAME: (5.0, 3_600.0),
    Status.NO_RECORDS: (5.0, 3_600.0),
    Status.FAILED: (10.0, 10.0),
}
PAGE = 512  # octets of a message that count as one entry, so that long answers do not take more memory than is meant

CLOSED: Answer[Any] = Answer(Status.FAILED, reason="the server is closing")
LOCALHOST: Mapping[Kind, Answer[Any]] = {
    Kind.AAAA: Answer(Status.RECORDS, (IPv6Address("::1"),)),
    Kind.A: Answer(Status.RECORDS, (IPv4Address("127.0.0.1"),)),
}


class Resolver:
    """Asks with `ask` (NameServers.ask, or a fake) what it does not know. `entries` bounds what is kept; an answer of
    more than 512 octets counts as several. `now` is in seconds and never jumps."""

    def __init__(self, ask: Ask, *, entries: int = 20_000, now: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._room = entries
        self._now = now
        self._kept: OrderedDict[tuple[Kind, str], tuple[float, Answer[Any]]] = OrderedDict()
        self._asking: dict[tuple[Kind, str], asyncio.Task[Answer[Any]]] = {}
        self._closed = False

    async def mx(self, name: str) -> Answer[MX]:
        """By preference, lowest first; at most nameservers.RECORDS of them."""
        return self.known(Kind.MX, name) or await self._wait(self._begin(Kind.MX, name))

    async def addresses(self, name: str) -> Answer[IPAddress]:
        """AAAA and A together, IPv6 first, mapped addresses unmapped. An error of one hides no record of the other."""
        six, four = self.known(Kind.AAAA, name), self.known(Kind.A, name)
        if six is None or four is None:
            return (await self.addresses_of((name,)))[0]
        return join(six, four)

    async def addresses_of(self, names: Sequence[str]) -> list[Answer[IPAddress]]:
        """The addresses of each, asked for at once."""
        pairs = [(self._begin(Kind.AAAA, name), self._begin(Kind.A, name)) for name in names]
        return [join(await self._wait(six), await self._wait(four)) for six, four in pairs]

    async def ptr(self, address: IPAddress) -> Answer[str]:
        """The names of an address, lower-case without last dot; not checked to resolve back."""
        name = address.reverse_pointer
        return self.known(Kind.PTR, name) or await self._wait(self._begin(Kind.PTR, name))

    async def txt(self, name: str) -> Answer[bytes]:
        """Each record's strings put together without a space (RFC 7208 3.3)."""
        return self.known(Kind.TXT, name) or await self._wait(self._begin(Kind.TXT, name))

    def known(self, kind: Kind, name: str) -> Answer[Any] | None:
        """The answer that is kept, None when it has to be asked for. `name` as it is kept: lower-case, no last dot."""
        key = (kind, name)
        found = self._kept.get(key)
        if found is None or found[0] <= self._now():
            return None
        self._kept.move_to_end(key)
        return found[1]

    def _begin(self, kind: Kind, name: str) -> Answer[Any] | asyncio.Task[Answer[Any]]:
        """The answer, or the task that brings it."""
        name = name.lower().removesuffix(".")
        answer = self.known(kind, name)
        if answer is not None:
            return answer
        if kind in LOCALHOST and (name == "localhost" or name.endswith(".localhost")):
            return LOCALHOST[kind]
        if self._closed:
            return CLOSED
        key = (kind, name)
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.create_task(self._look_up(key))
        return task

    @staticmethod
    async def _wait(answer: Answer[Any] | asyncio.Task[Answer[Any]]) -> Answer[Any]:
        # Shielded: others wait for the same task.
        return answer if isinstance(answer, Answer) else await asyncio.shield(answer)

    async def _look_up(self, key: tuple[Kind, str]) -> Answer[Any]:
        try:
            answer = await self._ask(*key)
        except asyncio.CancelledError:
            # Only close() cancels; those who wait shall hear an answer, not be cancelled themselves.
            return CLOSED
        finally:
            del self._asking[key]
        self._keep(key, answer)
        return answer

    def _keep(self, key: tuple[Kind, str], answer: Answer[Any]) -> None:
        least, most = LIFETIMES[answer.status]
        old = self._kept.pop(key, None)
        if old is not None:
            self._room += _entries(old[1])
        self._kept[key] = (self._now() + min(max(answer.ttl, least), most), answer)
        self._room -= _entries(answer)
        while self._room < 0:
            self._room += _entries(self._kept.popitem(last=False)[1][1])

    async def close(self) -> None:
        """Ends the questions in flight; who waits hears a failure."""
        self._closed = True
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def join(six: Answer[IPAddress], four: Answer[IPAddress]) -> Answer[IPAddress]:
    """One answer of two questions about one name. Where one has records they count, whatever the other says: name
    servers that fail for AAAA, or deny the whole name then, are common. Else a failure counts before an absence."""
    if six.records and four.records:
        return Answer(Status.RECORDS, six.records + four.records, min(six.ttl, four.ttl))
    if six.records or four.records:
        return six if six.records else four
    for status in (Status.FAILED, Status.NO_RECORDS):
        for each in (four, six):
            if each.status is status:
                return each
    return four


def _entries(answer: Answer[Any]) -> int:
    return 1 + answer.octets // PAGE
