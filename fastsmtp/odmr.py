"""A connection whose roles have turned: the client that came by ATRN is the server, and is sent the mail that waits.

In: a connection, the domains that are fetched over it, and who can be asked for their mail: all workers. Out: octets,
between that server and one worker at a time. Mail of a domain may lie in the spool of any worker; so the worker that
has the connection listens on a unix socket for each domain, and whoever has mail hands it over there by SMTP as to any
other host (delivery/odmr.py). It hears a greeting of ours; all else is the server's. Its QUIT says that it is done and
ends here; one that is gone without it leaves the server in the midst of something, and the connection is cut.
When no worker has mail left that is due, we say QUIT. A lock for each domain lets only one connection fetch it.
Whatever breaks, mail stays where it is until a 250 for it was made durable by the worker that has it.
Not here: who may fetch what (customers.py). RFC 2645 4, 5; RFC 5321 3.1.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

from . import local_socket
from . import log as logs
from .colleagues import Colleagues, UnreachableError
from .delivery.failures import PATIENCE, Stage
from .delivery.replies import Reply, ReplyParser

POLL_SECONDS = 0.2  # until we ask again whether mail is left
SHARE = 10  # ... and so many times as long as the answer took
IDLE_SECONDS = 60.0  # that mail is left and nobody brings it
LINGER = 5.0  # seconds that the server has to answer QUIT

QUIT = b"QUIT\r\n"


class TakenError(Exception):
    """The mail of a domain is being fetched over another connection."""


class Claim:
    """A domain that is fetched over one connection: its lock, and the socket at which its mail is taken."""

    def __init__(self, data_dir: Path, domain: str) -> None:
        """Raises TakenError, and OSError."""
        self._data_dir = data_dir
        self._name = local_socket.turned_name(domain)
        folder = local_socket.open_turned(data_dir)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock = os.open(f"{self._name}.lock", flags, 0o600, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.listening = local_socket.listen(data_dir, local_socket.TURNED, self._name)
        except BlockingIOError:
            os.close(self._lock)
            raise TakenError from None
        except OSError:
            os.close(self._lock)
            raise

    def close(self) -> None:
        self.listening.close()
        (self._data_dir / local_socket.TURNED / self._name).unlink(missing_ok=True)
        os.close(self._lock)


def claim_all(data_dir: Path, domains: Sequence[str]) -> list[Claim]:
    """All of them or none. Raises TakenError, and OSError."""
    with ExitStack() as opened:
        claims = [opened.enter_context(closing(Claim(data_dir, domain))) for domain in domains]
        opened.pop_all()
    return claims


class Turn(asyncio.Protocol):
    """What a connection becomes (job.Turned). `hostname` is ours; `ending`: whether the server is about to stop."""

    def __init__(
        self,
        claims: Sequence[Claim],
        domains: Sequence[str],
        colleagues: Colleagues,
        *,
        client: str,
        hostname: str,
        log: logs.Log,
        ending: Callable[[], bool],
    ) -> None:
        self._claims = claims
        self._domains = domains
        self._colleagues = colleagues
        self._client = client
        self._greeting = f"220 {hostname} turned\r\n".encode()
        self._log = log
        self._ending = ending
        self._server: asyncio.Transport | None = None
        self._lost: Callable[[Exception | None], None]
        self._work: asyncio.Task[None]
        self._asked: asyncio.Future[Reply] | None = None  # a reply to ourselves is awaited
        self._replies = ReplyParser()
        self._listeners: list[asyncio.AbstractServer] = []
        self._current: Bringer | None = None
        self._waiting: deque[Bringer] = deque()
        self._end = ""
        self._since = 0.0

    def begin(self, transport: asyncio.Transport, lost: Callable[[Exception | None], None]) -> None:
        self._server = transport
        self._lost = lost
        transport.set_protocol(self)
        loop = asyncio.get_running_loop()
        self._asked = loop.create_future()  # the greeting; it may be here before the task is
        self._since = time.monotonic()
        self._work = loop.create_task(self._serve())
        self._work.add_done_callback(self._finish)  # also where it is cancelled before it has begun

    def abandon(self) -> None:
        for claim in self._claims:
            claim.close()

    async def _serve(self) -> None:
        try:
            await self._converse()
        except TimeoutError:
            self._end = self._end or "timeout"
        except Exception as error:
            self._log.write(logs.BUG, "odmr", repr(error), logs.trace(error))
            self._end = "bug"

    async def _converse(self) -> None:
        loop = asyncio.get_running_loop()
        greeting = await self._reply(PATIENCE[Stage.GREETING])
        if greeting.code == 220:
            for claim in self._claims:
                listening = claim.listening.dup()
                self._listeners.append(await loop.create_unix_server(lambda: Bringer(self), sock=listening))
            await self._until_fetched()
        else:
            self._end = "refused"
        if self._server is not None and self._current is None:
            self._asked = loop.create_future()
            self._server.write(QUIT)
            await self._reply(LINGER)

    async def _reply(self, seconds: float) -> Reply:
        assert self._asked is not None
        async with asyncio.timeout(seconds):
            reply = await self._asked
        self._asked = None
        return reply

    async def _until_fetched(self) -> None:
        """Has all mail brought that waits."""
        try:
            await self._colleagues.retry(self._domains)
        except UnreachableError:
            pass  # the others bring theirs
        busy = time.monotonic()
        pause = POLL_SECONDS
        while True:
            await asyncio.sleep(pause)
            begun = time.monotonic()
            if self._is_busy():
                busy = begun
                continue
            if self._ending():
                self._end = "shutdown"
                return
            try:
                left = await self._colleagues.count(self._domains, "due")
            except UnreachableError:
                left = 1
            now = time.monotonic()
            pause = max(POLL_SECONDS, SHARE * (now - begun))
            if not left and not self._is_busy():
                return
            if now - busy > IDLE_SECONDS + pause and not self._is_busy():
                self._end = "mail left"
                return

    def _is_busy(self) -> bool:
        return self._current is not None or bool(self._waiting)

    # The server

    def data_received(self, data: bytes) -> None:
        if self._asked is not None:
            replies = self._replies.feed(data)
            if (
                self._replies.error
                or len(replies) > 1
                or (replies and self._replies.unread)
                or (replies and self._asked.done())
            ):
                self._cut("it says more than it was asked")
            elif replies:
                self._asked.set_result(replies[0])
        elif self._current is not None:
            self._current.write(data)
        else:
            self._cut("it speaks unasked")

    def pause_writing(self) -> None:
        if self._current is not None:
            self._current.pause()

    def resume_writing(self) -> None:
        if self._current is not None:
            self._current.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server = None
        self._work.cancel()
        self._lost(exc)

    def _cut(self, why: str) -> None:
        """Nobody knows what the server would take the next octets for."""
        self._end = self._end or why
        if self._server is not None:
            self._server.abort()

    def _finish(self, work: asyncio.Task[None]) -> None:
        for listener in self._listeners:
            listener.close()
        for claim in self._claims:
            claim.close()
        bringers = [*self._waiting, *([self._current] if self._current else [])]
        self._waiting.clear()
        self._current = None
        for bringer in bringers:
            bringer.abort()
        if self._server is not None:
            self._server.close()
        end = self._end or ("reset" if work.cancelled() else "done")
        self._log.write(logs.TURNED, self._client, tuple(self._domains), time.monotonic() - self._since, end)

    # Those who bring mail

    def arrived(self, bringer: Bringer) -> None:
        self._waiting.append(bringer)
        self._let_in()

    def brought(self, octets: bytes) -> None:
        if self._server is not None:
            self._server.write(octets)

    def hold_replies(self, held: bool) -> None:
        """The one who brings mail takes no replies, or does again."""
        server = self._server
        if server is not None and not server.is_closing():
            if held:
                server.pause_reading()
            else:
                server.resume_reading()

    def gone(self, bringer: Bringer, politely: bool) -> None:
        if bringer is not self._current:
            if bringer in self._waiting:
                self._waiting.remove(bringer)
            return
        self._current = None
        if not politely:
            self._cut("a delivery broke off")
        else:
            self._let_in()

    def _let_in(self) -> None:
        if self._current is None and self._waiting and self._server is not None:
            self._current = self._waiting.popleft()
            self._current.write(self._greeting)


class Bringer(asyncio.Protocol):
    """A worker with mail, this one included. Its QUIT is kept back."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._transport: asyncio.Transport
        self._kept = b""  # what may become QUIT
        self._fresh = True  # at the beginning of a line
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._turn.arrived(self)

    def data_received(self, data: bytes) -> None:
        octets = self._kept + data
        start = octets.rfind(b"\n", 0, -1) + 1  # of the last line
        last = octets[start:]
        if (start or self._fresh) and QUIT.startswith(last):
            self._kept = last
            octets = octets[:start]
        else:
            self._kept = b""
        if octets:
            self._fresh = octets.endswith(b"\n")
            self._turn.brought(octets)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._paused:
            self._turn.hold_replies(False)
        self._turn.gone(self, self._kept == QUIT)

    def pause_writing(self) -> None:
        self._paused = True
        self._turn.hold_replies(True)

    def resume_writing(self) -> None:
        self._paused = False
        self._turn.hold_replies(False)

    def write(self, octets: bytes) -> None:
        self._transport.write(octets)

    def pause(self) -> None:
        self._transport.pause_reading()

    def resume(self) -> None:
        self._transport.resume_reading()

    def abort(self) -> None:
        self._transport.abort()
