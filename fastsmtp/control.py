"""A worker's control socket: what an operator's command asks of a running server, and where local programs submit.

A request is a line of JSON; its answer is lines of JSON, any number of `item` and `progress`, then one `done` or
`error`. A `Desk` answers them; on a stopped server the command line asks one without a socket. Who may connect is the
file system's to say. Whoever goes away in the midst of an order ends it there; what was done stays done.
Local programs send their mail through a second socket, which speaks SMTP: the worker makes a Service of it.
Not here: the sockets' places (local_socket.py), how a spool does what is asked (administration.py), the other end
(console.py).
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeAlias

from . import local_socket
from . import log as logs
from .administration import Administration, Changed
from .connection import peer_uid
from .reader import STATES
from .selection import Selection, parse_selection
from .store import SpoolError

REQUEST_LIMIT = 4 << 20  # octets of a request: some ten thousand ids

Lines: TypeAlias = AsyncGenerator[dict[str, Any], None]
Place: TypeAlias = tuple[Administration, Callable[[Selection], object]]


class RequestError(Exception):
    """The request cannot be understood, or cannot be done now; one line says why."""


class Desk:
    """Answers what is asked about the spools of one worker.

    `places`: for each spool its administration, and who is told that mail in it is to be tried now: the queue, which
    forgets what it knows of dead hosts. `workers` is how many there are in all. `reload` has the configuration read
    anew, for a user id; `counters` are those of the whole server (metrics.py).
    """

    def __init__(
        self,
        places: Sequence[Place],
        workers: int,
        now: Callable[[], float],
        log: logs.Log,
        reload: Callable[[int], Awaitable[dict[str, Any]]] | None = None,
        counters: Callable[[], list[dict[str, Any]]] | None = None,
    ) -> None:
        self._places = places
        self._workers = workers
        self._now = now
        self._log = log
        self._reloads = reload
        self._counts = counters

    async def answer(self, request: Mapping[str, Any], uid: int) -> Lines:
        """The lines that answer a request; the last is `done` or `error`."""
        try:
            handler = HANDLERS.get(str(request.get("do")))
            if handler is None:
                raise RequestError(f"nothing is known here of {request.get('do')!r}")
            if not self._places and handler not in (Desk._hello, Desk._reload, Desk._counters):
                raise RequestError('mail is kept in memory only (spool.durability = "none"), out of reach')
            async for line in handler(self, request, uid):
                yield line
        except (RequestError, SpoolError, ValueError) as error:
            yield {"error": str(error)}

    async def _hello(self, request: Mapping[str, Any], uid: int) -> Lines:
        yield {"done": {"workers": self._workers}}

    async def _reload(self, request: Mapping[str, Any], uid: int) -> Lines:
        """The configuration of the whole server; asked of any one worker."""
        if self._reloads is None:
            raise RequestError("no server runs here")
        try:
            yield {"done": await self._reloads(uid)}
        except TimeoutError:
            raise RequestError("the supervisor does not answer") from None
        except OSError as error:
            raise RequestError(error.strerror or str(error)) from None

    async def _counters(self, request: Mapping[str, Any], uid: int) -> Lines:
        """What the whole server has counted; asked of any one worker."""
        if self._counts is None:
            raise RequestError("no server runs here")
        yield {"done": {"counters": self._counts()}}

    async def _order(self, request: Mapping[str, Any], uid: int) -> Lines:
        """Retry, hold, release and delete, spool by spool."""
        selection = parse_selection(request)
        order = str(request["do"])
        unknown = selection.ids
        total = Changed()
        try:
            for administration, wake in self._places:
                chosen, before = selection, total
                if selection.ids:
                    still_unknown = await administration.unknown(unknown)
                    chosen = Selection(tuple(one for one in unknown if one not in still_unknown))
                    unknown = tuple(still_unknown)
                    if not chosen.ids:
                        continue
                async for done in self._run(order, administration, wake, chosen):
                    total = _sum(before, done)
                    yield {"progress": total._asdict()}
        finally:  # also where the client has gone away
            if any(total):
                what = selection.ids or selection.domain or "everything"
                self._log.write(logs.OPERATED, uid, order, what, *total)
        yield {"done": {**total._asdict(), "unknown": list(unknown)}}

    def _run(
        self, order: str, administration: Administration, wake: Callable[[Selection], object], selection: Selection
    ) -> AsyncIterator[Changed]:
        if order == "hold":
            return administration.hold(selection)
        if order == "delete":
            return administration.delete(selection)
        wake(selection)
        run = administration.release if order == "release" else administration.retry
        return run(selection, self._now())

    async def _count(self, request: Mapping[str, Any], uid: int) -> Lines:
        selection = parse_selection(request)
        state = request.get("state") or ""
        if state not in STATES:
            raise RequestError("state is not what it can be")
        total = Changed()
        for administration, _ in self._places:
            total = _sum(total, await administration.count(selection, state))
        yield {"done": {**total._asdict(), "unknown": await self._unknown(selection)}}

    async def _list(self, request: Mapping[str, Any], uid: int) -> Lines:
        domain, state, limit = request.get("domain") or "", request.get("state") or "", request.get("limit") or 0
        if not isinstance(domain, str) or state not in STATES or not isinstance(limit, int):
            raise RequestError("domain, state or limit is not what it can be")
        # Oldest first over all spools: as many of one as may be wanted, merged with those of the others.
        sources = [administration.messages(domain, state) for administration, _ in self._places]
        heads = [(item, source) for source in sources if (item := await anext(source, None)) is not None]
        left = limit or -1
        while left and heads:
            item, source = oldest = min(heads, key=lambda head: float(head[0]["arrived"]))
            heads.remove(oldest)
            yield {"item": item}
            left -= 1
            if (following := await anext(source, None)) is not None:
                heads.append((following, source))
        yield {"done": {}}

    async def _show(self, request: Mapping[str, Any], uid: int) -> Lines:
        selection = parse_selection(request)
        for message_id in selection.ids:
            for administration, _ in self._places:
                shown = await administration.show(message_id)
                if shown is not None:
                    if request.get("headers"):
                        shown["headers"] = (await administration.head(message_id)).decode("utf-8", "surrogateescape")
                    yield {"item": shown}
        yield {"done": {"unknown": await self._unknown(selection)}}

    async def _summary(self, request: Mapping[str, Any], uid: int) -> Lines:
        for administration, _ in self._places:
            yield {"item": (await administration.summary(self._now())).render()}
        yield {"done": {}}

    async def _unknown(self, selection: Selection) -> list[str]:
        unknown = selection.ids
        for administration, _ in self._places:
            unknown = tuple(await administration.unknown(unknown))
        return list(unknown)


HANDLERS: Mapping[str, Callable[[Desk, Mapping[str, Any], int], Lines]] = {
    "hello": Desk._hello,
    "list": Desk._list,
    "show": Desk._show,
    "summary": Desk._summary,
    "count": Desk._count,
    "reload": Desk._reload,
    "counters": Desk._counters,
    "retry": Desk._order,
    "hold": Desk._order,
    "release": Desk._order,
    "delete": Desk._order,
}


def _sum(one: Changed, other: Changed) -> Changed:
    return Changed(*(a + b for a, b in zip(one, other, strict=True)))


class Control:
    """The sockets of worker `worker`. `open` and `close` are called once each, on the loop."""

    def __init__(self, data_dir: Path, worker: int, workers: int, desk: Desk, log: logs.Log) -> None:
        self._data_dir = data_dir
        self._worker = worker
        self._workers = workers
        self._desk = desk
        self._log = log
        self._server: asyncio.AbstractServer | None = None
        self._clients: set[asyncio.Task[None]] = set()

    def submission(self) -> socket.socket:
        """A socket that listens for local programs that send mail. Raises OSError."""
        return local_socket.listen(self._data_dir, local_socket.SUBMIT, self._worker)

    async def open(self) -> None:
        """Listens for commands. Raises OSError."""
        for kind in local_socket.MODES:  # of workers beyond today's number, each has one that removes it
            for other in local_socket.workers(self._data_dir, kind):
                if other >= self._workers and other % self._workers == self._worker:
                    local_socket.remove(self._data_dir, other)
        listening = local_socket.listen(self._data_dir, local_socket.CONTROL, self._worker)
        self._server = await asyncio.start_unix_server(self._serve, sock=listening, limit=REQUEST_LIMIT)

    async def close(self) -> None:
        """What is under way ends where it is: every piece of it that was answered is done."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        local_socket.remove(self._data_dir, self._worker)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            await self._converse(reader, writer)
        except (OSError, ValueError):
            pass  # it went away, or its line has no end
        except Exception as error:
            self._log.write(logs.BUG, "control", repr(error), logs.trace(error))
        finally:
            self._clients.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = peer_uid(writer.get_extra_info("socket"))
        while line := await reader.readline():
            try:
                request = json.loads(line)
            except (ValueError, RecursionError):
                request = None
            if not isinstance(request, dict):
                writer.write(b'{"error": "a JSON object in one line was expected"}\n')
                continue
            # Closed when the client goes away: what it ordered goes no further then.
            async with aclosing(self._desk.answer(request, uid)) as answers:
                async for answer in answers:
                    writer.write(json.dumps(answer).encode() + b"\n")
                    await writer.drain()
