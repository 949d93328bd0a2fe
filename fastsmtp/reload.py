"""A reload between the supervisor and its workers: what is sent, what is answered, and what it cannot change.

In: an old and a new configuration. Out: the one to serve by, with what only a restart can change as it was, and the
names of that. The supervisor sends each worker an `Order`, with the sockets that are new to it; the worker makes all
that it needs of it and says "ok", or why not; only when all have said "ok" they are told to adopt it. So one error
anywhere changes nothing anywhere. Messages are single packets: values stand in memory files whose descriptors go along,
so that none is too large and no send waits. Orders are pickled and go from parent to child only; what a worker says is
text. Not here: reading files, processes (supervisor.py), what a worker makes (generation.py). unix(7) SCM_RIGHTS.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from .config import FIXED, Config, Inet, Pipe, Unix
from .seat import Settings
from .tls import Pair

PACKET = 1 << 16  # octets of a message, without what stands in memory files
MOST_SOCKETS = 250  # descriptors that one message carries (SCM_MAX_FD is 253)
SHOWN = 100  # errors that are told
PATIENCE = 30.0  # seconds for an answer

# What the first octet says. From the supervisor:
PREPARE = b"P"  # an Order
ADOPT = b"C"
FORGET = b"A"
RENEW = b"T"  # certificates
RESULT = b"R"  # the numbers of those who asked, with commas between, and what became of their reload, as JSON
# From a worker:
ASKED = b"reload"  # the number of who asks, in this worker, and his uid
READY = b"ok"  # the order's number
UNABLE = b"no"  # the same, and why

Key = tuple[Inet | Unix, int]  # an address, and its number among the same ones (port 0 may stand twice)


class Order(NamedTuple):
    """`number` is in its answer, too: one that comes late is none to the next order. `bound`: the number and listener
    of each socket, `fresh` those numbers that come along, in this order; behind them the runner's socket, if `asks`."""

    number: int
    settings: Settings
    bound: tuple[tuple[int, int], ...]
    fresh: tuple[int, ...]
    asks: bool


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a reload. `errors`: it changed nothing, and why. `changed` are the tables and keys at the top of
    the file that differ; `restart` is what differs and needs a restart."""

    file: str
    errors: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()

    def render(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def keys_of(config: Config) -> dict[Key, int]:
    """Every address, and the listener that it belongs to."""
    found: dict[Key, int] = {}
    for number, listener in enumerate(config.listener):
        for endpoint in listener.address:
            same = sum(1 for one, _ in found if one == endpoint)
            found[endpoint, same] = number
    return found


# What only a restart changes: at the top, inside of tables, and of listeners, where it is about unix sockets.
AT_TOP = [fixed.key for fixed in FIXED if not fixed.section.place]
INSIDE = [(fixed.section.place[0], fixed.key) for fixed in FIXED if len(fixed.section.place) == 1]
OF_LISTENERS = [fixed.key for fixed in FIXED if fixed.section.place == ("listener", "#")]


def settle(old: Config, new: Config) -> tuple[Config, tuple[str, ...]]:
    """What can be served by now, and the names of what cannot be changed now."""
    restart = [name for name in AT_TOP if getattr(old, name) != getattr(new, name)]
    kept: dict[str, object] = {name: getattr(old, name) for name in restart}
    for table, key in INSIDE:
        before, after = getattr(old, table), getattr(new, table)
        if getattr(before, key) != getattr(after, key):
            restart.append(f"{table}.{key}")
            kept[table] = after.model_copy(update={key: getattr(before, key)})
    listeners = list(new.listener)
    before_by_key = keys_of(old)
    for at, number in keys_of(new).items():
        if at not in before_by_key or not isinstance(at[0], Unix):
            continue
        for key in OF_LISTENERS:
            value = getattr(old.listener[before_by_key[at]], key)
            if value != getattr(listeners[number], key):
                restart.append(f"listener[{number}].{key}")
                listeners[number] = listeners[number].model_copy(update={key: value})
                kept["listener"] = tuple(listeners)
    return new.model_copy(update=kept) if kept else new, tuple(restart)


def changes(old: Config, new: Config) -> tuple[str, ...]:
    """The names at the top of the file under which something differs."""
    return tuple(name for name in type(new).model_fields if getattr(old, name) != getattr(new, name))


def commands_of(config: Config) -> dict[str, Pipe]:
    """The transports that run commands, by name."""
    return {name: way for name, way in config.transport.items() if isinstance(way, Pipe)}


# The supervisor's end


def open_pair() -> tuple[socket.socket, socket.socket]:
    """The supervisor's end and the worker's. Messages keep their borders; no end ever waits."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    return pair[0], pair[1]


def send(end: socket.socket, kind: bytes, text: bytes = b"", value: object = None, more: Sequence[int] = ()) -> bool:
    """A message; `value` goes pickled, in a memory file. False: it was not taken, the worker is ending or stands
    still."""
    memory = -1
    try:
        if value is not None:
            memory = os.memfd_create("order", os.MFD_CLOEXEC)
            with os.fdopen(memory, "wb", closefd=False) as file:
                pickle.dump(value, file)
        socket.send_fds(end, [kind + text], [*([memory] if memory >= 0 else []), *more])
    except OSError:
        return False
    finally:
        if memory >= 0:
            os.close(memory)
    return True


def said(end: socket.socket) -> list[tuple[bytes, str]]:
    """What a worker has said since the last time: the word, and the text behind it."""
    found: list[tuple[bytes, str]] = []
    while True:
        try:
            octets = end.recv(PACKET)
        except (BlockingIOError, ConnectionError):
            return found
        if not octets:
            return found
        word, _, text = octets.partition(b" ")
        found.append((word, text.decode("utf-8", "replace")))


# The worker's end


class Obeys(Protocol):
    """What a worker does. `prepare` raises OSError or ValueError when it cannot, and has changed nothing then."""

    def prepare(self, order: Order, sockets: Sequence[socket.socket], asks: socket.socket | None) -> None: ...
    def adopt(self) -> None: ...
    def forget(self) -> None: ...
    def renew(self, pairs: tuple[Pair, ...]) -> None: ...


class Orders:
    """Hears the supervisor, on the loop."""

    def __init__(
        self, end: socket.socket, loop: asyncio.AbstractEventLoop, worker: Obeys, on_bug: Callable[[Exception], None]
    ) -> None:
        self._end = end
        self._loop = loop
        self._worker = worker
        self._on_bug = on_bug
        self._waiting: dict[int, asyncio.Future[dict[str, object]]] = {}
        self._number = 0  # of who asked last
        loop.add_reader(end.fileno(), self._hear)

    def close(self) -> None:
        self._loop.remove_reader(self._end.fileno())
        self._end.close()
        for one in self._waiting.values():
            one.cancel()

    async def reload(self, uid: int) -> dict[str, object]:
        """Has the supervisor read its configuration anew; what became of it. Raises OSError and TimeoutError."""
        answer: asyncio.Future[dict[str, object]] = self._loop.create_future()
        self._number += 1
        number = self._number
        self._waiting[number] = answer
        try:
            self._end.send(b"%s %d %d" % (ASKED, number, uid))
            async with asyncio.timeout(2 * PATIENCE):
                return await answer
        finally:
            self._waiting.pop(number, None)

    def _hear(self) -> None:
        try:
            octets, descriptors, _, _ = socket.recv_fds(self._end, PACKET, MOST_SOCKETS + 2)
        except BlockingIOError:
            return
        except ConnectionError:
            octets, descriptors = b"", []
        if not octets:  # the supervisor is gone: the pipe `alive` says so too
            self._loop.remove_reader(self._end.fileno())
            return
        try:
            self._obey(octets[:1], octets[1:], descriptors)
        except Exception as error:
            self._on_bug(error)

    def _obey(self, kind: bytes, text: bytes, descriptors: list[int]) -> None:
        if kind == PREPARE:
            self._end.send(self._prepare(_load(descriptors.pop(0)), [socket.socket(fileno=one) for one in descriptors]))
        elif kind == ADOPT:
            self._worker.adopt()
        elif kind == FORGET:
            self._worker.forget()
        elif kind == RENEW:
            pairs: tuple[Pair, ...] = _load(descriptors.pop(0))
            self._worker.renew(pairs)
        elif kind == RESULT:
            numbers, _, result = text.partition(b" ")
            for number in numbers.split(b","):
                one = self._waiting.pop(int(number), None)
                if one is not None and not one.done():
                    one.set_result(json.loads(result))

    def _prepare(self, order: Order, sockets: list[socket.socket]) -> bytes:
        for one in sockets:
            one.setblocking(False)
        asks = sockets.pop() if order.asks else None
        try:
            self._worker.prepare(order, sockets, asks)
        except Exception as error:
            for one in (*sockets, *([asks] if asks is not None else [])):
                one.close()
            if not isinstance(error, OSError | ValueError):
                self._on_bug(error)
            return b"%s %d %s" % (UNABLE, order.number, str(error).encode()[:1000])
        return b"%s %d" % (READY, order.number)


def _load(memory: int) -> Any:
    """What a memory file holds: the supervisor wrote it, which made this process."""
    with os.fdopen(memory, "rb") as file:
        file.seek(0)
        return pickle.load(file)
